"""The conformance suite that fusegrad's own ops pass, for any differentiable callable: `check(fn, reference, samples)`.

`properties.py` has the properties, `budget.py` the rule that decides whether a number is right. Not imported by `import fusegrad`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch.func import functional_call
from torch.utils import _pytree

from .. import _op
from .._op import Op, Sample
from .._samples import Make
from .budget import BF16, F16, F32, F64, PAIRS, call, diffable
from .properties import PROPERTIES, NotApplicable

__all__ = ["Finding", "Make", "PROPERTIES", "Report", "Sample", "check"]

# What may be said of a callable; the defaults are those of fusegrad's table, but for the bits in other layouts.
DESCRIPTION = ("constants", "permutes", "rounding", "units", "saves_output", "true_gradient", "layout_bits", "gemm")
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Op) if f.default is not dataclasses.MISSING} | dict(layout_bits=False)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one property: `outcome` is "pass", "fail" or "not applicable"; `cases` counts the calls that it held for;
    `example` describes the first call that broke it, and `detail` says how, or why it does not apply; `trace` is the traceback."""

    property: str
    outcome: str
    cases: int = 0
    example: str = ""
    detail: str = ""
    trace: str = ""

    @property
    def line(self) -> str:
        """The detail and the example on one line each, as the table shows them."""
        detail = textwrap.shorten(self.detail, 240, placeholder=" ...")
        return f"{detail}\n  at {self.example}" if self.example else detail


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found, by property: `report["gradcheck"].outcome`. `print(report)` prints a plain table, `report.print()` a
    coloured one where `rich` is installed."""

    name: str
    findings: dict[str, Finding]

    def __getitem__(self, name: str) -> Finding:
        return self.findings[name]

    @property
    def failures(self) -> dict[str, Finding]:
        return {name: f for name, f in self.findings.items() if f.outcome == "fail"}

    @property
    def title(self) -> str:
        outcomes = [f.outcome for f in self.findings.values()]
        return f"{self.name}: " + ", ".join(f"{outcomes.count(o)} {o}" for o in ("pass", "fail", "not applicable"))

    def __str__(self) -> str:
        width = max(map(len, self.findings), default=0)
        lines = [self.title]
        for f in self.findings.values():
            lines += f"{f.property:{width}}  {f.outcome:14}  {f.line}".rstrip().replace("\n", "\n" + " " * (width + 18)).splitlines()
        return "\n".join(lines)

    def print(self) -> None:
        """Prints the table, by `rich` if that is installed."""
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            print(self)
            return
        table = Table(title=self.title)
        table.add_column("property", no_wrap=True)
        table.add_column("outcome")
        table.add_column("first counter-example, or why it does not apply")
        colours = {"pass": "green", "fail": "bold red", "not applicable": "dim"}
        for f in self.findings.values():
            table.add_row(f.property, f"[{colours[f.outcome]}]{f.outcome}", escape(f.line))
        Console().print(table)

    def raise_for_failures(self) -> None:
        """AssertionError with the table, and the tracebacks of what failed, if any property did: the last line of a test."""
        if self.failures:
            raise AssertionError("\n".join([str(self), *(f"\n--- {name}\n{f.trace}" for name, f in self.failures.items())]))


class _Fresh(Sample):
    """A sample whose tensors are copied, with their storages, each time it is asked for its arguments: what a callable does to them
    reaches neither the caller's tensors nor the next call."""

    @property
    def kwargs(self):
        memo: dict = {}
        return _pytree.tree_map(lambda t: copy.deepcopy(t.detach(), memo) if isinstance(t, torch.Tensor) else t, self._kwargs)

    @kwargs.setter
    def kwargs(self, kwargs):
        self._kwargs = kwargs


