"""Losses of an element, summed up or averaged in the pass that computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import Function, differentiable
from .._op import (
    KERNEL_DTYPES,
    Op,
    Sample,
    Summed,
    autocast,
    check_constant,
    check_tensor,
    compiled,
    expands,
    fall_back,
    overridable,
    real,
    reduction_of,
    warn,
    wide,
    wide_dtype,
)  # fmt: skip

losses_fwd = compiled("losses_fwd")
losses_bwd = compiled("losses_bwd")

MSE, L1, HUBER, SMOOTH_L1, BCE, FOCAL, KL, JS = range(8)  # LossKind in csrc/ops/losses.h
NONE, SUM, MEAN, OVER_WEIGHT, OVER_BATCH = range(5)  # Reduction in csrc/ops/losses.cpp
REDUCTIONS = {"none": NONE, "sum": SUM, "mean": MEAN, "batchmean": OVER_BATCH}


def _reduced(loss, x, w, reduction, wide_out):
    loss = loss if w is None else loss * w.to(loss.dtype)
    if reduction == NONE:
        return loss.to(x.dtype)
    weight = None if w is None else w.to(loss.dtype).sum()
    items = {SUM: 1, OVER_WEIGHT: weight, OVER_BATCH: x.shape[0] if x.dim() else 1}
    total = loss.mean() if reduction == MEAN else loss.sum() / items[reduction]  # mean() has derivatives of no elements too
    return total.to(loss.dtype if wide_out else x.dtype)


def _both(x, target):
    return wide(x), target.to(wide_dtype(x))


def mse_loss_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    return _reduced((x_ - t).square(), x, w, reduction, wide_out)


def l1_loss_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    return _reduced((x_ - t).abs(), x, w, reduction, wide_out)


def huber_loss_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    near = (x_ - t).clamp(-a, a)
    return _reduced(near * (x_ - t - near / 2), x, w, reduction, wide_out)


def smooth_l1_loss_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    near = (x_ - t).clamp(-a, a)
    loss = near * (x_ - t - near / 2) / a if kind == SMOOTH_L1 else (x_ - t).abs()
    return _reduced(loss, x, w, reduction, wide_out)


def binary_cross_entropy_with_logits_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    factor = 1 if pos is None else 1 + (pos.to(t.dtype) - 1) * t
    return _reduced((1 - t) * x_ - factor * F.logsigmoid(x_), x, w, reduction, wide_out)


def sigmoid_focal_loss_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    s = torch.sigmoid(x_)
    loss = ((1 - t) * x_ - F.logsigmoid(x_)) * (s * (1 - t) + (1 - s) * t) ** b
    return _reduced(loss if a < 0 else loss * (a * t + (1 - a) * (1 - t)), x, w, reduction, wide_out)


def kl_div_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    x_, t = _both(x, target)
    if log_target:
        loss = torch.exp(t) * (t - x_)
    elif torch.onnx.is_in_onnx_export():  # the older exporter has no xlogy
        loss = t * torch.log(torch.where(t == 0, 1, t)) - t * x_
    else:
        loss = torch.xlogy(t, t) - t * x_
    return _reduced(loss, x, w, reduction, wide_out)


def js_div_reference(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    log_q, t = _both(x, target)
    q, p = torch.exp(log_q), torch.exp(t) if log_target else t
    log_p = t if log_target else torch.log(torch.where(p == 0, 1, p))
    r = torch.where(p == 0, -torch.inf, log_p - log_q)  # no gradient flows from what is multiplied by 0
    growth = torch.exp(r.clamp(max=80)) - 1 if torch.jit.is_tracing() else torch.expm1(r.clamp(max=80))  # ONNX has no expm1
    s, far = torch.log1p(a * growth), r > 80
    u, s = torch.where(far, -math.log(a), r - s), torch.where(far, r + math.log(a), s)
    return _reduced(a * p * torch.where(p == 0, 0, u) - (1 - a) * q * torch.where(q == 0, 0, s), x, w, reduction, wide_out)


@torch.library.register_fake("fusegrad::losses_fwd")
def _(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    if reduction == NONE:
        return torch.empty_like(x), None
    loss = x.new_empty((), dtype=wide_dtype(x) if wide_out else x.dtype)
    return loss, x.new_empty((), dtype=wide_dtype(x)) if reduction == OVER_WEIGHT else None


@torch.library.register_fake("fusegrad::losses_bwd")
def _(dloss, x, target, w, pos, divisor, kind, a, b, log_target, reduction, needed):
    return tuple(torch.empty_like(x) if need else None for need in needed)


class _LossFn(Function):
    params = ()

    @staticmethod
    def forward(x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
        return losses_fwd(x, target, w, pos, kind, a, b, log_target, reduction, wide_out)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, target, w, pos, *ctx.options = inputs
        _, divisor = outputs
        ctx.set_materialize_grads(False)
        if divisor is not None:
            ctx.mark_non_differentiable(divisor)
        ctx.save_for_backward(x, target, w, pos, divisor)

    @classmethod
    def why_no_vmap(cls, tensors, options):
        return None if options[4] == NONE else "vmap of a reduced loss has no kernel"

    @differentiable(lambda ctx: ctx.saved_tensors[:4])
    def backward(ctx, dloss, _):
        dx = dt = None
        if dloss is not None:
            dx, dt = losses_bwd(dloss, *ctx.saved_tensors, *ctx.options[:-1], ctx.needs_input_grad[:2])
        return dx, dt, *[None] * 8


class MSELossFn(_LossFn):
    op = "mse_loss"
    reference = staticmethod(mse_loss_reference)


class L1LossFn(_LossFn):
    op = "l1_loss"
    reference = staticmethod(l1_loss_reference)


class HuberLossFn(_LossFn):
    op = "huber_loss"
    reference = staticmethod(huber_loss_reference)


class SmoothL1LossFn(_LossFn):
    op = "smooth_l1_loss"
    reference = staticmethod(smooth_l1_loss_reference)


class BinaryCrossEntropyWithLogitsFn(_LossFn):
    op = "binary_cross_entropy_with_logits"
    reference = staticmethod(binary_cross_entropy_with_logits_reference)


class SigmoidFocalLossFn(_LossFn):
    op = "sigmoid_focal_loss"
    reference = staticmethod(sigmoid_focal_loss_reference)


class KLDivFn(_LossFn):
    op = "kl_div"
    reference = staticmethod(kl_div_reference)


class JSDivFn(_LossFn):
    op = "js_div"
    reference = staticmethod(js_div_reference)


def _loss(fn, kind, input, target, reduction, *, weight=None, pos=None, a=0.0, b=0.0, log_target=False):
    """Dtypes, shapes and weights as torch has them, then the kernel."""
    op, plain = fn.op, weight is None and pos is None and isinstance(input, Tensor) and isinstance(target, Tensor)
    if plain and target.dtype == input.dtype in KERNEL_DTYPES and target.shape == input.shape and not autocast(input):
        # Nothing of what follows applies; it takes twice as long as the kernel of a small input.
        return fn.call((input, target, None, None), kind, a, b, bool(log_target), REDUCTIONS[reduction], False, outputs=1)
    for name, value in (("input", input), ("target", target), ("weight", weight), ("pos_weight", pos)):
        if value is not None or name in ("input", "target"):
            check_tensor(op, name, value)
            if value.layout != torch.strided:
                raise RuntimeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    if input.is_complex() or target.is_complex():
        if kind != L1 or weight is not None:
            raise TypeError(f"{op}: input and target must be real, got {input.dtype} and {target.dtype}")
        fall_back(op, "there is no kernel for complex numbers", input)
        return F.l1_loss(input, target, reduction=reduction)
    if kind <= HUBER and weight is not None and weight.shape != input.shape:
        raise ValueError(f"{op}: weight must have the shape of input ({list(input.shape)}), got {list(weight.shape)}")
    if kind in (BCE, FOCAL) and target.shape != input.shape:
        raise ValueError(f"{op}: target must have the shape of input ({list(input.shape)}), got {list(target.shape)}")
    if kind == BCE:
        check_constant(op, weight=weight, pos_weight=pos)

    dtype = input.dtype  # of the result; beside a tensor that has dimensions a scalar counts for its kind alone, as in torch
    with_dimensions = [t.dtype for t in (input, target) if t.dim() > 0 and t.is_floating_point()]
    if kind == KL and len(with_dimensions) == 1:
        (dtype,) = with_dimensions
    elif kind != HUBER:  # torch expands the two before
        dtype = torch.promote_types(dtype, target.dtype)
    weight, pos = (t if t is None or t.is_floating_point() or t.dtype == torch.bool else t.to(dtype) for t in (weight, pos))
    for other in (weight, pos):
        if other is not None and (other.dim() > 0 or input.dim() == 0 or not dtype.is_floating_point):
            dtype = torch.promote_types(dtype, other.dtype)
    result = target.dtype if kind == BCE and target.is_floating_point() else dtype  # a quirk of torch's
    # With a weight torch's mse and l1 are made of operators, of which autocast knows a power and a sum on CUDA.
    known = weight is None or kind not in (MSE, L1) or (input.is_cuda and (kind == MSE or reduction != "none"))
    if kind <= KL and kind != FOCAL and known and autocast(input):  # of torch's functions
        result, dtype = (torch.promote_types(t, torch.float32) for t in (result, dtype))
    if not target.is_floating_point() and target.dtype != torch.bool:
        target = target.to(dtype)

    if kind <= HUBER and weight is not None and weight.requires_grad and torch.is_grad_enabled():
        # A weight that is learned: rare enough for what it multiplies to be stored.
        loss = _loss(fn, kind, input, target, "none", a=a, b=b) * weight
        return loss if reduction == "none" else loss.sum() / {"sum": 1, "mean": loss.numel() if kind == HUBER else weight.sum()}[reduction]

    batch, differ = input.shape[0] if input.dim() else 1, input.shape != target.shape
    code = OVER_WEIGHT if reduction == "mean" and weight is not None and kind <= L1 else REDUCTIONS[reduction]
    divisor = None
    if differ and code in (OVER_WEIGHT, OVER_BATCH):
        code, divisor = SUM, batch if code == OVER_BATCH else weight.sum(dtype=dtype)

    both = target.requires_grad and target.dtype != input.dtype
    # A gradient that is summed up over what it was broadcast to is not rounded before.
    through = wide_dtype(input) if differ and dtype.itemsize == 2 and (input.requires_grad or target.requires_grad) else dtype
    if both:
        through = torch.promote_types(through, target.dtype)
    wide_out = through == dtype and code != NONE and not both and input.dtype != dtype and wide_dtype(input) == dtype
    x = input if wide_out else input.to(through)
    target = target.to(through) if both or through != dtype else target
    if differ:
        x, target = torch.broadcast_tensors(x, target)
        if target.requires_grad and x.shape == input.shape:
            x = x.contiguous()  # its layout is that of the target's gradient, whose sum shall have the same bits in every one
    try:
        weight, pos = (None if t is None else t.expand(x.shape) for t in (weight, pos))
    except RuntimeError:
        wrong = "weight" if weight is not None and not expands(weight, x.shape) else "pos_weight"
        fact = list((weight if wrong == "weight" else pos).shape)
        raise RuntimeError(f"{op}: {wrong} must broadcast to the input's shape {list(x.shape)}, got {fact}") from None
    loss = fn.call((x, target, weight, pos), kind, a, b, bool(log_target), code, wide_out, outputs=1).to(result)
    return loss if divisor is None else loss / divisor


def _warn_of_sizes(op: str, input: Tensor, target: Tensor) -> None:
    if isinstance(input, Tensor) and isinstance(target, Tensor) and target.shape != input.shape:
        sizes = f"target size {list(target.shape)} is different from the input size {list(input.shape)}"
        warn(f"{op}: {sizes}; the loss is taken of what they broadcast to, which is rarely what is meant", stacklevel=5)


_SHARED = {
    "ARGS": """input: `[*]`, float32, float64, float16 or bfloat16, any layout.
        target: the shape of `input`, of any of these dtypes, or bool or integer; a gradient flows to it.""",
    "BROADCAST": "or one that broadcasts with it, by strides (with a warning, as torch)",
    "REDUCTION": """reduction: "mean", "sum" or "none".""",
    "LEGACY": """size_average, reduce: torch's old names for `reduction`.""",
    "RETURNS": """The loss, a scalar, or for "none" the shape of `input`; in the dtype that input and target promote to, or
        what torch, if it has the function, makes of them (float32 under autocast). Computed in float32 (float64 for float64).
        Saved for backward: the arguments.""",
    "RAISES": """ValueError: an unknown reduction, a shape that does not fit. RuntimeError: shapes that do not broadcast, two devices, a
        tensor that is not dense. TypeError: an argument that is no tensor.""",
}


