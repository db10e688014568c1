"""Builds what runs the CUDA kernels on the CPU, in build/emulator/, again only where a source has changed.

`extension()` is the module `_C_emulated`: the host functions of fusegrad, on CPU tensors, with the kernels of csrc/ops/*_cuda.cu in
place of the CPU ones; torch.ops knows it as `fusegrad_emulated`. `control()` has the functions of entry.cpp. `program()` compiles
a single .cu file with a main().
"""

import ctypes
import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
EMULATED = [f"-I{HERE}", "-O2"]  # the first, so that this cuda_runtime.h is found


@contextmanager
def locked():
    """Several test processes may want the same files."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command, made):
    """Makes a file, and notes the command beside it once that has worked."""
    made.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    made.with_suffix(".command").write_text("\0".join(command))


def current(command, made, needed):
    note = made.with_suffix(".command")
    if not made.exists() or not note.exists() or note.read_text() != "\0".join(command):
        return False
    return all(Path(f).exists() and Path(f).stat().st_mtime_ns <= made.stat().st_mtime_ns for f in needed)


def compiled(source, flags, folder):
    """The object file of a source; what it includes is what the compiler said the last time."""
    made, needed = folder / f"{source.name}.o", folder / f"{source.name}.d"
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    command = [CXX, *FLAGS, *flags, *language, "-c", str(source), "-o", str(made), "-MMD", "-MF", str(needed)]
    headers = needed.read_text().replace("\\\n", " ").split(":", 1)[-1].split() if needed.exists() else [str(source)]
    if not current(command, made, headers):
        run(command, made)
    return made


def linked(name, objects, flags):
    made = BUILD / name
    command = [CXX, *map(str, objects), *flags, "-pthread", "-o", str(made)]
    if not current(command, made, objects):
        run(command, made)
    return made


def program(source, *flags):
    """The path of an executable."""
    from torch.utils.cpp_extension import include_paths

    with locked():
        name = "-".join([Path(source).stem, *(f.strip("-").replace("=", "_") for f in flags)])
        include = [f"-isystem{path}" for path in include_paths()]
        return linked(name, [compiled(Path(source), [*EMULATED, "-O1", *include, *flags], BUILD / "programs" / name)], flags)


def extension():
    """The loaded module; its kernels watch over memory with FUSEGRAD_EMULATOR_SANITIZE=address (and the runtime preloaded)."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    include = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    host = [*include, "-O1", "-DFUSEGRAD_EMULATED", "-DFUSEGRAD_LIBRARY=fusegrad_emulated", "-DTORCH_EXTENSION_NAME=_C_emulated"]
    ops = sorted((ROOT / "csrc/ops").glob("*.cpp"))
    plain = BUILD / torch.__version__  # host functions are not sanitized
    sources = [(f, host, plain) for f in [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/host").glob("*.cpp"))]]
    sources += [(f, host, plain) for f in ops if not f.name.endswith("_cpu.cpp")]
    wish = os.environ.get("FUSEGRAD_EMULATOR_SANITIZE")
    sanitize = [f"-fsanitize={wish}", "-O1"] if wish else []
    folder = BUILD / "-".join(filter(None, (torch.__version__, wish)))
    kernels = [*sorted((ROOT / "csrc/ops").glob("*_cuda.cu")), HERE / "entry.cpp"]
    sources += [(f, [*EMULATED, *include, *sanitize], folder) for f in kernels]
    link = ["-shared", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", *sanitize]
    with locked(), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        objects = list(pool.map(lambda source: compiled(*source), sources))
        path = linked(folder / f"_C_emulated{sysconfig.get_config_var('EXT_SUFFIX')}", objects, link)
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    module = sys.modules.get("_C_emulated") or importlib.util.module_from_spec(spec)
    if "_C_emulated" not in sys.modules:
        sys.modules["_C_emulated"] = module
        spec.loader.exec_module(module)
    return module


def library(name, sources, flags):
    """The path of a library for torch.ops that is made of texts by file name, of host functions and of CUDA kernels: an extension's."""
    from torch.utils.cpp_extension import include_paths, library_paths

    include = [f"-isystem{path}" for path in include_paths()]
    folder = BUILD / "libraries" / name
    folder.mkdir(parents=True, exist_ok=True)
    with locked():
        objects = [compiled(HERE / "entry.cpp", EMULATED, folder)]
        for file, text in sources.items():
            path = folder / file
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            objects.append(compiled(path, [*(EMULATED if path.suffix == ".cu" else []), *include, *flags], folder))
        link = ["-shared", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
        return linked(folder / f"{name}.so", objects, link)


def control(path=None):
    """Of the loaded module, or of a library: `control().fusegrad_emulator_seed(n)` chooses the order in which its threads run."""
    library = ctypes.CDLL(path or sys.modules["_C_emulated"].__file__)
    library.fusegrad_emulator_seed.argtypes = [ctypes.c_uint64]
    library.fusegrad_emulator_launches.restype = ctypes.c_uint64
    return library


if __name__ == "__main__":
    print(extension().__file__)
