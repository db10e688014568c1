"""Fused ops written outside of fusegrad, with its drivers and its autograd: `load(name, header, reference)`. See docs/extension.md.

Not imported by `import fusegrad`."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from . import _C, _build_info, _op
from ._autograd import Function, differentiable
from ._op import check_tensor, overridable, real, wide, wide_dtype

__all__ = ["include_paths", "load", "wide"]

_INSTALLED = Path(__file__).resolve().parent / "include"
_INCLUDE = _INSTALLED if _INSTALLED.exists() else Path(__file__).resolve().parents[2] / "csrc"  # a checkout has its own
_MISSING = object()

_KERNELS = """\
#include "{include}"
#include {header}

FUSEGRAD_KERNELS({functor}Fwd)
FUSEGRAD_KERNELS({functor}Bwd)
"""
_BINDING = """
namespace {{
struct Loaded {{
  using Forward = fusegrad::{functor}Fwd;
  using Backward = fusegrad::{functor}Bwd;
  static constexpr const char *name = "{name}", *backward_name = "{name} backward";
  static constexpr const char* arguments[] = {{{arguments}}};
}};
}}  // namespace

FUSEGRAD_EXTENSION({library}, Loaded)
"""


def include_paths() -> list[str]:
    """The folders of fusegrad's C++ headers, for an editor or a build of your own: `#include <fusegrad.h>`."""
    return [str(_INCLUDE)]


def load(
    name: str,
    header: str | os.PathLike,
    reference: Callable,
    *,
    cuda: bool | None = None,
    build_directory: str | os.PathLike | None = None,
    verbose: bool = False,
) -> Callable:
    r"""Compiles a fused op that is written in a header, and returns it as a function that is differentiable at every order.

    First derivatives are the kernel's; higher ones, forward mode and what else no kernel takes are the reference's, by the same
    rules as for fusegrad's own ops: `use_reference`, `strict`, `stats`, `torch.func`, `torch.compile`, DTensors.

    Args:
        name: of the op, as error messages say it, an identifier.
        header: the file with the functors `<Name>Fwd` and `<Name>Bwd` (of `my_op`: `MyOpFwd` and `MyOpBwd`) in the namespace
            fusegrad; what they must have is said in fusegrad.h, in `include_paths()`. A map op works element by element on inputs of
            one shape; a row op over the last dimension, with parameters of one value per column.
        reference: the same in torch code, of the inputs, then the parameters, then a number for each field of the functors, with
            these names. It is the specification and every derivative but the first. Sums are taken in float32 for 16-bit inputs:
            `fusegrad.extension.wide(x)` is x in the dtype of the sums. A parameter may be None if the reference lets it.
        cuda: whether to compile CUDA kernels too; default: where fusegrad has them and nvcc is found.
        build_directory: where to compile; default: a folder of torch's own for extensions (TORCH_EXTENSIONS_DIR), by what is
            compiled, so that a second process only loads it.
        verbose: show what the compilers say.

    Returns:
        A function with the reference's signature, with the attributes `reference` and `fn`, its autograd.Function, whose
        `library` is that of torch.ops with the kernels. It gives a tensor,
        or a tuple if the functors' `out` is more than 1, of the first input's shape and dtype: float32, float64, float16, bfloat16.

    Raises:
        TypeError, ValueError: a name that is no identifier, a header without the functors, functors or a reference that do not fit
        each other. FileNotFoundError: no such header. RuntimeError: no compiler, or an error of the compiler. The op raises as
        fusegrad's own do: `my_op: z must have shape [4, 8], got [4, 1]`.

    The CPU kernels are compiled for the machine at hand alone, as it is the one that runs them: a third of the time that all
    variants of an installed fusegrad take. FUSEGRAD_CPU_CAPABILITY chooses another.

    Example::

        def cubed_relu(x):
            return (fusegrad.extension.wide(x).relu() ** 3).to(x.dtype)

        cubed = fusegrad.extension.load("cubed_relu", "cubed_relu.h", cubed_relu)
        fusegrad.testing.check(cubed, cubed_relu, lambda make: [(make(5, 33),)]).raise_for_failures()
    """
    if cuda and not _C.with_cuda:
        raise RuntimeError("extension: cuda=True needs a fusegrad with CUDA kernels, but this build has kernels for the CPU only")
    from torch.utils import cpp_extension

    nvcc = cpp_extension.CUDA_HOME is not None
    if cuda and not nvcc:
        raise RuntimeError("extension: cuda=True needs nvcc, and none was found (CUDA_HOME says where it is)")
    cuda = _C.with_cuda and nvcc if cuda is None else cuda
    flags = [*_build_info.FLAGS[_C.cpu_capability()], *(["-DFUSEGRAD_HAS_CUDA"] if cuda else [])]
    library, sources = _sources(name, header, reference, flags)
    if not hasattr(getattr(torch.ops, library), "forward"):
        if not cuda:
            sources.pop(f"{name}_cuda.cu")
        if build_directory is None:
            build_directory = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / library
        _compile(cpp_extension, library, sources, flags, Path(build_directory), verbose)
        _declare(library)
    return _function(name, reference, library, cuda)


