"""The examples' errors, and short runs of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def demo(tmp_path, *args, script="train_gpt"):
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--out", str(tmp_path / "out"), "--threads", "1", *args]
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


IMAGES = {"train_images": ("--steps", "30", "--width", "8", "--blocks", "1"), "domain_adaptation": ("--steps", "30", "--seeds", "2")}


@pytest.mark.parametrize("script", IMAGES)
def test_short_run_on_images(tmp_path, script):
    """So few steps adapt to nothing (exit code 1); what is checked is that fusegrad follows torch.nn."""
    done = demo(tmp_path, *IMAGES[script], script=script)
    assert done.returncode in ((0,) if script == "train_images" else (0, 1)) and "Traceback" not in done.stderr, done.stderr
    assert "PASSED: fusegrad trains like torch.nn" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0 or "FAILED: The reversal gains" in done.stderr
    assert json.loads((tmp_path / "out" / f"{script}.json").read_text())["errors"]
    assert (tmp_path / "out" / f"{script}.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", IMAGES)
def test_a_layer_that_is_a_little_off(tmp_path, script):
    """By an eps of 2e-5 for 1e-5."""
    code = f"""
import sys; sys.path.insert(0, {str(EXAMPLES)!r})
import fusegrad, {script} as example, digits
example.OURS.norm = example.OURS.group_norm = lambda *sizes: fusegrad.nn.GroupNorm(*sizes, eps=2e-5, activation="silu")
options = digits.arguments("{script}", "", [("steps", 1, 10, ""), ("width", 1, 8, ""), ("blocks", 1, 1, ""), ("batch", 1, 16, ""),
                                            ("seeds", 1, 1, ""), ("seed", 0, 0, "")])
example.compare(options)"""
    command = [sys.executable, "-c", code, "--out", str(tmp_path), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"{script}: FAILED: distance of the gradients" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("script", IMAGES)
def test_bad_options_of_images(tmp_path, script):
    done = demo(tmp_path, "--steps", "0", script=script)
    assert done.returncode == 2 and "argument --steps: expected a number from 2 to" in done.stderr
    (tmp_path / "out").write_text("no directory")
    done = demo(tmp_path, script=script)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: error: cannot write to") and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.rotating(2)
@pytest.mark.parametrize("script", ("train_gpt", *IMAGES))
def test_whole_run(tmp_path, script):
    """As a user runs it: it checks itself."""
    done = demo(tmp_path, script=script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
