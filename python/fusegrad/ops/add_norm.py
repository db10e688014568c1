"""A residual connection and the norm after it, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import Op, Sample, check_normalized_shape, check_tensor, compiled, overridable, real, wide, wide_dtype
from .dropout import draw_seed, dropout_bwd, dropped, probability
from .layer_norm import LayerNorm, layer_norm_reference, saved_bytes
from .rms_norm import RMSNorm, rms_norm_reference, rms_options

add_norm_fwd = compiled("add_norm_fwd")
add_norm_bwd = compiled("add_norm_bwd")


def _sum(x: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    x_ = wide(x) if seed is None else dropped(wide(x), seed, p)
    return (x_ + wide(residual)).to(x.dtype)


def add_rms_norm_reference(x, residual, w, seed, dims, eps, offset, cast_first, p) -> tuple[Tensor, Tensor]:
    s = _sum(x, residual, seed, p)
    return rms_norm_reference(s, w, dims, eps, offset, cast_first), s


def add_layer_norm_reference(x, residual, w, b, seed, dims, eps, p) -> tuple[Tensor, Tensor]:
    s = _sum(x, residual, seed, p)
    return layer_norm_reference(s, w, b, dims, eps), s


@torch.library.register_fake("fusegrad::add_norm_fwd")
def _(x, residual, w, b, seed, dims, eps, offset, cast_first, p, rms):
    mean, rstd = (x.new_empty(x.shape[: x.dim() - dims], dtype=wide_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), None if rms else mean, rstd


@torch.library.register_fake("fusegrad::add_norm_bwd")
def _(dy, dsum, sum, w, b, seed, mean, rstd, dims, offset, p, needed):
    needed = needed[0] and seed is not None, needed[1] or (needed[0] and seed is None), *needed[2:]
    dx, dresidual = (sum.new_empty(sum.shape) if n else None for n in needed[:2])
    shape = sum.shape[sum.dim() - dims :]
    dw, db = (sum.new_empty(shape, dtype=(sum if t is None else t).dtype) if n else None for t, n in zip((w, b), needed[2:]))
    return dx, dresidual, dw, db


class _AddNormFn(Function):
    @classmethod
    def why_no_vmap(cls, tensors, options):
        return None if tensors[-1] is None else "vmap of a dropout has no kernel"


def _setup_context(ctx, params, options, outputs):
    """Saves the sum in the place of input, and nothing in that of residual; params are weight, bias if there is one, and seed."""
    _, s, *statistics = outputs
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
    ctx.save_for_backward(s, None, *params, *statistics)


def _with_that_sum(ctx):
    """0 and the sum, in the place of input and residual: every pair with one sum has the same derivatives."""
    s, _, *params, _, _ = ctx.saved_tensors
    return s.new_zeros(()).expand_as(s), s, *params


def _backward(ctx, dy, dsum, saved, needs_b, offset):
    """The gradients of input, residual, weight and bias, from the sum, weight, bias, seed and statistics."""
    needs, p, seed = (*ctx.needs_input_grad[:3], needs_b), ctx.options[-1], saved[3]
    dx = dresidual = dw = db = None
    if dy is not None:
        dx, dresidual, dw, db = add_norm_bwd(dy, dsum, *saved, ctx.options[0], offset, p, needs)
    elif dsum is not None:
        dresidual = dsum
        if seed is not None and needs[0]:
            dx, _ = dropout_bwd(dsum, None, seed, p, (True, False))
    dx = dresidual if seed is None else dx
    return dx if needs[0] else None, dresidual if needs[1] else None, dw, db


class AddRMSNormFn(_AddNormFn):
    op = "add_rms_norm"
    reference = staticmethod(add_rms_norm_reference)
    params = (2, 3)

    @staticmethod
    def forward(x, residual, w, seed, dims, eps, offset, cast_first, p):
        return add_norm_fwd(x, residual, w, None, seed, dims, eps, offset, cast_first, p, True)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, _, w, seed, *options = inputs
        _setup_context(ctx, (w, seed), options, outputs)

    @differentiable(_with_that_sum)
    def backward(ctx, dy, dsum, *_):
        s, _, w, *others = ctx.saved_tensors
        dx, dresidual, dw, _ = _backward(ctx, dy, dsum, (s, w, None, *others), False, ctx.options[2])
        return dx, dresidual, dw, *(None,) * 6


class AddLayerNormFn(_AddNormFn):
    op = "add_layer_norm"
    reference = staticmethod(add_layer_norm_reference)
    params = (2, 3, 4)

    @staticmethod
    def forward(x, residual, w, b, seed, dims, eps, p):
        return add_norm_fwd(x, residual, w, b, seed, dims, eps, 0.0, False, p, False)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, _, w, b, seed, *options = inputs
        _setup_context(ctx, (w, b, seed), options, outputs)

    @differentiable(_with_that_sum)
    def backward(ctx, dy, dsum, *_):
        s, _, *others = ctx.saved_tensors
        return *_backward(ctx, dy, dsum, (s, *others), ctx.needs_input_grad[3], 0.0), *(None,) * 4


def _sum_of(op: str, input: Tensor, residual: Tensor, params: tuple, p: float, training: bool) -> tuple[tuple, float]:
    """Input and residual in one dtype, that of torch's sum of them, the parameters, and the seed of the dropout; its probability."""
    check_tensor(op, "residual", residual)
    if residual.shape != input.shape:
        raise RuntimeError(f"{op}: residual must have the shape of input ({list(input.shape)}), got {list(residual.shape)}")
    p = probability(op, p)
    p = p if training else 0.0
    seed = draw_seed(input) if p > 0 else None
    if input.dtype != residual.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
        # Parameters of the narrower of the two lose nothing in the other.
        params = [t.to(dtype) if t is not None and torch.promote_types(t.dtype, dtype) == dtype else t for t in params]
    return (input, residual, *params, seed), p


