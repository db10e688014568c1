"""The table: one row per op, the door to the compiled functions, and what is known of the calls that did not take a kernel."""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _C

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_DEVICES = ("cpu", "cuda") if _C.with_cuda else ("cpu",)

OPS: dict[str, Op] = {}
POOLS = [_C.pool_clear]  # and those of extensions
# Tiny, tall, square, wide, and beyond every cache.
SHAPES = ((4, 64), (65536, 64), (32768, 256), (4096, 1024), (2048, 4096), (512, 32768), (64, 131072))


@dataclass(frozen=True)
class Op:
    """One row. Tests and benchmarks are driven by it; adding an op adds no test file and no benchmark file."""

    name: str
    fn: type[torch.autograd.Function]
    functional: Callable
    reference: Callable  # of the arguments of fn.apply
    samples: Callable  # samples(make) yields Sample
    module: type[torch.nn.Module] | None = None
    torch: Callable | None = None  # torch's function of the same arguments, where it has one
    permutes: Callable = lambda kwargs: {}  # {argument: dimension} that may be permuted alike without changing a sum; see table.permuted
    rounding: Callable = lambda kwargs: 0.505  # of a 16-bit result, in ulp
    random: bool = False  # draws from torch's generator: equal calls need an equal seed, and torch's own function draws otherwise
    units: float = 4  # eps of the accumulate type, relative to the largest value, that a result may be off beside the reference's error
    saves_output: bool = False  # the backward starts from the output as it was stored, and gradients are checked from there
    constants: tuple = ()  # floating-point arguments that no gradient flows to
    by_reference: str = ""  # what goes through the reference, beside other devices and complex dtypes
    stored: Callable | None = None  # stored(kwargs, outputs): for the reference in float64, arguments that give what the op rounds
    saved_bytes: Callable | None = None  # saved_bytes(kwargs): documented cost of the backward
    bench: Callable | None = None  # bench(make, rows, cols): the keyword arguments of a benchmark call
    shapes: tuple = SHAPES  # (rows, cols) that it is timed with
    kernels: tuple | None = None  # registered functions that a forward and a backward call; None: <family>_fwd and <family>_bwd
    true_gradient: bool = True  # False: its gradient is by design not the derivative of its value
    layout_bits: bool = True  # False: it sums in the order of memory, so that the last bits of a sum depend on the layout
    # "torch" or "wide": made of ATen's matrix products too, whose last bits depend on threads. "torch": they round in 16 bits and
    # allocate as torch's function does, "wide": they give the accumulate type.
    gemm: str = ""
    workspace: Callable = lambda kwargs: 0  # workspace(kwargs): documented bytes that a call needs beside its results
    # Of DTensors. shards(*arguments of fn.apply): the dimensions of the first tensor that are needed whole, and
    # {number of another tensor: the first one's dimension that each of its own goes along with, or None}, where that is not all of
    # them for the same shape, and else none. summed(shape of the whole first tensor, *arguments for a part): a `Summed`, or None
    # if no loss is reduced.
    shards: Callable | None = None
    summed: Callable | None = None

    @property
    def family(self) -> str:
        """The file that holds it in python/fusegrad/ops, and its kernels in csrc/ops, alone or with its sisters."""
        return self.functional.__module__.rpartition(".")[2]

    def __post_init__(self):
        if self.kernels is None:
            object.__setattr__(self, "kernels", (f"{self.family}_fwd", f"{self.family}_bwd"))
        OPS[self.name] = self


class Summed(NamedTuple):
    """A loss of a part of the items, to be added up over the parts."""

    arguments: tuple  # of fn.apply, for a sum in the accumulate type
    divisor: Tensor | float | None  # what the sum of all is divided by: a tensor is this part's share of it
    dtype: torch.dtype  # of the loss
    empty_is_zero: bool = False


@dataclass
class Sample:
    """One call of an op, by the keyword arguments of its functional."""

    name: str
    kwargs: dict

    def __str__(self):
        return self.name


# --- calls -------------------------------------------------------------------------------------------------------------------


def compiled(name: str, module=_C, namespace: str = "fusegrad") -> Callable:
    """The C++ function: called directly in eager, which decides there whether the dispatcher must be asked; as torch.ops when
    torch.compile traces, as it sees nothing else."""
    direct = getattr(module, name)
    registered = getattr(getattr(torch.ops, namespace), name).default

    def call(*args):
        if torch.compiler.is_compiling():
            return registered(*args)
        return direct(*args)

    call.__name__ = name
    return call


def overridable(functional: Callable) -> Callable:
    """Hands a call over to `__torch_function__` of an argument that has one, or of a mode: the override sees the functional itself."""

    @functools.wraps(functional)
    def call(*args, **kwargs):
        given = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return functional(*args, **kwargs)

    return call


def is_traced() -> bool:
    """Whether the call becomes part of a TorchScript trace that is none of an ONNX export."""
    return torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()


_strict = os.environ.get("FUSEGRAD_STRICT", "") not in ("", "0")
_forced_reference = False
_stats: Counter = Counter()


@contextlib.contextmanager
def strict(enabled: bool = True):
    """Within, a call that has no kernel for its dtype, device or option raises instead of falling back to the reference.

    `FUSEGRAD_STRICT=1` does the same for the whole process."""
    global _strict
    before, _strict = _strict, enabled
    try:
        yield
    finally:
        _strict = before


