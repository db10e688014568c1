"""The L2 norm, and division by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import Function, differentiable
from .._op import Op, Sample, autocast, check_tensor, compiled, dimension, fall_back, overridable, real, wide

l2_norm_fwd = compiled("l2_norm_fwd")
l2_norm_bwd = compiled("l2_norm_bwd")


def norm_reference(x: Tensor, dim: int) -> Tensor:
    n = torch.linalg.vector_norm(wide(x), 2, dim)
    return n.to(x.dtype) if x.is_floating_point() else n


def normalize_reference(x: Tensor, dim: int, eps: float) -> Tensor:
    return (wide(x) / torch.linalg.vector_norm(wide(x), 2, dim, keepdim=True).clamp_min(eps)).to(x.dtype)


@torch.library.register_fake("fusegrad::l2_norm_fwd")
def _(x, dim, eps, divide):
    return _empty_along(x, dim) if divide else x.new_empty([n for d, n in enumerate(x.shape) if d != dim])


@torch.library.register_fake("fusegrad::l2_norm_bwd")
def _(dy, x, dim, eps, divide):
    return _empty_along(x, dim)


def _empty_along(x, dim):
    """Of x's shape, with what lies along dim next to each other in memory."""
    if x.dim() == 0:
        return x.new_empty(())
    return x.new_empty([*x.shape[:dim], *x.shape[dim + 1 :], x.shape[dim]]).movedim(-1, dim)


class NormFn(Function):
    op = "norm"
    reference = staticmethod(norm_reference)
    params, dim = (), -1

    @staticmethod
    def forward(x, dim):
        return l2_norm_fwd(x, dim, 0.0, False)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dn):
        return None if dn is None else l2_norm_bwd(dn, *ctx.saved_tensors, *ctx.options, 0.0, False), None


class NormalizeFn(Function):
    op = "normalize"
    reference = staticmethod(normalize_reference)
    params, dim = (), -2

    @staticmethod
    def forward(x, dim, eps):
        return l2_norm_fwd(x, dim, eps, True)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        return None if dy is None else l2_norm_bwd(dy, *ctx.saved_tensors, *ctx.options, True), None, None


def _along(op: str, input: Tensor, dim: int) -> tuple[Tensor, int]:
    """The input in the dtype that torch computes in, and the number of the dimension."""
    check_tensor(op, "input", input)
    dim = dimension(op, input, dim)
    if input.is_cuda and autocast(input) and input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()
    return input, dim


