import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("FUSEGRAD_STRICT", "1")  # a fallback that nobody asked for is a failure

import pytest
import torch

import fusegrad
from fusegrad.testing.budget import seed_torch
from table import DEVICE

# What this machine cannot run is not collected; there is no skip.
collect_ignore = ([] if DEVICE == "cuda" else ["test_cuda.py"]) + ([] if shutil.which("nvcc") else ["test_nvcc.py"])
_NEED = dict(test_fuse_transformers=["transformers"], test_fuse_timm=["timm"], test_row_f=["onnx", "onnxruntime", "onnxscript"])
_NEED["test_site"] = ["sphinx", "myst_parser", "furo"]
collect_ignore += [f"{test}.py" for test, libraries in _NEED.items() if not all(map(find_spec, libraries))]


TURNS = 3


def turn() -> int:
    """Which third of the tests marked `rotating` is due: drawn by the hash of the commit, which a shallow clone has too."""
    command = ("git", "rev-parse", "HEAD")
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return int(commit or "0", 16) % TURNS


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run all tests that are marked `rotating`, not only a third of them")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    due = turn()
    later = [item for item in items if any(mark.args != (due,) for mark in item.iter_markers("rotating"))]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in set(later)]


@pytest.fixture(autouse=True)
def _clean_state():
    seed_torch(0)
    fusegrad.reset_stats()
    yield
    torch._dynamo.reset()


def pytest_configure(config):
    # Two workers on two cores: a thread each. Tests about threads set their own number.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    config.addinivalue_line("markers", "slow: left out of `make test-quick`")
    config.addinivalue_line("markers", f"rotating(n): long; runs with one commit in {TURNS}, and in `make test-all`")