def _documented(f):
    """Puts the parts that all docstrings here have in common in their places."""
    for word, text in _SHARED.items():
        f.__doc__ = f.__doc__.replace(f"<{word}>", text)
    return f


@_documented
@overridable
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error:

    .. math:: l = w\, (x - t)^2

    Drop-in for `torch.nn.functional.mse_loss`.

    Args:
        <ARGS> Its shape may be <BROADCAST>.
        <LEGACY>
        <REDUCTION> With a weight the mean is over the sum of the weights.
        weight: the shape of `input`, a factor of each element. One that requires grad is multiplied by torch.

    Returns:
        <RETURNS>

    Raises:
        <RAISES>

    Equivalent eager code::

        loss = (input.float() - target.float()).square()
        y = loss.mean() if weight is None else (loss * weight).sum() / weight.sum()

    Source: Gauss, Theoria combinationis observationum erroribus minimis obnoxiae, 1823.
    """
    _warn_of_sizes("mse_loss", input, target)
    return _loss(MSELossFn, MSE, input, target, reduction_of("mse_loss", reduction, size_average, reduce), weight=weight)


@_documented
@overridable
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error:

    .. math:: l = w\, |x - t|

    Drop-in for `torch.nn.functional.l1_loss`. The derivative where x = t is 0.

    Args:
        <ARGS> Its shape may be <BROADCAST>.
        <LEGACY>
        <REDUCTION> With a weight the mean is over the sum of the weights.
        weight: the shape of `input`, a factor of each element. One that requires grad is multiplied by torch.

    Returns:
        <RETURNS>

    Raises:
        <RAISES>

    Equivalent eager code::

        loss = (input.float() - target.float()).abs()
        y = loss.mean() if weight is None else (loss * weight).sum() / weight.sum()

    Source: Boscovich, De litteraria expeditione per pontificiam ditionem, 1757.
    """
    _warn_of_sizes("l1_loss", input, target)
    return _loss(L1LossFn, L1, input, target, reduction_of("l1_loss", reduction, size_average, reduce), weight=weight)