@overridable
def norm(input: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    r"""The L2 norm along a dimension:

    .. math:: n = \sqrt{\sum_c x_c^2}

    Like `torch.linalg.vector_norm(input, 2, dim, keepdim)`. Squares that overflow or vanish do no harm: the norm is right
    wherever it can be represented itself.

    Args:
        input: `[*, n, *]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for float64).
        dim: the dimension to sum over.
        keepdim: keep it, with size 1.

    Returns:
        `[*, *]`, or `[*, 1, *]`, the dtype of `input` (float32 under CUDA autocast, as torch). The gradient at a norm of 0 is 0.
        Saved for backward: the input.

    Raises:
        TypeError: an input that is no tensor, a `dim` that is no int. IndexError: `dim` out of range. RuntimeError: a tensor that
        is not dense.

    Equivalent eager code::

        y = input.float().square().sum(dim, keepdim).sqrt().to(input.dtype)

    Source: Blue, A Portable Fortran Program to Find the Euclidean Norm of a Vector, ACM TOMS 4, 1978.
    """
    x, at = _along("norm", input, dim)
    n = NormFn.call((x,), at)
    return n.unsqueeze(at) if keepdim and x.dim() else n


@overridable
def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    r"""Divides by the norm along a dimension:

    .. math:: y = x / \max(\lVert x \rVert_p, \mathrm{eps})

    Drop-in for `torch.nn.functional.normalize`. Squares that overflow do no harm.

    Args:
        input: `[*, n, *]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for float64).
        p: the exponent of the norm. 2 is fused, torch's function does others.
        dim: the dimension to sum over, or, by torch's function, several.
        eps: the least that is divided by.
        out: gets the result, which then has no gradient; as in torch it may have another dtype that the result fits into.

    Returns:
        The shape and dtype of `input` (float32 under CUDA autocast, as torch), the elements along `dim` next to each other in memory.
        Where the norm is less than `eps` the gradient is that of x / eps. Saved for backward: the input.

    Raises:
        TypeError: an input that is no tensor, a `dim` that is no int. IndexError: `dim` out of range. RuntimeError: a tensor that
        is not dense, `out` where a gradient is asked for.

    Equivalent eager code::

        x = input.float()
        y = (x / x.square().sum(dim, keepdim=True).sqrt().clamp_min(eps)).to(input.dtype)

    Source: Blue, A Portable Fortran Program to Find the Euclidean Norm of a Vector, ACM TOMS 4, 1978.
    """
    check_tensor("normalize", "input", input)
    if p != 2 or dim is None or isinstance(dim, (tuple, list)):
        fall_back("normalize", f"there is no kernel for p = {p}" if p != 2 else "there is no kernel for several dimensions", input)
        return F.normalize(input, p, dim, eps, out)
    x, at = _along("normalize", input, dim)
    y = NormalizeFn.call((x,), at, real("normalize", "eps", eps))
    if out is None:
        return y
    if torch.is_grad_enabled() and (y.requires_grad or out.requires_grad):
        raise RuntimeError("normalize: out must be None where a gradient is asked for, got a tensor")
    return torch.mul(y, 1, out=out)


_LAYOUTS = ("row_strided", "column_strided", "transposed", "expanded", "offset", "packed_heads")


def _inputs(make):
    """(name, input, dim)"""
    yield "plain", make(5, 33), 1
    yield "first_dim", make(9, 35), 0
    yield "middle_dim", make(3, 20, 4), 1
    yield "last_of_three", make(3, 4, 64), -1
    yield "channels", make(2, 5, 3, 4), 1
    yield "channels_last", make(2, 5, 3, 4, layout="channels_last"), 1
    yield "one_column", make(7, 1), 1
    yield "one_row", make(129), 0
    for layout in _LAYOUTS:
        yield layout, make(6, 4, 42, layout=layout), 2
    yield "no_rows", make(0, 16), 1
    yield "wide", make(2, 1500), 1


def _norm_samples(make):
    for name, x, dim in _inputs(make):
        extra = {"keepdim": True} if name in ("middle_dim", "row_strided", "transposed") else {}
        yield Sample(name, dict(input=x, dim=dim) | extra)


def _normalize_samples(make):
    extra = {
        "first_dim": dict(eps=1e-3),
        "one_column": dict(p=2, eps=100.0),
        "one_row": dict(p=2.0, out=None),
        "offset": dict(eps=6.5, out=None),  # some norms are less
    }
    for name, x, dim in _inputs(make):
        yield Sample(name, dict(input=x, dim=dim) | extra.get(name, {}))


NORM = Op(
    name="norm",
    fn=NormFn,
    functional=norm,
    reference=norm_reference,
    samples=_norm_samples,
    torch=lambda input, dim=-1, keepdim=False: torch.linalg.vector_norm(input, 2, dim, keepdim),
    permutes=lambda kwargs: {"input": kwargs["dim"]},
    saved_bytes=lambda kwargs: kwargs["input"].nbytes,
    shards=lambda x, dim, *_: ((dim,), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), dim=1),
)
NORMALIZE = Op(
    name="normalize",
    fn=NormalizeFn,
    functional=normalize,
    reference=normalize_reference,
    samples=_normalize_samples,
    torch=torch.nn.functional.normalize,
    permutes=lambda kwargs: {"input": kwargs["dim"]},
    by_reference="p other than 2, several dimensions",
    saved_bytes=lambda kwargs: kwargs["input"].nbytes,
    shards=lambda x, dim, *_: ((dim,), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), dim=1),
)
