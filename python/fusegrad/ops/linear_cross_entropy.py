"""Cross entropy of the logits of a linear layer, which are never all there; and the log-probabilities of tokens by the same way."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .. import _op
from .._autograd import Function, differentiable
from .._op import (
    SHAPES,
    Op,
    Sample,
    Summed,
    autocast,
    check_constant,
    check_tensor,
    compiled,
    integer,
    overridable,
    reduction_of,
    warn,
    wide,
    wide_dtype,
)
from .cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    described,
    loss_items,
    loss_numbers,
    summed_options,
    weight_under_autocast,
    without_first,
)
from .linear import product_flops

linear_cross_entropy_fwd = compiled("linear_cross_entropy_fwd")
linear_cross_entropy_bwd = compiled("linear_cross_entropy_bwd")


def linear_cross_entropy_reference(x, w, target, b, class_weight, num_items, *options):
    # An ignored token is cut off before anything is computed of it: an infinity in one must not become a NaN gradient of w.
    kept = (target != options[0]).unsqueeze(-1)
    z = F.linear(torch.where(kept, wide(x), 0), wide(w), None if b is None else wide(b))
    loss, lse = cross_entropy_reference(z, target, class_weight, num_items, *options[:-2])
    dtype = wide_dtype(x) if options[-4] else x.dtype
    return loss.to(dtype), lse if lse is None else lse.to(dtype)


@torch.library.register_fake("fusegrad::linear_cross_entropy_fwd")
def _(x, w, target, b, class_weight, num_items, *options):
    reduce, *_, wide_out, return_lse, _, needed = options[5:]
    wide = dict(dtype=wide_dtype(x))
    out = wide if wide_out else dict(dtype=x.dtype)
    loss, lse = x.new_empty(() if reduce else target.shape, **out), x.new_empty(target.shape, **out) if return_lse else None
    if reduce and any(needed):
        shapes = x.shape, w.shape, w.shape[:1]
        divisor, grads = x.new_empty((), **wide), (x.new_empty(s, **wide) if need else None for s, need in zip(shapes, needed))
        return loss, lse, None, None, divisor, *grads
    top, log_sum = x.new_empty(target.shape, **wide), x.new_empty(target.shape, **wide)
    return loss, lse, top, log_sum, x.new_empty((), **wide) if reduce else None, None, None, None


@register_flop_formula(torch.ops.fusegrad.linear_cross_entropy_fwd)
def _(x, w, *rest, out_shape):
    *_, dx, dw, _ = out_shape
    return product_flops(x, w) * (1 + (dx is not None) + (dw is not None))


@register_flop_formula(torch.ops.fusegrad.linear_cross_entropy_bwd)
def _(dloss, dlse, x, w, target, b, class_weight, top, log_sum, *rest, out_shape):
    dx, dw, _ = out_shape  # without top the forward has made them
    return 0 if top is None else product_flops(x, w) * (1 + (dx is not None) + (dw is not None))


@torch.library.register_fake("fusegrad::linear_cross_entropy_bwd")
def _(dloss, dlse, x, w, target, b, *rest):
    dx, dw, needed = x.new_empty(x.shape), w.new_empty(w.shape), rest[-1]
    db = (x if b is None else b).new_empty(w.shape[:1])
    return tuple(g if need else None for g, need in zip((dx, dw, db), needed))


def _backward(ctx, dloss, dlse, saved, options):
    """The gradients of x, w and b, and nothing for the arguments after them."""
    needed = ctx.needs_input_grad
    if dloss is None and dlse is None:
        return (None,) * len(needed)
    dx, dw, db = linear_cross_entropy_bwd(dloss, dlse, *saved, *options, [needed[0], needed[1], needed[3]])
    return dx, dw, None, db, *[None] * (len(needed) - 4)


class LinearCrossEntropyFn(Function):
    op = "linear_cross_entropy"
    reference = staticmethod(linear_cross_entropy_reference)

    @staticmethod
    def forward(
        x, w, target, b, class_weight, num_items, ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero,
        wide_out, return_lse, chunk, needed
    ):  # fmt: skip  # spelled out: torch.compile counts the arguments to tell this form from the one with ctx
        options = (ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero, wide_out, return_lse)
        return linear_cross_entropy_fwd(x, w, target, b, class_weight, num_items, *options, chunk, needed)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, target, b, class_weight, num_items, *ctx.options = inputs
        ctx.divisor_is_given = num_items is not None
        loss, lse, *rest = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        top, log_sum, divisor, *grads = rest
        # The second derivative needs the divisor that was given.
        divisor = num_items if ctx.divisor_is_given else divisor
        ctx.save_for_backward(x, w, target, b, class_weight, top, log_sum, divisor, *grads)

    def inputs(ctx):
        *inputs, _, _, divisor, _, _, _ = ctx.saved_tensors
        return *inputs, divisor if ctx.divisor_is_given else None

    @differentiable(inputs)
    def backward(ctx, dloss, dlse, *_):
        return _backward(ctx, dloss, dlse, ctx.saved_tensors, [*ctx.options[:5], ctx.options[-2]])


def linear_token_log_probs_reference(x, w, target, b, ignore_index, softcap, scale, wide_out, return_lse, chunk):
    options = (ignore_index, 0.0, 0.0, softcap, scale, False, False, 0.0, False, wide_out, return_lse, chunk, None)
    loss, lse = linear_cross_entropy_reference(x, w, target, b, None, None, *options)
    return -loss, lse


class LinearTokenLogProbsFn(Function):
    op = "linear_token_log_probs"
    reference = staticmethod(linear_token_log_probs_reference)

    @staticmethod
    def forward(x, w, target, b, ignore_index, softcap, scale, wide_out, return_lse, chunk):
        options = (ignore_index, 0.0, 0.0, softcap, scale, False, False, 0.0, False, wide_out, return_lse, chunk, [False] * 3)
        loss, lse, top, log_sum, *_ = linear_cross_entropy_fwd(x, w, target, b, None, None, *options)
        return -loss, lse, top, log_sum

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, target, b, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.save_for_backward(x, w, target, b, *outputs[2:])

    @differentiable(lambda ctx: ctx.saved_tensors[:4])
    def backward(ctx, dlogp, dlse, *_):
        ignore_index, softcap, scale, _, _, chunk = ctx.options
        dloss = None if dlogp is None else -dlogp
        x, w, target, b, top, log_sum = ctx.saved_tensors
        saved = (x, w, target, b, None, top, log_sum, *[None] * 4)
        return _backward(ctx, dloss, dlse, saved, (ignore_index, 0.0, 0.0, softcap, scale, chunk))


def ignored(op: str, ignore_index: int | None) -> int:
    return -100 if ignore_index is None else integer(op, "ignore_index", ignore_index)


def _chunking(op, options):
    try:
        return options.batch_chunk_size, options.chunking_method, options.acc_dtype, options.acc_policy
    except AttributeError:
        raise TypeError(f"{op}: options must be a torch.nn.LinearCrossEntropyOptions or None, got {type(options).__name__}") from None


def _chunk(op, options, x):
    """What the kernel is told of the tokens per chunk: their number, or -n for "aspect_ratio:n", or 0 for its own choice."""
    if options is None:
        return 0
    size, method, acc_dtype, _ = _chunking(op, options)
    if acc_dtype not in (None, x.dtype, wide_dtype(x)):
        raise RuntimeError(f"{op}: options.acc_dtype must be None or {wide_dtype(x)} for input of {x.dtype}, got {acc_dtype}")
    if method == "auto":
        method = None if size is not None else "aspect_ratio" if x.dtype != wide_dtype(x) and x.device.type == "cpu" else "aspect_ratio:2"
    if size is not None and method is not None:
        raise ValueError(f"{op}: options must have batch_chunk_size or chunking_method, got {size} and {method!r}")
    if method is not None:
        return -int(method.partition(":")[2] or 1)
    return 0 if size is None else size


def _compact(options, x) -> bool:
    """Whether memory comes before speed: where torch's policy, or its sums in 16 bits, save it a float32 gradient of the weight beside
    the one that it returns. No gradient waits for the backward then, which makes the logits again."""
    if options is None:
        return False
    policy, acc_dtype, narrow = options.acc_policy, options.acc_dtype, x.dtype != wide_dtype(x)
    if policy == "auto":
        policy, acc_dtype = "accurate" if narrow and x.device.type == "cpu" else "compact", acc_dtype or wide_dtype(x)
    return policy == "compact" or narrow and (acc_dtype or x.dtype) == x.dtype


def _check(op, input, linear_weight, target, linear_bias):
    """Of what both functions take."""
    check_tensor(op, "input", input)
    check_tensor(op, "linear_weight", linear_weight)
    check_tensor(op, "target", target)
    if input.dim() == 0:
        raise RuntimeError(f"{op}: input must have at least one dimension, got a scalar")
    if linear_bias is not None:
        check_tensor(op, "linear_bias", linear_bias)
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        placements = getattr(t, "placements", ())  # of a DTensor
        if any(not p.is_replicate() for p in placements):
            fix = "gather it first, full_tensor() or redistribute(placements=[Replicate()]), or use vocab_parallel_cross_entropy"
            raise RuntimeError(f"{op}: {name} must not be sharded ({fix}), got {placements}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        expected = f"shape [C, {input.shape[-1]}] for input {list(input.shape)} (gather the head first if it is sharded)"
        raise RuntimeError(f"{op}: linear_weight must have {expected}, got {list(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(f"{op}: linear_bias must have shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}")


def _met(input, linear_weight, linear_bias) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast tensors of two dtypes meet in the wider one, as torch's products take any."""
    if autocast(input) and torch.float64 not in (input.dtype, linear_weight.dtype):
        if linear_weight.dtype not in (input.dtype, torch.float32):
            input, linear_weight = input.float(), linear_weight.float()
        if linear_bias is not None and linear_bias.dtype not in (input.dtype, torch.float32):
            linear_bias = linear_bias.float()
    return input, linear_weight, linear_bias