def _side(f, positional: bool, state: Iterable[str]) -> Callable:
    """The callable or its reference as a function of a sample's keyword arguments, of which `state` are parameters and buffers; it
    returns a tensor or a tuple of floating-point tensors."""
    inner = f
    if isinstance(f, torch.nn.Module):
        module, buffers = copy.deepcopy(f), dict(f.named_buffers())
        own = [*dict(f.named_parameters()), *buffers]

        def inner(*args, **kwargs):
            mine = {k: kwargs[k].clone() if k in buffers else kwargs[k] for k in own}  # running statistics are its to change
            return functional_call(module, mine, args, {k: v for k, v in kwargs.items() if k not in state})

    def side(**kwargs):
        args = [kwargs.pop(k) for k in [*kwargs] if k not in state] if positional else ()
        out = inner(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out
        if not isinstance(out, (tuple, list)):
            raise TypeError(f"check: a Tensor or a tuple of Tensors must be returned, got {type(out).__name__}")
        return tuple(y for y in out if isinstance(y, torch.Tensor) and y.is_floating_point())

    return side


def check(
    fn: Callable,
    reference: Callable,
    samples: Iterable | Callable,
    *,
    dtypes: Iterable = (F64, F32, F16, BF16),
    devices: Iterable[str] | None = None,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    name: str | None = None,
    **description,
) -> Report:
    r"""Runs the properties that fusegrad's own ops are held to on any differentiable callable, and reports those that it breaks.

    Args:
        fn: what is checked: a function, the `apply` of an autograd.Function, an op of torch.library, an nn.Module (whose parameters
            are arguments too, by their names). It returns a tensor or a tuple; of that, floating-point tensors are looked at.
        reference: plain torch code, or a module with the same parameters, that takes the same arguments, computes the same and is
            differentiated by torch: in float64 it is the truth, in float32 it sets the error that is allowed.
        samples: the calls: a list, each a tuple of positional arguments, a dict of keyword arguments or a `Sample` (a name and a
            dict). Floating-point tensors are cast to each dtype. Or a function of `make`, a `Make`, that returns such a list:
            `make(5, 33)` draws rows and `make.param(33)` a parameter, in the dtype at hand. The first floating-point tensor of a
            sample is its main one, its first dimension the rows. The tensors themselves are never handed to `fn`, only copies.
        dtypes: what `fn` takes; a pair (bfloat16, float32) stands for rows and parameters, where `samples` is a function.
            The orders of derivative are checked in float64 only.
        devices: default: the CPU, and CUDA if it is available; or where the tensors are, if not on the CPU.
        only, skip: names of properties (`fusegrad.testing.PROPERTIES`); default: all of them.
        name: of the report; default: that of `fn`.
        **description: what is peculiar about `fn`: `constants`, names of floating-point arguments that no gradient flows to;
            `permutes(kwargs)`, the arguments and dimensions that may be permuted alike without changing the result but for the order
            of sums ({"x": -1, "weight": -1}: a better estimate of the error that is allowed); `rounding(kwargs)` of a 16-bit result,
            in ulp (0.505); `units` of rounding, of the largest value, that are allowed beside the reference's error (4);
            `saves_output`: the gradient starts from the output as it was rounded; `true_gradient=False`: it is by design not the
            derivative; `layout_bits`: results have the same bits in every layout (False); `gemm="torch"`: made of torch's matrix
            products, which round in between and whose bits depend on threads.

    Returns:
        A `Report`: for each property pass, fail with the first counter-example, or why it does not apply.

    Raises:
        TypeError, ValueError: an argument that is not as above, samples without a floating-point tensor, a reference that does not
        take them. What `fn` raises is a failed property.

    Within, torch's generators are forked, and what torch.compile has compiled is forgotten.

    Example::

        def test_my_op():
            samples = lambda make: [(make(5, 33), make.param(33)), (make(2, 3, 64, layout="row_strided"), make.param(64))]
            check(MyOp.apply, my_reference, samples).raise_for_failures()
    """
    for what, f in (("fn", fn), ("reference", reference)):
        if not callable(f):
            raise TypeError(f"check: {what} must be callable, got {type(f).__name__}")
    for what, given in (("only", only), ("skip", skip)):
        if isinstance(given, str):
            raise TypeError(f"check: {what} must be a list of names, got {given!r}")
    for what, given, known in (("only", only or (), PROPERTIES), ("skip", skip, PROPERTIES), ("description", description, DESCRIPTION)):
        unknown = [k for k in given if k not in known]
        if unknown:
            raise ValueError(f"check: {what} must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    pairs = [d if isinstance(d, tuple) else (d, d) for d in dtypes]
    wrong = [d for pair in pairs for d in pair if d not in {a for a, _ in PAIRS}]
    if wrong or not pairs:
        raise ValueError(f"check: dtypes must be of float64, float32, float16 and bfloat16, got {', '.join(map(str, wrong)) or 'none'}")
    if any(a != b for a, b in pairs) and not callable(samples):
        raise ValueError("check: a pair of dtypes needs samples that is a function of make, got a list")

    samples = samples if callable(samples) else list(samples)
    parameters, buffers = (dict(fn.named_parameters()), dict(fn.named_buffers())) if isinstance(fn, torch.nn.Module) else ({}, {})
    state = parameters | buffers
    drawn, positional = _normalised(samples, F32, F32, "cpu", reference)
    if devices is None:
        devices = {t.device.type: None for s in drawn for t in _pytree.tree_leaves(s.kwargs) if isinstance(t, torch.Tensor)}
        devices = ("cpu", "cuda") if list(devices) == ["cpu"] and torch.cuda.is_available() else tuple(devices)

    def draw(rows, params, device):
        more = {k: v.detach().to(device, params if v.is_floating_point() else v.dtype) for k, v in state.items()}
        return [_Fresh(s.name, s.kwargs | more) for s in _normalised(samples, rows, params, device, reference)[0]]

    mine, truth = _side(fn, positional, state), _side(reference, positional, state)
    row = DEFAULTS | dict(name=name or _name(fn), torch=truth) | description
    row["functional"] = lambda **kwargs: truth(**kwargs) if _op._forced_reference else mine(**kwargs)
    row["constants"] = (*row["constants"], *buffers)
    op = SimpleNamespace(**row)

    with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in draw(*pairs[0], devices[0]):
            try:
                with _op.use_reference():
                    call(op, sample)
            except Exception as error:
                text = f"check: reference must take the samples, got {type(error).__name__} of {_describe(sample)}: {error}"
                raise ValueError(text) from error
            if not diffable(op, sample):
                text = "samples must have a floating-point tensor that is no constant as an argument (lists are not looked into)"
                raise ValueError(f"check: {text}, got {_describe(sample)}")
        chosen = [k for k in (PROPERTIES if only is None else only) if k not in skip]
        return Report(op.name, {k: _find(PROPERTIES[k], op, draw, pairs, devices) for k in chosen})


def _find(prop, op, draw, pairs, devices) -> Finding:
    """The property on every sample, dtype and device, up to the first that breaks it."""
    due = [p for p in prop.pairs if p in pairs] or (pairs[:1] if (F32, F32) in prop.pairs else [])
    cases, reason = 0, "it is checked in float64, which is not among the dtypes"
    for device in devices:
        for sample in (s for pair in due for s in draw(*pair, device)):
            for variant in prop.variants:
                try:
                    why = prop.holds(op, sample, *variant)
                except NotApplicable as error:
                    why = str(error)
                except Exception as error:
                    # What the property made of the sample (a layout, a size) is its own variable of that name.
                    frame = error.__traceback__.tb_next
                    example = _describe(frame.tb_frame.f_locals.get("sample", sample) if frame else sample)
                    detail = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                    chosen = "".join(f" ({v})" for v in variant)
                    return Finding(prop.name, "fail", cases, example + chosen, detail, traceback.format_exc())
                cases, reason = (cases + 1, reason) if why is None else (cases, why)
    return Finding(prop.name, "pass", cases) if cases else Finding(prop.name, "not applicable", detail=reason)


def _normalised(samples, rows, params, device, reference) -> tuple[list[Sample], bool]:
    """Samples of keyword arguments, in those dtypes and on that device; and whether they were positional."""
    given = list(samples(Make(rows, params, device=device)) if callable(samples) else samples)
    kinds = {Sample if isinstance(s, dict) else type(s) for s in given}
    if len(kinds) != 1 or not kinds <= {tuple, Sample}:
        found = ", ".join(sorted(k.__name__ for k in kinds)) or "none"
        raise TypeError(f"check: samples must be tuples of arguments, or all dicts of keyword arguments or Samples, got {found}")

    def cast(t):
        drawn = callable(samples) or not isinstance(t, torch.Tensor)
        return t if drawn else t.to(device, rows if t.is_floating_point() else t.dtype)

    named = [s if isinstance(s, Sample) else Sample(f"sample {i}", _named(s, reference)) for i, s in enumerate(given)]
    return [Sample(s.name, _pytree.tree_map(cast, s.kwargs)) for s in named], kinds == {tuple}


def _named(args, reference) -> dict:
    """Positional arguments by the names that the reference has for them, in their order."""
    if isinstance(args, dict):
        return args
    try:
        known = list(inspect.signature(getattr(reference, "forward", reference)).parameters.values())
    except (TypeError, ValueError):
        known = []
    known = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return dict(zip((*known, *(f"argument {i}" for i in range(len(known), len(args)))), args))


def _name(fn) -> str:
    owner = getattr(fn, "__self__", None)
    own = getattr(fn, "__name__", None) or getattr(fn, "_qualname", None)
    return owner.__name__ if isinstance(owner, type) else own or type(fn).__name__


def _describe(sample) -> str:
    """The arguments of a call, tensors by dtype, shape and strides."""

    def one(v):
        if not isinstance(v, torch.Tensor):
            return repr(v)
        place = "" if v.is_cpu else f" on {v.device}"
        return f"{str(v.dtype)[6:]}{list(v.shape)} strides {list(v.stride())}{place}"

    return f"{sample.name}: " + ", ".join(f"{k}={one(v)}" for k, v in sample.kwargs.items())
