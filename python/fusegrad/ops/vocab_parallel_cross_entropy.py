"""Cross entropy between labels and logits whose classes are spread over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._autograd import Function, differentiable
from .._op import SHAPES, Op, Sample, check_tensor, compiled, integer, overridable, reduction_of, wide_dtype
from .cross_entropy import cross_entropy_reference, loss_numbers

vocab_parallel_cross_entropy_fwd = compiled("vocab_parallel_cross_entropy_fwd")
vocab_parallel_cross_entropy_bwd = compiled("vocab_parallel_cross_entropy_bwd")


def vocab_parallel_cross_entropy_reference(x, target, group, rank, world, ignore_index, smoothing, z_loss, softcap, scale, *reduction):
    if world > 1:
        what = "no derivative but the first, no vmap, no forward mode and no reference"
        raise RuntimeError(f"vocab_parallel_cross_entropy: there is {what} over {world} processes; gather the logits for cross_entropy")
    reduce, mean, return_lse = reduction
    options = (ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, 0.0, False, False, return_lse)
    return cross_entropy_reference(x, target, None, None, *options)


@torch.library.register_fake("fusegrad::vocab_parallel_cross_entropy_fwd")
def _(x, target, first, classes, ignore_index, smoothing, softcap, scale):
    top, mass, label, below = (x.new_empty(target.shape, dtype=wide_dtype(x)) for _ in range(4))
    return top, mass, label, below if smoothing != 0 else None


@torch.library.register_fake("fusegrad::vocab_parallel_cross_entropy_bwd")
def _(dloss, dlse, x, target, *rest):
    return x.new_empty(x.shape)


def _of_all(group, cols, top, mass, label, below):
    """A shard's sums made those of all classes: a maximum over the processes, then sums. NaN or an error if the shards differ."""
    both = torch.cat((top, top.new_full((1,), cols), top.new_full((1,), -cols)))
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    of_all, same = both[:-2], both[-2] == -both[-1]
    if both.device.type == "cpu" and not same:
        raise RuntimeError(
            f"vocab_parallel_cross_entropy: input must have as many columns in every process, got {cols} here and {int(both[-2])} elsewhere"
        )
    apart = of_all - top
    sums = [mass * torch.exp(-apart), label] if below is None else [mass * torch.exp(-apart), label, below + cols * apart]
    sums = torch.stack(sums)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return torch.where(same, of_all, torch.nan), sums[0], sums[1], None if below is None else sums[2]


class VocabParallelCrossEntropyFn(Function):
    op = "vocab_parallel_cross_entropy"
    reference = staticmethod(vocab_parallel_cross_entropy_reference)

    @staticmethod
    def forward(x, target, group, rank, world, ignore_index, smoothing, z_loss, softcap, scale, reduce, mean, return_lse):
        cols = x.shape[1]
        sums = vocab_parallel_cross_entropy_fwd(x, target, rank * cols, world * cols, ignore_index, smoothing, softcap, scale)
        top, mass, label, below = sums if world == 1 else _of_all(group, cols, *sums)
        kept = target != ignore_index
        log_sum = mass.log()
        lse = top + log_sum
        loss = (top - label) + log_sum
        if smoothing != 0:
            loss = (1 - smoothing) * loss + smoothing * (below / (world * cols) + log_sum)
        if z_loss != 0:
            loss = loss + z_loss * lse.square()
        loss = torch.where(kept, loss, 0)
        divisor = kept.sum(dtype=loss.dtype) if mean else None
        if reduce:
            loss = loss.sum() / divisor if mean else loss.sum()
        return loss.to(x.dtype), torch.where(kept, lse, 0).to(x.dtype) if return_lse else None, top, log_sum, divisor

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, target, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in outputs[2:] if t is not None))
        ctx.save_for_backward(x, target, *outputs[2:])

    @differentiable(lambda ctx: ctx.saved_tensors[:2])
    def backward(ctx, dloss, dlse, *_):
        dx = None
        if ctx.needs_input_grad[0] and not (dloss is None and dlse is None):
            saved = ctx.saved_tensors
            _, rank, world, *options = ctx.options
            cols = saved[0].shape[1]
            dx = vocab_parallel_cross_entropy_bwd(dloss, dlse, *saved, rank * cols, world * cols, *options[:5])
        return dx, *[None] * (len(ctx.needs_input_grad) - 1)


