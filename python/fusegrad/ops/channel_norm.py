"""Group norm and batch norm, with an activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _transforms
from .._activations import activate, number, torchs
from .._autograd import BatchJoined, Function, differentiable
from .._op import SHAPES, Op, Sample, autocast, check_constant, check_tensor, compiled, integer, overridable, real, wide, wide_dtype

channel_norm_fwd = compiled("channel_norm_fwd")
channel_norm_bwd = compiled("channel_norm_bwd")


def of_channels(t: Tensor, x: Tensor) -> Tensor:
    return wide(t).view(-1, *[1] * (x.dim() - 2))


def affine(h: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    h = h if w is None else h * of_channels(w, h)
    return h if b is None else h + of_channels(b, h)


def group_norm_reference(x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, eps: float, activation: int) -> Tensor:
    a = wide(x).unflatten(1, (groups, x.shape[1] // groups)).flatten(2)
    a = a - a[..., :1].detach()  # no derivative sees it, and the digits of the spread are kept where the mean is large
    var, mean = torch.var_mean(a, -1, correction=0, keepdim=True)
    h = ((a - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    return activate(affine(h, w, b), activation).to(x.dtype)


def batch_norm_reference(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor | None]:
    a, stats = wide(x), None
    if mean is None:
        first = a[:1].unsqueeze(-1).flatten(2)[..., :1].detach()  # as in group norm; a batch of none has none
        a = (a.unsqueeze(-1).flatten(2) - first).reshape(x.shape)
        var, mean = torch.var_mean(a, (0, *range(2, a.dim())), correction=0)
        stats = torch.stack((mean + first.sum((0, 2)), var)).detach()
    z = affine((a - of_channels(mean, a)) * torch.rsqrt(of_channels(var, a) + eps), w, b)
    return activate(z if residual is None else z + wide(residual), activation).to(x.dtype), stats


@torch.library.register_fake("fusegrad::channel_norm_fwd")
def _(x, w, b, r, mean, var, groups, eps, activation):
    shape = (3, x.shape[0], groups) if groups else (3, x.shape[1])
    return torch.empty_like(x), x.new_empty(shape, dtype=wide_dtype(x)) if mean is None else None


@torch.library.register_fake("fusegrad::channel_norm_bwd")
def _(dy, x, w, b, r, mean, var, lost, groups, eps, activation, needed):
    dw, db = (x.new_empty(x.shape[1], dtype=x.dtype if p is None else p.dtype) for p in (w, b))
    dx, dr = (torch.empty_like(x) if need else None for need in (needed[0], needed[3]))
    return dx, dw if needed[1] else None, db if needed[2] else None, dr


class GroupNormFn(BatchJoined):
    op = "group_norm"
    reference = staticmethod(group_norm_reference)
    params = (1, 2)

    # The statistics are [3, N, groups], and [*, 3, N, groups] of a batch.
    @classmethod
    def join(cls, i, t, n):
        return t.movedim(-3, 0).flatten(1, n) if i == 3 else super().join(i, t, n)

    @classmethod
    def part(cls, i, y, sizes):
        return y.unflatten(1, sizes).movedim(0, -3) if i == 1 else super().part(i, y, sizes)

    @staticmethod
    def forward(x, w, b, groups, eps, activation):
        return channel_norm_fwd(x, w, b, None, None, None, groups, eps, activation)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, b, *ctx.options = inputs
        _, stats = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, w, b, stats)

    @differentiable(lambda ctx: ctx.saved_tensors[:3])
    def backward(ctx, dy, _):
        grads = (None, None, None)
        if dy is not None:
            x, w, b, stats = ctx.saved_tensors
            needed = (*ctx.needs_input_grad[:3], False)
            grads = channel_norm_bwd(dy, x, w, b, None, *stats, *ctx.options, needed)[:3]
        return *grads, None, None, None


def _residual_stands_for(ctx) -> tuple:
    # A residual is added, and nothing else happens to it: its value does not matter to any derivative, and is not kept.
    x, w, b, r, mean, var, stats = ctx.saved_tensors
    if r is None and ctx.needs_input_grad[3]:
        r = torch.zeros_like(x)
    return x, w, b, r, mean, var


class BatchNormFn(Function):
    op = "batch_norm"
    reference = staticmethod(batch_norm_reference)

    @staticmethod
    def forward(x, w, b, residual, mean, var, eps, activation):
        return channel_norm_fwd(x, w, b, residual, mean, var, 0, eps, activation)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, w, b, residual, mean, var, *ctx.options = inputs
        _, stats = outputs
        ctx.set_materialize_grads(False)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, w, b, residual if ctx.options[1] else None, mean, var, stats)

    @differentiable(_residual_stands_for)
    def backward(ctx, dy, _):
        grads = (None, None, None, None)
        if dy is not None:
            x, w, b, r, mean, var, stats = ctx.saved_tensors
            eps, activation = ctx.options
            dx, dw, db, dr = ctx.needs_input_grad[:4]
            statistics = (mean, var, None) if stats is None else stats.unbind()
            grads = (None, None, None, dy if dr and not activation else None)
            if dx or dw or db or (dr and activation):
                needed = (dx, dw, db, dr and bool(activation))
                *found, of_residual = channel_norm_bwd(dy, x, w, b, r, *statistics, 0, eps, activation, needed)
                grads = (*found, grads[3] if of_residual is None else of_residual)
        return *grads, None, None, None, None


def _check(op: str, input: Tensor, values_per_set: int, **params: Tensor | None) -> None:
    if input.dim() < 2:
        raise ValueError(f"{op}: input must have a batch and a channel dimension, got {list(input.shape)}")
    shape = input.shape[1:2]
    for name, p in params.items():
        if p is not None:
            check_tensor(op, name, p)
            if p.shape != shape:
                raise RuntimeError(f"{op}: {name} must have shape {list(shape)} (input is {list(input.shape)}), got {list(p.shape)}")
    if values_per_set == 1:
        raise ValueError(f"{op}: Expected more than 1 value per channel when training, got input {list(input.shape)}")


@overridable
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""Norm over groups of neighbouring channels of each sample, and an activation :math:`f`:

    .. math:: y = f\left((x - \mathrm{mean}) / \sqrt{\mathrm{var} + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}\right)

    Drop-in for `torch.nn.functional.group_norm`.

    Args:
        input: `[N, C, *]`, float32, float64, float16 or bfloat16, any layout; contiguous and channels_last are walked as they lie.
            Statistics are taken in float32 (float64 for float64), by two sweeps over data that is near.
        num_groups: a divisor of C.
        weight, bias: `[C]`, of the input's dtype, or float32 with a 16-bit input; or None.
        eps: added to the variance.
        activation: None, or a name of `bias_act`: "silu", "relu", "gelu", "gelu_tanh", ...

    Returns:
        The shape and dtype of `input` (float32 under CUDA autocast, as torch), in its memory format. Saved for backward: input,
        weight, bias and three float32 per group of each sample; what the activation is applied to is recomputed.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, a number of groups that does not
        divide the channels, tensors on two devices, a tensor that is not dense. ValueError: no group, an unknown activation, a single
        value in a group.

    Equivalent eager code::

        x = input.float().unflatten(1, (num_groups, -1)).flatten(2)
        x = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)
        shape = (-1, *[1] * (input.dim() - 2))
        y = x.view(input.shape) * weight.float().view(shape) + bias.float().view(shape)
        y = (torch.nn.functional.silu(y) if activation == "silu" else y).to(input.dtype)

    Source: Wu & He, Group Normalization, 2018, arXiv:1803.08494.
    """
    check_tensor("group_norm", "input", input)
    kind = number("group_norm", activation)
    if input.dim() < 2:
        raise RuntimeError(f"group_norm: input must have a batch and a channel dimension, got {list(input.shape)}")
    num_groups = integer("group_norm", "num_groups", num_groups)
    if num_groups <= 0 or input.shape[1] % num_groups:
        error = RuntimeError if num_groups > 0 else ValueError
        raise error(f"group_norm: num_groups must divide the channels of input ({input.shape[1]}), got {num_groups}")
    values = input.shape[0] * (input.shape[1] // num_groups) * math.prod(input.shape[2:])
    _check("group_norm", input, values, weight=weight, bias=bias)
    if input.is_cuda and autocast(input) and input.dtype != torch.float64:
        input, weight, bias = (t if t is None else t.float() for t in (input, weight, bias))
    return GroupNormFn.call((input, weight, bias), num_groups, real("group_norm", "eps", eps), kind, outputs=1)


@overridable
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Norm of each channel over the batch, the sum with a residual, and an activation :math:`f`:

    .. math:: y = f\left((x - \mathrm{mean}) / \sqrt{\mathrm{var} + \mathrm{eps}} \cdot \mathrm{weight} + \mathrm{bias}
              + \mathrm{residual}\right)

    with the batch's statistics in training, else with the running ones. Drop-in for `torch.nn.functional.batch_norm`.

    Args:
        input: `[N, C, *]`, float32, float64, float16 or bfloat16, any layout; contiguous and channels_last are walked as they lie.
            Statistics are taken in float32 (float64 for float64), by two sweeps over data that is near.
        running_mean, running_var: `[C]`; required without `training`. In training they are updated in place, if given:
            `running += momentum * (batch's - running)`, with the unbiased variance. They must not require grad.
        weight, bias: `[C]`, of the input's dtype, or float32 with a 16-bit input; or None.
        training: whether to use the statistics of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        activation: None, or a name of `bias_act`: "relu", "silu", "gelu", ...
        residual: the shape and dtype of `input`, any layout; added before the activation.

    Returns:
        The shape and dtype of `input`, in its memory format. Saved for backward: input, weight, bias, three float32 per channel (or the
        running statistics), and the residual if there is an activation.

    Raises:
        TypeError: a dtype that does not go with the input's. RuntimeError: a shape that does not fit, tensors on two devices, a tensor
        that is not dense. ValueError: an unknown activation, a single value per channel in training, no running statistics without it.

    Equivalent eager code::

        x, dims, shape = input.float(), (0, *range(2, input.dim())), (-1, *[1] * (input.dim() - 2))
        mean, var = (x.mean(dims), x.var(dims, correction=0)) if training else (running_mean, running_var)
        y = (x - mean.view(shape)) * torch.rsqrt(var.view(shape) + eps) * weight.float().view(shape) + bias.float().view(shape)
        y = y if residual is None else y + residual.float()
        y = (torch.relu(y) if activation == "relu" else y).to(input.dtype)

    Source: Ioffe & Szegedy, Batch Normalization, 2015, arXiv:1502.03167.
    """
    check_tensor("batch_norm", "input", input)
    kind = number("batch_norm", activation)
    values = input.shape[0] * math.prod(input.shape[2:]) if training and input.dim() > 1 else 0
    _check("batch_norm", input, values, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if residual is not None:
        check_tensor("batch_norm", "residual", residual)
        if residual.shape != input.shape or residual.dtype != input.dtype:
            error = RuntimeError if residual.dtype == input.dtype else TypeError
            expected, fact = f"{input.dtype} {list(input.shape)}", f"{residual.dtype} {list(residual.shape)}"
            raise error(f"batch_norm: residual must have the dtype and shape of input ({expected}), got {fact}")
    check_constant("batch_norm", running_mean=running_mean, running_var=running_var)
    eps, momentum = real("batch_norm", "eps", eps), real("batch_norm", "momentum", momentum)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be {'positive in training' if training else 'at least 0'}, got {eps}")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm: running_mean and running_var must be given when training is False, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var must be given both or neither, got one None")
    moved = training and running_mean is not None and _transforms.known and _transforms.active()
    if moved and _transforms.is_batched(input) and not _transforms.is_batched(running_mean):
        fix = "give each item its own, or none (track_running_stats=False)"
        raise RuntimeError(f"batch_norm: running_mean and running_var must have the batch dimension of vmap that input has ({fix})")
    given = (None, None) if training else (running_mean, running_var)
    y, stats = BatchNormFn.call((input, weight, bias, residual, *given), eps, kind)
    if training and input.numel() and not (running_mean is None and running_var is None):
        with torch.no_grad():
            unbiased = values / (values - 1)
            for running, batch, factor in zip((running_mean, running_var), stats.unbind(), (1, unbiased)):
                if running is not None:
                    exact = running.to(torch.promote_types(running.dtype, batch.dtype))  # those of 16 bits are rounded once
                    exact.mul_(1 - momentum).add_(batch, alpha=momentum * factor)
                    if exact is not running:
                        running.copy_(exact)
    return y


class GroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` with a fused forward and backward, and an activation in them. See `group_norm`."""

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, *, activation=None, **options):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **options)
        number("GroupNorm", activation)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class _BatchNorm:
    """What is ours in the three classes: an activation and, in the call, a residual. Statistics are kept as torch.nn keeps them."""

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
        *,
        activation=None,
        **options,  # of newer versions of torch
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        number(type(self).__name__, activation)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average over all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        kept = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if kept else (None, None)
        options = dict(activation=self.activation, residual=residual)
        return batch_norm(input, *running, self.weight, self.bias, of_batch, momentum, self.eps, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with a fused forward and backward; `forward(input, residual)` adds one. See `batch_norm`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a fused forward and backward; `forward(input, residual)` adds one. See `batch_norm`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with a fused forward and backward; `forward(input, residual)` adds one. See `batch_norm`."""


def _channels(cols: int) -> int:
    """So many of the columns of a benchmark are channels, the others pixels."""
    return next((c for c in (256, 16, 4) if cols % c == 0 and cols >= 32 * c), cols)


def _group_norm_bench(make, rows, cols):
    c = _channels(cols)
    groups = 32 if c == 256 else 4 if c < cols else 1
    pixels = cols // c if cols > 1 else 2  # a single value has no spread
    return dict(input=make(rows, c, pixels), num_groups=groups, weight=make.param(c), bias=make.param(c), activation="silu")


def _batch_norm_bench(make, rows, cols):
    c = _channels(cols)
    options = dict(training=True, activation="relu")
    return (
        dict(input=make(rows, c, max(4, cols // c)), running_mean=None, running_var=None, weight=make.param(c), bias=make.param(c))
        | options
    )


def _group_norm_samples(make):
    def sample(name, x, groups, activation=None, affine=("weight", "bias"), **options):
        params = {name: make.param(x.shape[1]) for name in affine}
        options |= dict(activation=activation) if activation else {}
        return Sample(name, dict(input=x, num_groups=groups) | params | options)

    yield sample("plain", make(2, 6, 5, 7), 3, eps=1e-5)
    yield sample("silu", make(3, 8, 4, 4), 4, "silu")
    yield sample("channels_last", make(2, 12, 5, 3, layout="channels_last"), 4, "silu")
    yield sample("channels_last_wide", make(2, 66, 5, 5, layout="channels_last"), 6, "gelu")
    yield sample("channels_last_tall", make(1, 8, 20, 13, layout="channels_last"), 2, eps=1e-3)
    yield sample("volume", make(2, 4, 3, 2, 5).contiguous(memory_format=torch.channels_last_3d), 2, "relu")
    yield sample("sequence", make(2, 6, 33), 2, "gelu_tanh")
    yield sample("two_dims", make(5, 12), 1, "tanh")
    yield sample("one_group", make(2, 5, 3, 3), 1, affine=())
    yield sample("weight_only", make(3, 6, 4), 2, "silu", affine=("weight",))
    yield sample("bias_only", make(2, 6, 7, 5, layout="channels_last"), 3, affine=("bias",))
    yield sample("each_channel", make(2, 5, 4, 4, layout="transposed"), 5, "mish")
    yield sample("row_strided", make(2, 4, 3, 6, layout="row_strided"), 2, "silu")
    yield sample("column_strided", make(2, 4, 6, 3, layout="column_strided"), 4, eps=1e-2, affine=())
    yield sample("offset", make(3, 9, 7, layout="offset"), 3, "leaky_relu")
    yield sample("expanded", make(3, 6, 4, 2, layout="expanded"), 2)
    yield sample("large", make(1, 6, 70, 41), 2, "silu")
    yield sample("no_rows", make(0, 4, 3, 3), 2)


def _batch_norm_samples(make):
    def sample(name, x, activation=None, training=True, affine=("weight", "bias"), residual=None, **options):
        c = x.shape[1]
        running = (None, None) if training else (make.param(c) - 1, make.param(c, positive=True))
        params = {name: make.param(c) for name in affine}
        options |= dict(training=True) if training else {}
        options |= dict(activation=activation) if activation else {}
        options |= {} if residual is None else dict(residual=residual)
        return Sample(name, dict(input=x, running_mean=running[0], running_var=running[1]) | params | options)

    yield sample("plain", make(4, 5, 3, 7))
    yield sample("add_relu", make(4, 6, 3, 3), "relu", residual=make(4, 6, 3, 3), eps=1e-3)
    yield sample("add", make(3, 4, 5), residual=make(3, 4, 5))
    yield sample("channels_last", make(3, 12, 5, 3, layout="channels_last"), "relu")
    yield sample("channels_last_add", make(2, 40, 4, 3, layout="channels_last"), "silu", residual=make(2, 40, 4, 3))
    yield sample("features", make(70, 9), "gelu")
    yield sample("features_wide", make(5, 75, layout="row_strided"), affine=())
    yield sample("weight_only", make(3, 6, 5, layout="transposed"), "relu", affine=("weight",))
    yield sample("bias_only", make(4, 3, 3, 2), "silu", affine=("bias",), residual=make(4, 3, 3, 2))
    yield sample("planes", make(2, 3, 6, 8), "elu")
    yield sample("volume", make(2, 4, 3, 2, 5).contiguous(memory_format=torch.channels_last_3d), "hardswish")
    yield sample("eval", make(3, 5, 4, 4), training=False, momentum=0.2)
    yield sample("eval_add_relu", make(3, 5, 4, 4, layout="channels_last"), "relu", training=False, residual=make(3, 5, 4, 4))
    yield sample("eval_features", make(7, 11), training=False, affine=(), momentum=0.3, eps=1e-2)
    yield sample("eval_bias_only", make(3, 5, 4), training=False, affine=("bias",))
    yield sample("row_strided", make(2, 4, 3, 6, layout="row_strided"), "squared_relu")
    yield sample("column_strided", make(2, 4, 6, 3, layout="column_strided"), residual=make(2, 4, 6, 3, layout="transposed"))
    yield sample("transposed", make(40, 6, 7, layout="transposed"), "sigmoid")
    yield sample("expanded", make(3, 6, 4, 2, layout="expanded"), "softplus")
    yield sample("no_rows", make(0, 4, 3, 3))


def _cells(kwargs):
    """Statistics of each sample's channels, and of the groups: a few numbers."""
    x = kwargs["input"]
    return 10 * x.shape[0] * x.shape[1] * wide_dtype(x).itemsize


def _group_norm_workspace(kwargs):
    """In one walk also w, b and their sums for each element of a sample, and the sums once more for each slice of the samples."""
    x = kwargs["input"]
    samples = x.shape[0]
    sample = x.numel() // samples if samples else 0
    return _cells(kwargs) + (4 + 2 * min(64, -(-samples // 16))) * sample * wide_dtype(x).itemsize


def _bytes(*tensors):
    return sum(t.nbytes for t in tensors if t is not None)


def _torch_group_norm(activation=None, **kwargs):
    return torchs(torch.nn.functional.group_norm(**kwargs), activation)


def _torch_batch_norm(activation=None, residual=None, **kwargs):
    y = torch.nn.functional.batch_norm(**kwargs)
    return torchs(y if residual is None else y + residual, activation)


GROUP_NORM = Op(
    name="group_norm",
    fn=GroupNormFn,
    functional=group_norm,
    reference=group_norm_reference,
    samples=_group_norm_samples,
    module=GroupNorm,
    torch=_torch_group_norm,
    permutes=lambda kwargs: {"input": 1, "weight": 0, "bias": 0} if kwargs["num_groups"] == 1 else {"input": -1},
    layout_bits=False,
    saved_bytes=lambda kwargs: (
        _bytes(*(kwargs.get(k) for k in ("input", "weight", "bias")))
        + 3 * kwargs["input"].shape[0] * kwargs["num_groups"] * wide_dtype(kwargs["input"]).itemsize
    ),
    workspace=_group_norm_workspace,
    shards=lambda x, *_: (range(1, x.dim()), {}),
    bench=_group_norm_bench,
    shapes=(*SHAPES, (2, 512), (64, 16384), (8, 1048576), (32, 262144)),
)


def _batch_norm_saved(kwargs):
    x = kwargs["input"]
    kept = [kwargs.get(k) for k in ("input", "weight", "bias", "running_mean", "running_var")]
    stats = 3 * x.shape[1] * wide_dtype(x).itemsize if kwargs.get("training") else 0
    return _bytes(*kept, kwargs.get("residual") if kwargs.get("activation") else None) + stats


BATCH_NORM = Op(
    name="batch_norm",
    fn=BatchNormFn,
    functional=batch_norm,
    reference=batch_norm_reference,
    samples=_batch_norm_samples,
    module=BatchNorm2d,
    torch=_torch_batch_norm,
    permutes=lambda kwargs: dict.fromkeys(("input", "residual"), 0 if kwargs["input"].shape[0] > 4 else -1),
    constants=("running_mean", "running_var"),
    layout_bits=False,
    saved_bytes=_batch_norm_saved,
    workspace=_cells,
    # In training the statistics are those of the whole batch.
    shards=lambda x, w, b, r, mean, *_: (range(x.dim()) if mean is None else (), {i: (1,) for i in (1, 2, 4, 5)}),
    bench=_batch_norm_bench,
    shapes=(*SHAPES, (4, 512), (64, 16384), (64, 65536), (32, 1048576)),
)