@overridable
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_order: str = "torch",
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Adds a layer's output to the residual stream and normalises the sum; returns `(normed, summed)`:

    .. math:: s = \mathrm{dropout}(\mathrm{input}) + \mathrm{residual}, \quad
        y = s / \sqrt{\mathrm{mean}(s^2) + \mathrm{eps}} \cdot (\mathrm{weight} + \mathrm{weight\_offset})

    The sum is added in float32 and rounded once, to the dtype in which it is returned; the norm is that of the rounded sum, as it is
    in eager code. Either result may be used alone, or both: their gradients meet in one kernel.

    Args:
        input: `[*, *normalized_shape]`, float32, float64, float16 or bfloat16, any layout.
        residual: the shape of `input`. If the dtypes differ, the one that torch would add them in is used, after a cast, for parameters
            of the narrower one too.
        normalized_shape, weight, eps, weight_offset, cast_order: see `rms_norm`.
        p: the probability that an element of `input` is dropped before it is added, as in `fusegrad.functional.dropout`.
        training: if False, nothing is dropped.

    Returns:
        `(normed, summed)`, the shape of `input` and the dtype of the sum, contiguous. Saved for backward: the sum, weight, one float32
        per row, and the seed of the dropout (8 bytes) if there is one; neither input nor residual nor mask.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices,
        a tensor that is not dense. ValueError: an unknown `cast_order`, p outside [0, 1].

    Equivalent eager code::

        eps = torch.finfo(torch.float32).eps if eps is None else eps
        summed = torch.nn.functional.dropout(input, p, training) + residual
        s = summed.float()
        y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
        y = (y * (weight.float() + weight_offset)).to(summed.dtype)

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """
    dims = check_normalized_shape("add_rms_norm", input, normalized_shape, weight=weight)
    tensors, p = _sum_of("add_rms_norm", input, residual, (weight,), p, training)
    options = rms_options("add_rms_norm", tensors[0], eps, weight_offset, cast_order)
    return AddRMSNormFn.call(tensors, dims, *options, p, outputs=2)


@overridable
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Adds a layer's output to the residual stream and normalises the sum; returns `(normed, summed)`:

    .. math:: s = \mathrm{dropout}(\mathrm{input}) + \mathrm{residual}, \quad
        y = (s - \mathrm{mean}(s)) / \sqrt{\mathrm{var}(s) + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}

    The sum is added in float32 and rounded once, to the dtype in which it is returned; the norm is that of the rounded sum, as it is
    in eager code. Either result may be used alone, or both: their gradients meet in one kernel.

    Args:
        input: `[*, *normalized_shape]`, float32, float64, float16 or bfloat16, any layout.
        residual: the shape of `input`. If the dtypes differ, the one that torch would add them in is used, after a cast, for parameters
            of the narrower one too.
        normalized_shape, weight, bias, eps: see `layer_norm`.
        p: the probability that an element of `input` is dropped before it is added, as in `fusegrad.functional.dropout`.
        training: if False, nothing is dropped.

    Returns:
        `(normed, summed)`, the shape of `input` and the dtype of the sum, contiguous. Saved for backward: the sum, weight, bias, two
        float32 per row, and the seed of the dropout (8 bytes) if there is one; neither input nor residual nor mask.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices,
        a tensor that is not dense. ValueError: p outside [0, 1].

    Equivalent eager code::

        summed = torch.nn.functional.dropout(input, p, training) + residual
        s = summed.float()
        s = s - s.mean(-1, keepdim=True)
        y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
        y = (y * weight.float() + bias.float()).to(summed.dtype)

    Source: Ba, Kiros & Hinton, Layer Normalization, 2016, arXiv:1607.06450.
    """
    dims = check_normalized_shape("add_layer_norm", input, normalized_shape, weight=weight, bias=bias)
    tensors, p = _sum_of("add_layer_norm", input, residual, (weight, bias), p, training)
    return AddLayerNormFn.call(tensors, dims, real("add_layer_norm", "eps", eps), p, outputs=2)