@overridable
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`cross_entropy` of logits whose C classes lie in equal shards on the processes of a group (a head that is split over its
    classes, as in tensor parallelism). Only a few numbers per item travel: a maximum, then two or three sums.

    .. math:: (1 - s) (\mathrm{lse} - z_t) + \frac{s}{C} \sum_c (\mathrm{lse} - z_c) + \mathrm{z\_loss} \cdot \mathrm{lse}^2, \quad
        \mathrm{lse} = \mathrm{top} + \log \sum_i \mathrm{mass}_i\, e^{\mathrm{top}_i - \mathrm{top}}

    Args:
        input: the logits `[N, C / W]` of this process, float32, float64, float16 or bfloat16, any layout. The process of rank r of W
            has the classes from r C / W on. Where W does not divide C, pad with logits of -inf (without label smoothing).
        target: class indices `[N]` in [0, C), int64 (or uint8), the same on every process.
        group: the processes; None is all of them, or this one alone where `torch.distributed` is not set up.
        ignore_index, reduction, label_smoothing, z_loss, logit_softcap, logit_scale, return_lse: see `cross_entropy`.

    Returns:
        The loss in the input's dtype, the same on every process, or `(loss, lse)`. Its gradient, for the same cotangent on every
        process, is that of this process's logits and needs no communication. Saved for backward: input, target, two float32 per item
        and, of a mean, the number of items. On one process every derivative is exact; on several the first one is, also under
        `torch.func.grad`, and its own derivative, forward mode and `vmap` raise an error.

    Raises:
        IndexError: on the CPU, a label that is neither a class nor `ignore_index`; on CUDA loss and gradient of its item become NaN.
        ValueError: a target of another shape, an unknown `reduction`. RuntimeError: a shape or dtype that does not fit; on the CPU,
        shards of different sizes (on CUDA they make the loss NaN).

    Equivalent eager code::

        z = input.float() * logit_scale  # of all processes, side by side
        z = logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap else z
        y = torch.nn.functional.cross_entropy(z, target, ignore_index=ignore_index, label_smoothing=label_smoothing)

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3.
    """
    op = "vocab_parallel_cross_entropy"
    check_tensor(op, "input", input)
    check_tensor(op, "target", target)
    if input.dim() != 2:
        raise RuntimeError(f"{op}: input must be [N, classes of this process], got {list(input.shape)}")
    if target.shape != input.shape[:1]:
        expected = f"one class per item, shape {list(input.shape[:1])} for input {list(input.shape)}"
        raise ValueError(f"{op}: target must have {expected}, got {list(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{op}: target must be int64 (class indices), got {target.dtype}")
    reduction_of(op, reduction)
    numbers = loss_numbers(op, label_smoothing, z_loss, logit_softcap, logit_scale)
    ignore_index, rank, world = integer(op, "ignore_index", ignore_index), 0, 1
    if group is not None or (dist.is_available() and dist.is_initialized()):
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError(f"{op}: group must have this process in it, got one of {world} others")
    loss, lse = VocabParallelCrossEntropyFn.call(
        (input, target.long()), group, rank, world, ignore_index, *numbers, reduction != "none", reduction == "mean", return_lse, outputs=2,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def _samples(make):
    def sample(name, rows, cols, ignore=None, layout="contiguous", scale=1.0, **options):
        return Sample(
            name, dict(input=make(rows, cols, layout=layout, scale=scale), target=make.labels(rows, classes=cols, ignore=ignore)) | options
        )

    yield sample("plain", 6, 37)
    yield sample("group", 6, 20, group=None, layout="offset")
    yield sample("group_sum", 5, 12, group=None, reduction="sum")
    yield sample("none", 9, 35, reduction="none", layout="transposed")
    yield sample("ignored", 8, 20, ignore=-100, layout="row_strided")
    yield sample("ignored_class", 8, 12, ignore=3, ignore_index=3, reduction="sum")
    yield sample("ignored_number", 5, 9, ignore=77, ignore_index=77, z_loss=0.1)
    yield sample("smoothing", 5, 19, label_smoothing=0.1, reduction="none")
    yield sample("smoothing_mean", 6, 40, ignore=-100, label_smoothing=0.3, z_loss=0.02)
    yield sample("softcap", 5, 30, scale=20, logit_softcap=15.0, z_loss=1e-2)
    yield sample("scale", 4, 24, layout="column_strided", logit_scale=0.25, logit_softcap=3.0)
    yield sample("scale_alone", 5, 24, logit_scale=3.0, reduction="sum")
    yield sample("lse", 5, 26, ignore=-100, return_lse=True, reduction="none")
    yield sample("lse_mean", 5, 70, return_lse=True, z_loss=0.1, label_smoothing=0.1)
    yield sample("nobody", 3, 8, ignore="all")
    yield sample("no_rows", 0, 8, reduction="sum")
    yield sample("one_class", 3, 1)
    yield sample("large_logits", 4, 300, scale=200)


def _saved_bytes(kwargs):
    x, target, width = kwargs["input"], kwargs["target"], wide_dtype(kwargs["input"]).itemsize
    return x.nbytes + target.nbytes + 2 * target.numel() * width + (width if kwargs.get("reduction", "mean") == "mean" else 0)


VOCAB_PARALLEL_CROSS_ENTROPY = Op(
    name="vocab_parallel_cross_entropy",
    fn=VocabParallelCrossEntropyFn,
    functional=vocab_parallel_cross_entropy,
    reference=vocab_parallel_cross_entropy_reference,
    samples=_samples,
    permutes=lambda kwargs: {"input": 1, "target": 0},
    saved_bytes=_saved_bytes,
    bench=lambda make, rows, cols: dict(input=make(rows, cols), target=make.labels(rows, classes=cols)),
    shapes=(*SHAPES, (1024, 32000), (256, 128256)),
)