@_documented
@overridable
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error near the target, absolute error away from it:

    .. math:: l = w \cdot \begin{cases} (x - t)^2 / 2 & |x - t| \le \delta \\ \delta\, (|x - t| - \delta / 2) & \text{else} \end{cases}

    Drop-in for `torch.nn.functional.huber_loss`.

    Args:
        <ARGS> Its shape may be <BROADCAST>.
        <REDUCTION>
        delta: where it goes over from one to the other, positive.
        weight: the shape of `input`, a factor of each element. One that requires grad is multiplied by torch.

    Returns:
        <RETURNS>

    Raises:
        <RAISES> RuntimeError: `delta` is not positive.

    Equivalent eager code::

        far = (input.float() - target.float()).abs()
        loss = torch.where(far <= delta, far.square() / 2, delta * (far - delta / 2))
        y = loss.mean() if weight is None else (loss * weight).mean()

    Source: Huber, Robust Estimation of a Location Parameter, 1964, doi:10.1214/aoms/1177703732.
    """
    delta = real("huber_loss", "delta", delta)
    if not delta > 0:
        raise RuntimeError(f"huber_loss: delta must be positive, got {delta}")
    _warn_of_sizes("huber_loss", input, target)
    return _loss(HuberLossFn, HUBER, input, target, reduction_of("huber_loss", reduction), weight=weight, a=delta)


@_documented
@overridable
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Huber's loss over beta:

    .. math:: l = \begin{cases} (x - t)^2 / (2 \beta) & |x - t| < \beta \\ |x - t| - \beta / 2 & \text{else} \end{cases}

    Drop-in for `torch.nn.functional.smooth_l1_loss`.

    Args:
        <ARGS> Its shape may be <BROADCAST>.
        <LEGACY>
        <REDUCTION>
        beta: where it goes over from one to the other; 0 is `l1_loss`.

    Returns:
        <RETURNS>

    Raises:
        <RAISES> RuntimeError: `beta` is negative.

    Equivalent eager code::

        far = (input.float() - target.float()).abs()
        y = torch.where(far < beta, far.square() / (2 * beta), far - beta / 2).mean()

    Source: Girshick, Fast R-CNN, 2015, arXiv:1504.08083.
    """
    beta = real("smooth_l1_loss", "beta", beta)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss: beta must not be negative, got {beta}")
    _warn_of_sizes("smooth_l1_loss", input, target)
    reduction = reduction_of("smooth_l1_loss", reduction, size_average, reduce)
    # Beside a beta that is no normal number, whose reciprocal is infinite, no difference is small.
    least = torch.finfo(torch.float64 if getattr(input, "dtype", None) == torch.float64 else torch.float32).tiny
    return _loss(SmoothL1LossFn, SMOOTH_L1 if beta >= least else L1, input, target, reduction, a=beta)


