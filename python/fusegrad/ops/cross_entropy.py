"""Cross entropy between logits and class indices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _op
from .._autograd import BatchJoined, differentiable
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
    real,
    reduction_of,
    wide,
    wide_dtype,
)

cross_entropy_fwd = compiled("cross_entropy_fwd")
cross_entropy_bwd = compiled("cross_entropy_bwd")


def cross_entropy_reference(
    x, target, w, num_items, ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero, wide_out, return_lse
):
    kept = target != ignore_index
    dim = min(1, x.dim() - 1)
    # Ignored rows are cut off before anything is computed of them: an infinity in one must not become a NaN gradient.
    z = torch.where(kept.unsqueeze(dim), wide(x), 0) * scale
    z = softcap * torch.tanh(z / softcap) if softcap > 0 else z
    log_p = F.log_softmax(z, dim)
    weight = torch.ones(x.shape[dim], dtype=z.dtype, device=x.device) if w is None else wide(w)
    label = torch.where(kept, target, 0)
    # Not weight[label], which vmap does not know for a single label.
    label_weight = torch.where(kept, weight.index_select(0, label.flatten()).view(label.shape), 0)
    loss = -(1 - smoothing) * label_weight * log_p.gather(dim, label.unsqueeze(dim)).squeeze(dim)
    if smoothing != 0:
        loss = loss - smoothing / x.shape[dim] * (log_p.movedim(dim, -1) * weight).sum(-1)
    lse = torch.logsumexp(z, dim) if z_loss != 0 or return_lse else None  # it holds two more copies of the logits
    loss = torch.where(kept, loss if lse is None else loss + z_loss * lse.square(), 0)
    if reduce:
        divisor = label_weight.sum() if num_items is None and items == 0 else items if num_items is None else wide(num_items)
        if mean and empty_is_zero:
            divisor = torch.where(label_weight.sum() == 0, math.inf, divisor)  # the gradient is 0 too
        loss = loss.sum() / divisor if mean else loss.sum()
    dtype = z.dtype if wide_out else x.dtype
    return loss.to(dtype), torch.where(kept, lse, 0).to(dtype) if return_lse else None


@torch.library.register_fake("fusegrad::cross_entropy_fwd")
def _(x, target, w, num_items, ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero, wide_out, return_lse):
    out = dict(dtype=wide_dtype(x) if wide_out else x.dtype)
    acc = dict(dtype=wide_dtype(x))
    loss, divisor = x.new_empty(() if reduce else target.shape, **out), x.new_empty((), **acc) if reduce else None
    lse = x.new_empty(target.shape, **out) if return_lse else None
    return loss, lse, x.new_empty(target.shape, **acc), x.new_empty(target.shape, **acc), divisor


@torch.library.register_fake("fusegrad::cross_entropy_bwd")
def _(dloss, dlse, x, target, w, top, log_sum, divisor, ignore_index, smoothing, z_loss, softcap, scale):
    dim = min(1, x.dim() - 1)
    return x.new_empty(x.movedim(dim, -1).shape).movedim(-1, dim)


class CrossEntropyFn(BatchJoined):
    op = "cross_entropy"
    reference = staticmethod(cross_entropy_reference)
    params = (2,)

    @staticmethod
    def forward(
        x, target, w, num_items, ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero, wide_out, return_lse
    ):  # spelled out: torch.compile counts the arguments to tell this form from the one with ctx
        options = (ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, items, empty_is_zero, wide_out, return_lse)
        return cross_entropy_fwd(x, target, w, num_items, *options)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, target, w, num_items, *ctx.options = inputs
        ctx.divisor_is_given = num_items is not None
        loss, lse, top, log_sum, divisor = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top, log_sum, *(() if divisor is None else (divisor,)))
        ctx.save_for_backward(x, target, w, top, log_sum, divisor)

    @classmethod
    def why_no_vmap(cls, tensors, options):
        return "vmap of a reduced loss has no kernel" if options[5] else None

    def inputs(ctx):
        *inputs, _, _, divisor = ctx.saved_tensors  # once: a checkpoint allows no more
        return *inputs, divisor if ctx.divisor_is_given else None

    @differentiable(inputs)
    def backward(ctx, dloss, dlse, *_):
        dx = None
        if ctx.needs_input_grad[0] and not (dloss is None and dlse is None):
            dx = cross_entropy_bwd(dloss, dlse, *ctx.saved_tensors, *ctx.options[:5])
        return dx, *[None] * (len(ctx.needs_input_grad) - 1)


def loss_numbers(op: str, label_smoothing, z_loss, logit_softcap, logit_scale) -> tuple[float, float, float, float]:
    """As the kernels take them: no soft cap is 0."""
    smoothing, cap = real(op, "label_smoothing", label_smoothing), 0.0
    if not 0.0 <= smoothing <= 1.0:
        raise RuntimeError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if logit_softcap is not None:
        cap = real(op, "logit_softcap", logit_softcap)
        if not cap > 0:
            raise ValueError(f"{op}: logit_softcap must be positive or None, got {logit_softcap}")
    return smoothing, real(op, "z_loss", z_loss), 0.0 if cap == math.inf else cap, real(op, "logit_scale", logit_scale)


def loss_items(op: str, reduction: str, num_items, empty: str) -> tuple[float, Tensor | None]:
    """The divisor as a number, 0 if there is none, and as a tensor."""
    if empty not in ("nan", "zero"):
        raise ValueError(f"{op}: empty must be 'nan' or 'zero', got {empty!r}")
    if num_items is None:
        return 0.0, None
    if reduction != "mean":
        raise ValueError(f"{op}: num_items is the divisor of reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise RuntimeError(f"{op}: num_items must be a number or have no dimension, got {list(num_items.shape)}")
        check_constant(op, num_items=num_items)
        return 0.0, num_items
    items = real(op, "num_items", num_items)
    if not items > 0:
        raise ValueError(f"{op}: num_items must be positive, got {items}")
    return items, None


def weight_under_autocast(input: Tensor, weight: Tensor) -> Tensor:
    """Under autocast one of 16 bits goes with any logits, as in torch."""
    return weight.to(wide_dtype(input)) if autocast(input) and weight.dtype.itemsize == 2 else weight


@overridable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: float | Tensor | None = None,
    return_lse: bool = False,
    empty: str = "nan",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross entropy between logits and class indices, with everything that training recipes add to it, in one pass each way.

    With `z = softcap(logit_scale * input)`, `softcap(a) = logit_softcap * tanh(a / logit_softcap)` (identity if None),
    `lse = logsumexp(z)` over the C classes and t the label, the loss of an item is

    .. math:: (1 - s)\, w_t\, (\mathrm{lse} - z_t) + \frac{s}{C} \sum_c w_c\, (\mathrm{lse} - z_c) + \mathrm{z\_loss} \cdot \mathrm{lse}^2

    with s = label_smoothing. Drop-in for `torch.nn.functional.cross_entropy`; the arguments up to `label_smoothing` are torch's.

    Args:
        input: logits `[N, C]`, `[C]` or `[N, C, d1, ...]`, float32, float64, float16 or bfloat16, any layout.
        target: class indices `[N]`, `[]` or `[N, d1, ...]`, int64 (or uint8, as torch). Class probabilities (a floating-point target
            of the input's shape) go through `torch.nn.functional.cross_entropy`.
        weight: `[C]`, a constant factor per class; it must not require grad.
        ignore_index: an item with this label has loss, gradient and lse 0, whatever its logits are (inf and NaN too).
        reduction: "mean" divides the sum by the sum of the labels' weights (by the number of items without `weight`) over items
            that are not ignored; "sum"; "none" returns `target`'s shape. `size_average` and `reduce` are torch's old names for it.
        z_loss: factor of the squared log-partition function (PaLM uses 1e-4).
        logit_softcap: bound of the logits (Gemma 2 uses 30).
        logit_scale: factor of the logits, before the soft cap.
        num_items: divisor of "mean" instead, a number or a scalar tensor (a constant: no gradient), so that accumulated
            micro-batches add up to the gradient of one big batch.
        return_lse: also return the log-partition function of every item, `target`'s shape; gradients flow through it.
        empty: "nan" or "zero": the mean over no item at all, or over items whose classes weigh nothing; of "zero" the gradient is 0 too.

    Returns:
        The loss in the input's dtype (float32 under autocast, as torch, without casting the logits), or `(loss, lse)`.
        Saved for backward: input, target, weight and two float32 per item.

    Raises:
        IndexError: on the CPU, a label that is neither a class nor `ignore_index`; on CUDA, where looking would mean waiting, it
        makes loss and gradient of its item NaN. ValueError: batch sizes that differ, an unknown `reduction` or `empty`, `num_items`
        with another reduction than "mean". RuntimeError: a shape, dtype or device that does not fit.

    Equivalent eager code::

        z = input.float() * logit_scale
        z = logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap else z
        y = torch.nn.functional.cross_entropy(z, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)

    Sources: Szegedy et al. 2016, arXiv:1512.00567 (smoothing); Chowdhery et al. 2022, arXiv:2204.02311 (z-loss); Gemma 2,
    arXiv:2408.00118 (soft cap).
    """
    check_tensor("cross_entropy", "input", input)
    check_tensor("cross_entropy", "target", target)
    reduction = reduction_of("cross_entropy", reduction, size_average, reduce)
    numbers = loss_numbers("cross_entropy", label_smoothing, z_loss, logit_softcap, logit_scale)
    items, num_items = loss_items("cross_entropy", reduction, num_items, empty)
    ignore_index = integer("cross_entropy", "ignore_index", ignore_index)
    if weight is not None:
        check_tensor("cross_entropy", "weight", weight)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input must have at least one dimension, got a scalar")
    if target.is_floating_point():
        if numbers[1:] != (0.0, 0.0, 1.0) or items or num_items is not None or return_lse or empty != "nan":
            raise ValueError("cross_entropy: z_loss, logit_softcap, logit_scale, num_items, return_lse and empty go with class indices")
        _op.fall_back("cross_entropy", "targets are probabilities", input)
        return F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    sizes, dims = input.shape, input.dim()
    if dims != 2 or target.dim() != 1 or target.shape[0] != sizes[0]:  # the usual case first: slices of sizes are slow
        shape = sizes[:0] if dims == 1 else sizes[:1] + sizes[2:]
        if target.shape != shape:
            expected = f"one class per item, shape {list(shape)} for input {list(sizes)}"
            raise ValueError(f"cross_entropy: target must have {expected}, got {list(target.shape)}")
    if target.dtype != torch.int64:
        if target.dtype != torch.uint8:
            raise RuntimeError(f"cross_entropy: target must be int64 (class indices), got {target.dtype}")
        target = target.long()
    if weight is not None:
        classes = sizes[min(1, dims - 1)]
        if weight.shape != (classes,):
            raise RuntimeError(f"cross_entropy: weight must have one element per class ([{classes}]), got {list(weight.shape)}")
        check_constant("cross_entropy", weight=weight)
        weight = weight_under_autocast(input, weight)
    loss, lse = CrossEntropyFn.call(
        (input, target, weight, num_items), ignore_index, *numbers, reduction != "none",
        reduction == "mean", items, empty == "zero", autocast(input), return_lse,
        outputs=2,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def summed_options(x, target, weight, num_items, options) -> tuple | None:
    """Of a part of the items, whose losses are to be added up: options, and the rest of a `Summed`."""
    *numbers, reduce, mean, items, empty_is_zero, wide_out, return_lse = options[:11]
    if not reduce:
        return None
    divisor = None
    if mean and num_items is None and items == 0:
        kept, mean = target != numbers[0], False
        divisor = kept.sum() if weight is None else torch.where(kept, wide(weight)[torch.where(kept, target, 0)], 0).sum()
    rest = divisor, wide_dtype(x) if wide_out else x.dtype, empty_is_zero
    return (*numbers, reduce, mean, items, empty_is_zero, True, return_lse, *options[11:]), *rest


def _summed(shape, x, target, weight, num_items, *options):
    found = summed_options(x, target, weight, num_items, options)
    return None if found is None else Summed((x, target, weight, num_items, *found[0]), *found[1:])


def described(options: dict) -> str:
    """Those that are not as torch's loss is."""
    usual = dict(z_loss=0.0, logit_softcap=None, logit_scale=1.0, return_lse=False, empty="nan")
    return ", ".join(f"{k}={v!r}" for k, v in options.items() if v != usual[k])


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward, and the further options of `cross_entropy`."""

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        z_loss=0.0,
        logit_softcap=None,
        logit_scale=1.0,
        return_lse=False,
        empty="nan",
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        integer("CrossEntropyLoss", "ignore_index", ignore_index)
        loss_numbers("CrossEntropyLoss", label_smoothing, z_loss, logit_softcap, logit_scale)
        loss_items("CrossEntropyLoss", reduction, None, empty)
        self.options = dict(z_loss=z_loss, logit_softcap=logit_softcap, logit_scale=logit_scale, return_lse=return_lse, empty=empty)

    def extra_repr(self) -> str:
        return described(self.options)

    def forward(self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            num_items=num_items,
            **self.options,
        )


def without_first(weight: Tensor) -> Tensor:
    """Weights of classes of which the first weighs nothing."""
    return torch.cat((torch.zeros_like(weight[:1]), weight[1:]))


def _samples(make):
    yield Sample("plain", dict(input=make(6, 37), target=make.labels(6, classes=37)))
    yield Sample("sum", dict(input=make(4, 10, scale=5), target=make.labels(4, classes=10), reduction="sum"))
    yield Sample("none", dict(input=make(9, 35, layout="transposed"), target=make.labels(9, classes=35), reduction="none"))
    yield Sample("one_item", dict(input=make(41), target=make.labels(classes=41)))
    yield Sample("one_class", dict(input=make(3, 1), target=make.labels(3, classes=1)))
    yield Sample("image", dict(input=make(2, 5, 3, 4), target=make.labels(2, 3, 4, classes=5), label_smoothing=0.2))
    yield Sample("image_channels_last", dict(input=make(2, 7, 3, 4, layout="channels_last"), target=make.labels(2, 3, 4, classes=7),
                                             reduction="none", weight=make.param(7, positive=True)))  # fmt: skip
    yield Sample("ignored", dict(input=make(8, 20, layout="row_strided"), target=make.labels(8, classes=20, ignore=-100)))
    yield Sample("ignored_class", dict(input=make(8, 12), target=make.labels(8, classes=12, ignore=3), ignore_index=3, reduction="sum"))
    yield Sample("ignored_number", dict(input=make(5, 9), target=make.labels(5, classes=9, ignore=77), ignore_index=77, z_loss=0.1))
    yield Sample("weights", dict(input=make(6, 33), target=make.labels(6, classes=33, ignore=-100), weight=make.param(33, positive=True)))
    yield Sample("smoothing", dict(input=make(5, 19), target=make.labels(5, classes=19), label_smoothing=0.1, reduction="none"))
    yield Sample("weights_smoothing", dict(input=make(6, 40), target=make.labels(6, classes=40, ignore=-100), label_smoothing=0.3,
                                           weight=make.param(40, positive=True)))  # fmt: skip
    yield Sample("z_loss", dict(input=make(5, 30), target=make.labels(5, classes=30, ignore=-100), z_loss=0.05))
    yield Sample("weights_z_loss", dict(input=make(5, 14), target=make.labels(5, classes=14, ignore=-100), label_smoothing=0.2,
                                        weight=make.param(14, positive=True), z_loss=0.1, reduction="none"))  # fmt: skip
    yield Sample("softcap", dict(input=make(5, 30, scale=20), target=make.labels(5, classes=30), logit_softcap=15.0, z_loss=1e-2))
    yield Sample("scale", dict(input=make(4, 24, layout="column_strided"), target=make.labels(4, classes=24), logit_scale=0.25,
                               logit_softcap=3.0))  # fmt: skip
    yield Sample("scale_alone", dict(input=make(5, 24), target=make.labels(5, classes=24), logit_scale=3.0, reduction="sum"))
    yield Sample("lse", dict(input=make(5, 26), target=make.labels(5, classes=26, ignore=-100), return_lse=True, reduction="none"))
    yield Sample("lse_mean", dict(input=make(5, 70), target=make.labels(5, classes=70), return_lse=True, z_loss=0.1, label_smoothing=0.1))
    yield Sample("num_items", dict(input=make(6, 11), target=make.labels(6, classes=11, ignore=-100), num_items=17))
    yield Sample("num_items_tensor", dict(input=make(6, 11), target=make.labels(6, classes=11), num_items=make.number(13.0)))
    yield Sample("empty_zero", dict(input=make(3, 8), target=make.labels(3, classes=8, ignore="all"), empty="zero"))
    yield Sample("not_empty", dict(input=make(4, 8), target=make.labels(4, classes=8, ignore=-100), empty="zero", z_loss=0.1))
    yield Sample("no_weight", dict(input=make(3, 8), target=make.labels(3, classes=1), weight=without_first(make.param(8, positive=True)),
                                   label_smoothing=0.1, empty="zero"))  # fmt: skip
    yield Sample("empty_nan", dict(input=make(3, 8), target=make.labels(3, classes=8, ignore="all")))
    yield Sample("no_rows", dict(input=make(0, 8), target=make.labels(0, classes=8), reduction="sum"))
    yield Sample("large_logits", dict(input=make(4, 300, scale=200), target=make.labels(4, classes=300)))
    yield Sample("many_classes", dict(input=make(2, 3001), target=make.labels(2, classes=3001), label_smoothing=0.05))


def _saved_bytes(kwargs):
    x, target, w = kwargs["input"], kwargs["target"], kwargs.get("weight")
    width = wide_dtype(x).itemsize
    divisor = width if kwargs.get("reduction") != "none" else 0
    return x.nbytes + target.nbytes + (0 if w is None else w.nbytes) + 2 * target.numel() * width + divisor


def _like_torch(
    input, target, weight=None, *, return_lse=False, z_loss=0, num_items=None, logit_softcap=None, logit_scale=1, empty="nan", **kwargs
):
    """`torch.nn.functional.cross_entropy` where the options are its own; None where they are not."""
    if (return_lse, z_loss, num_items, logit_softcap, logit_scale, empty) == (False, 0, None, None, 1, "nan"):
        return F.cross_entropy(input, target, weight, **kwargs)
    return None


CROSS_ENTROPY = Op(
    name="cross_entropy",
    constants=("weight", "num_items"),
    fn=CrossEntropyFn,
    functional=cross_entropy,
    reference=cross_entropy_reference,
    samples=_samples,
    module=CrossEntropyLoss,
    torch=_like_torch,
    permutes=lambda kwargs: {"input": min(1, kwargs["input"].dim() - 1), "weight": 0, "target": 0},
    by_reference="targets that are probabilities",
    saved_bytes=_saved_bytes,
    shards=lambda x, *_: ((min(1, x.dim() - 1),), {1: [d for d in range(x.dim()) if d != min(1, x.dim() - 1)]}),
    summed=_summed,
    bench=lambda make, rows, cols: dict(input=make(rows, cols), target=make.labels(rows, classes=cols)),
    shapes=(*SHAPES, (1024, 32000), (256, 128256)),
)
