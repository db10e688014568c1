"""The demo's errors, and a short run of it on a small text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_gpt.py"


def demo(tmp_path, *args):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--threads", "1", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("case", ("missing", "empty", "short", "directory", "unreadable"))
def test_bad_data(tmp_path, case):
    data = tmp_path / "data"
    if case == "directory":
        data.mkdir()
    elif case == "unreadable":
        data = Path("/proc/self/mem")  # cannot be read from its start, not even by root
    elif case != "missing":
        data.write_bytes(b"" if case == "empty" else b"too short")
    done = demo(tmp_path, "--data", str(data))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(data) in done.stderr.strip().splitlines()[-1] and "error" in done.stderr


def test_short_run(tmp_path):
    data = tmp_path / "text"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog, and again: " * 2000)
    small = ("--steps", "4", "--dim", "32", "--layers", "1", "--heads", "2", "--context", "32", "--batch", "4")
    done = demo(tmp_path, "--data", str(data), *small)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("loss", "bits per byte", "tokens per second", "peak memory"):
        assert text in done.stdout
    result = json.loads((tmp_path / "out" / "train_gpt.json").read_text())
    assert result and (tmp_path / "out" / "train_gpt.png").stat().st_size > 10_000