@_documented
@overridable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy between logits and probabilities:

    .. math:: l = -w\, (p\, t \log \sigma(x) + (1 - t) \log (1 - \sigma(x)))

    with p = pos_weight. Drop-in for `torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        <ARGS>
        weight: broadcasts to the shape of `input`, by strides: a constant factor of each element.
        <LEGACY>
        <REDUCTION>
        pos_weight: broadcasts to the shape of `input`, by strides: a constant factor of the positive part.

    Returns:
        <RETURNS>

    Raises:
        <RAISES> RuntimeError: a weight that requires grad.

    Equivalent eager code::

        factor = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
        loss = (1 - target) * input.float() - factor * torch.nn.functional.logsigmoid(input.float())
        y = (loss if weight is None else loss * weight).mean()

    Source: Good, Rational Decisions, 1952.
    """
    reduction = reduction_of("binary_cross_entropy_with_logits", reduction, size_average, reduce)
    return _loss(BinaryCrossEntropyWithLogitsFn, BCE, input, target, reduction, weight=weight, pos=pos_weight)


@_documented
@overridable
def sigmoid_focal_loss(input: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    r"""Focal loss of logits, as torchvision.ops has it: binary cross entropy that is small where the prediction is good.

    .. math:: l = -\alpha_t\, (1 - p_t)^\gamma \log p_t

    with p_t = p t + (1 - p) (1 - t), p the sigmoid of the input, and alpha_t = alpha t + (1 - alpha) (1 - t).

    Args:
        <ARGS>
        alpha: weight of the positive class; negative: no weights.
        gamma: how much good predictions are turned down; 0: not at all.
        <REDUCTION>

    Returns:
        <RETURNS>

    Raises:
        <RAISES>

    Equivalent eager code::

        p = torch.sigmoid(input.float())
        ce = torch.nn.functional.binary_cross_entropy_with_logits(input.float(), target, reduction="none")
        y = ce * (1 - (p * target + (1 - p) * (1 - target))) ** gamma
        y = (alpha * target + (1 - alpha) * (1 - target)) * y if alpha >= 0 else y

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv:1708.02002.
    """
    op = "sigmoid_focal_loss"
    a, b = real(op, "alpha", alpha), real(op, "gamma", gamma)
    return _loss(SigmoidFocalLossFn, FOCAL, input, target, reduction_of(op, reduction), a=a, b=b)


@_documented
@overridable
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of the input from the target, element by element:

    .. math:: l = p\, (\log p - x)

    with p = target, 0 for p = 0. Drop-in for `torch.nn.functional.kl_div`.

    Args:
        <ARGS> Here log-probabilities and probabilities. The target's shape may be one that broadcasts with the input's.
        <LEGACY>
        <REDUCTION> "batchmean": the sum over the first size of `input`. torch's "mean", which is over all elements, warns.
        log_target: the target is log-probabilities.

    Returns:
        <RETURNS>

    Raises:
        <RAISES>

    Equivalent eager code::

        t = target.float()
        loss = t.exp() * (t - input) if log_target else torch.xlogy(t, t) - t * input
        y = loss.sum() / len(input) if reduction == "batchmean" else loss.mean()

    Source: Kullback & Leibler, On Information and Sufficiency, 1951, doi:10.1214/aoms/1177729694.
    """
    if size_average is None and reduce is None and reduction == "mean":
        warn("kl_div: reduction='mean' divides by all elements; 'batchmean' is the divergence")
    meant = reduction_of("kl_div", reduction, size_average, reduce, known=tuple(REDUCTIONS))
    loss = _loss(KLDivFn, KL, input, target, meant, log_target=log_target)
    # A quirk of torch's: the old names win, and are divided too.
    return loss / input.shape[0] if reduction == "batchmean" != meant and input.dim() else loss


@_documented
@overridable
def js_div(input: Tensor, target: Tensor, beta: float = 0.5, reduction: str = "batchmean", log_target: bool = False) -> Tensor:
    r"""Generalised Jensen-Shannon divergence between a teacher P and a student Q, as distillation uses it:

    .. math:: l = \beta\, p\, (\log p - \log m) + (1 - \beta)\, q\, (\log q - \log m), \quad m = \beta p + (1 - \beta) q

    Symmetric for beta = 1/2. 0 log 0 is 0, and has derivative 0.

    Args:
        <ARGS> Here log-probabilities log q, and probabilities p. The target's shape may be one that broadcasts with the input's.
        beta: between 0 and 1. Over beta it goes to KL(P|Q) for beta to 0; at the ends themselves it is 0, and refused: see `kl_div`.
        <REDUCTION> "batchmean": the sum over the first size of `input`.
        log_target: the target is log-probabilities.

    Returns:
        <RETURNS>

    Raises:
        <RAISES> ValueError: `beta` out of range.

    Equivalent eager code::

        p, q = target.exp() if log_target else target, input.exp()
        m = beta * p + (1 - beta) * q
        loss = beta * torch.xlogy(p, p / m) + (1 - beta) * torch.xlogy(q, q / m)
        y = loss.sum() / len(input)

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2023, arXiv:2306.13649.
    """
    beta, reduction = _js_options("js_div", beta, reduction)
    return _loss(JSDivFn, JS, input, target, reduction, a=beta, log_target=log_target)


def _js_options(op: str, beta: float, reduction: str) -> tuple[float, str]:
    beta = real(op, "beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"{op}: beta must be between 0 and 1 (at the ends the divergence is 0: see kl_div), got {beta}")
    return beta, reduction_of(op, reduction, known=tuple(REDUCTIONS))


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` with a fused forward and backward. See `mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """`torch.nn.L1Loss` with a fused forward and backward. See `l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


