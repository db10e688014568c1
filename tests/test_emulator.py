"""The emulator catches what it is there to catch, and leaves correct kernels alone. See emulator/cuda_runtime.h."""

import os
import re
import subprocess
import sys

import pytest
from emulator import build

SOURCE = build.HERE / "planted.cu"
CAUGHT = {
    "missing_barrier": r"race on shared memory row\[\d+\]: (reads|writes) what thread .* (wrote|read), with no barrier between",
    "missing_syncwarp": r"race on shared memory row\[\d+\]: .*",
    "divergent_barrier": r"divergent barrier: (exits, but thread .* waits at|waits at) __syncthreads \(planted.cu:\d+\).*",
    "two_barriers": r"divergent barrier: waits at __syncthreads \(planted.cu:\d+\), but thread .* at __syncthreads .*",
    "divergent_shuffle": r"divergent barrier: (exits, but thread .* waits at|waits at) __shfl_xor_sync \(planted.cu:\d+\).*",
    "inactive_lane": r"bad shuffle: __shfl_sync \(planted.cu:\d+\) reads lane 20, which takes no part",
    "out_of_bounds_shared": r"out of bounds: shared memory row\[96\] of 96",
    "race": r"race on shared memory row\[\d+\]: writes what thread \(\d+, 0, 0\) wrote, with no barrier between",
    "uninitialised": r"uninitialised read of shared memory row\[96\]",
    "misaligned": r"misaligned access of 16 bytes",
}


def planted(name, seed, *flags):
    environment = {**os.environ, "FUSEGRAD_EMULATOR_SEED": str(seed)}
    return subprocess.run([build.program(SOURCE, *flags), name], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CAUGHT)
def test_emulator_catches(name, seed):
    kernel = "".join(part.capitalize() for part in name.split("_"))
    where = rf"; kernel {kernel}, block \(0, 0, 0\), thread \(\d+, 0, 0\)"
    said = planted(name, seed).stdout.strip()
    assert re.fullmatch("emulator: " + CAUGHT[name] + where, said), said


def test_emulator_shuffles_the_order_of_threads():
    assert "wrong" in {planted("missing_barrier_global", seed).stdout.strip() for seed in range(4)}


def test_emulator_reports_launch_errors():
    assert planted("too_many_threads", 0).stdout.strip() == "Sum: invalid configuration argument"


@pytest.mark.parametrize("flags", [(), ("-fsanitize=address",)], ids=["plain", "asan"])
@pytest.mark.parametrize("name", ["sum", "reverse", "votes"])
def test_emulator_runs_correct_kernels(name, flags):
    for seed in range(5):
        result = planted(name, seed, *flags)
        assert result.stdout.strip() == "right", result.stdout + result.stderr


def test_emulator_under_asan_catches_out_of_bounds():
    assert "heap-buffer-overflow" in planted("out_of_bounds", 0, "-fsanitize=address").stderr


@pytest.mark.slow
@pytest.mark.rotating(2)
def test_emulated_kernels_under_asan():
    """Every op in every size of element, on tensors that end where their memory ends."""
    runtime = subprocess.run([build.CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "FUSEGRAD_EMULATOR_SANITIZE": "address"}
    # float16 is as wide as bfloat16.
    chosen = "paths and (contiguous or strided) and not (float16-float and not bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "--all", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run([*command, str(build.HERE.parent / "test_emulated.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-3000:]
