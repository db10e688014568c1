"""`fuse(model)`: the layers of a model that a kernel of ours computes get our classes, in place; `unfuse(model)` takes them back.

A module stays the object that it is and only changes its class: parameters, buffers, hooks, flags, ties and sharing are never touched.
What is recognised, and what replaces it, is in `_fuse_rules`."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Module

_RECORD = "_fused_from"  # in the __dict__ of a changed module: (its class, our class or None, attributes before, attributes set, joint)


@dataclass(frozen=True)
class Entry:
    """What became of one layer."""

    name: str  # as named_modules has it
    layer: str  # its class, or the function that it calls
    by: str = ""  # what replaces it
    why: str = ""  # why nothing does
    also: tuple[str, ...] = ()  # the other names of a shared module


@dataclass(frozen=True)
class Report:
    """The answer of `fuse`: the entries `replaced` and `kept`; as text, a table with a line for all layers alike."""

    model: str
    replaced: tuple[Entry, ...]
    kept: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} replaced, {len(self.kept)} kept"]
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            alike: dict[tuple, list[Entry]] = {}
            for e in entries:
                alike.setdefault((e.layer, e.by or e.why), []).append(e)
            width = max((len(layer) for layer, _ in alike), default=0)
            for (layer, text), some in alike.items():
                more = f" and {len(some) - 1} more" if len(some) > 1 else ""
                lines.append(f"  {title:8} {len(some):4} x {layer:{width}}  {text}  [{some[0].name or 'the model'}{more}]")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Joint:
    """What modules have in common of which the first does the work of all: none of them is right without the others."""

    members: int


@dataclass(frozen=True)
class Change:
    """What a rule wants: our class for the module (None: as it is), attributes to set, and the words of the report."""

    ours: type | None
    attributes: dict
    layer: str
    by: str
    joint: Joint | None = None


@functools.cache
def fused_class(ours: type, base: type) -> type:
    """Our class, if it is one of base's anyway; else one that is both, so that whoever asks for the model's own class still finds it."""
    if issubclass(ours, base):
        return ours
    made = {"__module__": __name__, "__doc__": ours.__doc__, "__reduce_ex__": _reduce, "_made_of": (ours, base)}
    return type(f"Fused{base.__name__}", (ours, base), made | (ours.of(base) if hasattr(ours, "of") else {}))


def _reduce(self, protocol):
    """A class that was made is made again where the module is unpickled."""
    _, _, *state = super(self._made_of[0], self).__reduce_ex__(max(2, protocol))
    return (_new, self._made_of, *state)


def _new(ours: type, base: type) -> Module:
    cls = fused_class(ours, base)
    return cls.__new__(cls)


def _change(module: Module, change: Change) -> None:
    state, base = module.__dict__, type(module)
    before = {k: state[k] for k in change.attributes if k in state}
    if change.ours is not None:
        module.__class__ = fused_class(change.ours, base)
    state[_RECORD] = (base, change.ours, before, tuple(change.attributes), change.joint)
    state.update(change.attributes)


def _restore(module: Module) -> None:
    base, ours, before, attributes, _ = module.__dict__.pop(_RECORD)
    for k in attributes:
        del module.__dict__[k]
    module.__dict__.update(before)
    if ours is not None:
        module.__class__ = base


def fused(module: Module) -> bool:
    """Whether `fuse` changed it."""
    return _RECORD in module.__dict__


def _check(op: str, model) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{op}: model must not be scripted (its code is compiled already), got {type(model).__name__}; {op} it before, and trace it"
        )
    if not isinstance(model, Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {model if isinstance(model, type) else type(model).__name__}")


def _check_whole(model: Module) -> None:
    """Raises for one that fully_shard was given: it has made a class of each module's own, which would no longer be the one it looks for.
    Its package is slow to import, and imported where there is such a model."""
    package = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(getattr(package, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(package, name))
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            where = f"{type(module).__name__}{name and ' at '}{name}"
            raise TypeError(f"fuse: model must not be sharded already (fuse it before fully_shard), got {where}")


def _names(model: Module) -> Iterator[tuple[Module, tuple[str, ...]]]:
    """Each module once, with all of its names; nothing within a scripted one."""
    found: dict[Module, list[str]] = {}
    scripted = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, torch.jit.ScriptModule)]
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(name.startswith(f"{s}.") for s in scripted):
            found.setdefault(module, []).append(name)
    yield from ((m, tuple(names)) for m, names in found.items())


def fuse(model: Module, *, dry_run: bool = False) -> Report:
    """Replaces the layers of a model that fusegrad has a fused kernel for, in place.

    Layers of `torch.nn`; an activation that follows a Linear, GroupNorm or BatchNorm, in a Sequential or in any forward that can be
    followed; and, by what they compute and not by their names, the norms, gated MLPs, rotary embeddings and losses that models are
    written with (those of Hugging Face transformers, timm and your own). Every module stays the object that it is, with its parameters,
    buffers, hooks and training flag, and changes its class to one that is in fusegrad and still an instance of the old one. Names, order
    and values of the state dict, ties, shared modules and optimizers do not notice.

    Args:
        model: any Module, on any device (meta too), trained or not; also one within DistributedDataParallel. Not a scripted one, nor
            one that `fully_shard` was given: fuse before it.
        dry_run: change nothing, only report.

    Returns:
        A `Report`: `replaced` and `kept`, each a tuple of entries with `name`, `layer`, and `by` what or `why` not. `print(report)`
        shows a table.

    Raises:
        TypeError: no Module, or a scripted or sharded one. ValueError: nothing to replace, with the reasons; not with `dry_run`. The
        model is changed as a whole or not at all.

    Example::

        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16))
        print(fusegrad.fuse(model))
        fusegrad.unfuse(model)

    Two modules that are joined (Linear and GELU above) keep their places: the first does the work of both, the second hands on what it
    gets. Whoever calls the first one alone afterwards, or hooks it, sees the result of both.
    """
    from ._fuse_rules import plan  # with all layers, which import this module

    _check("fuse", model)
    _check_whole(model)
    names = dict(_names(model))
    changes, reasons = plan(names)
    replaced = [(m, Entry(names[m][0], c.layer, by=c.by, also=names[m][1:])) for m, c in changes.items()]
    kept = [Entry(names[m][0], type(m).__name__, why=why, also=names[m][1:]) for m, why in reasons.items()]
    report = Report(type(model).__name__, tuple(e for _, e in replaced), tuple(kept))
    if dry_run:
        return report
    if not changes:
        why = "; ".join(f"{n} x {layer}: {text}" for (layer, text), n in Counter((e.layer, e.why) for e in kept).items())
        raise ValueError(f"fuse: model must have a layer that can be replaced, got {type(model).__name__} ({why or 'no layers'})")
    done = []
    try:
        for module, change in changes.items():
            _change(module, change)
            done.append(module)
    except BaseException:
        for module in reversed(done):
            _restore(module)
        raise
    return report


def unfuse(model: Module) -> tuple[str, ...]:
    """Takes back what `fuse` did to the modules of a model: each has its own class and attributes again.

    Args:
        model: what was given to `fuse`, or a part, copy or wrapper of it, with all of the layers that were joined to one of them.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: no Module. ValueError: nothing in it is fused, a layer is outside of it that was joined to one within, or the class
        of a fused module was changed again (by `fully_shard` or a parametrization, which must be undone first); nothing is restored
        then.

    Example::

        names = fusegrad.unfuse(model)
    """
    _check("unfuse", model)
    found = {name: m for name, m in model.named_modules() if fused(m)}
    if not found:
        raise ValueError(f"unfuse: model must have a fused layer, got {type(model).__name__} without one")
    there = Counter(m.__dict__[_RECORD][-1] for m in found.values())
    for name, m in found.items():
        base, ours, *_, joint = m.__dict__[_RECORD]
        if joint is not None and there[joint] < joint.members:
            text = f"{name or 'it'} is one of {joint.members} layers that are joined, and {there[joint]} of them are in it"
            raise ValueError(f"unfuse: model must have whole groups of joined layers, got a {type(model).__name__} where {text}")
        if ours is not None and type(m) is not fused_class(ours, base):
            raise ValueError(f"unfuse: {name or 'the model'} must have the class that fuse gave it, got {type(m).__name__}")
    for m in found.values():
        _restore(m)
    return tuple(found)
