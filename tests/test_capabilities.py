"""The table's values once more with each other variant of the CPU kernels that this machine can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusegrad import _C, _build_info

HERE = Path(__file__).parent
KNOWN = ("default", "avx2", "avx512")
OTHERS = [v for v in KNOWN[: KNOWN.index(_C.cpu_capability())] if v in _build_info.VARIANTS]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param(c, marks=pytest.mark.rotating(KNOWN.index(c))) for c in OTHERS])
def test_table_with_another_variant(capability):
    which = "values_and_gradients or row_lengths or special_values or threads"
    env = {**os.environ, "FUSEGRAD_CPU_CAPABILITY": capability}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        which,
        str(HERE / "test_conformance.py"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