class HuberLoss(torch.nn.HuberLoss):
    """`torch.nn.HuberLoss` with a fused forward and backward. See `huber_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` with a fused forward and backward. See `smooth_l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` with a fused forward and backward. See `binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = dict(pos_weight=self.pos_weight, reduction=self.reduction)
        return binary_cross_entropy_with_logits(input, target, self.weight, **options)


class KLDivLoss(torch.nn.KLDivLoss):
    """`torch.nn.KLDivLoss` with a fused forward and backward. See `kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class SigmoidFocalLoss(torch.nn.Module):
    """`sigmoid_focal_loss` as a module."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"):
        super().__init__()
        op = type(self).__name__
        real(op, "alpha", alpha), real(op, "gamma", gamma), reduction_of(op, reduction)
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(input, target, self.alpha, self.gamma, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class JSDivLoss(torch.nn.Module):
    """`js_div` as a module."""

    def __init__(self, beta: float = 0.5, reduction: str = "batchmean", log_target: bool = False):
        super().__init__()
        _js_options(type(self).__name__, beta, reduction)
        self.beta, self.reduction, self.log_target = beta, reduction, log_target

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return js_div(input, target, self.beta, self.reduction, self.log_target)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}, log_target={self.log_target}"


def _pair(make, kind, *shape, log_target=False, **layout):
    """Input and target of such a loss."""
    x, t = make(*shape, **layout), make(*shape, **layout)
    if kind in (KL, JS):  # log-probabilities, but for their sum
        x = -x.abs() - 0.1
        return dict(input=x, target=-t.abs() - 0.1 if log_target else t.sigmoid())
    return dict(input=x, target=t.sigmoid() if kind in (BCE, FOCAL) else t)


def _samples_of(kind, *options):
    """The shapes and layouts, with one of the options after the other; options(make, shape) gives the keyword arguments."""
    shapes = [(5, 33), (4, 3, 8), (7, 1), (1, 40), (19, 35), (3, 4, 31), (6, 66), (2, 5, 3, 4), (), (0, 8), (2, 9001), (12,), (8, 8)]
    layouts = {4: "transposed", 5: "column_strided", 6: "expanded", 7: "channels_last", 12: "row_strided"}

    def samples(make):
        for n, (name, option) in enumerate((*options, *options)):
            shape = shapes[n % len(shapes)]
            extra = option(make, shape)
            pair = _pair(make, kind, *shape, log_target=extra.get("log_target"), layout=layouts.get(n % len(shapes), "contiguous"))
            yield Sample(f"{n}_{name}", pair | extra)
        for n in range(2 * len(options), len(shapes)):
            name, option = options[n % len(options)]
            extra = option(make, shapes[n])
            pair = _pair(make, kind, *shapes[n], log_target=extra.get("log_target"), layout=layouts.get(n, "contiguous"))
            yield Sample(f"{n}_{name}", pair | extra)
        if kind not in (BCE, FOCAL):
            pair = _pair(make, kind, 6, 5)
            yield Sample("broadcast_target", pair | dict(target=pair["target"][0], reduction="sum"))
            yield Sample("broadcast_both", dict(input=pair["input"][:1], target=pair["target"][:, :1], reduction="none"))

    return samples


def _plain(**kwargs):
    return lambda make, shape: kwargs


def _weighted(**kwargs):
    return lambda make, shape: kwargs | dict(weight=make(*shape).abs() + 0.1)


_REDUCTIONS = [(name, _plain(reduction=name)) for name in ("mean", "sum", "none")]
_WEIGHTED = [(f"weight_{name}", _weighted(reduction=name)) for name in ("mean", "sum", "none")]


def _bce(name):
    def option(make, shape):
        last = shape[-1:] if shape else ()
        return dict(weight=make(*last).abs() + 0.1, pos_weight=make(*last).abs() + 0.5, reduction=name)

    return option


def _with(**kwargs):
    return [(f"{k}_{v}_{r}", _plain(reduction=r, **{k: v})) for r in ("mean", "sum", "none") for k, v in kwargs.items()]


def _saved_bytes(kwargs):
    x, t = kwargs["input"], kwargs["target"]
    shape = torch.broadcast_shapes(x.shape, t.shape)
    width = wide_dtype(x).itemsize if x.shape != t.shape else x.itemsize
    arguments = 2 + sum(kwargs.get(k) is not None for k in ("weight", "pos_weight"))
    divisor = "weight" in kwargs and "pos_weight" not in kwargs and "delta" not in kwargs and kwargs["reduction"] == "mean"
    return shape.numel() * width * arguments + (wide_dtype(x).itemsize if divisor else 0)


def _permutes(kwargs):
    shape = kwargs["input"].shape
    if not shape or any(isinstance(v, Tensor) and v.shape[-1:] != shape[-1:] for v in kwargs.values()):
        return {}
    return {k: -1 for k, v in kwargs.items() if isinstance(v, Tensor)}


def _summed(shape, x, target, w, pos, kind, a, b, log_target, reduction, wide_out):
    if reduction == NONE:
        return None
    share = w.sum(dtype=wide_dtype(x)) if reduction == OVER_WEIGHT else None
    divisor = {SUM: None, MEAN: shape.numel(), OVER_WEIGHT: share, OVER_BATCH: shape[0] if shape else 1}[reduction]
    return Summed((x, target, w, pos, kind, a, b, log_target, SUM, True), divisor, wide_dtype(x) if wide_out else x.dtype)


def _row(kind, fn, functional, reference, module, options, **kwargs):
    reduction = dict(reduction="batchmean") if kind in (KL, JS) else dict(reduction="mean")
    return Op(
        name=functional.__name__,
        fn=fn,
        functional=functional,
        reference=reference,
        samples=_samples_of(kind, *options),
        module=module,
        torch=getattr(F, functional.__name__, None),
        permutes=_permutes,
        constants=("weight", "pos_weight"),
        saved_bytes=_saved_bytes,
        shards=lambda *_: ((), {}),
        summed=_summed,
        bench=lambda make, rows, cols: _pair(make, kind, rows, cols) | reduction,
        **kwargs,
    )


_delta = [(f"delta_{name}", _plain(delta=delta, reduction=name)) for delta, name in ((0.5, "mean"), (2.0, "sum"), (0.7, "none"))]
_delta_weight = [(f"delta_weight_{r}", _weighted(delta=0.8, reduction=r)) for r in ("mean", "sum", "none")]
_beta = [(f"beta_{beta}_{name}", _plain(beta=beta, reduction=name)) for beta, name in ((0.0, "mean"), (2.0, "sum"), (0.7, "none"))]
_focal = [
    (f"alpha_{alpha}_gamma_{gamma}_{name}", _plain(alpha=alpha, gamma=gamma, reduction=name))
    for alpha, gamma, name in ((0.25, 2.0, "none"), (-1.0, 1.0, "mean"), (0.6, 3.5, "sum"), (0.5, 0.0, "mean"))
]
_batch = [("batchmean", _plain(reduction="batchmean")), *_with(log_target=True), *_REDUCTIONS]
_js = [
    (f"beta_{beta}_{name}_{log}", _plain(beta=beta, reduction=name, log_target=log))
    for beta, name, log in ((0.5, "batchmean", False), (0.1, "sum", True), (0.9, "none", False), (0.5, "mean", True), (0.3, "none", True))
]

MSE_LOSS = _row(MSE, MSELossFn, mse_loss, mse_loss_reference, MSELoss, [*_REDUCTIONS, *_WEIGHTED])
L1_LOSS = _row(L1, L1LossFn, l1_loss, l1_loss_reference, L1Loss, [*_REDUCTIONS, *_WEIGHTED])
HUBER_LOSS = _row(HUBER, HuberLossFn, huber_loss, huber_loss_reference, HuberLoss, [*_REDUCTIONS, *_delta, *_delta_weight])
SMOOTH_L1_LOSS = _row(SMOOTH_L1, SmoothL1LossFn, smooth_l1_loss, smooth_l1_loss_reference, SmoothL1Loss, [*_REDUCTIONS, *_beta])
BINARY_CROSS_ENTROPY_WITH_LOGITS = _row(
    BCE,
    BinaryCrossEntropyWithLogitsFn,
    binary_cross_entropy_with_logits,
    binary_cross_entropy_with_logits_reference,
    BCEWithLogitsLoss,
    [*_REDUCTIONS, *((f"weights_{name}", _bce(name)) for name in ("mean", "sum", "none"))],
)
SIGMOID_FOCAL_LOSS = _row(FOCAL, SigmoidFocalLossFn, sigmoid_focal_loss, sigmoid_focal_loss_reference, SigmoidFocalLoss, _focal, units=16)
KL_DIV = _row(KL, KLDivFn, kl_div, kl_div_reference, KLDivLoss, _batch)
JS_DIV = _row(JS, JSDivFn, js_div, js_div_reference, JSDivLoss, _js, units=64)  # what cancels in the reference's derivative