class _Adds:
    """A norm that adds first, after a dropout: `p` beside the norm's own arguments, and a forward of two tensors."""

    p: float

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", p={self.p}" if self.p else "")


class AddRMSNorm(_Adds, RMSNorm):
    """`AddRMSNorm(...)(input, residual)` gives `(normed, summed)`; arguments and parameters are those of `RMSNorm`, and `p`, the
    probability to drop an element of the input. See `add_rms_norm`."""

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, p: float = 0.0, **options):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype, **options)
        self.p = probability(type(self).__name__, p)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(weight_offset=self.weight_offset, cast_order=self.cast_order, p=self.p, training=self.training)
        return add_rms_norm(input, residual, self.normalized_shape, self.weight, self.eps, **options)


class AddLayerNorm(_Adds, LayerNorm):
    """`AddLayerNorm(...)(input, residual)` gives `(normed, summed)`; arguments and parameters are those of `LayerNorm`, and `p`, the
    probability to drop an element of the input. See `add_layer_norm`."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None, *, p: float = 0.0):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.p = probability(type(self).__name__, p)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(p=self.p, training=self.training)
        return add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps, **options)


def _pairs(make):
    """(name, input and residual, normalized_shape)"""

    def pair(*shape, layout="contiguous", other="contiguous"):
        return dict(input=make(*shape, layout=layout), residual=make(*shape, layout=other))

    yield "plain", pair(5, 33), (33,)
    yield "three_dims", pair(3, 4, 64), (64,)
    yield "two_dims", pair(4, 3, 17), (3, 17)
    yield "one_column", pair(7, 1), (1,)
    yield "one_row", pair(129), (129,)
    yield "row_strided", pair(6, 40, layout="row_strided"), (40,)
    yield "column_strided", pair(3, 50, layout="column_strided"), (50,)
    yield "transposed", pair(19, 35, layout="transposed", other="transposed"), (35,)
    yield "mixed_layouts", pair(9, 32, layout="transposed", other="row_strided"), (32,)
    yield "expanded", pair(6, 66, other="expanded"), (66,)
    yield "packed_heads", pair(2, 3, 5, 48, layout="packed_heads"), (48,)
    yield "no_rows", pair(0, 16), (16,)
    yield "wide", pair(2, 1500), (1500,)


_DROPOUT = {
    "mixed_layouts": dict(p=0.4),
    "one_row": dict(p=0.1, training=True),
    "column_strided": dict(p=0.5),
    "expanded": dict(p=1.0),
    "transposed": dict(p=0.3, training=False),
    "no_rows": dict(p=0.2, training=False),
}


def _rms_samples(make):
    extra = _DROPOUT | {
        "three_dims": dict(weight=None, eps=1e-3),
        "two_dims": dict(weight_offset=1.0, eps=1e-5),
        "one_column": dict(eps=1e-2),
        "row_strided": dict(cast_order="llama"),
        "packed_heads": dict(cast_order="llama", weight_offset=0.5),
    }
    for name, tensors, shape in _pairs(make):
        kwargs = tensors | dict(normalized_shape=shape, weight=make.param(*shape)) | extra.get(name, {})
        yield Sample(name, {k: v for k, v in kwargs.items() if v is not None})


def _layer_samples(make):
    extra = _DROPOUT | {
        "three_dims": dict(weight=None, bias=None, eps=1e-3),
        "one_column": dict(eps=1e-2),
        "row_strided": dict(bias=None),
        "packed_heads": dict(weight=None),
    }
    for name, tensors, shape in _pairs(make):
        kwargs = tensors | dict(normalized_shape=shape, weight=make.param(*shape), bias=make.param(*shape)) | extra.get(name, {})
        yield Sample(name, {k: v for k, v in kwargs.items() if v is not None})


def _stored(kwargs, outputs):
    """The pair (0, rounded sum), which is added exactly."""
    return dict(input=torch.zeros_like(kwargs["input"]), residual=outputs[1])


def _saved_bytes(kwargs, statistics):
    seed = 8 if kwargs.get("p") and kwargs.get("training", True) else 0
    return saved_bytes(kwargs["input"], kwargs, statistics) + seed


def _bench(make, rows, cols):
    return dict(input=make(rows, cols), residual=make(rows, cols), normalized_shape=(cols,), weight=make.param(cols), eps=1e-5)


_ALIKE = {"input": -1, "residual": -1, "weight": -1, "bias": -1}

ADD_RMS_NORM = Op(
    name="add_rms_norm",
    fn=AddRMSNormFn,
    functional=add_rms_norm,
    reference=add_rms_norm_reference,
    samples=_rms_samples,
    module=AddRMSNorm,
    permutes=lambda kwargs: _ALIKE,
    rounding=lambda kwargs: 1.5 if kwargs.get("cast_order") == "llama" else 0.505,
    stored=_stored,
    saved_bytes=lambda kwargs: _saved_bytes(kwargs, 1),
    shards=lambda x, residual, w, seed, dims, *_: (range(-dims, 0), {}),
    bench=_bench,
)
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    fn=AddLayerNormFn,
    functional=add_layer_norm,
    reference=add_layer_norm_reference,
    samples=_layer_samples,
    module=AddLayerNorm,
    permutes=lambda kwargs: _ALIKE,
    stored=_stored,
    saved_bytes=lambda kwargs: _saved_bytes(kwargs, 2),
    shards=lambda x, residual, w, b, seed, dims, *_: (range(-dims, 0), {}),
    bench=lambda make, rows, cols: _bench(make, rows, cols) | dict(bias=make.param(cols)),
)
