"""What torch.func does to a call: which transforms are open, `Function.apply` beneath them, and vjp and vmap of code with None in it.

Names of torch that are not public are used where they exist. Without them everything is as right, only slower."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# Function.apply binds default arguments with inspect.signature each time, 50 us that a complete positional call does not need.
# Its base does the work.
_BASE = getattr(torch._C, "_FunctionBase", None)
_functorch = getattr(torch._C, "_functorch", None)
_NEEDED = ("_add_batch_dim", "_unwrap_batched", "_unwrap_for_grad", "_wrap_for_grad", "get_unwrapped", "is_batchedtensor",
           "is_functorch_wrapped_tensor", "get_interpreter_stack", "unwrap_if_dead")  # fmt: skip
try:
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as _innermost
    from torch._functorch.utils import enable_single_level_autograd_function as _single_level_allowed

    known = all(hasattr(_functorch, name) for name in _NEEDED)  # False: every transform goes through the references
except ImportError:
    known = False

active = getattr(torch._C, "_are_functorch_transforms_active", None) or (lambda: True)
is_legacy_batched = getattr(_functorch, "is_legacy_batchedtensor", None) or (lambda t: False)
unwrap_if_dead = getattr(_functorch, "unwrap_if_dead", None) or (lambda t: t)  # a tensor of a level that has ended


def forward_mode_open() -> bool:
    return getattr(forward_ad, "_current_level", 0) >= 0


def only_grad_and_vmap() -> bool:
    return known and all(level.key().name in ("Grad", "Vmap") for level in _functorch.get_interpreter_stack() or ())


def is_batched(t: torch.Tensor | None) -> bool:
    """Whether vmap hides a dimension of it, at any level."""
    while t is not None and _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def unwrapped(t: torch.Tensor) -> torch.Tensor:
    """What is within all levels."""
    while known and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def apply(fn: type[torch.autograd.Function], *args):
    """fn.apply. What torch does beneath transforms takes it a millisecond for a forward and a backward, with pytrees, signatures
    that are inspected and classes that are made anew; this does the same for flat positional arguments and a vmap rule whose results
    have the batch in front."""
    if _BASE is None:
        return fn.apply(*args)
    if not active():
        return super(torch.autograd.Function, fn).apply(*args)
    innermost = _innermost() if known else None
    kind = innermost.key().name if known else None
    if kind not in ("Grad", "Vmap"):
        return fn.apply(*args)
    args = [unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args]
    if kind == "Grad":
        args = [innermost._cptr.lift(a) if isinstance(a, torch.Tensor) else a for a in args]
        with _single_level_allowed():
            return super(_SingleLevelFunction, _single_level(fn)).apply(*args)
    level = innermost.level()
    args, dims = zip(*(_functorch._unwrap_batched(a, level) if isinstance(a, torch.Tensor) else (a, None) for a in args))
    with innermost.lower():
        if all(d is None for d in dims):
            return apply(fn, *args)
        results, _ = fn.vmap(SimpleNamespace(batch_size=innermost.batch_size()), dims, *args)
    return _each_tensor(lambda y: _functorch._add_batch_dim(y, 0, level), results)


@functools.cache
def _single_level(fn) -> type:
    """The Function that records a call of fn at the innermost level, which is one of grad, and leaves the others to `apply`."""

    def forward(*args):
        innermost = _innermost()
        level = innermost.level()
        args = [_functorch._unwrap_for_grad(a, level) if isinstance(a, torch.Tensor) else a for a in args]
        with torch.enable_grad(), innermost.lower():
            results = apply(fn, *args)
        return _each_tensor(lambda y: _functorch._wrap_for_grad(y, level), results)

    body = {"forward": forward, "setup_context": fn.setup_context, "backward": fn.backward}
    return type(fn.__name__, (_SingleLevelFunction,), {name: staticmethod(f) for name, f in body.items()})


def _each_tensor(f, results):
    if isinstance(results, torch.Tensor):
        return f(results)
    return tuple(f(y) if isinstance(y, torch.Tensor) else y for y in results)


def vmapped(f: Callable, in_dims: Sequence[int | None]) -> Callable:
    """torch.vmap of an f whose results may be None."""

    def mapped(*tensors):
        there = []

        def g(*tensors):
            results = f(*tensors)
            there[:] = [y is not None for y in results]
            return tuple(y for y in results if y is not None)

        results = iter(torch.vmap(g, in_dims=tuple(in_dims))(*tensors))
        return [next(results) if y else None for y in there]

    return mapped


def vjp(f: Callable, inputs: Sequence[torch.Tensor | None], needed: Sequence[int], grads: Sequence[torch.Tensor | None]) -> list:
    """The gradients of f at `inputs`, a graph over inputs and grads that can be differentiated again; None where not needed."""

    def given(outputs):
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return [(y, g) for y, g in zip(outputs, grads) if y is not None and g is not None]

    found = [None] * len(needed)
    if all(g is None for g in grads):
        pass
    elif active():  # where torch.autograd.grad would see the innermost level alone

        def g(*some):
            placed = list(inputs)
            for i, t in zip(needed, some):
                placed[i] = t
            return tuple(y for y, _ in given(f(*placed)))

        _, pull = torch.func.vjp(g, *(inputs[i] for i in needed))
        found = pull(tuple(g for g in grads if g is not None))
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view of each: the same tensor may be given twice, and each place has its own gradient.
            placed = [
                t if i not in needed else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for i, t in enumerate(inputs)
            ]
            pairs = [(y, g) for y, g in given(f(*placed)) if y.requires_grad]
            if pairs:
                outputs, grads = zip(*pairs)
                found = torch.autograd.grad(outputs, [placed[i] for i in needed], grads, create_graph=create_graph, allow_unused=True)
    result = [None] * len(inputs)
    for i, g in zip(needed, found):
        result[i] = g
    return result
