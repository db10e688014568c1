"""The C++ tests in tests/core, as `cmake -B build && ctest --test-dir build` runs them: plain, and under the sanitizers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["OFF", pytest.param("ON", marks=pytest.mark.rotating(1))])
def test_cpp(sanitize):
    build = "build/cmake-sanitize" if sanitize == "ON" else "build/cmake"
    run("cmake", "-B", build, f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEGRAD_SANITIZE={sanitize}")
    log = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    for name in ("build", "functors", "drivers_default"):
        assert re.search(rf"{name} \.+ +Passed", log), log
