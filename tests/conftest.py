import os
import shutil

os.environ.setdefault("FUSEGRAD_STRICT", "1")  # a fallback that nobody asked for is a failure

import pytest
import torch

import fusegrad
from table import DEVICE

# What this machine cannot run is not collected; there is no skip.
collect_ignore = ([] if DEVICE == "cuda" else ["test_cuda.py"]) + ([] if shutil.which("nvcc") else ["test_nvcc.py"])


@pytest.fixture(autouse=True)
def _clean_state():
    torch.manual_seed(0)
    fusegrad.reset_stats()
    yield
    torch._dynamo.reset()


def pytest_configure(config):
    # Two workers on two cores: a thread each. Tests about threads set their own number.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    config.addinivalue_line("markers", "slow: left out of `make test-quick`")
