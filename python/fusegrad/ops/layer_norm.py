"""Layer norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import Op, Sample, autocast, check_normalized_shape, compiled, overridable, real, wide, wide_dtype

layer_norm_fwd = compiled("layer_norm_fwd")
layer_norm_bwd = compiled("layer_norm_bwd")


def layer_norm_reference(x: Tensor, w: Tensor | None, b: Tensor | None, dims: int, eps: float) -> Tensor:
    a = wide(x).flatten(-dims)
    a = a - a[..., :1].detach()  # no derivative sees it, and the digits of the spread are kept where the mean is large
    a = a - a.mean(-1, keepdim=True)
    y = (a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    y = y if w is None else y * wide(w)
    return (y if b is None else y + wide(b)).to(x.dtype)


@torch.library.register_fake("fusegrad::layer_norm_fwd")
def _(x, w, b, dims, eps):
    rows = x.shape[: x.dim() - dims]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide_dtype(x)), x.new_empty(rows, dtype=wide_dtype(x))


@torch.library.register_fake("fusegrad::layer_norm_bwd")
def _(dy, x, w, b, mean, rstd, dims, needed):
    shape = x.shape[x.dim() - dims :]
    dw, db = (x.new_empty(shape, dtype=(x if p is None else p).dtype) if n else None for p, n in zip((w, b), needed[1:]))
    return x.new_empty(x.shape) if needed[0] else None, dw, db


class LayerNormFn(Function):
    op = "layer_norm"
    reference = staticmethod(layer_norm_reference)
    params = (1, 2)

    @staticmethod
    def forward(x, w, b, dims, eps):
        return layer_norm_fwd(x, w, b, dims, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, dims, eps = inputs
        ctx.options = dims, eps
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*tensors, *outputs[1:])

    @differentiable(lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx, dy, *_):
        dx = dw = db = None
        if dy is not None:
            dx, dw, db = layer_norm_bwd(dy, *ctx.saved_tensors, ctx.options[0], ctx.needs_input_grad[:3])
        return dx, dw, db, None, None


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer norm over the last `len(normalized_shape)` dimensions:

    .. math:: y = d / \sqrt{\mathrm{mean}(d^2) + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}, \quad d = x - \mathrm{mean}(x)

    Drop-in for `torch.nn.functional.layer_norm`. The variance is a second sum, over the differences from the mean, and the rows are
    taken relative to their first element: a mean that is large beside the spread costs no digits.

    Args:
        input: `[*, *normalized_shape]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for
            float64).
        normalized_shape: the dimensions to normalise over.
        weight: `normalized_shape`, of the input's dtype, or float32 with a 16-bit input; or None for 1.
        bias: the same, and of the weight's dtype; or None for 0.
        eps: added to the variance.

    Returns:
        The shape and dtype of `input` (float32 under CUDA autocast, as torch), contiguous. Saved for backward: input, weight, bias
        and two float32 per row.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices,
        a tensor that is not dense.

    Equivalent eager code::

        x = input.float()
        x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = (y * weight.float() + bias.float()).to(input.dtype)

    Source: Ba, Kiros & Hinton, Layer Normalization, 2016, arXiv:1607.06450.
    """
    dims = check_normalized_shape("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if input.is_cuda and autocast(input) and input.dtype != torch.float64:
        input, weight, bias = (t if t is None else t.float() for t in (input, weight, bias))
    return LayerNormFn.call((input, weight, bias), dims, real("layer_norm", "eps", eps), outputs=1)


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with a fused forward and backward; parameters, state dict and arguments are torch's. See `layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _samples(make):
    p = make.param
    yield Sample("plain", dict(input=make(5, 33), normalized_shape=(33,), weight=p(33), bias=p(33)))
    yield Sample("no_affine", dict(input=make(3, 4, 64), normalized_shape=(64,), eps=1e-3))
    yield Sample("weight_only", dict(input=make(3, 4, 40), normalized_shape=(40,), weight=p(40)))
    yield Sample("bias_only", dict(input=make(4, 40), normalized_shape=(40,), bias=p(40)))
    yield Sample("one_column", dict(input=make(7, 1), normalized_shape=(1,), weight=p(1), bias=p(1), eps=1e-2))
    yield Sample("one_row", dict(input=make(129), normalized_shape=(129,), weight=p(129), bias=p(129)))
    yield Sample("two_dims", dict(input=make(4, 3, 17), normalized_shape=(3, 17), weight=p(3, 17), bias=p(3, 17)))
    yield Sample("row_strided", dict(input=make(6, 40, layout="row_strided"), normalized_shape=(40,), weight=p(40), bias=p(40)))
    yield Sample("column_strided", dict(input=make(3, 50, layout="column_strided"), normalized_shape=(50,), weight=p(50), bias=p(50)))
    yield Sample("transposed", dict(input=make(19, 35, layout="transposed"), normalized_shape=(35,), weight=p(35), bias=p(35)))
    yield Sample("expanded", dict(input=make(6, 66, layout="expanded"), normalized_shape=(66,), bias=p(66),
                                  weight=p(66, layout="column_strided")))  # fmt: skip
    yield Sample("offset", dict(input=make(4, 2, 31, layout="offset"), normalized_shape=(31,), weight=p(31), eps=1.0))
    yield Sample("packed_heads", dict(input=make(2, 3, 5, 48, layout="packed_heads"), normalized_shape=(48,), weight=p(48), bias=p(48)))
    yield Sample("no_rows", dict(input=make(0, 16), normalized_shape=(16,), weight=p(16), bias=p(16)))
    yield Sample("wide", dict(input=make(2, 1500), normalized_shape=(1500,), weight=p(1500), bias=p(1500)))


def saved_bytes(x: Tensor, kwargs: dict, statistics: int) -> int:
    """Of a norm that saves x, its parameters and so many values per row."""
    params = sum(t.nbytes for k in ("weight", "bias") if (t := kwargs.get(k)) is not None)
    rows = x.shape[: x.dim() - len(kwargs["normalized_shape"])].numel()
    return x.nbytes + params + statistics * rows * wide_dtype(x).itemsize


LAYER_NORM = Op(
    name="layer_norm",
    fn=LayerNormFn,
    functional=layer_norm,
    reference=layer_norm_reference,
    samples=_samples,
    module=LayerNorm,
    torch=torch.nn.functional.layer_norm,
    permutes=lambda kwargs: {"input": -1, "weight": -1, "bias": -1},
    saved_bytes=lambda kwargs: saved_bytes(kwargs["input"], kwargs, 2),
    shards=lambda x, w, b, dims, eps: (range(-dims, 0), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), normalized_shape=(cols,), weight=make.param(cols), bias=make.param(cols)),
)
