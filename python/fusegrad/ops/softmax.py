"""Softmax, its logarithm, and softmax with a scale and a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import Function, differentiable
from .._op import Op, Sample, autocast, check_tensor, compiled, dimension, overridable, real, warn, wide, wide_dtype

softmax_fwd = compiled("softmax_fwd")
softmax_bwd = compiled("softmax_bwd")

PLAIN, LOG, MASKED = range(3)  # SoftmaxKind in csrc/ops/softmax.h


def softmax_reference(x: Tensor, mask: None, dim: int, scale: float, causal: bool, kind: int) -> Tensor:
    return torch.softmax(wide(x), dim).to(x.dtype)


def log_softmax_reference(x: Tensor, mask: None, dim: int, scale: float, causal: bool, kind: int) -> Tensor:
    return torch.log_softmax(wide(x), dim).to(x.dtype)


def scaled_masked_softmax_reference(x: Tensor, mask: Tensor | None, dim: int, scale: float, causal: bool, kind: int) -> Tensor:
    z = wide(x) * scale
    masked = torch.zeros_like(z, dtype=torch.bool) if mask is None else mask if mask.dtype == torch.bool else mask == -torch.inf
    z = z if mask is None or mask.dtype == torch.bool else z + torch.where(masked, 0, mask).to(z.dtype)
    masked = masked | torch.ones_like(z, dtype=torch.bool).triu(x.shape[-1] - x.shape[-2] + 1) if causal else masked
    z = torch.where(masked, -torch.inf, z)
    dead = (z == -torch.inf).all(-1, keepdim=True)
    return torch.where(z == -torch.inf, 0, torch.softmax(torch.where(dead, 0, z), -1)).to(x.dtype)


def _empty_result(x: Tensor, dim: int) -> Tensor:
    if dim == x.dim() - 1 or x.stride(dim) == 1:
        return x.new_empty(x.movedim(dim, -1).shape).movedim(-1, dim)
    return x.new_empty(x.shape)


@torch.library.register_fake("fusegrad::softmax_fwd")
def _(x, mask, dim, scale, causal, kind, statistics):
    rows = x.shape[:dim] + x.shape[dim + 1 :]
    top, log_sum = (x.new_empty(rows, dtype=wide_dtype(x)) if statistics else None for _ in range(2))
    return _empty_result(x, dim), top, log_sum


@torch.library.register_fake("fusegrad::softmax_bwd")
def _(dy, saved, top, log_sum, dim, scale, kind):
    return _empty_result(saved, dim)


def _formula(ctx, saved_tensors, dy, *_):
    """The gradients of input and mask, in torch, by what was saved."""
    saved, top, _ = saved_tensors
    dim, scale, _, kind = ctx.options
    a, g = wide(saved), wide(dy)
    if kind == LOG:
        dz = g - (torch.softmax(a, dim) if top is not None else torch.exp(a)) * g.sum(dim, keepdim=True)
    else:
        g = torch.where(a == 0, 0, g) if kind == MASKED else g
        dz = a * (g - (a * g).sum(dim, keepdim=True))
        dz = torch.where(a == 0, 0, dz) if kind == MASKED else dz
    return (dz * scale).to(saved.dtype), dz if ctx.needs_input_grad[1] else None


class _SoftmaxFn(Function):
    params, dim = (), -4

    @staticmethod
    def forward(x, mask, dim, scale, causal, kind):
        # A 16-bit logarithm is too coarse to start from: see csrc/ops/softmax.h.
        return softmax_fwd(x, mask, dim, scale, causal, kind, kind == LOG and x.dtype in (torch.float16, torch.bfloat16))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, _, *ctx.options = inputs
        y, top, log_sum = outputs
        ctx.set_materialize_grads(False)
        if top is not None:
            ctx.mark_non_differentiable(top, log_sum)
        ctx.save_for_backward(y if top is None else x, top, log_sum)

    @differentiable(formula=_formula)
    def backward(ctx, dy, *_):
        dx = dmask = None
        if dy is not None:
            saved, top, log_sum = ctx.saved_tensors
            dim, scale, _, kind = ctx.options
            if ctx.needs_input_grad[0]:
                dx = softmax_bwd(dy, saved, top, log_sum, dim, scale, kind)
            if ctx.needs_input_grad[1]:
                dmask = softmax_bwd(wide(dy), wide(saved), None, None, dim, 1.0, kind)
        return dx, dmask, None, None, None, None


class SoftmaxFn(_SoftmaxFn):
    op = "softmax"
    reference = staticmethod(softmax_reference)


class LogSoftmaxFn(_SoftmaxFn):
    op = "log_softmax"
    reference = staticmethod(log_softmax_reference)


class ScaledMaskedSoftmaxFn(_SoftmaxFn):
    op = "scaled_masked_softmax"
    reference = staticmethod(scaled_masked_softmax_reference)


def _over(fn, kind: int, input: Tensor, dim: int | None, dtype: torch.dtype | None, stacklevel: int) -> Tensor:
    """What softmax and log_softmax have in common."""
    check_tensor(fn.op, "input", input)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warn(f"{fn.op}: the choice of dim for it is deprecated, pass dim ({dim} here)", stacklevel + 2)
    dim = dimension(fn.op, input, dim)
    if dtype is not None:
        input = input.to(dtype)
    elif input.is_cuda and autocast(input) and input.dtype != torch.float64:
        input = input.float()
    if input.dim() == 0:
        return fn.call((input[None], None), 0, 1.0, False, kind, outputs=1)[0]
    return fn.call((input, None), dim, 1.0, False, kind, outputs=1)


@overridable
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    r"""Softmax over one dimension:

    .. math:: y_i = e^{x_i} / \sum_j e^{x_j}

    Drop-in for `torch.nn.functional.softmax`.

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for float64).
        dim: the dimension to sum over. None is torch's old choice of it, with a warning.
        dtype: cast the input to it first.

    Returns:
        The shape of `input`, in its dtype or `dtype` (float32 under CUDA autocast, as torch), contiguous, or channels_last over the
        channels of a channels_last input. Saved for backward: the output.

    Raises:
        IndexError: `dim` out of range. RuntimeError: a tensor that is not dense. TypeError: an input that is no tensor.

    Equivalent eager code::

        y = torch.softmax(input.float(), dim).to(input.dtype)

    Source: Bridle, Probabilistic Interpretation of Feedforward Classification Network Outputs, 1990.
    """
    return _over(SoftmaxFn, PLAIN, input, dim, dtype, _stacklevel)


@overridable
def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    r"""The logarithm of softmax over one dimension:

    .. math:: y_i = x_i - \log \sum_j e^{x_j}

    Drop-in for `torch.nn.functional.log_softmax`; in 16 bits its gradient is exact to rounding, where that of torch starts from the
    rounded output and is off by percents.

    Args:
        input: `[*]`, float32, float64, float16 or bfloat16, any layout. Sums are taken in float32 (float64 for float64).
        dim: the dimension to sum over. None is torch's old choice of it, with a warning.
        dtype: cast the input to it first.

    Returns:
        The shape of `input`, in its dtype or `dtype` (float32 under CUDA autocast, as torch), contiguous, or channels_last over the
        channels of a channels_last input. Saved for backward: the output; of 16-bit rows the input and two float32 per row.

    Raises:
        IndexError: `dim` out of range. RuntimeError: a tensor that is not dense. TypeError: an input that is no tensor.

    Equivalent eager code::

        y = torch.log_softmax(input.float(), dim).to(input.dtype)

    Source: Bridle, Probabilistic Interpretation of Feedforward Classification Network Outputs, 1990.
    """
    return _over(LogSoftmaxFn, LOG, input, dim, dtype, _stacklevel)


@overridable
def scaled_masked_softmax(input: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    r"""Softmax over the last dimension of scaled logits, some of which are masked out: the weights of attention.

    .. math:: y_i = e^{z_i} / \sum_j e^{z_j}, \quad z = \mathrm{scale} \cdot x + \mathrm{mask}

    A row without a logit above minus infinity (all of it is masked out) is 0, and so is its gradient. A NaN that is not masked out
    makes its row NaN; one that is masked out is not seen.

    Args:
        input: `[*, queries, keys]` or `[*]`, float32, float64, float16 or bfloat16, any layout, any length.
        mask: broadcasts to `input`, by strides. bool: True is masked out. Floating-point: added after the scale, -inf is masked out;
            a gradient flows to it.
        scale: a factor of the logits.
        causal: also mask out what comes later: query i of Q sees the keys up to number i + K - Q, as the last one sees all K.

    Returns:
        The shape and dtype of `input`. Saved for backward: the output. A mask that requires grad has its gradient
        computed at full size, in float32.

    Raises:
        TypeError: a mask that is neither bool nor floating-point. RuntimeError: a mask that does not broadcast to the input, an input
        with too few dimensions (1, with `causal` 2), a tensor that is not dense or on another device.

    Equivalent eager code::

        z = input.float() * scale
        z = z if mask is None else z.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else z + mask
        if causal:
            z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(z.shape[-1] - z.shape[-2] + 1), -torch.inf)
        y = torch.softmax(z, -1).masked_fill((z == -torch.inf).all(-1, keepdim=True), 0).to(input.dtype)

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.
    """
    check_tensor("scaled_masked_softmax", "input", input)
    if input.dim() < 1 + bool(causal):
        raise RuntimeError(f"scaled_masked_softmax: input must have at least {1 + bool(causal)} dimensions, got {list(input.shape)}")
    if mask is not None:
        check_tensor("scaled_masked_softmax", "mask", mask)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"scaled_masked_softmax: mask must be bool or floating-point, got {mask.dtype}")
        try:
            # In 16 bits the sum over what it was broadcast to would be taken of rounded gradients.
            mask = (wide(mask) if mask.requires_grad else mask).expand(input.shape)
        except RuntimeError:
            expected = f"broadcast to the input's shape {list(input.shape)}"
            raise RuntimeError(f"scaled_masked_softmax: mask must {expected}, got {list(mask.shape)}") from None
    scale = real("scaled_masked_softmax", "scale", scale)
    return ScaledMaskedSoftmaxFn.call((input, mask), input.dim() - 1, scale, bool(causal), MASKED, outputs=1)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` with a fused forward and backward. See `softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` with a fused forward and backward. See `log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5)


class ScaledMaskedSoftmax(torch.nn.Module):
    """`scaled_masked_softmax` as a module."""

    def __init__(self, *, scale: float = 1.0, causal: bool = False):
        super().__init__()
        real("ScaledMaskedSoftmax", "scale", scale)
        self.scale, self.causal = scale, causal

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_masked_softmax(input, mask, scale=self.scale, causal=self.causal)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, causal={self.causal}"


def _samples(make):
    yield Sample("plain", dict(input=make(5, 33), dim=-1))
    yield Sample("rows", dict(input=make(5, 33), dim=0))
    yield Sample("image", dict(input=make(2, 7, 3, 5), dim=1))
    yield Sample("image_channels_last", dict(input=make(2, 7, 3, 5, layout="channels_last"), dim=1))
    yield Sample("middle", dict(input=make(3, 18, 20), dim=-2))
    yield Sample("dtype", dict(input=make(3, 40), dim=1, dtype=torch.float64))
    yield Sample("dtype_transposed", dict(input=make(4, 9, layout="transposed"), dim=1, dtype=torch.float64))
    yield Sample("implicit_dim", dict(input=make(4, 30)))
    yield Sample("stacklevel", dict(input=make(4, 30, scale=4), dim=1, _stacklevel=4))
    yield Sample("stacklevel_implicit", dict(input=make(6), _stacklevel=2))
    yield Sample("scalar", dict(input=make(), dim=0))
    yield Sample("one_column", dict(input=make(7, 1), dim=1))
    yield Sample("transposed", dict(input=make(19, 35, layout="transposed"), dim=1))
    yield Sample("expanded", dict(input=make(6, 66, layout="expanded"), dim=1))
    yield Sample("column_strided", dict(input=make(3, 4, 31, layout="column_strided"), dim=2))
    yield Sample("no_rows", dict(input=make(0, 16), dim=1))
    yield Sample("no_columns", dict(input=make(3, 0), dim=1))
    yield Sample("large", dict(input=make(3, 300, scale=100), dim=1))
    yield Sample("wide", dict(input=make(2, 1500), dim=1))


def _masked_samples(make):
    def some(*shape):
        return make.labels(*shape, classes=3) == 0

    yield Sample("plain", dict(input=make(5, 33)))
    yield Sample("boolean", dict(input=make(5, 33), mask=some(5, 33), scale=0.5))
    yield Sample("boolean_keys", dict(input=make(2, 3, 4, 9), mask=some(2, 1, 1, 9)))
    yield Sample("boolean_queries", dict(input=make(2, 3, 4, 9), mask=some(4, 1), scale=2.0))
    yield Sample("boolean_one", dict(input=make(3, 4), mask=some()))
    yield Sample("boolean_transposed", dict(input=make(8, 8, layout="transposed"), mask=some(8, 8).t()))
    yield Sample("additive", dict(input=make(4, 20), mask=make(4, 20), scale=3.0))
    yield Sample("additive_heads", dict(input=make(2, 3, 5, 16, layout="packed_heads"), mask=make(3, 1, 16), scale=0.25))
    yield Sample("additive_param", dict(input=make(6, 40), mask=make.param(40, layout="column_strided")))
    yield Sample("causal", dict(input=make(3, 9, 9), causal=True, scale=0.3))
    yield Sample("causal_more_keys", dict(input=make(2, 5, 21), causal=True))
    yield Sample("causal_more_queries", dict(input=make(2, 9, 4, layout="row_strided"), causal=True))
    yield Sample("causal_boolean", dict(input=make(2, 2, 7, 7), mask=some(2, 1, 1, 7), causal=True))
    yield Sample("causal_additive", dict(input=make(2, 6, 40, layout="transposed"), mask=make(6, 40), causal=True))
    yield Sample("vector", dict(input=make(70), mask=some(70)))
    yield Sample("no_rows", dict(input=make(0, 8), mask=some(8)))
    yield Sample("wide", dict(input=make(2, 1500), mask=some(1500), scale=0.1))


def _cast(kwargs):
    return kwargs["input"] if kwargs.get("dtype") is None else kwargs["input"].to(kwargs["dtype"])


def _saved_log_bytes(kwargs):
    x = _cast(kwargs)
    dim = kwargs.get("dim", 0 if x.dim() == 1 else 1)
    rows = x.numel() // x.shape[dim] if x.dim() and x.numel() else 1 if not x.dim() else x.movedim(dim, -1)[..., 0:1].numel()
    return x.nbytes + (2 * 4 * rows if wide_dtype(x) != x.dtype else 0)


def _masked_permutes(kwargs):
    x, mask = kwargs["input"], kwargs.get("mask")
    if kwargs.get("causal"):
        return {}
    return {"input": -1} | ({"mask": -1} if mask is not None and mask.dim() and mask.shape[-1] == x.shape[-1] else {})


def _shards(x, mask, dim, scale, causal, kind):
    return (dim, -2) if causal else (dim,), {}  # causal: a query's number says what it sees


_COMMON = dict(
    samples=_samples,
    permutes=lambda kwargs: {"input": kwargs.get("dim", 0 if kwargs["input"].dim() == 1 else 1)} if kwargs["input"].dim() else {},
    shards=_shards,
    bench=lambda make, rows, cols: dict(input=make(rows, cols), dim=1),
)
SOFTMAX = Op(
    name="softmax",
    fn=SoftmaxFn,
    functional=softmax,
    reference=softmax_reference,
    module=Softmax,
    torch=F.softmax,
    saves_output=True,
    saved_bytes=lambda kwargs: _cast(kwargs).nbytes,
    **_COMMON,
)
LOG_SOFTMAX = Op(
    name="log_softmax",
    fn=LogSoftmaxFn,
    functional=log_softmax,
    reference=log_softmax_reference,
    module=LogSoftmax,
    torch=F.log_softmax,
    saved_bytes=_saved_log_bytes,
    **_COMMON,
)
SCALED_MASKED_SOFTMAX = Op(
    name="scaled_masked_softmax",
    fn=ScaledMaskedSoftmaxFn,
    functional=scaled_masked_softmax,
    reference=scaled_masked_softmax_reference,
    samples=_masked_samples,
    module=ScaledMaskedSoftmax,
    permutes=_masked_permutes,
    saves_output=True,
    saved_bytes=lambda kwargs: kwargs["input"].nbytes,
    shards=_shards,
    bench=lambda make, rows, cols: dict(input=make(rows, cols), mask=make.labels(rows, cols, classes=4) == 0, scale=0.125),
)