def _check_dtypes(op, input, **tensors) -> None:
    """As the kernel asks of linear_weight and linear_bias, for what does not come to it."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in (input.dtype, wide_dtype(input)):
            expected = " or ".join(dict.fromkeys((str(input.dtype), str(wide_dtype(input)))))
            raise TypeError(f"{op}: {name} must be {expected}, got {t.dtype}")


def _labels(op, input, target) -> Tensor:
    if target.shape != input.shape[:-1]:
        expected = f"one class per token, shape {list(input.shape[:-1])} for input {list(input.shape)}"
        raise ValueError(f"{op}: target must have {expected}, got {list(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{op}: target must be int64 (class indices), got {target.dtype}")
    return target.long()


@overridable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: float | Tensor | None = None,
    return_lse: bool = False,
    empty: str = "nan",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross entropy of the logits of a linear layer (the head of a language model), a chunk of tokens at a time: the logits, by far
    the largest tensor of such a model, are never all there, neither forward nor backward.

    .. math:: \mathrm{cross\_entropy}(\mathrm{input}\, \mathrm{linear\_weight}^T + \mathrm{linear\_bias}, \mathrm{target})

    with all options of `cross_entropy`, where their formulas are. Drop-in for `torch.nn.functional.linear_cross_entropy`.

    Args:
        input: `[N, H]` or `[H]`, float32, float64, float16 or bfloat16, any layout.
        linear_weight: `[C, H]`, of the input's dtype, or float32 with a 16-bit input. `[C, d1, ..., H]` (a loss of several
            dimensions) goes through `torch.nn.functional.linear` and `cross_entropy`.
        target: class indices `[N]` or `[]`, int64 (or uint8, as torch). Class probabilities go the same way as a weight of several
            dimensions.
        linear_bias: `[C]`, or None.
        weight, reduction, label_smoothing, z_loss, logit_softcap, logit_scale, num_items, return_lse, empty: see `cross_entropy`.
        ignore_index: None is -100. A token with this label has loss and gradient 0, whatever its features are.
        options: `torch.nn.LinearCrossEntropyOptions` says how many tokens a chunk has; None lets as many be in one as 64 MB of
            logits in float32 (float64) have room for. Where torch's saves memory, no gradient waits for the backward, which makes the
            logits again: a fourth product, for nothing of the weight's size beside its gradient (if 16-bit weights have more classes
            than twice the tokens). That is `acc_policy="compact"`, which "auto" is but for 16 bits on a CPU, and `acc_dtype` of 16
            bits, which None is beside a policy that is not "auto". Three products, by "accurate" with an `acc_dtype` of float32. Sums
            are in float32 (float64) in any case. A graph may be kept. Where the logits are not made in chunks, for a weight of several
            dimensions or probabilities, options are ignored with a warning.

    Returns:
        The loss in the input's dtype (float32 under autocast), or `(loss, lse)`. Reduced to a number without lse, its forward makes
        the gradients too, while the logits are there; else the backward makes the logits again, a chunk of tokens at a time, or of
        classes. Memory beyond arguments and gradients, with 4 bytes a number (8 in float64): a chunk's logits, twice its tokens'
        features, at most 32 MB for a part of a 16-bit weight, half the logits again where products have 16-bit factors, and the
        gradients in float32 until the backward has rounded them; where it makes the logits again instead, the gradient of a 16-bit
        weight in float32, or the features of all tokens twice and 32 MB at most, whichever is less. Saved for backward: input,
        linear_weight, linear_bias, target, weight, and the gradients in float32 that are asked for, with the divisor of a mean (where
        the logits are made again two float32 per token instead). What does not require grad costs nothing.

    Raises:
        IndexError: on the CPU, a label that is neither a class nor `ignore_index`; on CUDA the token's loss and gradient become NaN,
        and with them those of linear_weight and linear_bias. ValueError: a target of another shape, an
        unknown `reduction` or `empty`, `ignore_index` with probabilities. RuntimeError: a shape or device that does not fit.
        TypeError: a dtype that does not go with the input's.

    Equivalent eager code::

        z = torch.nn.functional.linear(input.float(), linear_weight.float(), linear_bias)
        y = torch.nn.functional.cross_entropy(z, target, weight, label_smoothing=label_smoothing, reduction=reduction)

    Sources: Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009 (the memory that it saves);
    those of `cross_entropy`.
    """
    op = "linear_cross_entropy"
    _check(op, input, linear_weight, target, linear_bias)
    if input.dim() > 2:
        raise RuntimeError(f"{op}: input must have one or two dimensions, got {list(input.shape)}")
    input, linear_weight, linear_bias = _met(input, linear_weight, linear_bias)
    if weight is not None:
        check_tensor(op, "weight", weight)
        weight = weight_under_autocast(input, weight)
        _check_dtypes(op, input, weight=weight)
    reduction_of(op, reduction)
    numbers, divisor = loss_numbers(op, label_smoothing, z_loss, logit_softcap, logit_scale), num_items
    items, num_items = loss_items(op, reduction, num_items, empty)
    chunk = _chunk(op, options, input)
    if linear_weight.dim() > 2 or target.is_floating_point():
        if options is not None:
            why = "a linear_weight of more than two dimensions" if linear_weight.dim() > 2 else "targets that are probabilities"
            warn(f"{op}: options are ignored beside {why}: the logits are made as a whole")
        return _whole_logits(
            input, linear_weight, target, linear_bias, weight, ignore_index,
            dict(reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, logit_softcap=logit_softcap,
                 logit_scale=logit_scale, num_items=divisor, return_lse=return_lse, empty=empty),
        )  # fmt: skip
    target = _labels(op, input, target)
    if weight is not None:
        if weight.shape != linear_weight.shape[:1]:
            raise RuntimeError(f"{op}: weight must have one element per class ({list(linear_weight.shape[:1])}), got {list(weight.shape)}")
        check_constant(op, weight=weight)
    single, reduce = input.dim() == 1, reduction != "none"
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    # Where the backward will ask for a multiple of gradients that are known now, the forward makes them.
    at_once = reduce and not (return_lse or _compact(options, input)) and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    needed = [at_once and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    loss, lse = LinearCrossEntropyFn.call(
        (input, linear_weight, target, linear_bias, weight, num_items), ignored(op, ignore_index),
        *numbers, reduce, reduction == "mean", items,
        empty == "zero", autocast(input), return_lse, chunk, needed, outputs=2,
    )  # fmt: skip
    if single:
        loss, lse = loss if reduce else loss.squeeze(0), lse if lse is None else lse.squeeze(0)
    return (loss, lse) if return_lse else loss


def _whole_logits(x, w, target, b, class_weight, ignore_index, options):
    """Where no kernel makes the logits in chunks."""
    op, probabilities = "linear_cross_entropy", target.is_floating_point()
    _check_dtypes(op, x, linear_weight=w, linear_bias=b)
    if probabilities and ignore_index is not None:
        raise RuntimeError(f"{op}: ignore_index goes with class indices, got {ignore_index} and a target of probabilities")
    if w.dim() > 2 and x.dim() == 1:
        raise RuntimeError(f"{op}: input must be [N, H] with a linear_weight of several dimensions {list(w.shape)}, got {list(x.shape)}")
    _op.fall_back(op, "targets are probabilities" if probabilities else "linear_weight has more than two dimensions", x)
    if not probabilities and target.dim() > 1 and target.shape[0] == x.shape[0]:
        # Cut off, so that an infinity in an ignored token makes no NaN gradient of w.
        x = torch.where((target != ignored(op, ignore_index)).flatten(1).any(1, keepdim=True), x, 0)
    z = F.linear(x.to(w.dtype), w.flatten(0, -2), None if b is None else b.flatten().to(w.dtype))
    z = z.reshape(*x.shape[:-1], *w.shape[:-1])
    found = cross_entropy(z, target, class_weight, ignore_index=ignored(op, ignore_index), **options)
    if w.dtype == x.dtype:
        return found
    return tuple(t.to(x.dtype) for t in found) if isinstance(found, tuple) else found.to(x.dtype)


@overridable
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
    wide: bool = False,
    options=None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The log-probability that a linear layer (the head of a language model) gives to each token, a chunk of tokens at a time: what
    preference and reinforcement learning losses are made of, by the kernels of `linear_cross_entropy` and within its memory.

    .. math:: y_n = z_{n, \mathrm{target}_n} - \mathrm{logsumexp}(z_n), \quad
        z = \mathrm{softcap}(\mathrm{logit\_scale} \cdot (\mathrm{input}\, \mathrm{linear\_weight}^T + \mathrm{linear\_bias}))

    Args:
        input: `[*, H]`, float32, float64, float16 or bfloat16, any layout.
        linear_weight: `[C, H]`, of the input's dtype, or float32 with a 16-bit input.
        target: class indices `[*]`, int64 (or uint8).
        linear_bias: `[C]`, or None.
        ignore_index: a token with this label has log-probability, lse and gradient 0; None is -100.
        logit_softcap, logit_scale: see `cross_entropy`; a scale of 1 / temperature gives the probabilities of sampling with it.
        return_lse: also return the log-partition function of each token; gradients flow through it.
        wide: results in the dtype that sums are taken in, float32 for 16-bit input: ratios of probabilities need the digits.
        options: see `linear_cross_entropy`.

    Returns:
        `[*]`, or `(log_probs, lse)`. The backward takes any cotangent and makes the logits again, chunk by chunk (of classes, for a
        16-bit weight of more than twice as many classes as there are tokens).
        Saved for backward: input, linear_weight, linear_bias, target and two float32 per token.

    Raises:
        IndexError: on the CPU, a label that is neither a class nor `ignore_index`; on CUDA as in `linear_cross_entropy`.
        ValueError: a target of another shape.
        RuntimeError: another shape or device that does not fit. TypeError: a dtype that does not.

    Equivalent eager code::

        z = torch.nn.functional.linear(input.float(), linear_weight.float(), linear_bias)
        y = torch.log_softmax(z, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    Source: the policy term of Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290.
    """
    op = "linear_token_log_probs"
    _check(op, input, linear_weight, target, linear_bias)
    if linear_weight.dim() > 2:
        raise RuntimeError(f"{op}: linear_weight must have two dimensions, got {list(linear_weight.shape)}")
    input, linear_weight, linear_bias = _met(input, linear_weight, linear_bias)
    target = _labels(op, input, target)
    *_, cap, factor = loss_numbers(op, 0.0, 0.0, logit_softcap, logit_scale)
    shape = target.shape
    if input.dim() != 2:
        input, target = input.reshape(math.prod(shape), input.shape[-1]), target.reshape(math.prod(shape))
    log_probs, lse = LinearTokenLogProbsFn.call(
        (input, linear_weight, target, linear_bias), ignored(op, ignore_index), cap, factor,
        bool(wide), return_lse, _chunk(op, options, input), outputs=2,
    )  # fmt: skip
    if len(shape) != 1:
        log_probs, lse = log_probs.reshape(shape), lse if lse is None else lse.reshape(shape)
    return (log_probs, lse) if return_lse else log_probs


class _Head(torch.nn.Module):
    """What `torch.nn.LinearCrossEntropyLoss` is, for a torch that has none."""

    def __init__(self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None, reduction="mean", weight=None,
                 ignore_index=None, label_smoothing=0.0, options=None):  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", _Head)):
    """`torch.nn.LinearCrossEntropyLoss` in chunks, with the further options of `linear_cross_entropy`; it owns `linear.weight` (and
    `linear.bias`) as torch's does, for an optimizer, a tied embedding or a state dict."""

    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None, reduction="mean", weight=None,
        ignore_index=None, label_smoothing=0.0, options=None, z_loss=0.0, logit_softcap=None, logit_scale=1.0, return_lse=False,
        empty="nan"
    ):  # fmt: skip
        super().__init__(
            in_features, num_classes, out_features=out_features, bias=bias, device=device, dtype=dtype, reduction=reduction,
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
        op = "LinearCrossEntropyLoss"
        ignored(op, ignore_index)
        loss_numbers(op, label_smoothing, z_loss, logit_softcap, logit_scale)
        loss_items(op, reduction, None, empty)
        if options is not None:
            _chunking(op, options)
        self.extra = dict(z_loss=z_loss, logit_softcap=logit_softcap, logit_scale=logit_scale, return_lse=return_lse, empty=empty)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), described(self.extra))))

    def forward(self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        w, b = self.linear.weight, self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            w, b = w.reshape(*shape, -1), None if b is None else b.reshape(shape)
        return linear_cross_entropy(
            input, w, target, linear_bias=b, weight=self.weight, reduction=self.reduction, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, options=self.options, num_items=num_items, **self.extra,
        )  # fmt: skip


class _Chunks:
    """As much of `torch.nn.LinearCrossEntropyOptions` as counts here, for a torch that has none."""

    def __init__(self, batch_chunk_size=None, chunking_method="auto", acc_policy="auto", acc_dtype=None):
        self.batch_chunk_size, self.chunking_method = batch_chunk_size, chunking_method
        self.acc_policy, self.acc_dtype = acc_policy, acc_dtype


_Options = getattr(torch.nn, "LinearCrossEntropyOptions", _Chunks)


def _args(make, tokens, features, classes, layout="contiguous", ignore=None, param=False, bias=False):
    args = dict(input=make(tokens, features, layout=layout))
    args["linear_weight"] = make.param(classes, features) if param else make(classes, features, scale=0.5)
    args["target"] = make.labels(tokens, classes=classes, ignore=ignore)
    return args | (dict(linear_bias=make.param(classes)) if bias else {})


def _samples(make):
    def sample(name, *shape, layout="contiguous", ignore=None, param=False, bias=False, **options):
        return Sample(name, _args(make, *shape, layout, ignore, param, bias) | options)

    yield sample("plain", 6, 8, 17)
    yield sample("bias", 5, 7, 12, bias=True, reduction="sum", layout="row_strided")
    yield sample("none", 9, 5, 20, bias=True, reduction="none", layout="transposed")
    yield sample("ignored", 7, 6, 11, ignore=-100, ignore_index=-100, layout="column_strided")
    yield sample("ignored_class", 8, 4, 9, ignore=3, ignore_index=3, reduction="none")
    yield sample("weights", 6, 5, 10, ignore=-100, weight=make.param(10, positive=True), param=True)
    yield sample("weights_smoothing", 6, 9, 13, bias=True, label_smoothing=0.2, weight=make.param(13, positive=True), reduction="none")
    yield sample("smoothing", 5, 6, 8, label_smoothing=0.1, empty="zero", param=True, bias=True)
    yield sample("z_loss", 5, 6, 15, z_loss=0.05, ignore=-100, reduction="sum")
    yield sample("softcap", 4, 6, 12, logit_softcap=2.0, z_loss=1e-2, weight=make.param(12, positive=True), logit_scale=0.5)
    yield sample("scale", 4, 6, 12, logit_scale=2.0, logit_softcap=5.0, reduction="none", layout="offset")
    yield sample("lse", 6, 5, 14, return_lse=True, ignore=-100, bias=True)
    yield sample("lse_none", 6, 5, 14, return_lse=True, reduction="none", label_smoothing=0.1)
    yield sample("num_items", 6, 4, 7, num_items=11, ignore=-100)
    yield sample("num_items_tensor", 6, 4, 7, num_items=make.number(5.0), bias=True)
    yield sample("two_a_chunk", 7, 5, 9, options=_Options(batch_chunk_size=2, acc_policy="accurate"), bias=True, ignore=-100)
    yield sample("chunks_none", 7, 5, 9, options=_Options(batch_chunk_size=3), reduction="none", param=True)
    yield sample("aspect_ratio", 9, 4, 12, options=_Options(chunking_method="aspect_ratio:2"))
    compact = dict(options=_Options(batch_chunk_size=2, acc_policy="compact"), weight=make.param(13, positive=True))
    yield sample("compact", 5, 6, 13, bias=True, ignore=-100, label_smoothing=0.1, param=True, **compact)
    yield sample("empty_zero", 3, 4, 6, ignore="all", empty="zero")
    nothing = sample("no_weight", 3, 4, 6, weight=without_first(make.param(6, positive=True)), empty="zero", label_smoothing=0.1)
    nothing.kwargs["target"] = make.labels(3, classes=1)
    yield nothing
    yield sample("empty_nan", 3, 4, 6, ignore="all", bias=True)
    yield sample("no_tokens", 0, 4, 6, reduction="sum", bias=True)
    yield sample("one_class", 3, 4, 1)
    weight = make(6, 11, layout="transposed", scale=0.5)
    yield Sample("one_token", dict(input=make(11), linear_weight=weight, target=make.labels(classes=6), reduction="none"))


def _log_probs_samples(make):
    def sample(name, *shape, layout="contiguous", ignore=None, param=False, bias=False, **options):
        return Sample(name, _args(make, *shape, layout, ignore, param, bias) | options)

    yield sample("plain", 6, 8, 17)
    yield sample("bias", 5, 7, 12, bias=True, layout="row_strided")
    yield sample("param", 5, 7, 12, bias=True, param=True)
    yield sample("transposed", 9, 5, 20, layout="transposed")
    yield sample("ignored", 7, 6, 11, ignore=-100, ignore_index=-100)
    yield sample("ignored_class", 8, 4, 9, ignore=3, ignore_index=3, layout="column_strided", return_lse=True)
    yield sample("softcap", 4, 6, 12, logit_softcap=2.0)
    yield sample("scale", 4, 6, 12, logit_scale=2.0, logit_softcap=5.0, layout="offset")
    yield sample("temperature", 4, 6, 12, logit_scale=0.7, bias=True)
    yield sample("lse", 6, 5, 14, return_lse=True, ignore=-100)
    yield sample("wide", 6, 5, 14, wide=True, bias=True)
    yield sample("wide_lse", 6, 5, 14, wide=True, return_lse=True, param=True)
    yield sample("two_a_chunk", 7, 5, 9, options=_Options(batch_chunk_size=2), bias=True, ignore=-100)
    yield sample("aspect_ratio", 9, 4, 12, options=_Options(chunking_method="aspect_ratio"))
    yield sample("no_tokens", 0, 4, 6, bias=True)
    weight = make(6, 11, layout="transposed", scale=0.5)
    yield Sample("sequences", dict(input=make(2, 3, 11), linear_weight=weight, target=make.labels(2, 3, classes=6)))
    yield Sample("one_token", dict(input=make(11), linear_weight=weight, target=make.labels(classes=6)))


def _saved_bytes(kwargs):
    x, w, target = kwargs["input"], kwargs["linear_weight"], kwargs["target"]
    b, class_weight, number = (kwargs.get(k) for k in ("linear_bias", "weight", "num_items"))
    width = wide_dtype(x).itemsize
    inputs = sum(t.nbytes for t in (x, w, target, b, class_weight, number) if isinstance(t, Tensor))
    if kwargs.get("reduction") == "none":
        return inputs + 2 * target.numel() * width
    inputs += 0 if isinstance(number, Tensor) else width
    if kwargs.get("return_lse") or _compact(kwargs.get("options"), x):
        return inputs + 2 * target.numel() * width
    return inputs + width * sum(t.numel() for t in (x, w, b) if t is not None)


def _log_probs_saved_bytes(kwargs):
    return _saved_bytes(kwargs | dict(reduction="none"))


def _workspace(kwargs):
    """Bytes beyond arguments and results: a chunk's logits (and their gradient in 16 bits), its features, a part of the weight, some
    numbers per token, and the gradients that are asked for, in float32."""
    x, w, b = kwargs["input"], kwargs["linear_weight"], kwargs.get("linear_bias")
    width, tokens = wide_dtype(x).itemsize, x.numel() // max(1, x.shape[-1])
    chunk = min(tokens, max(1, 2**26 // (width * w.shape[0])))
    part = 0 if w.dtype == wide_dtype(x) and w.is_contiguous() else min(2**25, width * w.numel())
    part += 2 * chunk * w.shape[0] if x.dtype == w.dtype != wide_dtype(x) else 0
    grads = sum(t.numel() for t in (x, w, b) if t is not None and t.requires_grad)
    return width * (chunk * w.shape[0] + 2 * chunk * x.shape[-1] + 8 * tokens + 2 * w.shape[0] + grads) + part


def _like_torch(input, linear_weight, target, *, return_lse=False, z_loss=0, num_items=None, logit_softcap=None, logit_scale=1,
                empty="nan", options=None, **kwargs):  # fmt: skip
    """`torch.nn.functional.linear_cross_entropy` where the options are its own; None where they are not."""
    if (return_lse, z_loss, num_items, logit_softcap, logit_scale, empty) == (False, 0, None, None, 1, "nan"):
        return F.linear_cross_entropy(input, linear_weight, target, **kwargs)
    return None


def _bench(make, rows, cols):
    """Tokens and classes; the features of a model where the size is one of a model."""
    return _args(make, rows, 512 if rows * cols >= 2**20 else 16, cols)


_SHAPES = (*SHAPES[:5], (1024, 32000), (256, 128256))  # vocabularies of models instead of the widest ones


def _summed(shape, x, w, target, b, class_weight, num_items, *options):
    found = summed_options(x, target, class_weight, num_items, options)
    return None if found is None else Summed((x, w, target, b, class_weight, num_items, *found[0]), *found[1:])


_SHARDS = (1,), {1: (), 2: (0,)}  # the tokens may be split, the head not

LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    constants=("weight", "num_items"),
    fn=LinearCrossEntropyFn,
    functional=linear_cross_entropy,
    reference=linear_cross_entropy_reference,
    samples=_samples,
    module=LinearCrossEntropyLoss,
    torch=_like_torch if hasattr(F, "linear_cross_entropy") else None,
    permutes=lambda kwargs: {"input": -1, "linear_weight": -1},
    by_reference="targets that are probabilities, weights of more than two dimensions",
    layout_bits=False,
    gemm="wide",
    workspace=_workspace,
    saved_bytes=_saved_bytes,
    shards=lambda *_: _SHARDS,
    summed=_summed,
    bench=_bench,
    shapes=_SHAPES,
)

LINEAR_TOKEN_LOG_PROBS = Op(
    name="linear_token_log_probs",
    fn=LinearTokenLogProbsFn,
    functional=linear_token_log_probs,
    reference=linear_token_log_probs_reference,
    samples=_log_probs_samples,
    permutes=lambda kwargs: {"input": -1, "linear_weight": -1},
    layout_bits=False,
    gemm="wide",
    workspace=_workspace,
    saved_bytes=_log_probs_saved_bytes,
    shards=lambda *_: _SHARDS,
    bench=_bench,
    shapes=_SHAPES,
)
