"""The C++ tests in tests/core, as `cmake -B build && ctest --test-dir build` runs them: plain, and under the sanitizers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusegrad import _C

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


def run(*command):
    tool = shutil.which(command[0], path=PATH)
    assert tool, f"{command[0]} must be installed: pip install cmake"
    environ = os.environ | {"PATH": PATH}
    if shutil.which("ninja", path=PATH):
        environ.setdefault("CMAKE_GENERATOR", "Ninja")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n" + "\n".join(done.stdout.splitlines()[-60:])
    return done.stdout


BEST = _C.cpu_capability()
KINDS = {"best": (BEST, "OFF"), "default": ("default", "OFF"), "sanitize": (BEST, "ON")}
TURNS = {"sanitize": 0, "default": 1, "best": 1}  # the third has the emulator under AddressSanitizer, which takes longest of all


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.rotating(TURNS[kind])) for kind in KINDS])
def test_cpp(kind):
    variant, sanitize = KINDS[kind]
    build = f"build/cmake-{kind}"
    options = dict(Python_EXECUTABLE=sys.executable, FUSEGRAD_SANITIZE=sanitize, FUSEGRAD_VARIANTS=variant.upper())
    run("cmake", "-B", build, *(f"-D{k}={v}" for k, v in options.items()))
    log = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    for name in ("build", "functors", f"drivers_{variant}"):
        assert re.search(rf"{name} \.+ +Passed", log), log
