"""The bench: that it measures, refuses what is wrong, keeps what it has, and that the README shows what was measured."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusegrad
from fusegrad._op import OPS

BENCH = Path(__file__).resolve().parent.parent / "bench"
QUICK = ("--rounds", "2", "--threads", "1", "--shapes", "4x64", "33x40", "--dtypes", "float32")
sys.path.append(str(BENCH))

import guard  # noqa: E402
import measure  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import sides  # noqa: E402


def bench(*args, code=None, **environment):
    command = [sys.executable, *(("-c", code) if code else (BENCH / "run.py",)), *args]
    paths = os.pathsep.join((str(BENCH), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)


def positive(value):
    return all(map(positive, value.values())) if isinstance(value, dict) else value > 0


def test_every_figure_of_a_small_run(tmp_path):
    own = ("--sides", "fusegrad", "eager", "native")
    done = bench(*QUICK, *own, "--json", tmp_path / "new" / "r.json", "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "new" / "r.json").read_text())
    assert {"date", "device", "capability", "threads", "torch", "commit", "seed"} <= result["machine"].keys()
    assert len(result["cells"]) == 2 * len(OPS)
    for cell in result["cells"]:
        assert {"fusegrad", "eager"} <= cell["sides"].keys() and positive(cell["bytes"]) and positive(cell["copy"])
        for s in cell["sides"].values():
            assert s.keys() == {"saved", "peak", "forward", "backward", "both"} and positive(s)
        assert ("native" in cell["sides"]) == (OPS[cell["op"]].torch is not None)
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == len(OPS) and "<script" not in page and "src=" not in page
    assert "geometric mean" in done.stdout and "not installed: " in done.stdout
    again = bench(*QUICK, *own, "--ops", "swiglu", "--compare", tmp_path / "new" / "r.json")
    assert again.returncode == 0 and "over old" in again.stdout


@pytest.mark.slow
def test_compile_is_a_side():
    done = bench(*QUICK, "--ops", "swiglu", "--host")
    assert done.returncode == 0 and "compile" in done.stdout and "forward + backward µs" in done.stdout, done.stderr


@pytest.mark.slow
def test_training_steps():
    done = bench("--model", "--rounds", "3", "--threads", "1")
    assert done.returncode == 0 and "gpt" in done.stdout and "mlp" in done.stdout, done.stderr


BROKEN = """
import runpy, sys
import fusegrad.ops.rms_norm as op
right = op.rms_norm_fwd
def broken(*args):
    y, rstd = right(*args)
    return y * 1.004, rstd
op.rms_norm_fwd = broken
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_broken_kernel_is_not_timed(tmp_path):
    done = bench(BENCH / "run.py", *QUICK, "--ops", "rms_norm", "--sides", "fusegrad", "eager", "--json", tmp_path / "r.json", code=BROKEN)
    assert done.returncode == 1 and "over the budget" in done.stdout, done.stderr
    for cell in json.loads((tmp_path / "r.json").read_text())["cells"]:
        assert cell["sides"]["fusegrad"].keys() == {"wrong"} and "both" in cell["sides"]["eager"]


@pytest.mark.parametrize(
    "option, known", (("--ops", "rms_norm"), ("--sides", "liger_kernel"), ("--dtypes", "bfloat16"), ("--shapes", "ROWSxCOLS"))
)
def test_unknown_names_list_the_known_ones(option, known):
    done = bench(option, "nonsense")
    assert done.returncode == 2 and known in done.stderr and "Traceback" not in done.stderr


def test_a_file_to_compare_with_that_is_not_there():
    done = bench("--compare", "missing.json")
    assert done.returncode == 2 and "there is no file missing.json" in done.stderr


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    path = tmp_path / "r.json"
    shapes = [f"{n}x64" for n in range(4, 400)]
    command = [sys.executable, str(BENCH / "run.py"), "--ops", "swiglu", "--sides", "fusegrad", "--shapes", *shapes, "--json", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        start = time.monotonic()
        while not path.exists() and time.monotonic() - start < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    cells = json.loads(path.read_text())["cells"]
    assert 0 < len(cells) < 2 * len(shapes) and f"interrupted: {len(cells)} of {2 * len(shapes)} cells" in said


def test_peers(tmp_path, monkeypatch):
    """One that is installed is a side of the ops it has; one that is not is listed with the reason."""
    (tmp_path / "quack.py").write_text(
        "import torch\ndef rmsnorm(x, weight, eps):\n    return torch.rms_norm(x, weight.shape, weight, eps)\n"
    )
    (tmp_path / "quack.py").open("a").write("cross_entropy = torch.nn.functional.cross_entropy\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed, absent = sides.peers()
    assert "quack" in installed and "apex" in absent and "No module named" in absent["apex"]
    functions = sides.sides_of(OPS["rms_norm"], ("fusegrad", "quack", "apex"), installed)
    assert list(functions) == ["fusegrad", "quack"]
    call = measure.prepare(OPS["rms_norm"], torch.float32, 5, 16, "cpu", 0)
    assert measure.wrong(OPS["rms_norm"], "quack", functions["quack"], call) is None
    assert "quack" not in sides.sides_of(OPS["swiglu"], ("fusegrad", "quack"), installed)
    sys.modules.pop("quack")
    importlib.invalidate_caches()


def test_a_peer_that_is_wrong_is_refused():
    call = measure.prepare(OPS["swiglu"], torch.float32, 5, 16, "cpu", 0)
    assert "relative error" in measure.wrong(OPS["swiglu"], "peer", lambda gate: fusegrad.functional.swiglu(gate) * 1.01, call)


def test_readme_shows_the_newest_results():
    text = readme.README.read_text()
    assert readme.updated(text) == text, "run python bench/readme.py"


def test_summary():
    def side(seconds):
        return dict(both=dict(median=seconds, low=seconds, high=seconds))

    def cell(dtype, seconds):
        own = dict(fusegrad=side(seconds), eager=side(4.0), native=dict(wrong="too far off"))
        return dict(op="a", dtype=dtype, rows=1, cols=1, bytes=dict(forward=10), copy=side(1.0), sides=own)

    cells = [cell("float32", 1.0), cell("bfloat16", 4.0)]
    found = report.summary(dict(cells=cells, machine=dict(last_level_cache_MB=0)))
    assert found == dict(ratio=0.5, above=["a bfloat16 1x1: 1.00"], of_copy=2.0, cells=2, large_cells=2, bfloat16_slower=["a bfloat16 1x1"])


def test_guard():
    """The vector variants pass; the baseline, which has no such registers, shows that the guard sees what it looks for."""
    variants = [v for v in ("avx2", "avx512") if guard.objects(v)]
    assert variants, "no objects in build/: build with `make test`"
    for variant in variants:
        kernels, complaints = guard.examine(variant, guard.objects(variant))
        assert kernels >= 4 * len(OPS) and not complaints
    kernels, complaints = guard.examine("default", guard.objects("default"))
    assert len(complaints) == kernels
