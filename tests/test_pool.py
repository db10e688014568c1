"""Large CPU results come from memory that is kept; see csrc/host/pool.h."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusegrad
import fusegrad.functional as F
from fusegrad import _C


@pytest.fixture(autouse=True)
def _empty():
    fusegrad.empty_cache()
    yield
    fusegrad.empty_cache()


def test_freed_memory_is_used_again():
    x = torch.randn(2048, 1024)
    y = F.rms_norm(x, (1024,))
    expected, address = y.clone(), y.data_ptr()
    assert _C.pool_kept() == 0
    del y
    assert _C.pool_kept() >= expected.nbytes
    again = F.rms_norm(x, (1024,))
    assert again.data_ptr() == address and _C.pool_kept() == 0 and torch.equal(again, expected)
    other = F.rms_norm(x + 1, (1024,))  # the first is alive: other memory
    assert other.data_ptr() != address and torch.equal(again, expected)
    del again, other
    fusegrad.empty_cache()
    assert _C.pool_kept() == 0


def test_a_much_larger_block_is_not_taken_for_a_small_result():
    large = F.rms_norm(torch.randn(8192, 1024), (1024,))
    address = large.data_ptr()
    del large
    assert F.rms_norm(torch.randn(2048, 1024), (1024,)).data_ptr() != address


def test_products_of_linear_are_kept():
    """The result and the gradients, whose values are torch's."""
    x, w, b = torch.randn(1024, 1024), torch.randn(2048, 1024), torch.randn(2048)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    dy = torch.randn(1024, 2048)
    y = F.linear(*leaves)
    expected = torch.nn.functional.linear(*leaves)
    found, others = (torch.autograd.grad(z, leaves, dy) for z in (y, expected))
    for a, b in zip((y, *found), (expected, *others)):
        torch.testing.assert_close(a, b)
    kept = sum(t.nbytes for t in (y, *found[:2]))
    del y, found, a
    assert _C.pool_kept() == kept


def test_small_results_are_not_kept():
    F.rms_norm(torch.randn(64, 64), (64,))
    assert _C.pool_kept() == 0


def test_a_result_is_an_ordinary_tensor():
    """What is done to tensors works on one from the pool: in place, resized, shared, as a view that outlives it, from another thread."""
    y = F.swiglu(torch.randn(1024, 4096))
    y.add_(1)
    view = y[3:, 5:]
    expected = view.clone()
    del y
    assert _C.pool_kept() == 0 and torch.equal(view, expected)
    z = F.swiglu(torch.randn(1024, 4096))
    z.resize_(2048, 4096).fill_(2.0)
    assert z.sum() == 2 * z.numel()
    z.share_memory_()
    assert z.is_shared() and (z == 2).all()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(F.swiglu, [torch.ones(1024, 4096)] * 8))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("megabytes, kept", (("0", 0), ("8", 8 << 20), ("64", 40 << 20)))
def test_limit(megabytes, kept):
    code = (
        "import torch, fusegrad.functional as F; from fusegrad import _C;"
        "ys = [F.rms_norm(torch.ones(2048, 1024), (1024,)) for _ in range(5)]; del ys; print(_C.pool_kept())"
    )
    env = {**os.environ, "FUSEGRAD_CPU_POOL_MB": megabytes}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(kept), done.stderr


def test_bad_limit():
    env = {**os.environ, "FUSEGRAD_CPU_POOL_MB": "lots"}
    code = "import torch, fusegrad.functional as F; F.rms_norm(torch.ones(2048, 1024), (1024,))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "ValueError: fusegrad: FUSEGRAD_CPU_POOL_MB must be a number of megabytes, got lots" in done.stderr


def test_a_fork_beside_busy_threads():
    """Parent and child can both go on taking memory: the pool is locked while the process is copied, and not after it."""
    code = """
import os, threading, torch, fusegrad.functional as F
torch.set_num_threads(1)
x, stop = torch.ones(1024, 1024), threading.Event()
F.rms_norm(x, (1024,))  # what is made once is made
def work():
    while not stop.is_set():
        F.rms_norm(x, (1024,))
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for _ in range(30):
    if (child := os.fork()) == 0:
        F.rms_norm(x, (1024,))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    F.rms_norm(x, (1024,))
stop.set()
[t.join() for t in threads]
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "done", done.stderr
