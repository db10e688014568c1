"""Installing and importing: what a user meets first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusegrad
from fusegrad._op import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fusegrad.__file__).resolve().parent


def python(*args, **kwargs):
    env = {**os.environ, **kwargs.pop("env", {})}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, **kwargs)


def test_this_checkout_is_under_test():
    assert PACKAGE == ROOT / "python" / "fusegrad"


def test_info():
    done = python("-m", "fusegrad", "info")
    assert done.returncode == 0, done.stderr
    for text in (fusegrad.__version__, torch.__version__, "CPU capability", "threads", "CUDA kernels", "CUDA devices"):
        assert text in done.stdout
    lines = done.stdout.splitlines()
    for name, op in OPS.items():
        assert any(line.startswith(f"{name} ") and line.endswith(op.by_reference) for line in lines), name
    assert sum(bool(op.by_reference) for op in OPS.values()) > 3


@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_capability_is_chosen_by_the_environment(capability):
    done = python("-m", "fusegrad", "info", env={"FUSEGRAD_CPU_CAPABILITY": capability})
    assert f"CPU capability  {capability} " in done.stdout, done.stderr


def test_import_needs_no_compiler_and_compiles_nothing():
    code = "import sys, fusegrad; assert not {'torch.utils.cpp_extension', 'triton', 'fusegrad.testing'} & sys.modules.keys()"
    done = python("-c", code, env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", "CC": "false", "CXX": "false"})
    assert done.returncode == 0, done.stderr


def pretend(tmp_path, **info):
    """A copy of the package whose build information says something else."""
    copy = tmp_path / "fusegrad"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "_build_info.py"
    path.write_text(path.read_text() + "".join(f"{k} = {v!r}\n" for k, v in info.items()))
    return copy


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_built_for_another_torch(tmp_path):
    pretend(tmp_path, TORCH="1.0.0")
    line = last_line(python("-c", "import fusegrad", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path))
    assert line.startswith(f"ImportError: fusegrad was built for torch 1.0.0, found torch {torch.__version__}; reinstall it: pip install")


def test_not_built(tmp_path):
    (pretend(tmp_path) / "_build_info.py").unlink()
    line = last_line(python("-c", "import fusegrad", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path))
    assert line.startswith("ImportError: fusegrad was not built; reinstall it: pip install")


def test_broken_binary(tmp_path):
    for path in pretend(tmp_path).glob("_C*.so"):
        path.write_bytes(b"not a library")
    line = last_line(python("-c", "import fusegrad", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path))
    assert line.startswith("ImportError: fusegrad's compiled part (built for torch") and "does not load" in line


def test_building_without_torch_says_what_to_type():
    """What plain `pip install .` meets in its isolated environment."""
    hide = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', {!r}]; runpy.run_path('setup.py', run_name='__main__')"
    line = last_line(python("-c", hide.format("bdist_wheel"), cwd=ROOT))
    assert line.startswith("fusegrad: torch must be installed first") and "pip install --no-build-isolation ." in line


def test_cuda_that_cannot_be_built_is_an_error():
    if torch.version.cuda is not None:
        return
    line = last_line(python("setup.py", "build_ext", "--dry-run", env={"FUSEGRAD_CUDA": "1"}, cwd=ROOT))
    assert line == "fusegrad: FUSEGRAD_CUDA=1 asks for CUDA kernels, but torch is a CPU build"


@pytest.mark.slow
def test_wheel(tmp_path):
    """A wheel holds the package, imports from where it is installed, and says in the build log what it was built for."""
    done = python("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "fusegrad: building" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("fusegrad-*.whl")
    target = tmp_path / "site"
    done = python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    assert done.returncode == 0, done.stderr
    code = "import fusegrad, torch; print(fusegrad.__file__); print(fusegrad.functional.swiglu(torch.ones(2, 4)).sum().item())"
    done = python("-c", code, env={"PYTHONPATH": str(target)}, cwd=tmp_path)
    assert done.returncode == 0 and str(target) in done.stdout, done.stderr