@contextlib.contextmanager
def use_reference():
    """Within, every op runs its reference: plain torch code, differentiated by torch. To tell whether a kernel is at fault."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def stats() -> dict[tuple[str, str], int]:
    """How often an op did not take its kernel, by (op, reason), since the last `reset_stats()`."""
    return dict(_stats)


def reset_stats() -> None:
    """Forgets what `stats()` has counted; the next call without a kernel warns again."""
    _stats.clear()


def count(op: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # which traces neither a count nor a warning
        _stats[op, reason] += 1


def empty_cache() -> None:
    """Gives back to the system the memory of freed large CPU results, which is kept for the next ones.

    Up to FUSEGRAD_CPU_POOL_MB of it (an environment variable, read once; default 512, or a sixteenth of the machine's memory if that
    is less; 0 keeps none). Results on a GPU come from torch's own cache."""
    for clear in POOLS:
        clear()


def why_not(tensor: torch.Tensor) -> str | None:
    """The sentence that says why no kernel takes a call with that main tensor; None if one does."""
    if tensor.dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {tensor.dtype}"
    if not tensor.is_cpu and tensor.device.type not in KERNEL_DEVICES and tensor.device.type != "meta":
        return f"there is no kernel for the device {tensor.device.type}"
    return None


def check_tensor(op: str, name: str, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.is_nested:  # has no shape that the checks after this one could look at
        raise RuntimeError(f"{op}: {name} must be a dense tensor, got a nested tensor")


def real(op: str, name: str, value) -> float:
    """An option as a float. A tensor would lose the gradient that it might expect, and wait for its device."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number (no gradient flows to it), got {type(value).__name__}")
    return float(value)


def integer(op: str, name: str, value) -> int:
    """An option as an int; torch.compile's symbolic ones stay as they are."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    return value if isinstance(value, torch.SymInt) else int(value)


def dimension(op: str, input: Tensor, dim: int) -> int:
    """A dimension of input, counted from the front; as in torch a scalar counts as a vector."""
    dim, dims = integer(op, "dim", dim), max(1, input.dim())
    if not -dims <= dim < dims:
        raise IndexError(f"{op}: dim must be in [{-dims}, {dims - 1}] for input {list(input.shape)}, got {dim}")
    return dim % dims


def expands(t: Tensor, shape) -> bool:
    """Whether t broadcasts to that shape."""
    return t.dim() <= len(shape) and all(a in (1, b) for a, b in zip(reversed(t.shape), reversed(shape)))


def reduction_of(
    op: str, reduction: str, size_average: bool | None = None, reduce: bool | None = None, known=("mean", "sum", "none")
) -> str:
    """The reduction that is meant; size_average and reduce are torch's old names for it, and win."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
        warn(f"{op}: size_average and reduce are deprecated, use reduction", stacklevel=5)
    if reduction not in known:
        expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise ValueError(f"{op}: reduction must be {expected}, got {reduction!r}")
    return reduction


def check_constant(op: str, **tensors) -> None:
    """Raises for one that requires grad: no gradient flows to it, as in torch."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}: {name} must not require grad, it is a constant")


def check_normalized_shape(op: str, input, normalized_shape, **params) -> int:
    """How many dimensions a norm takes together: normalized_shape must be the last ones of input, and each parameter that is given
    must have it."""
    check_tensor(op, "input", input)
    if isinstance(normalized_shape, int):
        raise TypeError(f"{op}: normalized_shape must be a sequence of sizes, got int")
    shape = tuple(normalized_shape)
    if not shape or shape != tuple(input.shape[input.dim() - len(shape) :]):
        raise RuntimeError(
            f"{op}: normalized_shape must be the last dimensions of input ({list(input.shape)}) and at least one, got {list(shape)}"
        )
    for name, param in params.items():
        if param is not None:
            check_tensor(op, name, param)
            if param.shape != shape:
                raise RuntimeError(f"{op}: {name} must have shape {list(shape)}, got {list(param.shape)}")
    return len(shape)


def warn(text: str, stacklevel: int = 4) -> None:
    """A warning where the functional that calls this was called, or so many frames up from here; torch.compile cannot trace one."""
    if not torch.compiler.is_compiling():
        warnings.warn(text, stacklevel=stacklevel)


def fall_back(op: str, reason: str, tensor: torch.Tensor) -> None:
    """A capability is missing: visible in stats(), a warning the first time, an error if strict; and always an error for integers,
    which have no derivative, and for a CUDA tensor that meets a build without CUDA kernels."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{op}: input must be a floating-point tensor, got {tensor.dtype}")
    device = tensor.device
    if device.type == "cuda" and not _C.with_cuda:
        raise RuntimeError(
            f"{op}: input is on {device}, but this build of fusegrad has kernels for the CPU only; reinstall it where nvcc and a CUDA "
            "build of torch are found (FUSEGRAD_CUDA=1 says what is missing), or move the tensor to the CPU"
        )
    if _strict:
        raise RuntimeError(f"{op}: {reason} (strict mode does not fall back to the reference)")
    count(op, reason)
    if not torch.compiler.is_compiling() and _stats[op, reason] == 1:
        warnings.warn(f"{op}: {reason}; using the reference, which is plain torch code", stacklevel=5)


def autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")


# --- what references are written with ------------------------------------------------------------------------------------------


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums over x are taken in."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that its sums are taken in: 16-bit types in float32, others as they are."""
    return x.to(wide_dtype(x))
