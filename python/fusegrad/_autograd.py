"""What every fused op's autograd.Function shares. The rule that keeps every order of derivative exact:

a backward runs the kernel only where nobody can differentiate it; with grad mode on (create_graph=True), or while a forward-mode
level is open, it is the vector-Jacobian product of the op's reference instead, which torch differentiates like any code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _op

# Function.apply binds default arguments with inspect.signature each time, 50 us that a complete positional call does not need.
# Its base does the work; without it (a private name) apply is right, only slower.
_BASE = getattr(torch._C, "_FunctionBase", None)
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None) or (lambda: True)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
_is_legacy_batched = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None) or (lambda t: False)


def _forward_mode_open() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


class Function(torch.autograd.Function):
    """Base of the ops' Functions. A subclass has `forward`, `setup_context` and a `backward` made by `differentiable`; its
    tensor arguments come first. It sets `op`, the op's name, and `reference`, which takes the arguments of `apply` and returns
    what the caller gets; the forward may return more after it, to be saved."""

    op: str
    reference: Callable

    @classmethod
    def call(cls, tensors: Sequence[torch.Tensor | None], *options, outputs: int | None = None):
        """`apply`, by the shortest way that is right here. Of several results the first `outputs` are returned (1: without a tuple)."""
        if is_sharded(tensors[0]):
            from . import _sharded

            return _sharded.call(_op.OPS[cls.op], tensors, options, outputs)
        if _op._forced_reference:
            return cls.reference(*tensors, *options)
        if torch.compiler.is_compiling():
            if torch.onnx.is_in_onnx_export():  # ONNX knows torch's operators only
                return cls.reference(*tensors, *options)
            return _first(outputs, cls.apply(*_distinct(tensors), *options))
        reason = _op.why_not(tensors[0])
        if reason is not None:
            _op.fall_back(cls.op, reason, tensors[0])
            return cls.reference(*tensors, *options)
        if _is_tracing():  # as does TorchScript, and the ONNX exporter that is built on it
            _op.count(cls.op, "a trace is recorded")
            return cls.reference(*tensors, *options)
        if _functorch_active() or _forward_mode_open():
            _op.count(cls.op, "a transform or forward mode is active")
            return cls.reference(*tensors, *options)
        if not torch.is_grad_enabled():
            return _first(outputs, cls.forward(*tensors, *options))
        if _BASE is None:
            return _first(outputs, cls.apply(*tensors, *options))
        return _first(outputs, super(torch.autograd.Function, cls).apply(*tensors, *options))


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

    def decorate(kernel: Callable) -> Callable:
        def backward(ctx, *grads):
            if not torch.compiler.is_compiling() and (
                torch.is_grad_enabled() or _forward_mode_open() or any([g is not None and _is_legacy_batched(g) for g in grads])
            ):
                return reference_vjp(ctx, inputs(ctx), grads) if formula is None else formula_vjp(ctx, formula, grads)
            return kernel(ctx, *grads)

        return staticmethod(backward)

    return decorate


def _without_autocast(device: str):
    return torch.autocast(device if device in ("cpu", "cuda") else "cpu", enabled=False)


def reference_vjp(ctx, inputs: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]) -> tuple:
    """The gradients of the reference, as a graph over `inputs` and `grads` that can be differentiated again."""
    fn = ctx._forward_cls
    _op.count(fn.op, "the backward is differentiated")
    create_graph = torch.is_grad_enabled()
    needed = [i for i, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]
    with torch.enable_grad(), _without_autocast(inputs[0].device.type):
        # A view of each: the same tensor may be given twice, and each place has its own gradient.
        inputs = [t.view_as(t) if i in needed else t for i, t in enumerate(inputs)]
        outputs = fn.reference(*inputs, *ctx.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
        if not pairs:
            found = [None] * len(needed)
        else:
            ys, gs = zip(*pairs)
            found = torch.autograd.grad(ys, [inputs[i] for i in needed], gs, create_graph=create_graph, allow_unused=True)
    result = [None] * len(ctx.needs_input_grad)
    for i, g in zip(needed, found):
        result[i] = g
    return tuple(result)


def formula_vjp(ctx, formula: Callable, grads: Sequence[torch.Tensor | None]) -> tuple:
    """The gradients that `formula` makes of what was saved, in a graph that can be differentiated again."""
    _op.count(ctx._forward_cls.op, "the backward is differentiated")
    result = [None] * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors  # once: checkpointing counts
    given = [g for g in grads if g is not None]
    if given:
        with _without_autocast(given[0].device.type):
            found = formula(ctx, saved, *grads)
        result[: len(found)] = found
    return tuple(result)


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
