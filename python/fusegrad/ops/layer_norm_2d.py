"""Layer norm over the channels of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import BatchJoined, differentiable
from .._op import SHAPES, Op, Sample, check_tensor, compiled, overridable, real, wide_dtype
from .layer_norm import layer_norm_reference

layer_norm_2d_fwd = compiled("layer_norm_2d_fwd")
layer_norm_2d_bwd = compiled("layer_norm_2d_bwd")


def layer_norm_2d_reference(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    return layer_norm_reference(x.movedim(1, -1), w, b, 1, eps).movedim(x.dim() - 1, 1)


@torch.library.register_fake("fusegrad::layer_norm_2d_fwd")
def _(x, w, b, eps):
    pixels = (x.shape[0], *x.shape[2:])
    return torch.empty_like(x), x.new_empty(pixels, dtype=wide_dtype(x)), x.new_empty(pixels, dtype=wide_dtype(x))


@torch.library.register_fake("fusegrad::layer_norm_2d_bwd")
def _(dy, x, w, b, mean, rstd, needed):
    dw, db = (x.new_empty(x.shape[1], dtype=x.dtype if p is None else p.dtype) for p in (w, b))
    return torch.empty_like(x) if needed[0] else None, dw if needed[1] else None, db if needed[2] else None


class LayerNorm2dFn(BatchJoined):
    op = "layer_norm_2d"
    reference = staticmethod(layer_norm_2d_reference)
    params = (1, 2)

    @staticmethod
    def forward(x, w, b, eps):
        return layer_norm_2d_fwd(x, w, b, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, b, *ctx.options = inputs
        _, mean, rstd = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, w, b, mean, rstd)

    @differentiable(lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx, dy, *_):
        grads = (None, None, None)
        if dy is not None:
            grads = layer_norm_2d_bwd(dy, *ctx.saved_tensors, ctx.needs_input_grad[:3])
        return *grads, None


@overridable
def layer_norm_2d(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""Layer norm over the channels of each pixel:

    .. math:: y = (x - \mathrm{mean}_c(x)) / \sqrt{\mathrm{var}_c(x) + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}

    as `layer_norm` between two permutes, without them and without their copies.

    Args:
        input: `[N, C, *]`, float32, float64, float16 or bfloat16, any layout; contiguous and channels_last are walked as they lie.
            Statistics are taken in float32 (float64 for float64), by two sweeps over data that is near.
        weight, bias: `[C]`, of the input's dtype, or float32 with a 16-bit input; or None.
        eps: added to the variance.

    Returns:
        The shape and dtype of `input`, in its memory format. Saved for backward: input, weight, bias and two float32 per pixel.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices, a tensor
        that is not dense.

    Equivalent eager code::

        x = input.float().movedim(1, -1)
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)
        y = y.movedim(-1, 1).to(input.dtype)

    Sources: Ba, Kiros & Hinton, Layer Normalization, 2016, arXiv:1607.06450; Liu et al., A ConvNet for the 2020s, 2022,
    arXiv:2201.03545.
    """
    check_tensor("layer_norm_2d", "input", input)
    if input.dim() < 2:
        raise RuntimeError(f"layer_norm_2d: input must have a batch and a channel dimension, got {list(input.shape)}")
    shape = input.shape[1:2]
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check_tensor("layer_norm_2d", name, p)
            if p.shape != shape:
                fact = f"(input is {list(input.shape)}), got {list(p.shape)}"
                raise RuntimeError(f"layer_norm_2d: {name} must have shape {list(shape)} {fact}")
    return LayerNorm2dFn.call((input, weight, bias), real("layer_norm_2d", "eps", eps), outputs=1)


class LayerNorm2d(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm(num_channels)` over dimension 1 of `[N, C, *]` instead of the last one. See `layer_norm_2d`."""

    def __init__(self, num_channels: int, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None):
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm_2d(input, self.weight, self.bias, self.eps)


def _samples(make):
    def sample(name, x, w=True, b=True, **options):
        c = x.shape[1]
        params = (dict(weight=make.param(c)) if w else {}) | (dict(bias=make.param(c)) if b else {})
        return Sample(name, dict(input=x) | params | options)

    yield sample("plain", make(2, 6, 5, 7))
    yield sample("channels_last", make(2, 12, 5, 3, layout="channels_last"), eps=1e-6)
    yield sample("wide", make(2, 7, 9, 20), eps=1e-3)
    yield sample("deep", make(1, 300, 3, 5))
    yield sample("deep_channels_last", make(1, 300, 3, 5, layout="channels_last"))
    yield sample("no_affine", make(3, 5, 4, 4), w=False, b=False)
    yield sample("weight_only", make(2, 5, 8, 8, layout="channels_last"), b=False)
    yield sample("bias_only", make(2, 5, 3, 8), w=False)
    yield sample("features", make(4, 33))
    yield sample("sequence", make(2, 8, 70))
    yield sample("volume", make(2, 4, 3, 2, 5).contiguous(memory_format=torch.channels_last_3d))
    yield sample("row_strided", make(2, 4, 3, 6, layout="row_strided"))
    yield sample("column_strided", make(2, 4, 6, 3, layout="column_strided"))
    yield sample("transposed", make(2, 9, 6, 7, layout="transposed"))
    yield sample("expanded", make(3, 6, 4, 2, layout="expanded"))
    yield sample("offset", make(2, 6, 5, 9, layout="offset"))
    yield sample("one_channel", make(2, 1, 3, 3), eps=1e-2)
    yield sample("no_rows", make(0, 4, 3, 3))


def _bench(make, rows, cols):
    side = 8 if rows % 64 == 0 and rows else 1
    return dict(input=make(rows // side**2, cols, side, side), weight=make.param(cols), bias=make.param(cols))


def _saved_bytes(kwargs):
    x = kwargs["input"]
    pixels = x.numel() // max(1, x.shape[1])
    return sum(t.nbytes for t in kwargs.values() if isinstance(t, Tensor)) + 2 * pixels * wide_dtype(x).itemsize


LAYER_NORM_2D = Op(
    name="layer_norm_2d",
    fn=LayerNorm2dFn,
    functional=layer_norm_2d,
    reference=layer_norm_2d_reference,
    samples=_samples,
    module=LayerNorm2d,
    permutes=lambda kwargs: {"input": 1, "weight": 0, "bias": 0},
    layout_bits=False,
    saved_bytes=_saved_bytes,
    shards=lambda *_: ((1,), {}),
    bench=_bench,
    shapes=(*SHAPES[:5], (64, 64), (8192, 1024)),  # images have no more channels
)
