"""Builds the extension `fusegrad._C`: what this machine can build, decided by environment variables that are printed.

FUSEGRAD_CUDA=0/1         leave out / insist on the CUDA kernels (default: build them where nvcc and a CUDA torch are found)
FUSEGRAD_AVX512=0/1       leave out / build the AVX-512 variant of the CPU kernels (default: build it)
TORCH_CUDA_ARCH_LIST      CUDA architectures (default: "8.0;9.0+PTX", and 10.0 where nvcc knows it)
MAX_JOBS                  compiler processes at a time
"""

import os
import platform
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = os.path.dirname(os.path.abspath(__file__))
os.chdir(ROOT)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

# FUSEGRAD_VARIANT: (name in at::vec, compiler flags). Baseline code runs everywhere; the others are chosen at run time.
X86 = platform.machine() in ("x86_64", "AMD64")
VARIANTS = {"kDefault": ("DEFAULT", [])}
if X86:
    VARIANTS["kAvx2"] = ("AVX2", ["-mavx2", "-mfma", "-mf16c"])
    if os.environ.get("FUSEGRAD_AVX512", "1") != "0":
        avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
        # gcc 12 warns of its own intrinsics
        VARIANTS["kAvx512"] = ("AVX512", avx512 + ["-Wno-uninitialized", "-Wno-maybe-uninitialized"])

# C++20 is what torch 2.13 compiles extensions with; 2.11 took 17. Neither errno nor traps are looked at, as in torch itself. Warnings are
# ours; pragmas that gcc does not know are ATen's.
CXX = ["-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CXX += ["-Wno-unused-parameter", "-Wno-psabi", "-Wno-missing-field-initializers", "-fopenmp", "-g0"]
# With -O2, kernels of rotary take 1.5 to 2.7 times as long, of bias_act twice, and a variant's code is no longer all inlined: what is
# left would be shared with the others. A call costs the host the same, and host code compiles in two thirds of the time.
HOST, KERNELS = ["-O2"], ["-O3"]


def say(text):
    print(f"fusegrad: {text}", file=sys.stderr, flush=True)


def macros(variant):
    capability = VARIANTS[variant][0]
    names = {"FUSEGRAD_SIMD": None, "FUSEGRAD_VARIANT": variant, "CPU_CAPABILITY": capability, f"CPU_CAPABILITY_{capability}": None}
    return list(names.items())


def cuda_wanted():
    wish = os.environ.get("FUSEGRAD_CUDA", "")
    missing = "torch is a CPU build" if torch.version.cuda is None else "no nvcc found" if not cpp_extension.CUDA_HOME else ""
    if wish == "1" and missing:
        sys.exit(f"fusegrad: FUSEGRAD_CUDA=1 asks for CUDA kernels, but {missing}")
    use = wish != "0" and not missing
    say("building CPU and CUDA kernels" if use else f"building for the CPU only: {missing or 'FUSEGRAD_CUDA=0'}")
    return use


def arch_list():
    nvcc = cpp_extension.CUDA_HOME and os.popen(f"{cpp_extension.CUDA_HOME}/bin/nvcc --list-gpu-arch").read()
    return "8.0;9.0;10.0+PTX" if "compute_100" in (nvcc or "") else "8.0;9.0+PTX"


def extension():
    define = [("FUSEGRAD_HAS_" + name, None) for name, _ in VARIANTS.values()]
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/host/*.cpp"))]
    sources += [f for f in sorted(glob("csrc/ops/*.cpp")) if not f.endswith("_cpu.cpp")]
    args = {"cxx": CXX + HOST, "nvcc": ["-std=c++20", "-O3"]}
    if not cuda_wanted():
        return cpp_extension.CppExtension(
            "fusegrad._C", sources, define_macros=define, extra_compile_args=args, extra_link_args=["-fopenmp"]
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", arch_list())
    say(f"CUDA architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
    define.append(("FUSEGRAD_HAS_CUDA", None))
    sources += sorted(glob("csrc/ops/*_cuda.cu"))
    return cpp_extension.CUDAExtension("fusegrad._C", sources, define_macros=define, extra_compile_args=args, extra_link_args=["-fopenmp"])


def build_extension():
    class Build(cpp_extension.BuildExtension):
        """Compiles the `_cpu.cpp` files once per variant and links all of them."""

        def finalize_options(self):
            super().finalize_options()
            # pip would build an editable installation in a temporary folder, from scratch each time.
            self.build_temp = os.path.join(ROOT, "build", f"temp-{torch.__version__}-{sys.implementation.cache_tag}")

        def build_extension(self, ext):
            sources = sorted(glob("csrc/ops/*_cpu.cpp"))
            include = [*ext.include_dirs, *cpp_extension.include_paths()]
            for variant, (capability, flags) in VARIANTS.items():
                objects = self.compiler.compile(
                    [os.path.abspath(f) for f in sources],
                    os.path.join(self.build_temp, capability.lower()),
                    macros(variant),
                    include,
                    extra_postargs={"cxx": CXX + KERNELS + flags},
                    depends=ext.depends,
                )
                ext.extra_objects += objects
            super().build_extension(ext)

    return Build.with_options(use_ninja=True)


class BuildPy(build_py):
    """Puts the headers beside the package, for fusegrad.extension; in a checkout it finds them in csrc."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in ["csrc/fusegrad.h", *(f for folder in ("core", "host", "extension") for f in glob(f"csrc/{folder}/*"))]:
                to = os.path.join(self.build_lib, "fusegrad", "include", os.path.relpath(path, "csrc"))
                self.mkpath(os.path.dirname(to))
                self.copy_file(path, to)


def write_build_info():
    """What the binary is for, so that the import can say so instead of failing in the dynamic linker."""
    text = f'"""Written by setup.py."""\n\nTORCH = "{torch.__version__}"\nCUDA = {torch.version.cuda!r}\n'
    flags = {}  # for fusegrad.extension, which compiles for the machine that it runs on
    for variant, (capability, more) in VARIANTS.items():
        flags[capability.lower()] = CXX + KERNELS + more + ["-D" + (k if v is None else f"{k}={v}") for k, v in macros(variant)]
    text += f"FLAGS = {flags!r}\n"
    text += f"VARIANTS = {tuple(name.lower() for name, _ in VARIANTS.values())!r}\n"
    path = Path("python/fusegrad/_build_info.py")
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if torch is not None:
    for name in ("FUSEGRAD_CUDA", "FUSEGRAD_AVX512", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        if name in os.environ:
            say(f"{name}={os.environ[name]}")
    write_build_info()
    ext_modules, cmdclass = [extension()], {"build_ext": build_extension(), "build_py": BuildPy}
elif any(command in sys.argv for command in ("egg_info", "dist_info", "sdist", "clean")):
    ext_modules, cmdclass = [], {}
else:
    sys.exit(
        "fusegrad: torch must be installed first, and seen by the build: pip install torch==2.13.0 && pip install --no-build-isolation ."
    )

setup(ext_modules=ext_modules, cmdclass=cmdclass)
