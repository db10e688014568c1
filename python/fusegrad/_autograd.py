"""What every fused op's autograd.Function shares. The rules that keep every order of derivative exact:

A backward is an op of its own, `_Backward`, wherever somebody may differentiate it (create_graph=True, torch.func): its numbers come
from the kernel, its derivative is that of the vector-Jacobian product of the op's reference, which torch differentiates like any
code. While a forward-mode level is open everything is the reference.

Under vmap a batch dimension is moved to the front, where it is more rows. A parameter's gradient is then that of each sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch.autograd.function import once_differentiable

from . import _op, _transforms

_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
# Sample by sample a kernel costs some microseconds a call; of many small samples torch code of all of them together is cheaper.
_FEW_SAMPLES, _LARGE_SAMPLE = 64, 1024


class Function(torch.autograd.Function):
    """Base of the ops' Functions. A subclass has `forward`, `setup_context` and a `backward` made by `differentiable`; its
    tensor arguments come first. It sets `op`, the op's name, and `reference`, which takes the arguments of `apply` and returns
    what the caller gets; the forward may return more after it, to be saved.

    It is vmapped by its kernels if it sets `params`; then the other tensors, given, saved or returned, have the rows in their first
    dimensions, and what is saved starts with the tensor arguments."""

    op: str
    reference: Callable
    params: tuple[int, ...] | None = None  # the places of the tensor arguments that all rows share; None: no vmap of the kernels
    rule: _Rule | None = None  # of its backward
    sharded: SimpleNamespace | None = None  # of an op outside of the table: what `_sharded.call` asks its row for
    dim: int | None = None  # the option that counts a dimension from the front, by its place from the end (-1: the last)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        backward = cls.__dict__.get("backward", cls.rule)
        cls.rule = backward if isinstance(backward, _Rule) else None
        if cls.rule is not None:
            cls.backward = staticmethod(cls.rule.backward_of(cls))

    @classmethod
    def call(cls, tensors: Sequence[torch.Tensor | None], *options, outputs: int | None = None):
        """`apply`, by the shortest way that is right here. Of several results the first `outputs` are returned (1: without a tuple)."""
        if any([t is not None and is_sharded(t) for t in tensors]) and not _transforms.active():
            from . import _sharded

            return _sharded.call(cls.sharded or _op.OPS[cls.op], tensors, options, outputs)
        if _op._forced_reference:
            return cls.reference(*tensors, *options)
        reason = _op.why_not(tensors[0])
        if reason is not None:
            _op.fall_back(cls.op, reason, tensors[0])
            return cls.reference(*tensors, *options)
        if torch.compiler.is_compiling():
            # ONNX knows torch's operators only; and of a Function within a transform Dynamo traces the forward alone.
            if torch.onnx.is_in_onnx_export() or _transforms.active():
                return cls.reference(*tensors, *options)
            if not (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])):
                return _first(outputs, cls.forward(*tensors, *options))
            return _first(outputs, cls.apply(*_distinct(tensors), *options))
        if _is_tracing():  # as does TorchScript, and the ONNX exporter that is built on it
            _op.count(cls.op, "a trace is recorded")
            return cls.reference(*tensors, *options)
        if _transforms.forward_mode_open():
            _op.count(cls.op, "forward mode is active")
            return cls.reference(*tensors, *options)
        if _transforms.active():
            reason = cls._why_no_transform(tensors, options)
            if reason is not None:
                _op.count(cls.op, reason)
                return cls.reference(*tensors, *options)
        elif not torch.is_grad_enabled():
            return _first(outputs, cls.forward(*tensors, *options))
        return _first(outputs, _transforms.apply(cls, *tensors, *options))

    @classmethod
    def why_no_vmap(cls, tensors, options) -> str | None:
        """The sentence that says why this call is not vmapped by its kernels; None if it is."""
        return "vmap has no kernel" if cls.params is None else None

    @classmethod
    def _why_no_transform(cls, tensors, options) -> str | None:
        """The sentence that says why the transforms at hand go through the reference; None if they do not."""
        if cls.rule is None or not _transforms.only_grad_and_vmap():
            return "a transform other than grad and vmap is active"
        if any(t is not None and is_sharded(_transforms.unwrapped(t)) for t in tensors):
            return "a transform of DTensors is active"
        batched = [i for i, t in enumerate(tensors) if _transforms.is_batched(t)]
        reason = cls.why_no_vmap(tensors, options) if batched else None
        return "a parameter is vmapped" if batched and reason is None and any(i in cls.params for i in batched) else reason

    @classmethod
    def vmap(cls, info, in_dims, *args):
        moved = [
            _to_front(a, d, info.batch_size) if isinstance(a, torch.Tensor) and i not in cls.params else a
            for i, (a, d) in enumerate(zip(args, in_dims))
        ]
        return _transforms.apply(cls, *cls.deeper(moved, 1)), 0

    @classmethod
    def deeper(cls, options: Sequence, by: int) -> list:
        """The options, or all arguments, of the same call with so many dimensions in front."""
        options = list(options)
        if cls.dim is not None:
            options[cls.dim] += by
        return options

    @classmethod
    def of_samples(cls, ctx, samples: Sequence[int], *grads) -> list:
        """The gradients where everything but parameters has `samples` as its first dimensions; those of parameters have them too."""
        params, rows = cls._needs(ctx, True), cls._needs(ctx, False)
        found = [None] * len(rows)
        if any(rows):
            found = cls.of_rows(ctx.replace(needs_input_grad=rows, batch=0), samples, grads)
        if any(params):
            count, size = math.prod(samples), max(g.numel() for g in grads if g is not None)
            ctx = ctx.replace(needs_input_grad=params)
            one_by_one = 0 < count <= _FEW_SAMPLES or size >= _LARGE_SAMPLE * count > 0
            of_params = _one_by_one(ctx, samples, count, grads) if one_by_one else ctx.torch_result(grads)
            found = [r if p is None else p for p, r in zip(of_params, found)]
        return found

    @classmethod
    def of_rows(cls, ctx, samples: Sequence[int], grads: Sequence) -> list:
        """The same of all but the parameters, by one call of the kernel."""
        return ctx.replace(options=cls.deeper(ctx.options, len(samples))).kernel_result(grads)

    @classmethod
    def _needs(cls, ctx, params: bool) -> tuple:
        return tuple(need and (i in cls.params) == params for i, need in enumerate(ctx.needs_input_grad))


def _one_by_one(ctx, samples, count, grads) -> list:
    """A kernel call for each sample."""
    params = ctx.fn.params
    split = [
        t.reshape(count, *t.shape[len(samples) :]).unbind() if t is not None and i not in params else [t] * count
        for i, t in enumerate((*ctx.saved_tensors, *grads))
    ]
    n, one, found = len(ctx.saved_tensors), ctx.replace(batch=0), []
    for tensors in zip(*split):
        one.saved_tensors = tensors[:n]
        found.append(one.kernel_result(tensors[n:]))
    return [None if parts[0] is None else torch.stack(parts).unflatten(0, samples) for parts in zip(*found)]


def _to_front(t: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _distinct(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same, a tensor that comes a second time as a view: Dynamo takes no tensor twice."""
    return [t if t is None or all(t is not other for other in tensors[:i]) else t.view_as(t) for i, t in enumerate(tensors)]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_sharded(t: torch.Tensor) -> bool:
    """Whether it is a DTensor; its module is slow to import, and imported where there is one."""
    return type(t) not in _PLAIN and isinstance(t, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def _first(n, results):
    return results if n is None else results[0] if n == 1 else results[:n]


def differentiable(inputs: Callable | None = None, *, formula: Callable | None = None) -> Callable:
    """Makes a `backward` of a kernel call: `inputs(ctx)` gives the tensor arguments of the forward, recomputed by torch from what
    was saved where they were not saved themselves; `ctx.options` its other arguments.

    An op whose inputs are not to be had gives a `formula` instead: `formula(ctx, saved, *grads)` are the gradients of the first
    inputs as torch code of the saved tensors. A saved output hangs on the inputs by this very Function: it is exact at every order."""
    return lambda kernel: _Rule(kernel, inputs, formula)


class _Rule:
    def __init__(self, kernel, inputs, formula):
        self.kernel, self.inputs, self.formula = kernel, inputs, formula

    def backward_of(self, fn: type[Function]) -> Callable:
        kernel = self.kernel

        def backward(ctx, *grads):
            if torch.compiler.is_compiling():
                return kernel(ctx, *grads)
            if _transforms.forward_mode_open() or any([g is not None and _transforms.is_legacy_batched(g) for g in grads]):
                return tuple(_Call.of(fn, ctx).torch_result(grads))
            if torch.is_grad_enabled() or _transforms.active():
                return _Backward.of(_Call.of(fn, ctx), grads)
            return kernel(ctx, *grads)

        return backward


class _Call(SimpleNamespace):
    """The ctx of a call, as a plain value that says also which Function's it is and how many dimensions of `batch` are in front of
    all that has rows."""

    @classmethod
    def of(cls, fn, ctx) -> _Call:
        saved = tuple(t if t is None else _transforms.unwrap_if_dead(t) for t in ctx.saved_tensors)
        return cls(**{**vars(ctx), "fn": fn, "batch": 0, "needs_input_grad": ctx.needs_input_grad, "saved_tensors": saved})

    def replace(self, **changes) -> _Call:
        return _Call(**{**vars(self), **changes})

    def batch_dims(self, grads: Sequence) -> tuple:
        """Where vmap finds a level of the batch, in what was saved and the gradients."""
        return tuple(None if t is None or i in self.fn.params else 0 for i, t in enumerate((*self.saved_tensors, *grads)))

    def kernel_result(self, grads: Sequence[torch.Tensor | None]) -> list:
        if self.batch:
            shape = next(t for t, d in zip((*self.saved_tensors, *grads), self.batch_dims(grads)) if d == 0).shape
            return self.fn.of_samples(self, shape[: self.batch], *grads)
        found = self.fn.rule.kernel(self, *grads)
        return list(found) if isinstance(found, tuple) else [found]

    def torch_result(self, grads: Sequence[torch.Tensor | None]) -> list:
        """The same gradients in torch code, which can be differentiated again."""
        _op.count(self.fn.op, "the backward is differentiated")
        tensors, n = (*self.saved_tensors, *grads), len(self.saved_tensors)

        def f(*tensors):
            call = self.replace(saved_tensors=tensors[:n])
            rule = self.fn.rule
            if rule.formula is not None:
                return rule.formula(call, tensors[:n], *tensors[n:])
            inputs = rule.inputs(call)
            needed = [i for i, need in enumerate(self.needs_input_grad[: len(inputs)]) if need]
            return _transforms.vjp(lambda *inputs: self.fn.reference(*inputs, *self.options), inputs, needed, tensors[n:])

        for _ in range(self.batch):
            f = _transforms.vmapped(f, self.batch_dims(grads))
        with _without_autocast(next(t for t in tensors if t is not None).device.type):
            found = f(*tensors)
        return [*found, *[None] * (len(self.needs_input_grad) - len(found))]


class BatchJoined(Function):
    """Base of Functions whose kernels take a single dimension of items before that of the channels, or classes: a batch is joined to it.
    The first argument, alone of channels or with items before them, says how many dimensions these are."""

    @classmethod
    def join(cls, i: int, t: torch.Tensor, n: int) -> torch.Tensor:
        """Argument, or saved tensor, number i with its first n dimensions as one."""
        return t.flatten(0, n - 1)

    @classmethod
    def part(cls, i: int, y: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Result number i with the sizes of those."""
        return y.unflatten(0, sizes)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        shared = [i in cls.params or not isinstance(a, torch.Tensor) for i, a in enumerate(args)]
        moved = [a if s else _to_front(a, d, info.batch_size) for a, s, d in zip(args, shared, in_dims)]
        sizes = moved[0].shape[: min(2, moved[0].dim() - 1)]
        joined = [a if s else cls.join(i, a, len(sizes)) for i, (a, s) in enumerate(zip(moved, shared))]
        results = _transforms.apply(cls, *joined)
        return tuple(y if y is None else cls.part(i, y, sizes) for i, y in enumerate(results)), 0

    @classmethod
    def of_rows(cls, ctx, samples, grads):
        x = ctx.saved_tensors[0]
        sizes = x.shape[: min(len(samples) + 1, x.dim() - 1)]
        saved = [t if t is None or i in cls.params else cls.join(i, t, len(sizes)) for i, t in enumerate(ctx.saved_tensors)]
        grads = [g if g is None else g.flatten(0, len(sizes) - 1) for g in grads]
        found = ctx.replace(saved_tensors=tuple(saved)).kernel_result(grads)
        return [g if g is None else g.unflatten(0, sizes) for g in found]


class _Backward(torch.autograd.Function):
    """A backward as an op: the kernel, and as its own derivative that of the torch code that is equal to it."""

    @classmethod
    def of(cls, call: _Call, grads: Sequence[torch.Tensor | None]) -> tuple:
        if all(g is None for g in grads):
            return (None,) * len(call.needs_input_grad)
        tensors = (*call.saved_tensors, *grads)
        return _transforms.apply(cls, call.replace(saved_tensors=(None,) * len(call.saved_tensors)), *tensors)

    @staticmethod
    def with_tensors(call, tensors):
        n = len(call.saved_tensors)
        return call.replace(saved_tensors=tensors[:n]), tensors[n:]

    @staticmethod
    def forward(call, *tensors):
        call, grads = _Backward.with_tensors(call, tensors)
        with _without_autocast(next(g for g in grads if g is not None).device.type):
            found = call.kernel_result(grads)
        # A gradient may be what came in, or stand for two inputs; autograd tells results apart by what they are.
        taken = [id(t) for t in tensors]
        return tuple(y.view_as(y) if y is not None and id(y) in taken + [id(z) for z in found[:i]] else y for i, y in enumerate(found))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        def f(*tensors):
            call, grads = _Backward.with_tensors(ctx.call, tensors)
            return call.torch_result(grads)

        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        saved = [t if t is None else _transforms.unwrap_if_dead(t) for t in ctx.saved_tensors]
        return None, *_transforms.vjp(f, saved, needed, grads)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        dims, params = in_dims[1:], call.fn.params
        if params is not None and all(dims[i] is None for i in params):
            moved = [t if t is None or i in params else _to_front(t, d, info.batch_size) for i, (t, d) in enumerate(zip(tensors, dims))]
            return _transforms.apply(_Backward, call.replace(batch=call.batch + 1), *moved), 0

        def f(*tensors):
            call_, grads = _Backward.with_tensors(call, tensors)
            return call_.torch_result(grads)

        return tuple(_transforms.vmapped(f, dims)(*tensors)), 0


def _without_autocast(device: str):
    return torch.autocast(device if device in ("cpu", "cuda") else "cpu", enabled=False)


class _NoSecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, anchor, grad):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.op}: the backward of this op cannot be differentiated (it has no second derivative)")


def first_order_only(kernel: Callable) -> Callable:
    """Makes a `backward` for an op that declares no second order: its gradients raise when they are differentiated.

    `once_differentiable` alone stays silent when the incoming gradient does not require grad (a loss plus a gradient penalty), as
    then nothing hangs on it; so with grad mode on each gradient is made to hang on the inputs."""
    once = once_differentiable(kernel)

    def backward(ctx, *grads):
        result = once(ctx, *grads)
        anchor = next((t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad), None)
        if not torch.is_grad_enabled() or anchor is None:
            return result
        single = isinstance(result, torch.Tensor)
        guarded = [
            g if g is None else _NoSecondOrder.apply(ctx._forward_cls.op, anchor, g.detach()) for g in ((result,) if single else result)
        ]
        return guarded[0] if single else tuple(guarded)

    return staticmethod(backward)
