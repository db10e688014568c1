"""RMS norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import Op, Sample, autocast, check_normalized_shape, compiled, fall_back, overridable, real, why_not, wide, wide_dtype

rms_norm_fwd = compiled("rms_norm_fwd")
rms_norm_bwd = compiled("rms_norm_bwd")


def rms_norm_reference(x: Tensor, w: Tensor | None, dims: int, eps: float, offset: float, cast_first: bool) -> Tensor:
    a = wide(x)
    y = a * torch.rsqrt(a.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps)
    y = wide(y.to(x.dtype)) if cast_first else y
    return (y if w is None else y * (wide(w) + offset)).to(x.dtype)


@torch.library.register_fake("fusegrad::rms_norm_fwd")
def _(x, w, dims, eps, offset, cast_first):
    return x.new_empty(x.shape), x.new_empty(x.shape[: x.dim() - dims], dtype=wide_dtype(x))


@torch.library.register_fake("fusegrad::rms_norm_bwd")
def _(dy, x, w, rstd, dims, offset, needed):
    dw = x.new_empty(x.shape[x.dim() - dims :], dtype=x.dtype if w is None else w.dtype)
    return x.new_empty(x.shape) if needed[0] else None, dw if needed[1] else None


class RMSNormFn(Function):
    op = "rms_norm"
    reference = staticmethod(rms_norm_reference)
    params = (1,)

    @staticmethod
    def forward(x, w, dims, eps, offset, cast_first):
        return rms_norm_fwd(x, w, dims, eps, offset, cast_first)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, *ctx.options = inputs
        _, rstd = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(x, w, rstd)

    @differentiable(lambda ctx: ctx.saved_tensors[:2])
    def backward(ctx, dy, _):
        dx = dw = None
        if dy is not None:
            x, w, rstd = ctx.saved_tensors
            dims, _, offset, _ = ctx.options
            dx, dw = rms_norm_bwd(dy, x, w, rstd, dims, offset, ctx.needs_input_grad[:2])
        return dx, dw, None, None, None, None


@overridable
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_order: str = "torch",
) -> Tensor:
    r"""Root mean square norm over the last `len(normalized_shape)` dimensions:

    .. math:: y = x / \sqrt{\mathrm{mean}(x^2) + \mathrm{eps}} \cdot (\mathrm{weight} + \mathrm{weight\_offset})

    Drop-in for `torch.nn.functional.rms_norm`.

    Args:
        input: `[*, *normalized_shape]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for
            float64). Other dtypes that torch takes (complex) go through the reference.
        normalized_shape: the dimensions to normalise over.
        weight: `normalized_shape`, of the input's dtype, or float32 with a 16-bit input; or None for 1. One of another dtype
            goes through the reference: the result has the input's dtype, as torch's.
        eps: added to the mean of squares; None is the machine epsilon of the dtype that sums are taken in, as in torch.
        weight_offset: added to the weight in float32: 1.0 for Gemma, whose weights are stored as w - 1. Unused without a weight.
        cast_order: "torch" rounds once, at the end; "llama" rounds the normalised input to its dtype before the multiplication,
            as the model code of Llama does.

    Returns:
        The shape and dtype of `input` (float32 under CUDA autocast, as torch), contiguous. Saved for backward: input, weight and
        one float32 per row.

    Raises:
        RuntimeError: a shape that does not fit, tensors on two devices, a tensor that is not dense. TypeError: an integer input.
        ValueError: an unknown `cast_order`.

    Equivalent eager code::

        eps = torch.finfo(torch.float32).eps if eps is None else eps
        x = input.float()
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = (y * (weight.float() + weight_offset)).to(input.dtype)

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """
    dims = check_normalized_shape("rms_norm", input, normalized_shape, weight=weight)
    if input.is_cuda and autocast(input) and input.dtype != torch.float64:
        input, weight = input.float(), None if weight is None else weight.float()
    options = rms_options("rms_norm", input, eps, weight_offset, cast_order)
    if weight is not None and weight.dtype != input.dtype and weight.dtype != wide_dtype(input):
        fall_back("rms_norm", why_not(input) or f"there is no kernel for {input.dtype} and a weight of {weight.dtype}", input)
        return rms_norm_reference(input, weight, dims, *options)
    return RMSNormFn.call((input, weight), dims, *options, outputs=1)


def rms_options(op: str, input: Tensor, eps: float | None, weight_offset: float, cast_order: str) -> tuple[float, float, bool]:
    """As the kernels take them."""
    if cast_order not in ("torch", "llama"):
        raise ValueError(f"{op}: cast_order must be 'torch' or 'llama', got {cast_order!r}")
    if eps is None:
        eps = torch.finfo(wide_dtype(input)).eps if input.is_floating_point() or input.is_complex() else 0.0
    return real(op, "eps", eps), real(op, "weight_offset", weight_offset), cast_order == "llama"


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with a fused forward and backward; parameters, state dict and arguments are torch's. See `rms_norm`."""

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, weight_offset=0.0, cast_order="torch"
    ):
        self.weight_offset = weight_offset  # reset_parameters needs it
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        rms_options(type(self).__name__, torch.empty(0), eps, weight_offset, cast_order)
        self.cast_order = cast_order

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        options = dict(weight_offset=self.weight_offset, cast_order=self.cast_order)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, **options)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        order = f", cast_order={self.cast_order!r}" if self.cast_order != "torch" else ""
        return super().extra_repr() + offset + order


def _samples(make):
    yield Sample("plain", dict(input=make(5, 33), normalized_shape=(33,), weight=make.param(33)))
    yield Sample("no_weight", dict(input=make(3, 4, 64), normalized_shape=(64,), eps=1e-3))
    yield Sample("one_column", dict(input=make(7, 1), normalized_shape=(1,), weight=make.param(1), eps=1e-2))
    yield Sample("one_row", dict(input=make(129), normalized_shape=(129,), weight=make.param(129), eps=1e-6))
    yield Sample("two_dims", dict(input=make(4, 3, 17), normalized_shape=(3, 17), weight=make.param(3, 17), eps=1e-5))
    yield Sample("gemma", dict(input=make(6, 40, layout="row_strided"), normalized_shape=(40,), weight=make.param(40), weight_offset=1.0))
    yield Sample("llama", dict(input=make(2, 3, 96), normalized_shape=(96,), weight=make.param(96), eps=1e-5, cast_order="llama"))
    yield Sample("llama_gemma", dict(input=make(3, 50, layout="column_strided"), normalized_shape=(50,), weight=make.param(50),
                                     weight_offset=0.5, cast_order="llama", eps=1e-4))  # fmt: skip
    yield Sample("transposed", dict(input=make(19, 35, layout="transposed"), normalized_shape=(35,), weight=make.param(35)))
    yield Sample(
        "expanded", dict(input=make(6, 66, layout="expanded"), normalized_shape=(66,), weight=make.param(66, layout="column_strided"))
    )
    yield Sample("offset", dict(input=make(4, 2, 31, layout="offset"), normalized_shape=(31,), weight=make.param(31), eps=1.0))
    yield Sample("packed_heads", dict(input=make(2, 3, 5, 48, layout="packed_heads"), normalized_shape=(48,), weight=make.param(48)))
    yield Sample("no_rows", dict(input=make(0, 16), normalized_shape=(16,), weight=make.param(16)))
    yield Sample("wide", dict(input=make(2, 1500), normalized_shape=(1500,), weight=make.param(1500), eps=1e-5))


def _saved_bytes(kwargs):
    x, w = kwargs["input"], kwargs.get("weight")
    rows = x.numel() // max(1, math.prod(kwargs["normalized_shape"]))
    return x.nbytes + (0 if w is None else w.nbytes) + rows * wide_dtype(x).itemsize


RMS_NORM = Op(
    name="rms_norm",
    fn=RMSNormFn,
    functional=rms_norm,
    reference=rms_norm_reference,
    samples=_samples,
    module=RMSNorm,
    by_reference="weights of another dtype than the kernel takes",
    torch=torch.nn.functional.rms_norm,
    permutes=lambda kwargs: {"input": -1, "weight": -1},
    rounding=lambda kwargs: 1.5 if kwargs.get("cast_order") == "llama" else 0.505,
    saved_bytes=_saved_bytes,
    shards=lambda x, w, dims, *_: (range(-dims, 0), {}),
    bench=lambda make, rows, cols: dict(input=make(rows, cols), normalized_shape=(cols,), weight=make.param(cols), eps=1e-5),
)