def _sources(name: str, header, reference: Callable, flags: list[str]) -> tuple[str, dict[str, str]]:
    """The library of torch.ops that holds the op, named after all that it is made of, and the files to compile."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"extension: name must be an identifier, got {name!r}")
    header = Path(header).resolve()
    if not header.is_file():
        raise FileNotFoundError(f"extension: header must be a file, got {header}")
    text = header.read_text()
    functor = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    for needed in (f"{functor}Fwd", f"{functor}Bwd"):
        if not re.search(rf"\bstruct\s+{needed}\b", text):
            found = ", ".join(re.findall(r"\bstruct\s+(\w+)", text)) or "none"
            raise ValueError(f"extension: {header.name} must have a struct {needed} (the functors of {name}), got {found}")
    names = _arguments(reference)
    files = sorted(path for path in _INCLUDE.rglob("*") if path.suffix in (".h", ".cuh", ".cpp") and path.parent.name != "ops")
    made_of = [torch.__version__, str(header), text, *names, *flags, *(path.read_text() for path in files)]
    library = f"fusegrad_{name}_{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:12]}"
    given = dict(name=name, functor=functor, header=f'"{header}"', library=library, arguments=", ".join(f'"{n}"' for n in names))
    cpu = _KERNELS.format(include="extension/cpu.h", **given) + _BINDING.format(**given)
    return library, {f"{name}.cpp": cpu, f"{name}_cuda.cu": _KERNELS.format(include="extension/cuda.cuh", **given)}


def _arguments(reference: Callable) -> list[str]:
    if not callable(reference):
        raise TypeError(f"extension: reference must be callable, got {type(reference).__name__}")
    known = inspect.signature(reference).parameters.values()
    if not known or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in known):
        raise TypeError(f"extension: reference must take a fixed number of arguments by position, got {inspect.signature(reference)}")
    return [p.name for p in known]


def _compile(cpp_extension, library: str, sources: dict[str, str], flags: list[str], folder: Path, verbose: bool) -> None:
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(shlex.split(compiler)[0]):
        raise RuntimeError(f"extension: a C++ compiler is needed, and there is no {compiler}: install g++, or name one in CXX")
    if not cpp_extension.is_ninja_available():
        raise RuntimeError("extension: ninja is needed to compile, and was not found: pip install ninja")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in sources.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:  # a file that is as it was is not compiled again
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(text)
            new.replace(path)
    try:
        cpp_extension.load(
            library,
            [str(folder / file) for file in sources],
            extra_cflags=[*flags, "-Wfatal-errors"],
            extra_cuda_cflags=["-std=c++20", "-O3"],
            extra_ldflags=["-fopenmp"],
            extra_include_paths=include_paths(),
            build_directory=str(folder),
            verbose=verbose,
            is_python_module=False,
        )
    except RuntimeError as error:
        said = re.findall(r"error: (?:static assertion failed: )?(.*)", f"{error}\n{getattr(error.__cause__, 'stdout', b'')}")
        raise RuntimeError(f"extension: {list(sources)[0]} does not compile: {said[0] if said else error}") from error


def _declare(library: str) -> None:
    """What torch must know of a library that was just loaded: the shapes of its results, and the pool that `empty_cache` empties."""
    ops = getattr(torch.ops, library)
    rows, inputs, _, outputs, kept = ops.layout()
    _op.POOLS.append(ops.pool_clear)

    def empty(x):
        return x.new_empty(x.shape) if rows else torch.empty_like(x)

    @torch.library.register_fake(f"{library}::forward")
    def _(tensors, numbers, options):
        x = tensors[0]
        return [*(empty(x) for _ in range(outputs)), *(x.new_empty(x.shape[:-1], dtype=wide_dtype(x)) for _ in range(kept))]

    @torch.library.register_fake(f"{library}::backward")
    def _(grads, tensors, numbers, kept, options, needed):
        x, by_number = tensors[0], dict(zip(numbers, tensors))
        return [empty(x) if i < inputs else x.new_empty(x.shape[-1:], dtype=by_number[i].dtype) for i in needed]


def _function(name: str, reference: Callable, library: str, cuda: bool) -> Callable:
    """The function of a loaded library."""
    ops = getattr(torch.ops, library)
    forward_op, backward_op = ops.forward.default, ops.backward.default
    rows, inputs, params, outputs, _ = ops.layout()
    tensors, signature = inputs + params, inspect.signature(reference)
    names = tuple(signature.parameters)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    of_options = (None,) * (len(names) - tensors)

    def given(args):
        numbers = [i for i, t in enumerate(args) if t is not None]
        return [args[i] for i in numbers], numbers

    class Fn(Function):
        op = name
        params = tuple(range(inputs, tensors))
        sharded = SimpleNamespace(name=name, shards=lambda *_: ((-1,) if rows else (), {}), summed=None)

        @staticmethod
        def forward(*args):
            return tuple(forward_op(*given(args[:tensors]), args[tensors:]))

        @staticmethod
        def setup_context(ctx, inputs, outcome):
            ctx.options = tuple(inputs[tensors:])
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outcome[outputs:])
            ctx.save_for_backward(*inputs[:tensors], *outcome[outputs:])

        @differentiable(lambda ctx: ctx.saved_tensors[:tensors])
        def backward(ctx, *grads):
            found, saved = [None] * tensors, ctx.saved_tensors
            needed = [i for i in range(tensors) if ctx.needs_input_grad[i]]
            if any([g is not None for g in grads[:outputs]]):
                dy = [saved[0].new_zeros(()).expand(saved[0].shape) if g is None else g for g in grads[:outputs]]
                results = backward_op(dy, *given(saved[:tensors]), saved[tensors:], ctx.options, needed)
                for i, g in zip(needed, results):
                    found[i] = g
            return (*found, *of_options)

    Fn.reference, Fn.sharded.fn, Fn.__name__, Fn.library = staticmethod(reference), Fn, f"{name}Fn", library

    def call(*args, **kwargs):
        if kwargs or len(args) != len(names):
            by_name = ", ".join(kwargs) or "none"
            rest = {n: kwargs.pop(n, defaults.get(n, _MISSING)) for n in names[len(args) :]}
            if kwargs or len(args) > len(names) or any([v is _MISSING for v in rest.values()]):
                raise TypeError(f"{name}: takes {signature}, got {len(args)} by position and {by_name} by name")
            args = (*args, *rest.values())
        for n, value in zip(names[:tensors], args):
            if value is not None or n not in defaults:
                check_tensor(name, n, value)
        if args[0].is_cuda and not (cuda or _op._forced_reference):
            raise RuntimeError(f"{name}: {names[0]} is on {args[0].device}, but the extension was compiled for the CPU only")
        return Fn.call(args[:tensors], *[real(name, n, v) for n, v in zip(names[tensors:], args[tensors:])], outputs=outputs)

    call.__name__ = call.__qualname__ = name
    call.__doc__, call.__module__, call.__signature__ = reference.__doc__, reference.__module__, signature
    functional = overridable(call)
    functional.reference, functional.fn = reference, Fn
    return functional
