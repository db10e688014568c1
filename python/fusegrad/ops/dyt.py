"""Dynamic tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import Op, Sample, check_normalized_shape, check_tensor, compiled, overridable, wide

dyt_fwd = compiled("dyt_fwd")
dyt_bwd = compiled("dyt_bwd")


def dyt_reference(x: Tensor, alpha: Tensor, w: Tensor | None, b: Tensor | None, dims: int) -> Tensor:
    y = torch.tanh(wide(alpha) * wide(x))
    y = y if w is None else y * wide(w)
    return (y if b is None else y + wide(b)).to(x.dtype)


@torch.library.register_fake("fusegrad::dyt_fwd")
def _(x, alpha, w, b, dims):
    return x.new_empty(x.shape)


@torch.library.register_fake("fusegrad::dyt_bwd")
def _(dy, x, alpha, w, b, dims, needed):
    shape = x.shape[x.dim() - dims :]
    dw, db = (x.new_empty(shape, dtype=(x if p is None else p).dtype) if n else None for p, n in zip((w, b), needed[2:]))
    return x.new_empty(x.shape) if needed[0] else None, torch.empty_like(alpha) if needed[1] else None, dw, db


class DyTFn(Function):
    op = "dyt"
    reference = staticmethod(dyt_reference)
    params = (1, 2, 3)

    @staticmethod
    def forward(x, alpha, w, b, dims):
        return dyt_fwd(x, alpha, w, b, dims)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, dims = inputs
        ctx.options = (dims,)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @differentiable(lambda ctx: ctx.saved_tensors)
    def backward(ctx, dy):
        found = (None,) * 4
        if dy is not None:
            found = dyt_bwd(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4])
        return *found, None


@overridable
def dyt(input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    r"""Dynamic tanh, a layer in the place of a norm that needs no statistics:

    .. math:: y = \tanh(\mathrm{alpha} \cdot x) \cdot \mathrm{weight} + \mathrm{bias}

    Args:
        input: `[*, *columns]`, float32, float64, float16 or bfloat16, any layout. Computed in float32 (float64 for float64).
        alpha: one element, of the input's dtype, or float32 with a 16-bit input. Its gradient is summed in float32 over all of the
            input, and rounded once.
        weight: the last dimensions of the input, of the input's dtype, or float32 with a 16-bit input; or None for 1.
        bias: the same, and of the weight's shape and dtype; or None for 0.

    Returns:
        The shape and dtype of `input`, contiguous. Saved for backward: the inputs; the tanh is recomputed.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices,
        a tensor that is not dense.

    Equivalent eager code::

        y = torch.tanh(alpha.float() * input.float())
        y = (y * weight.float() + bias.float()).to(input.dtype)

    Source: Zhu et al., Transformers without Normalization, 2025, arXiv:2503.10622.
    """
    check_tensor("dyt", "input", input)
    check_tensor("dyt", "alpha", alpha)
    if alpha.numel() != 1:
        raise RuntimeError(f"dyt: alpha must have one element, got {list(alpha.shape)}")
    first = bias if weight is None else weight
    if first is not None:
        check_tensor("dyt", "bias" if weight is None else "weight", first)
    shape = input.shape[-1:] if first is None else first.shape
    dims = check_normalized_shape("dyt", input, shape, weight=weight, bias=bias) if len(shape) else 0
    return DyTFn.call((input, alpha.reshape(()), weight, bias), dims)


class DyT(torch.nn.Module):
    """`dyt` as a module, in the place of `LayerNorm(normalized_shape)`: parameters `alpha`, `weight` and `bias`."""

    def __init__(self, normalized_shape, alpha_init: float = 0.5, elementwise_affine=True, bias=True, device=None, dtype=None):
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.alpha_init = alpha_init
        factory = dict(device=device, dtype=dtype)
        self.alpha = torch.nn.Parameter(torch.empty(1, **factory))
        affine = elementwise_affine, elementwise_affine and bias
        for name, given in zip(("weight", "bias"), affine):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(self.normalized_shape, **factory)) if given else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.alpha, self.alpha_init)
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return dyt(input, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        affine = f"elementwise_affine={self.weight is not None}, bias={self.bias is not None}"
        return f"{self.normalized_shape}, alpha_init={self.alpha_init}, {affine}"


def _samples(make):
    p, n = make.param, dict(weight=None, bias=None)
    yield Sample("plain", dict(input=make(5, 33), alpha=p(1), weight=p(33), bias=p(33)))
    yield Sample("scalar_alpha", dict(input=make(3, 4, 64), alpha=p(), weight=p(64), bias=p(64)))
    yield Sample("no_affine", dict(input=make(3, 40), alpha=p(1), **n))
    yield Sample("weight_only", dict(input=make(3, 40), alpha=p(1), weight=p(40), bias=None))
    yield Sample("bias_only", dict(input=make(3, 40), alpha=p(1), weight=None, bias=p(40)))
    yield Sample("saturated", dict(input=make(4, 48, scale=20.0), alpha=p(1), weight=p(48), bias=p(48)))
    yield Sample("one_column", dict(input=make(7, 1), alpha=p(1), weight=p(1), bias=p(1)))
    yield Sample("one_row", dict(input=make(129), alpha=p(1), weight=p(129), bias=p(129)))
    yield Sample("two_dims", dict(input=make(4, 3, 17), alpha=p(1), weight=p(3, 17), bias=p(3, 17)))
    yield Sample("row_strided", dict(input=make(6, 40, layout="row_strided"), alpha=p(1), weight=p(40), bias=p(40)))
    yield Sample("column_strided", dict(input=make(3, 50, layout="column_strided"), alpha=p(1), weight=p(50), bias=p(50)))
    yield Sample("transposed", dict(input=make(19, 35, layout="transposed"), alpha=p(1), weight=p(35), bias=p(35)))
    yield Sample("expanded", dict(input=make(6, 66, layout="expanded"), alpha=p(1), weight=p(66), bias=p(66)))
    yield Sample("packed_heads", dict(input=make(2, 3, 5, 48, layout="packed_heads"), alpha=p(1), weight=p(48), bias=p(48)))
    yield Sample("no_rows", dict(input=make(0, 16), alpha=p(1), weight=p(16), bias=p(16)))
    yield Sample("wide", dict(input=make(2, 1500), alpha=p(1), weight=p(1500), bias=p(1500)))


DYT = Op(
    name="dyt",
    fn=DyTFn,
    functional=dyt,
    reference=dyt_reference,
    samples=_samples,
    module=DyT,
    permutes=lambda kwargs: {"input": -1, "weight": -1, "bias": -1},
    saved_bytes=lambda kwargs: sum(t.nbytes for t in kwargs.values() if t is not None),
    shards=lambda x, alpha, w, b, dims: (range(-dims, 0), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), alpha=make.param(1), weight=make.param(cols), bias=make.param(cols)),
)
