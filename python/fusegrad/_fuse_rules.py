"""What `fuse` recognises, and what replaces it: `RULES`, tried in order on each module.

Names only say where to look. A class of torch.nn is known by the forward that it runs. Code of models is known by its structure (few
parameters, few children) and then proved: its own forward is run on small random tensors, or followed with torch.fx, and must compute
what the kernel computes. A probe is a copy of the module's attributes with parameters of its own: it needs none of the weights, works
on the meta device, and leaves the module as it is."""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import operator
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from types import CellType, CodeType, FunctionType

import torch
from torch import Tensor, fx
from torch.nn import Module

from . import functional as F
from . import nn
from ._activations import ACTIVATIONS
from ._fuse import Change, Joint, fused
from ._op import autocast
from .ops.mlp import GATES

TORCH = {getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)}
NORMS_WITH_ACTIVATION = (torch.nn.GroupNorm, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
ROTARY = "apply_rotary_pos_emb"  # the function that models of transformers turn q and k with, each its own


# --- what a module is ----------------------------------------------------------------------------------------------------------


def _torch_class(m: Module) -> type | None:
    """The class of torch.nn whose forward it runs, unchanged."""
    base = next((c for c in type(m).__mro__ if c in TORCH), None)
    return base if base is not None and type(m).forward is base.forward else None


@functools.cache
def _added(base: type) -> dict:
    """What our constructor adds to a module of torch's: found by making one of each."""
    parameters = inspect.signature(base).parameters.values()
    sizes = [1 for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with torch.device("meta"):  # draws no random numbers
        usual, more = vars(base(*sizes)), vars(TORCH[base](*sizes))
    return {k: v for k, v in more.items() if k not in usual}


def _has_its_own(m: Module, base: type) -> bool:
    """Whether it has an attribute, other than a child, of a name that our constructor would set."""
    return any(k in vars(m) or hasattr(type(m), k) for k in _added(base))


def _own(tensors: dict) -> dict:
    return {k: t for k, t in tensors.items() if t is not None}


def _runs(m: Module, *forwards: Callable) -> bool:
    """Whether its class's forward is one of these."""
    return not isinstance(m, torch.jit.ScriptModule) and type(m).forward in forwards


def _leaf(m: Module) -> bool:
    return not any(True for _ in m.children())


def _hooked(m: Module, behind: bool = False) -> bool:
    """Whether somebody looks at it, or at every module; with `behind`, at what comes out of it."""
    kinds = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks") + (() if behind else ("_forward_pre_hooks",))
    return any(getattr(m, kind) or getattr(torch.nn.modules.module, f"_global{kind}") for kind in kinds)


def _refusal(m: Module) -> str | None:
    """Why no rule is asked."""
    if fused(m):
        return "it is fused already"
    if type(m).__module__.partition(".")[0] == "fusegrad":
        return "it is a layer of fusegrad"
    if isinstance(m, torch.jit.ScriptModule):
        return "it is scripted"
    if "forward" in vars(m):
        return "its forward is set on the object"
    if torch.nn.utils.parametrize.is_parametrized(m):
        return "it is parametrized"
    if isinstance(m, torch.nn.modules.lazy.LazyModuleMixin) and m.has_uninitialized_params():
        return "its parameters are not there yet: run it once"
    return None


# --- probes --------------------------------------------------------------------------------------------------------------------


def _copied(value, memo: dict):
    """Tensors and plain containers anew, whatever else as it is; what memo has by its id, as memo has it."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        memo[id(value)] = new = copy(value)
        new.update((k, _copied(v, memo)) for k, v in value.items())
    elif type(value) is list:
        memo[id(value)] = new = []
        new.extend(_copied(v, memo) for v in value)
    elif type(value) is tuple:
        return tuple(_copied(v, memo) for v in value)
    elif isinstance(value, (set, deque)):
        memo[id(value)] = copy(value)
    else:
        return value
    return memo[id(value)]


def _probe(m: Module, training: bool = True, **state) -> Module:
    """A module of m's class and attributes, some of them others, and so its children: what its forward sets, counts or collects does not
    reach m. Parameters are the same."""
    memo: dict = {id(p): p for p in m.parameters()}
    probes = [(old, object.__new__(type(old))) for old in m.modules() if not isinstance(old, torch.jit.ScriptModule)]
    memo |= {id(old): new for old, new in probes}
    for old, new in probes:
        new.__dict__.update((k, _copied(v, memo)) for k, v in vars(old).items())
    probe = memo[id(m)]
    probe.__dict__.update(training=training, **state)
    return probe


@contextmanager
def _drawing_apart():
    """What is drawn within is not missing from the generators afterwards; gives a function that says whether something was."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        drawn = torch.get_rng_state()
        try:
            yield lambda: random.getstate() != state or not torch.equal(torch.get_rng_state(), drawn)
        finally:
            random.setstate(state)


def _run(forward: Callable, *inputs: Tensor, parameters: Iterable[Tensor | None] = ()) -> list[Tensor] | None:
    """What it makes of the inputs, and the gradients of them and of the parameters for a cotangent that is drawn; None if it is not for
    such inputs, or has no such gradients."""
    try:
        with _drawing_apart(), torch.inference_mode(False), torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = forward(*[t.clone() for t in leaves])  # it may be one that writes to what it gets
            leaves += [p for p in parameters if p is not None]
            return [y.detach(), *torch.autograd.grad(y, leaves, _draw(*y.shape, dtype=y.dtype, seed=17))]
    except Exception:  # code of others may raise whatever it likes
        return None


def _draw(*shape: int, dtype=torch.float32, seed=0, scale=1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * scale).to(dtype)


def _close(a: list[Tensor] | None, b: list[Tensor] | None, tolerance: float) -> bool:
    """Results and gradients, to this part of the largest value of each."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x.shape == y.shape and x.dtype == y.dtype and bool((x - y).abs().max() <= tolerance * y.abs().max()) for x, y in zip(a, b))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """But for an element here and there, whose last bit hangs on the order of a sum."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= 0.25) and (a != b).double().mean().item() < 0.02


def _activation(m: Module) -> tuple[str, float] | None:
    """Name and slope of the activation that it computes, in float64 to the last digits."""
    named = any(word in type(m).__name__.lower() for word in ("lu", "act", "mish", "sigmoid", "swish", "tanh"))
    if not named or not _leaf(m) or _own(m._parameters) or _own(m._buffers):
        return None
    x = torch.linspace(-6.03, 25.07, 312, dtype=torch.float64, device="cpu")  # beyond the threshold of softplus, on no kink
    x = torch.cat((x, x.new_tensor((-1e4, -100.0, 100.0, 1e4))))
    training, evaluating = (_run(functools.partial(type(m).forward, _probe(m, mode)), x) for mode in (True, False))
    slope = getattr(m, "negative_slope", 0.01)
    if training is None or evaluating is None or not all(map(torch.equal, training, evaluating)) or not isinstance(slope, float):
        return None
    if any(t.shape != x.shape or t.dtype != x.dtype for t in training):  # as of one that halves what it gets
        return None
    for name, function in ACTIVATIONS.items():
        expected = None if name == "identity" else _run(lambda x, function=function: function(x, slope), x)
        if expected and all(torch.allclose(*pair, rtol=1e-12, atol=1e-13) for pair in zip(training, expected)):
            return name, slope
    return None


# --- what a forward calls ------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def __init__(self):
        super().__init__()
        self.values = []

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def proxy(self, node):
        value = super().proxy(node)
        self.values.append((node, weakref.ref(value)))
        return value

    def mark_kept(self) -> None:
        """Marks the nodes whose value the forward has put somewhere, where others may look at it."""

        def kept():
            return [node for node, value in self.values if value() is not None]

        if kept():
            gc.collect()
        for node in kept():
            node.meta["kept"] = True


def _graphs(m: Module) -> list[fx.Graph]:
    """m's own forward as calls of its modules, in training and in evaluation, with and without gradients. Nothing where it cannot be
    followed, draws random numbers, or takes more than one argument, as its way may then be another one the next time."""
    if _leaf(m) or _refusal(m):
        return []
    try:
        kinds = [p.kind for p in inspect.signature(type(m).forward).parameters.values()]
        if len(kinds) != 2 or any(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds):
            return []
        tracers, graphs = [], []
        with _drawing_apart() as drawn:
            for training, gradients in ((True, True), (True, False), (False, True), (False, False)):
                tracers.append(_Tracer())
                with torch.set_grad_enabled(gradients):
                    graphs.append(tracers[-1].trace(_probe(m, training)))
            if drawn():
                return []
        for tracer in tracers:
            tracer.mark_kept()
        return graphs
    except Exception:  # code of others may raise whatever it likes
        return []


@functools.cache
def _reads(cls: type) -> dict[str, list[tuple[str, str]]]:
    """What the functions of a class read of objects: each attribute's name, and "()" if it is called, the name that is read of it in
    turn, or "" for all else."""
    found = defaultdict(list)

    def read(name, code):
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for step, after in zip(steps, (*steps[1:], None)):
            if step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL" in step.argrepr):
                found[name].append((step.argval, "()"))
            elif step.opname == "LOAD_ATTR":
                found[name].append((step.argval, after.argval if after.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""))
        for inner in (c for c in code.co_consts if inspect.iscode(c)):
            read(name, inner)

    for base in cls.__mro__[: cls.__mro__.index(Module)]:
        for name, f in vars(base).items():
            f = f.fget if isinstance(f, property) else getattr(f, "__func__", f)
            if isinstance(f, FunctionType) and name != "__init__":
                read(name, getattr(inspect.unwrap(f), "__code__", f.__code__))
    return found


def _reached(cls: type) -> set[str]:
    """The functions of a class that its forward may come to."""
    found, reads = set(), _reads(cls)
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [attribute for attribute, _ in reads.get(name, ()) if attribute in reads]
    return found


def _gated_parts(m: Module, graph: fx.Graph) -> tuple[str, ...] | None:
    """The names (act, gate, up, down) if down(act(gate(x)) * up(x)) is all that the graph does; (act, both, "", down) if one child
    makes gate and up, the two halves of its result."""
    x, *nodes = graph.nodes
    products = [n for n in nodes if n.op == "call_function" and n.target in (operator.mul, torch.mul)]
    if len(products) != 1 or len(products[0].users) != 1 or any("kept" in n.meta for n in nodes):
        return None
    (product,) = products
    (down,) = product.users
    for act, up in (product.args, product.args[::-1]):
        gate = act.args[0] if isinstance(act, fx.Node) and act.args else None
        calls = [(act, gate), (down, product)]
        halves = [n for n in (gate, up) if isinstance(n, fx.Node) and n.target is operator.getitem]
        if len(halves) == 2:
            split = gate.args[0]
            whole = split.args[0] if (split.target, split.args[1:], split.kwargs) == ("chunk", (2,), {"dim": -1}) else None
            if whole is None or [n.args for n in halves] != [(split, 0), (split, 1)]:
                continue
            calls.append((whole, x))
            names, others = (act.target, whole.target, "", down.target), 5  # split, its halves, product, output
        else:
            calls += [(gate, x), (up, x)]
            names, others = None, 2
        if len(nodes) != len(calls) + others or not all(
            isinstance(n, fx.Node) and n.op == "call_module" and n.args == (i,) and not n.kwargs for n, i in calls
        ):
            continue
        names = names or (act.target, gate.target, up.target, down.target)
        return None if any("." in name for name in names) else names
    return None


def _taken_in(first: Module, second: Module, attributes: dict) -> dict | None:
    """What `first` becomes if it does the work of `second` too."""
    kind = _torch_class(first)
    if _refusal(first) or _refusal(second) or kind is None or _has_its_own(first, kind):
        return None
    if kind in (torch.nn.Linear, *NORMS_WITH_ACTIVATION) and "activation" not in attributes:
        activation = _activation(second)
        return {"activation": activation[0]} if activation and activation[1] == 0.01 else None
    if kind is torch.nn.Dropout and _torch_class(second) is kind and first.training == second.training:
        p = attributes.get("p", first.p)
        return {"p": p + second.p - p * second.p}
    return None


# What may be read of a child by its owner without a look at what comes out of the layers: nothing but that it is called, for a
# Sequential, or an attribute, for a layer.
_PARAMETERS = {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "load_state_dict", "requires_grad_", "zero_grad"}
_CASTS = {"to", "float", "double", "half", "bfloat16", "cpu", "cuda"}


def _leaves_whole(what: str) -> bool:
    return what in {"()", "apply", "train", "eval", "compile", "append", "add_module"} | _PARAMETERS | _CASTS


def _leaves_alone(what: str) -> bool:
    return what not in ("()", "", "forward", "__call__")


class Found:
    """What is known of the whole model before its modules are asked one by one."""

    def __init__(self, names: dict[Module, tuple[str, ...]]):
        self.names = names
        self.graphs = {m: graphs for m in names if (graphs := _graphs(m))}
        self.gated: dict[Module, tuple[str, ...]] = {}  # its activation, and the names of gate, up and down
        self.within: dict[Module, Module] = {}  # an activation whose work a module around it does
        self.attributes: dict[Module, dict] = defaultdict(dict)  # of a module that others are joined to
        self.joined: dict[Module, Module] = {}  # to which one
        self.together: dict[Module, set[Module]] = {}  # all that are joined to each other
        self.why: dict[Module, str] = {}
        self._find_gated()
        self._find_joins()

    def _find_gated(self) -> None:
        for m, graphs in self.graphs.items():
            parts, *others = (_gated_parts(m, graph) for graph in graphs)
            if parts is None or any(parts != other for other in others):
                continue
            act = m.get_submodule(parts[0])
            activation = _activation(act)
            if activation is None or activation[0] not in GATES:
                self.why[m] = f"its activation must be {', '.join(GATES)}, got {type(act).__name__}"
            elif _hooked(act):
                self.why[m] = "its activation has a hook"
            else:
                self.gated[m], self.within[act] = (activation[0], *parts[1:]), m
        for m in self.gated:
            del self.graphs[m]  # gate and activation are no pair

    def _callers(self, m: Module, owners: dict) -> set[Module]:
        """The modules whose forward may call it: its owners, or theirs if they are lists, which have none."""
        found = set()
        for owner in owners[m]:
            found |= self._callers(owner, owners) if _runs(owner, Module.forward) else {owner}
        return found

    def _seen(self, m: Module, owners: dict) -> bool:
        """Whether code of an owner may call it, or reach into a Sequential around it, aside from the forwards that were followed."""
        for owner in owners[m]:
            followed = owner in self.graphs
            if _runs(owner, torch.nn.Sequential.forward):
                if self._seen(owner, owners):
                    return True
                continue
            if type(owner).__module__.startswith("torch."):  # wrappers too, as torch.compile's
                continue
            names = {name for name, child in owner._modules.items() if child is m}
            aside = _reads(type(owner)).keys() - (_reached(type(owner)) if followed else ())
            harmless = _leaves_whole if _runs(m, torch.nn.Sequential.forward) else _leaves_alone
            if any(name in names and not harmless(what) for f in aside for name, what in _reads(type(owner))[f]):
                return True
        return False

    def _after(self, root: Module, node: fx.Node, through: set[Module]) -> Module | None:
        """The module that alone takes the node's result, behind those that hand on what they get."""
        while len(node.users) == 1 and "kept" not in node.meta:
            (user,) = node.users
            if user.op != "call_module" or user.args != (node,) or user.kwargs:
                return None
            module = root.get_submodule(user.target)
            if module not in through:
                return module
            node = user
        return None

    def _with(self, m: Module) -> set[Module]:
        return self.together.get(m, set())

    def _find_joins(self) -> None:
        owners = defaultdict(set)
        for owner in self.names:
            for child in owner.children():
                owners[child].add(owner)
        through = {m for m in self.names if _runs(m, torch.nn.Identity.forward) and not _hooked(m)}
        while True:
            after, before, callers = defaultdict(list), defaultdict(list), defaultdict(set)
            for root, graphs in self.graphs.items():
                for node in (n for graph in graphs for n in graph.nodes if n.op == "call_module"):
                    module = root.get_submodule(node.target)
                    callers[module].add(root)
                    if module not in through:
                        next_one = self._after(root, node, through)
                        after[module].append(next_one)
                        before[next_one].append(module)
            wanted = {}
            for first, follow in after.items():
                for second in {m for m in follow if m is not None}:
                    taken = _taken_in(first, second, self.attributes[first])
                    if taken is not None:
                        wanted[first, second] = taken

            def refusal(first, second, wanted=wanted, after=after, before=before, callers=callers):
                if _hooked(first, behind=True) or _hooked(second):
                    return "a hook sees what is between them"
                if not all(self._callers(m, owners) <= callers[m] for m in (first, second)):
                    return "one is called by a forward that cannot be followed"
                if self._seen(first, owners) or self._seen(second, owners):
                    return "code of the module around them may call one alone"
                alike = all(wanted.get((first, m)) == wanted[first, second] for m in after[first])
                if not alike or len(before[second]) != len(after[second]) or any((m, second) not in wanted for m in before[second]):
                    return "one is called elsewhere too"
                return None

            refused = True
            while refused:
                refused = {pair: reason for pair in wanted if (reason := refusal(*pair))}
                for pair, reason in refused.items():
                    del wanted[pair]
                    self.why |= {m: f"{' and '.join(type(m).__name__ for m in pair)} are not joined: {reason}" for m in pair}
            seconds = {second for _, second in wanted}
            heads = {pair: taken for pair, taken in wanted.items() if pair[0] not in seconds}  # of three, the last waits a round
            if not heads:
                return
            for (first, second), taken in heads.items():
                self.attributes[first] |= taken
                self.joined[second] = first
                self.together |= dict.fromkeys(together := {first, second} | self._with(first) | self._with(second), together)
                through.add(second)


# --- our classes that torch.nn has no counterpart of -----------------------------------------------------------------------------


class Joined(Module):
    """Hands on what it gets: the layer before it does its work."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class WrittenRMSNorm(nn.RMSNorm):
    """RMS norm as model code writes it: autocast does not change its dtypes, and where that code rounds before it multiplies
    (`cast_order="llama"`), a weight of a wider dtype makes the result wider."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and autocast(x):
            with torch.autocast("cuda", enabled=False):
                return self.forward(x)
        if self.cast_order == "llama" and torch.promote_types(x.dtype, self.weight.dtype) != x.dtype:
            return F.rms_norm(x, self.normalized_shape, None, self.eps) * (self.weight + self.weight_offset)
        return super().forward(x)


class WrittenLayerNorm2d(nn.LayerNorm2d):
    """Layer norm over channels as image models write it, between two permutes: its result is channels_last, and so is what follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)


class Gated(Module):
    """down(act(gate(x)) * up(x)) with the activation and the product in one kernel; the parts are the module's own, and one of them
    may make gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        activation, gate, up, down = self.gated
        parts = [getattr(self, name)(x) for name in (gate, up) if name]
        if len({(part.shape, part.dtype) for part in parts}) > 1:  # one gate for many columns, say
            return getattr(self, down)(ACTIVATIONS[activation](parts[0], 0.01) * parts[1])
        return getattr(self, down)(GATES[activation](*parts))


class Rotary(Module):
    """A module whose forward is its own, but for the rotary embedding of q and k."""

    @staticmethod
    def of(base: type) -> dict:
        """The forward with another name in the place of the function's; the module that it is from gets that name, and no other user
        of that module notices."""
        forward = inspect.unwrap(base.forward)
        code, name = forward.__code__, f"_fusegrad_{ROTARY}"
        forward.__globals__[name] = _rotary(forward.__globals__[ROTARY])
        return {"forward": _with_code(base.forward, code.replace(co_names=tuple(name if n == ROTARY else n for n in code.co_names)))}


def _can_be_copied(f) -> bool:
    """Whether it is a function, or one that decorators are around which hold it in a variable of their own."""
    while hasattr(f, "__wrapped__"):
        if not isinstance(f, FunctionType) or [_contents(cell) for cell in f.__closure__ or ()].count(f.__wrapped__) != 1:
            return False
        f = f.__wrapped__
    return isinstance(f, FunctionType)


def _contents(cell: CellType):
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _with_code(f: FunctionType, code: CodeType) -> FunctionType:
    """A copy with that code, or with the same decorators around it."""
    closure, more = f.__closure__, dict(vars(f))
    if "__wrapped__" in more:
        inner = more["__wrapped__"]
        more["__wrapped__"] = new = _with_code(inner, code)
        code, closure = f.__code__, tuple(CellType(new) if _contents(cell) is inner else cell for cell in closure)
    made = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__, made.__doc__ = f.__kwdefaults__, f.__annotations__, f.__doc__
    vars(made).update(more)
    return made


def _rotary(theirs: Callable) -> Callable | None:
    """Our function of theirs' arguments, if theirs turns q and k as `rotary_embedding` does."""
    try:
        if list(inspect.signature(theirs).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
            return None
        shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
        q, k, cos, sin = tensors = [_draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        expected = _run(lambda *tensors: torch.cat([t.flatten() for t in theirs(*tensors)]), *tensors)
        wide = theirs(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.float32
        for interleaved in (False, True):

            def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1, *, interleaved=interleaved, wide=wide):
                if unsqueeze_dim not in (1, 2):
                    raise ValueError(f"rotary_embedding: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
                if unsqueeze_dim == 2:  # [batch, seq, heads, dim]
                    q, k = q.transpose(1, 2), k.transpose(1, 2)
                if wide:  # float32 tables make 16-bit q and k float32, as in the product that is written there
                    dtype = torch.promote_types(q.dtype, cos.dtype)
                    q, k = q.to(dtype), k.to(dtype)
                if cos.dtype not in (q.dtype, torch.float32) or q.dtype == torch.float64:
                    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
                q, k = F.rotary_embedding(q, k, cos, sin, interleaved=interleaved)
                return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 2 else (q, k)

            ours = apply_rotary_pos_emb
            if _close(expected, _run(lambda *tensors, ours=ours: torch.cat([t.flatten() for t in ours(*tensors)]), *tensors), 1e-5):
                return ours
    except Exception:  # code of others may raise whatever it likes
        pass
    return None


def _token_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch, ignore_index: int) -> Tensor:
    logits, labels = logits.view(-1, vocab_size), labels.view(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    # Of 16-bit logits autocast makes a float32 loss, without a float32 copy of them.
    with torch.autocast(logits.device.type, enabled=logits.dtype in (torch.float16, torch.bfloat16), dtype=logits.dtype):
        loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs) -> Tensor:
    """Cross entropy of each token's logits with the next token's label, as `loss_function` of a model of transformers."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _token_loss(logits, shift_labels.contiguous(), vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs) -> Tensor:
    """Cross entropy of each token's logits with its own label, as `loss_function` of a model of transformers."""
    return _token_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index)


# --- the rules -----------------------------------------------------------------------------------------------------------------
# Each takes a module and what was found in the model: a Change, or None if it is not its business.


def _change(ours: type, m: Module, attributes: dict, by: str = "", **words) -> Change:
    text = ", ".join(f"{k}={v!r}" for k, v in words.items())
    name = next(c.__name__ for c in ours.__mro__ if c.__name__ in nn.__all__) if not by else ""
    return Change(ours, attributes, type(m).__name__, by or f"fusegrad.nn.{name}({text})")


def layer_of_torch(m: Module, found: Found) -> Change | None:
    """A layer of torch.nn that fusegrad has too, with what is joined to it. A Linear that nothing is joined to is torch's product, as
    ours would be."""
    base, taken = _torch_class(m), found.attributes[m]
    if base is None or (base is torch.nn.Linear and not taken):
        return None
    if _has_its_own(m, base):
        found.why[m] = f"it has an attribute of its own where ours has one ({', '.join(_added(base))})"
        return None
    return _change(TORCH[base], m, _added(base) | taken, **taken)


def joined(m: Module, found: Found) -> Change | None:
    """An activation, or a Dropout behind a Dropout, that the module before it takes in."""
    first = found.joined.get(m)
    return None if first is None else _change(Joined, m, {}, by=f"joined to the {type(first).__name__} before it")


def _agree(a: Module, b: Module, x: Tensor, param_dtype: torch.dtype, order_of_casts: bool) -> bool:
    """Whether both make the same of x, with weights that are drawn; lying in memory alike. In 16 bits results, of the same dtype, are
    as close as that allows, or the same if the order of casts shall be."""
    n, results = len(a.weight), []
    for m in (a, b):
        own = [k for k, p in a._parameters.items() if p is not None]
        params = {k: _draw(n, dtype=param_dtype, seed=i).requires_grad_() for i, k in enumerate(sorted(own), 1)}
        probe = _probe(m, _parameters=dict.fromkeys(("bias", *a._parameters)) | params)
        results.append(_run(functools.partial(type(m).forward, probe), x, parameters=params.values()))
    theirs, ours = results
    if theirs is None or ours is None or theirs[0].stride() != ours[0].stride():
        return False
    if x.dtype == torch.float32:
        return _close(theirs, ours, 1e-4)
    return _same_bits(theirs[0], ours[0]) if order_of_casts else _close(theirs[:1], ours[:1], 2**-4)


def written_norm(m: Module, found: Found) -> Change | None:
    """A norm in Python code: a weight, perhaps a bias, one eps."""
    epsilons = {v for k, v in vars(m).items() if "eps" in k and isinstance(v, float)}
    own = _own(m._parameters)
    shapes = {p.shape for p in own.values()}
    if not _leaf(m) or _own(m._buffers) or "weight" not in own or own.keys() - {"weight", "bias"} or len(epsilons) != 1:
        return None
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] < 2:
        return None
    (n,), (eps,) = shape, epsilons
    scale = eps**0.5 or 1.0  # where eps counts
    rows, images = _draw(max(4, 2048 // n), n, scale=scale), _draw(2, n, 3, 4, scale=scale)
    kinds = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))  # of rows and weight
    for cls, x in ((nn.LayerNorm, rows), (nn.LayerNorm2d, images), (WrittenLayerNorm2d, images)):
        ours = cls(n, eps, bias="bias" in own, device="cpu")
        if all(_agree(m, ours, x.to(dtype), param, False) for dtype, param in kinds):
            return _change(cls, m, _attributes(ours) | ({} if "bias" in m._parameters else dict(bias=None)))
    for options in (dict(weight_offset=o, cast_order=c) for c in ("torch", "llama") for o in (0.0, 1.0)):
        ours = WrittenRMSNorm((n,), eps, device="cpu", **options)
        if "bias" not in own and all(_agree(m, ours, rows.to(dtype), param, True) for dtype, param in kinds):
            return _change(WrittenRMSNorm, m, _attributes(ours), **options)
    return None


def _attributes(ours: Module) -> dict:
    """What its constructor sets, beside what each module has."""
    return {k: v for k, v in vars(ours).items() if k not in vars(Module())}


def norm_with_activation(m: Module, found: Found) -> Change | None:
    """A subclass of a norm of torch's whose forward applies its child, an activation, to the result."""
    base = next((c for c in NORMS_WITH_ACTIVATION if isinstance(m, c)), None)
    acts = [c for c in m.children() if not _runs(c, torch.nn.Identity.forward)]
    if base is None or _leaf(m) or len(acts) > 1 or m.weight is None or any(map(_hooked, m.children())) or _has_its_own(m, base):
        return None
    name, slope = _activation(acts[0]) or (None, None) if acts else ("identity", 0.01)
    if slope != 0.01:
        return None
    c = len(m.weight)
    x = _draw(6, c, *[3] * {torch.nn.BatchNorm1d: 0, torch.nn.BatchNorm3d: 3}.get(base, 2))
    for training in (True, False):
        results = []
        for forward in (type(m).forward, lambda m, x: ACTIVATIONS[name](base.forward(m, x), slope)):
            buffers = {k: b if b is None else torch.ones(b.shape, device="cpu") for k, b in m._buffers.items()}
            params = {k: _draw(c, seed=i).requires_grad_() for i, k in enumerate(("weight", "bias"), 1)}
            probe = _probe(m, training, _parameters=params, _buffers=buffers)
            found_by = _run(functools.partial(forward, probe), x, parameters=params.values())
            results.append((found_by, list(_own(buffers).values())))
        (theirs, after), (ours, expected) = results
        if not _close(theirs, ours, 1e-4) or not all(map(torch.equal, after, expected)):
            return None
    activation = dict(activation=name) if acts else {}
    found.within |= dict.fromkeys(acts, m)
    return _change(TORCH[base], m, _added(base) | activation, **activation)


def gated_mlp(m: Module, found: Found) -> Change | None:
    """down(act(gate(x)) * up(x)), whatever the parts are called."""
    gated = found.gated.get(m)
    return None if gated is None else _change(Gated, m, dict(gated=gated), by=f"fusegrad.functional.{GATES[gated[0]].__name__}")


def written_activation(m: Module, found: Found) -> Change | None:
    """An activation in Python code, or the one of a gated MLP or a norm. Those of torch.nn are one kernel already."""
    into = found.within.get(m)
    if (into is None and type(m).__module__.startswith("torch.")) or getattr(m, "inplace", False):
        return None
    activation = _activation(m)
    if activation is None:
        return None
    name, slope = activation
    attributes = dict(num_features=None, activation=name, bias=None, options=dict(scale=1.0, negative_slope=slope, dim=-1))
    by = "" if into is None else f"in the kernel of its {type(into).__name__}"
    return _change(nn.BiasAct, m, attributes, by=by, activation=name)


def rotary_caller(m: Module, found: Found) -> Change | None:
    """A module whose forward calls the function of its file that turns q and k."""
    if not _can_be_copied(type(m).forward):
        return None
    forward = inspect.unwrap(type(m).forward)
    if ROTARY not in forward.__code__.co_names:
        return None
    if _rotary(forward.__globals__.get(ROTARY)) is None:
        found.why[m] = f"its {ROTARY} is another one than rotary_embedding"
        return None
    return Change(Rotary, {}, f"{type(m).__name__}.{ROTARY}", "fusegrad.functional.rotary_embedding")


def token_loss(m: Module, found: Found) -> Change | None:
    """`loss_function`, a property of models of transformers, where it is the cross entropy of tokens."""
    attribute = getattr(type(m), "loss_function", None)
    if not isinstance(attribute, property) or "labels" not in inspect.signature(type(m).forward).parameters:
        return None
    try:
        theirs = m.loss_function
    except Exception:  # code of others may raise whatever it likes
        return None
    name = getattr(theirs, "__name__", type(theirs).__name__)
    logits, labels = _draw(2, 5, 7), torch.tensor([[1, 2, -100, 4, 6], [0, -100, 3, 5, 2]], device="cpu")
    divisors = ({}, dict(num_items_in_batch=3), dict(num_items_in_batch=torch.tensor(5, device="cpu")))
    for ours in (causal_lm_loss, masked_lm_loss):
        results = [
            [_run(lambda x, f=f, items=items: f(logits=x, labels=labels, vocab_size=7, **items), logits) for f in (theirs, ours)]
            for items in divisors
        ]
        if all(_close(*pair, 1e-5) for pair in results) and _probe(m, _loss_function=ours).loss_function is ours:
            layer = f"{type(m).__name__}.loss_function"
            return Change(None, dict(_loss_function=ours), layer, f"fusegrad.functional.cross_entropy (was {name})")
    found.why[m] = f"its loss_function, {name}, is no cross entropy of tokens"
    return None


RULES = (joined, layer_of_torch, written_norm, norm_with_activation, gated_mlp, written_activation, rotary_caller, token_loss)


def plan(names: dict[Module, tuple[str, ...]]) -> tuple[dict[Module, Change], dict[Module, str]]:
    """What to change, and why not the other layers (modules without children, and what else looked like something)."""
    found, changes, kept = Found(names), {}, {}
    joints = {id(together): Joint(len(together)) for together in found.together.values()}
    for m in names:
        refusal = _refusal(m)
        change = None if refusal else next((change for rule in RULES if (change := rule(m, found))), None)
        if change is not None:
            changes[m] = replace(change, joint=joints.get(id(found.together.get(m))))
        elif refusal or m in found.why or (_leaf(m) and not _runs(m, Module.forward, torch.nn.Identity.forward)):
            kept[m] = refusal or found.why.get(m) or _nothing(m, found)
    return changes, kept


def _nothing(m: Module, found: Found) -> str:
    if m in found.within:
        return f"its {type(found.within[m]).__name__} does its work now"
    if _torch_class(m) is torch.nn.Linear:
        return "no activation follows that it could take in; the product is torch's"
    if _activation(m) is not None:
        return "it is one kernel, and no layer before it can take it in"
    return "fusegrad has no layer for it"
