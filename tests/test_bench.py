"""The bench: that it measures, refuses what is wrong, keeps what it has, and that the README shows what was measured."""

import copy
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fusegrad
from fusegrad._op import OPS, SHAPES

BENCH = Path(__file__).resolve().parent.parent / "bench"
QUICK = ("--rounds", "2", "--threads", "1", "--shapes", "4x64", "33x40", "--dtypes", "float32")
sys.path.append(str(BENCH))

import eager  # noqa: E402
import guard  # noqa: E402
import measure  # noqa: E402
import model  # noqa: E402
import readme  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import sides  # noqa: E402


def bench(*args, code=None, **environment):
    command = [sys.executable, *(("-c", code) if code else (BENCH / "run.py",)), *args]
    paths = os.pathsep.join((str(BENCH), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)


def files(path):
    return "--json", path / "r.json", "--html", path / "r.html"


def measured(op, peer, layout="contiguous"):
    """A small cell with that function beside fusegrad's."""
    args = SimpleNamespace(device="cpu", seed=0, threads=1, rounds=2)
    return measure.measure(op, torch.float32, 4, 8, layout, dict(fusegrad=op.functional, peer=peer), args)


def refused(capsys, *args):
    """What the command line says to these options."""
    with pytest.raises(SystemExit) as end:
        run.parse([str(a) for a in args])
    assert end.value.code == 2
    return capsys.readouterr().err


def positive(value):
    return all(map(positive, value.values())) if isinstance(value, dict) else value > 0


def test_g5_every_figure_of_a_small_run(tmp_path):
    own = ("--sides", "fusegrad", "eager", "native")
    done = bench(*QUICK, *own, "--json", tmp_path / "new" / "r.json", "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "new" / "r.json").read_text())
    assert {"date", "device", "capability", "threads", "torch", "commit", "seed"} <= result["machine"].keys()
    assert len(result["cells"]) == 2 * len(OPS)
    for cell in result["cells"]:
        assert {"fusegrad", "eager"} <= cell["sides"].keys() and cell["bytes"]["both"] > 0 and positive(cell["copy"])
        for s in cell["sides"].values():
            assert s.keys() == {"saved", "peak", "forward", "backward", "both"}
            assert s.pop("saved") >= 0  # some keep nothing
            if cell["bytes"]["forward"] == 0:  # a view
                assert s["forward"].pop("GB_s") == 0
            assert positive(s)
            assert all("percent_of_copy" in s[phase] for phase in ("forward", "backward", "both"))
        assert ("native" in cell["sides"]) == (OPS[cell["op"]].torch is not None)
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == len(OPS) and "<script" not in page and "src=" not in page
    assert "geometric mean" in done.stdout and "absent: apex" in done.stdout
    old = tmp_path / "new" / "r.json"
    again = bench(*QUICK, *own, "--ops", "swiglu", "--compare", old, "--json", old, "--html", tmp_path / "r.html")
    assert again.returncode == 0 and "over old" in again.stdout and "of 4 times within the quartiles" in again.stdout
    assert "of 2 ratios within the rounds" in again.stdout
    assert len(json.loads(old.read_text())["cells"]) == 2  # written over only after it was read


@pytest.mark.slow
def test_compile_is_a_side(tmp_path):
    done = bench(*QUICK, "--ops", "swiglu", "--host", *files(tmp_path))
    assert done.returncode == 0 and "compile" in done.stdout and "forward + backward µs" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.rotating(2)
def test_training_steps(tmp_path):
    done = bench("--model", "--rounds", "3", "--threads", "1", "--json", tmp_path / "m.json")
    assert done.returncode == 0 and "wrong" not in done.stdout, done.stderr
    assert [network["name"] for network in json.loads((tmp_path / "m.json").read_text())["networks"]] == [
        "gpt",
        "mlp",
        "perceptron",
        "conv",
    ]


class Tiny(torch.nn.Module):
    """A loss; off by a factor, for a network that must be refused."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.linear, self.factor = torch.nn.Linear(8, 8), factor

    def forward(self, x):
        return self.linear(x).square().mean() * self.factor


def tiny(layers, device):
    """a layer and its loss"""
    return Tiny(), torch.randn(4, 8)


def steps(*args, old=None, networks=(), keep=None):
    """(exit status, result, what was shown) of a run of `--model` with the networks that are registered."""
    result, shown = dict(networks=list(networks)), io.StringIO()
    args = run.parse(["--model", "--rounds", "4", *args])
    args.old = old
    status = model.main(args, Console(file=shown, width=150), result, keep or (lambda: None))
    return status, result["networks"], shown.getvalue()


def test_training_steps_are_written_compared_and_gone_on_with(monkeypatch):
    monkeypatch.setattr(model, "NETWORKS", dict(a=tiny, b=lambda layers, device: (Tiny(1.0 + (layers is fusegrad)), tiny(layers, 0)[1])))
    kept = []
    status, (a, b), shown = steps(keep=lambda: kept.append(len(kept) + 1))
    assert status == 1 and kept == [1, 2]
    assert b["wrong"] == "losses" and b["difference"] == pytest.approx(1) and not b["sides"] and "wrong" in shown
    assert list(a["sides"]) == ["native", "fusegrad"] and positive(a["sides"]) and a["difference"] == 0
    assert a["what"] == tiny.__doc__ and 0 < a["ratio"]["low"] <= a["ratio"]["median"] <= a["ratio"]["high"]
    assert report.with_range(a["ratio"]) in shown
    assert json.loads(json.dumps(a)) == a

    old = copy.deepcopy(a)
    old["sides"]["native"] = {k: 2 * v for k, v in a["sides"]["native"].items()}
    status, again, shown = steps(networks=[a, b], old=dict(networks=[old]))
    assert again == [a, b] and "over old" in shown  # nothing was left to measure
    assert re.search(r"native .* 0\.50", shown) and re.search(r"fusegrad .* 1\.00", shown)
    (only,) = steps("--sides", "fusegrad", "--seed", "5", networks=[b])[1][1:]
    assert list(only["sides"]) == ["fusegrad"] and "ratio" not in only and only["losses"] != a["losses"]


def test_interrupted_training_steps_are_kept(monkeypatch):
    """Also the network that was measured just before."""
    kept = []

    def keep():
        kept.append(1)
        if len(kept) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "NETWORKS", dict(a=tiny, b=tiny))
    status, networks, shown = steps(keep=keep)
    assert status == 130 and [network["name"] for network in networks] == ["a"] and len(kept) == 2
    assert "interrupted: 1 of 2 networks" in shown


@pytest.mark.parametrize(
    "options", (("--ops", "rms_norm"), ("--dtypes", "float32"), ("--shapes", "4x4"), ("--layouts", "offset"), ("--host",), ("--html", "x"))
)
def test_options_that_do_not_go_with_training_steps(options, capsys):
    assert f"does not go with {options[0]}" in refused(capsys, "--model", *options)


def test_sides_of_training_steps(capsys):
    assert "--sides are native, fusegrad" in refused(capsys, "--model", "--sides", "eager")
    assert list(run.parse(["--model"]).sides) == ["native", "fusegrad"]


def test_results_of_the_other_kind_are_refused(tmp_path, capsys):
    cells, networks = tmp_path / "cells.json", tmp_path / "networks.json"
    cells.write_text(json.dumps(dict(machine={}, cells=[])))
    networks.write_text(json.dumps(dict(machine={}, networks=[])))
    assert "is of a run with --model" in refused(capsys, "--compare", networks)
    assert "is of a run with --model" in refused(capsys, "--resume", "--json", networks)
    assert "is of a run without --model" in refused(capsys, "--model", "--compare", cells)
    assert "is of a run without --model" in refused(capsys, "--model", "--resume", "--json", cells)
    assert run.parse(["--model", "--compare", str(networks)]).old["networks"] == []


def test_rounds_and_shapes_that_are_given_win():
    assert [run.parse(args).shapes for args in (["--host", "--quick"], ["--host", "--shapes", "4x8"])] == [((4, 64),), [(4, 8)]]
    assert [run.parse(args).rounds for args in ([], ["--quick"], ["--quick", "--rounds", "7"])] == [9, 3, 7]


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


def test_g5_a_broken_kernel_is_not_timed(tmp_path):
    own = ("--ops", "rms_norm", "--sides", "fusegrad", "eager", *files(tmp_path))
    done = bench(BENCH / "run.py", *QUICK, *own, code=BROKEN)
    assert done.returncode == 1 and "wrong" in done.stdout, done.stderr
    for cell in json.loads((tmp_path / "r.json").read_text())["cells"]:
        assert "over the budget" in cell["sides"]["fusegrad"]["wrong"] and "both" in cell["sides"]["eager"]


@pytest.mark.parametrize(
    "option, known",
    (
        ("--ops", "rms_norm"),
        ("--sides", "liger_kernel"),
        ("--dtypes", "bfloat16"),
        ("--layouts", "row_strided"),
        ("--shapes", "ROWSxCOLS"),
        ("--rounds", "from 1 on"),
    ),
)
def test_unknown_names_list_the_known_ones(option, known, capsys):
    assert known in refused(capsys, option, "nonsense")


def test_a_file_to_compare_with_that_is_not_there_or_another(capsys):
    assert "there is no file missing.json" in refused(capsys, "--compare", "missing.json")
    assert "is not what --json writes" in refused(capsys, "--compare", __file__)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    path = tmp_path / "r.json"
    shapes = [f"{n}x64" for n in range(4, 400)]
    command = [
        sys.executable,
        str(BENCH / "run.py"),
        "--ops",
        "swiglu",
        "--sides",
        "fusegrad",
        "--shapes",
        *shapes,
        *map(str, files(tmp_path)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        start = time.monotonic()
        while not path.exists() and time.monotonic() - start < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    cells = json.loads(path.read_text())["cells"]
    assert process.returncode == 130
    assert 0 < len(cells) < 2 * len(shapes) and f"interrupted: {len(cells)} of {2 * len(shapes)} cells" in said


INTERRUPTED = """
import sys, run
written = run.write
def once(path, result):
    run.write = written
    raise KeyboardInterrupt
run.write = once
sys.exit(run.main())
"""


def test_an_interruption_between_a_cell_and_its_writing_loses_nothing(tmp_path):
    done = bench(*QUICK, "--ops", "swiglu", "--sides", "fusegrad", *files(tmp_path), code=INTERRUPTED)
    assert done.returncode == 130 and "interrupted: 1 of 2 cells" in done.stdout, done.stderr
    assert (tmp_path / "r.html").exists()
    assert len(json.loads((tmp_path / "r.json").read_text())["cells"]) == 1


def test_an_interrupted_run_goes_on(tmp_path):
    command = ("--rounds", "2", "--threads", "1", "--dtypes", "float32", "--ops", "swiglu", "--sides", "fusegrad", *files(tmp_path))
    same = "import sys, measure, run; measure.code_is_that_of = lambda commit: True; sys.exit(run.main())"
    assert bench(*command, "--shapes", "4x64", "--resume").returncode == 0  # nothing to go on with
    first = json.loads((tmp_path / "r.json").read_text())
    done = bench(*command, "--shapes", "4x64", "33x40", "--resume", code=same)
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 0, done.stderr
    assert result["machine"] == first["machine"] and result["cells"][:1] == first["cells"] and len(result["cells"]) == 2

    for commit, why in (("0123abc", "and the code is not the same since"), ("0123abc-dirty", "which changes nobody knows")):
        (tmp_path / "r.json").write_text(json.dumps(result | dict(machine=result["machine"] | dict(commit=commit))))
        changed = bench(*command, "--shapes", "4x64", "--resume", code=same.replace("True", "False"))
        assert changed.returncode and f"was measured at commit {commit}, {why}" in changed.stderr
    (tmp_path / "r.json").write_text(json.dumps(result))
    other = bench(*command, "--shapes", "4x64", "--resume", "--seed", "3", code=same)
    fewer = bench(*command[: command.index("--sides")], *files(tmp_path), "--shapes", "4x64", "--resume", code=same)
    assert fewer.returncode and "was measured with sides ['fusegrad'], this run is with ['fusegrad', 'eager', " in fewer.stderr
    assert other.returncode and "was measured with seed 0, this run is with 3" in other.stderr
    assert json.loads((tmp_path / "r.json").read_text()) == result

    (tmp_path / "r.json").write_text("{")
    done = bench(*command, "--shapes", "4x64", "--resume")
    assert done.returncode == 2 and "is not what --json writes" in done.stderr


def test_code_is_that_of_a_commit():
    git = ("git", "-C", str(BENCH))
    head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True).stdout.strip()
    code = ("../csrc", "../python", "../setup.py", "*.py", "../examples/*.py")
    clean = not subprocess.run((*git, "diff", "--quiet", "HEAD", "--", *code)).returncode
    assert measure.code_is_that_of(head) == bool(head and clean)
    assert not measure.code_is_that_of("") and not measure.code_is_that_of("0" * 40)


def rms_norm(x, w, b=None, residual=None, eps=1e-6, prenorm=False):
    s = x if residual is None else x + residual
    y = torch.rms_norm(s, w.shape, w, eps)
    return (y, s) if prenorm else y


def layer_norm(x, w, b, residual=None, eps=1e-6, prenorm=False):
    s = x if residual is None else x + residual
    y = torch.layer_norm(s, w.shape, w, b, eps)
    return (y, s) if prenorm else y


NN = torch.nn.functional
# {peer: {module: {function: the same in torch, with the arguments that the peer documents}}}
PEERS = dict(
    quack={"quack": dict(rmsnorm=rms_norm, softmax=lambda x: x.softmax(-1), cross_entropy=NN.cross_entropy)},
    flash_attn={
        "flash_attn.losses.cross_entropy": dict(CrossEntropyLoss=torch.nn.CrossEntropyLoss),
        "flash_attn.ops.activations": dict(swiglu=lambda x, y: NN.silu(x) * y),
        "flash_attn.ops.triton.layer_norm": dict(layer_norm_fn=layer_norm, rms_norm_fn=rms_norm),
    },
    apex={
        "apex.contrib.xentropy": dict(
            SoftmaxCrossEntropyLoss=SimpleNamespace(
                apply=lambda logits, labels, smoothing=0.0, padding_idx=0: NN.cross_entropy(
                    logits, labels, ignore_index=padding_idx, label_smoothing=smoothing, reduction="none"
                )
            )
        ),
        "apex.normalization.fused_layer_norm": dict(
            fused_layer_norm_affine=lambda input, weight, bias, normalized_shape, eps=1e-6: torch.layer_norm(
                input, normalized_shape, weight, bias, eps
            ),
            fused_rms_norm_affine=lambda input, weight, normalized_shape, eps=1e-6: torch.rms_norm(input, normalized_shape, weight, eps),
        ),
    },
    liger_kernel={
        "liger_kernel.transformers.functional": dict(
            liger_rms_norm=lambda X, W, eps, in_place=True: rms_norm(X, W, eps=eps),
            liger_layer_norm=lambda X, W, B, eps: layer_norm(X, W, B, eps=eps),
            liger_fused_add_rms_norm=lambda X, R, W, eps, in_place=True: rms_norm(X, W, None, R, eps, prenorm=True),
            liger_group_norm=lambda X, w, b, num_channels, num_groups, eps: torch.group_norm(X, num_groups, w, b, eps),
            liger_dyt=lambda x, alpha, gamma, beta: torch.tanh(x * alpha) * gamma + beta,
            liger_swiglu=lambda a, b: NN.silu(a) * b,
            liger_geglu=lambda a, b: NN.gelu(a, approximate="tanh") * b,
            liger_softmax=lambda x: x.softmax(-1),
            liger_cross_entropy=NN.cross_entropy,
            liger_fused_linear_cross_entropy=lambda input, weight, target, bias=None: NN.cross_entropy(input @ weight.T, target),
        )
    },
)


@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer, monkeypatch):
    """One that is installed is a side of the ops it has, called as it documents; one that is not is listed with the reason."""
    assert f"No module named '{peer}" in sides.peers("cuda")[1][peer]
    for module, functions in PEERS[peer].items():
        *parents, _ = itertools.accumulate(module.split("."), "{}.{}".format)
        for name in (*parents, module):
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, types.ModuleType(name)))
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))
    assert sides.peers("cpu")[1][peer] == "runs on cuda only"
    installed, absent = sides.peers("cuda")
    assert peer in installed and "xformers" in absent
    for name in installed[peer]:
        functions = sides.sides_of(OPS[name], ("fusegrad", peer, "xformers"), installed)
        assert list(functions) == ["fusegrad", peer]
        call = measure.prepare(OPS[name], torch.float32, 5, 16, "cpu", 0)
        assert measure.wrong(OPS[name], peer, functions[peer], call) is None
    assert peer not in sides.sides_of(OPS["exp"], ("fusegrad", peer), installed)


def test_torch_linear_cross_entropy():
    """Its values, and that it keeps gradients: as attributes of a node, where hooks of saved tensors do not see them."""
    op = OPS["linear_cross_entropy"]
    peer = sides.peers("cpu")[0]["torch_linear_cross_entropy"]["linear_cross_entropy"]
    call = measure.prepare(op, torch.float32, 96, 50, "cpu", 0)
    assert measure.wrong(op, "peer", peer, call) is None
    torch.testing.assert_close(call.forward(peer), call.forward(op.functional))
    assert measure.saved_bytes(peer, call) >= sum(t.nbytes for t in call.leaves.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_peer_that_is_wrong_is_refused(dtype):
    call = measure.prepare(OPS["swiglu"], dtype, 5, 16, "cpu", 0)
    assert "relative error" in measure.wrong(OPS["swiglu"], "peer", lambda gate: fusegrad.functional.swiglu(gate) * 1.05, call)


def test_a_side_that_raises_is_refused_and_the_others_are_timed():
    def raises(**kwargs):
        raise ValueError("no gradient here\nand more")

    for op in (OPS["swiglu"], OPS["dropout"]):  # of the second one, which draws, other sides' values are not looked at
        cell = measured(op, raises)
        own = cell["sides"]["fusegrad"]
        assert cell["sides"]["peer"] == dict(wrong="ValueError: no gradient here") and own.pop("saved") >= 0 and positive(own)


@pytest.mark.parametrize("enough, turns", ((measure.Clock.ENOUGH, 2), (1e-9, 1)))
def test_a_side_whose_calls_take_long_has_fewer_turns(enough, turns, monkeypatch):
    seconds, calls = measure.Clock.seconds, []
    monkeypatch.setattr(measure.Clock, "ENOUGH", enough)
    monkeypatch.setattr(measure.Clock, "seconds", lambda clock, *n: calls.append(clock) or seconds(clock, *n))
    cell = measured(OPS["exp"], torch.exp)
    assert positive(cell["copy"]) and all(positive(side["both"]) for side in cell["sides"].values())
    # In each of three phases: how long a call is, three times, and the turns, of two sides and of the copy, which has both.
    assert len(calls) == 3 * (2 * (3 + turns) + 5)


def test_a_side_that_raises_while_it_is_timed():
    calls = itertools.count()

    def raises(gate):
        if next(calls) == 8:
            raise RuntimeError("one [/more]")
        return fusegrad.functional.swiglu(gate)

    cell = measured(OPS["swiglu"], raises)
    assert cell["sides"]["peer"] == dict(wrong="RuntimeError: one [/more]") and positive(cell["sides"]["fusegrad"])
    result = dict(machine=dict(last_level_cache_MB=1, date="today"), absent={}, cells=[cell])
    assert "swiglu float32 4x8 peer (RuntimeError: one [/more])" in report.footer(result)
    Console(file=io.StringIO()).print(report.table(result), report.host_table(result))


@pytest.mark.parametrize("cache, plots", ((0, 2), (2**20, 1)))
def test_html(cache, plots):
    """A plot of all ops for cells that come from memory, one of each op; the cells that fall short under their number."""
    machine = dict(last_level_cache_MB=cache, date="today", kind="cpu", recycled_memory=False)
    cell = measured(OPS["swiglu"], fusegrad.functional.swiglu)
    cell["sides"]["eager"] = cell["sides"].pop("peer")
    for phase in cell["sides"]["eager"].values():
        if isinstance(phase, dict):
            phase["median"] = 1e-12
    page = report.html(dict(machine=machine, absent={}, cells=[cell]))
    assert page.count("<svg") == plots and ("all ops" in page) == (plots == 2)
    summary, listed = re.search(r"<details><summary>cells above 0.95: (\d+)</summary>(.*?)</details>", page).groups()
    assert summary == "1" and listed.startswith("swiglu float32 4x8: ") and "<li>absent: none</li>" in page
    assert "page faults" in page


def test_html_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    machine = dict(last_level_cache_MB=0, date="today", kind="cuda", recycled_memory=False)
    page = report.html(dict(machine=machine, absent={}, cells=[measured(OPS["exp"], torch.exp)]))
    assert "there is no matplotlib" in page and "<svg" not in page and "exp float32 4x8" in page


def test_a_cell_that_cannot_be_measured_is_named_and_the_others_are(tmp_path):
    huge = f"4x{2**50}"
    done = bench(
        "--rounds", "1", "--ops", "swiglu", "--sides", "fusegrad", "--dtypes", "float32", "--shapes", huge, "4x8", *files(tmp_path)
    )
    assert done.returncode == 1 and f"swiglu float32 {huge}: RuntimeError" in done.stdout, done.stderr
    assert [cell["cols"] for cell in json.loads((tmp_path / "r.json").read_text())["cells"]] == [8]
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "op, forward, backward",
    (("swiglu", 3, 5), ("dropout", 2, 2), ("bias_dropout_add", 3, 2), ("add_rms_norm", 4, 4), ("grad_reverse", 0, 2), ("softmax", 2, 3)),
)
def test_bytes_that_must_move(op, forward, backward):
    """In tensors of 100 x 300 numbers; parameters and what is kept of a row are little beside them."""
    call = measure.prepare(OPS[op], torch.float32, 100, 300, "cpu", 0)
    moved = measure.bytes_moved(OPS[op], call)
    halves = 0.5 if op == "swiglu" else 1  # of a gate and up in one
    tensor = max(t.nbytes for t in call.tensors()) * halves
    assert [moved[phase] / tensor for phase in ("forward", "backward")] == pytest.approx([forward, backward], abs=0.05)
    assert moved["both"] == moved["forward"] + moved["backward"]


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_sizes(op):
    """From next to nothing to a tensor that no cache holds, tall and square between them."""
    assert set(op.shapes) >= set(SHAPES[:5]) and max(rows * cols for rows, cols in op.shapes) * 4 >= 32 * 2**20


def test_inputs_that_are_not_contiguous():
    """Every op gets them once; each call of the rotation has their strides, and their elements are counted as they are."""
    cells = run.cells_of(run.parse(["--dtypes", "float32"]))
    assert sorted((op, layout) for op, *_, layout in cells if layout != "contiguous") == sorted((op, "row_strided") for op in OPS)
    assert {layout for *_, layout in run.cells_of(run.parse(["--shapes", "4x4"]))} == {"contiguous"}
    assert len(list(run.cells_of(run.parse(["--ops", "exp", "--shapes", "4x4", "--layouts", "offset", "transposed"])))) == 4
    for op in OPS.values():
        call = measure.prepare(op, torch.float32, 64, 64, "cpu", 0, "row_strided")
        plain = measure.prepare(op, torch.float32, 64, 64, "cpu", 0)
        rows = next(t for t in call.tensors() if t.is_floating_point())
        again = next(t for t in copy.deepcopy(call).tensors() if t.is_floating_point())
        assert not rows.is_contiguous() and again.stride() == rows.stride() and again.requires_grad == rows.requires_grad
        assert measure.wrong(op, "fusegrad", op.functional, call) is None
        moved = measure.bytes_moved(op, call)
        if op.name != "grad_reverse":  # a view
            assert moved["forward"] == measure.bytes_moved(op, plain)["forward"] == moved["both"] - moved["backward"]


def test_the_layout_is_part_of_what_a_cell_is():
    strided, plain = (measured(OPS["exp"], torch.exp, layout) for layout in ("row_strided", "contiguous"))
    assert strided["layout"] == "row_strided" and report.name(strided) == "exp float32 4x8 row_strided"
    plain.pop("layout")  # as older results are
    assert report.name(plain) == "exp float32 4x8"
    result = dict(machine=dict(last_level_cache_MB=1, kind="cuda", recycled_memory=False), cells=[strided | dict(repeated=True), plain])
    slices, again = readme.where_there_is(result, None)
    assert "inputs of 1 cells" in slices and "1 cells were measured once more" in again
    assert not list(readme.where_there_is(result | dict(cells=[plain]), None))
    plain["sides"]["peer"] = dict(wrong="output 0")
    assert list(readme.where_there_is(result | dict(cells=[plain]), None))[0].startswith("In 1 cells a side is not compared with")
    assert not report.over_old(dict(cells=[strided]), dict(cells=[plain]))
    assert report.over_old(dict(cells=[strided]), dict(cells=[strided])).keys() == {(report.name(strided), s) for s in ("fusegrad", "peer")}


def test_the_range_of_a_ratio_over_the_rounds():
    """Round by round, so that what slows down both sides changes nothing; and whether two runs agree in it."""
    assert measure.by_rounds([1.0, 8.0, 3.0], [2.0, 16.0, 4.0, 9.0]) == dict(median=0.5, low=0.5, high=0.75)
    cell = measured(OPS["exp"], torch.exp)
    cell["sides"]["native"] = native = cell["sides"].pop("peer")
    low, high = (native["both"]["ratio"][k] for k in ("low", "high"))
    assert 0 < low <= report.ratio(cell) <= high and "ratio" not in cell["sides"]["fusegrad"]["both"]
    assert report.ratio_text(cell) == f"{report.ratio(cell):.2f} ({low:.2f} – {high:.2f})"
    (line, _), old = report.rows(dict(cells=[cell])), copy.deepcopy(cell)
    assert line[report.HEADER.index("ratio")] == report.ratio_text(cell)

    def agree():
        return list(report.ratios_over_old(dict(cells=[cell]), dict(cells=[old])))

    assert agree() == [(1, True)]
    was = old["sides"]["native"]["both"]["ratio"]
    was |= {k: 2 * high for k in was}
    assert agree() == [(native["both"]["ratio"]["median"] / (2 * high), False)]
    old["sides"]["native"]["both"].pop("ratio")  # as older results are
    assert agree() == [] and report.ratio_text(old) == f"{report.ratio(old):.2f}"
    assert report.ratio_text(dict(cell, sides={})) == ""


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.torch is None])
def test_what_users_write_is_the_op_and_nothing_of_fusegrad(name, monkeypatch):
    """In float64, where rounding does not matter; what draws at random, with nothing dropped."""
    op, f = OPS[name], eager.WRITTEN[name]
    call = measure.prepare(op, torch.float64, 64, 40, "cpu", 0)
    if op.random:
        call.kwargs["p"] = 0.0
    expected = call.forward(op.functional)
    gradients = call.backward(expected)
    with monkeypatch.context() as m:
        for module in [module for k, module in sys.modules.items() if k.partition(".")[0] == "fusegrad" and module is not None]:
            for k, v in vars(module).items():
                if callable(v) and not isinstance(v, type):
                    m.setattr(module, k, None)
        found = call.forward(f)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(call.backward(found), gradients)


def test_what_users_write_is_there_for_what_torch_has_not():
    assert eager.WRITTEN.keys() == {op.name for op in OPS.values() if op.torch is None}
    assert "fusegrad" not in Path(eager.__file__).read_text()
    for op in (OPS["swiglu"], OPS["exp"]):
        assert (sides.eager(op) is eager.WRITTEN.get(op.name)) == (op.torch is None)
    call = measure.prepare(OPS["exp"], torch.float32, 5, 16, "cpu", 0)
    torch.testing.assert_close(call.forward(sides.eager(OPS["exp"])), call.forward(torch.exp))


def test_what_cancels_counts_for_other_sides():
    """Sums whose terms cancel are not held against a side, beyond what they must lose; a wrong factor is, wherever it is."""
    op, exact = OPS["batch_norm"], {}
    call = measure.prepare(op, torch.float32, 2048, 64, "cpu", 0)
    assert measure.wrong(op, "native", op.torch, call, exact) is None
    lost = {k: size / r.norm() for k, (r, size) in exact.items()}
    assert lost["output 0"] == lost["gradient of input"] == 1 and lost["gradient of weight"] > 4
    assert "output 0" in measure.wrong(op, "native", lambda **kwargs: op.torch(**kwargs) * 1.0001, call)


def test_compile_keeps_graphs_in_the_phase_that_needs_it():
    config = measure.functorch_config
    assert config.donated_buffer
    with measure.kept_graphs():
        assert not config.donated_buffer
    assert config.donated_buffer


def test_another_machine_is_named_beside_an_older_run():
    old, new = dict(date="a", threads=1, capability="avx2"), dict(date="b", threads=2, capability="avx2", cores=4)
    assert sorted(report.differences(old, new)) == ["cores: None, now 4", "threads: 1, now 2"]
    machine = dict(last_level_cache_MB=1)
    found = dict(machine=machine | dict(threads=2), absent={}, cells=[])
    lines = dict(report.findings(found, dict(machine=machine | dict(threads=1), cells=[])))
    assert lines["measured otherwise than the older run"] == ["threads: 1, now 2"]
    assert "beside the older run: 0 of 0 ratios within the rounds" in lines  # and no mean of nothing


def test_host_costs_are_a_column():
    """Of calls on next to nothing, forward and with the backward."""
    cell = measured(OPS["exp"], torch.exp)
    (line, _), at = report.rows(dict(cells=[cell])), report.HEADER.index("host µs")
    us = [cell["sides"]["fusegrad"][phase]["median"] * 1e6 for phase in ("forward", "both")]
    assert line[at] == "{:.0f} / {:.0f}".format(*us)
    assert next(report.rows(dict(cells=[cell | dict(rows=4096, cols=1024)])))[at] == ""


REPEATED = """
import sys, measure, run
calls = []
def fake(op, dtype, rows, cols, layout, sides, args):
    calls.append(rows)
    figures = dict(median=2.0, low=1.0, high=4.0 if rows > 4 and len(calls) < 4 else 1.5, GB_s=1, percent_of_copy=1)
    side = dict(forward=figures, backward=figures, both=figures, saved=0, peak=0)
    what = dict(op=op.name, dtype=str(dtype)[6:], rows=rows, cols=cols, layout=layout, gemm=False, rotated_bytes=1, bytes=dict(both=1))
    return what | dict(sides=dict(fusegrad=side), copy=dict(both=figures), call=len(calls))
measure.measure = fake
measure.code_is_that_of = lambda commit: True
sys.exit(run.main())
"""


def test_what_was_disturbed_is_measured_once_more(tmp_path):
    """At the end, once; a run that goes on does so too, with what the one before it has left."""
    command = ("--ops", "swiglu", "--dtypes", "float32", "--shapes", "4x4", "5x4", "6x4", *files(tmp_path))
    done = bench(*command, code=REPEATED)
    assert "of which they still are: none" in done.stdout
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert [(c["rows"], c["call"], c.get("repeated")) for c in cells] == [(4, 1, None), (5, 4, True), (6, 5, True)], done.stderr
    assert "measured once more, as quartiles were more than a factor of two apart: swiglu float32 5x4, swiglu float32 6x4" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    del result["cells"][1]["repeated"]
    for c in result["cells"][1:]:  # of which the second was repeated and is let be
        c["sides"]["fusegrad"]["backward"]["high"] = 9.0
    (tmp_path / "r.json").write_text(json.dumps(result))
    bench(*command, "--resume", code=REPEATED)
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert [(c["call"], c.get("repeated")) for c in cells] == [(1, None), (1, True), (5, True)]


@pytest.mark.parametrize("size", (1, 10**6, 10**7, 10**9))
def test_inputs_rotate_through_more_than_the_last_level_cache(size):
    cache = measure.last_level_cache("cpu", 2)
    assert cache >= 2**20 and measure.last_level_cache("cpu", 1) <= cache
    assert measure.sets_of(size, cache) * size >= 3 * cache or measure.sets_of(size, cache) == measure.MOST_SETS
    assert measure.sets_of(size, cache) * size < 3 * cache + size


def test_the_results_shown_are_the_longest_of_the_last_day_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="no results"):
        readme.updated("<!-- figures: python bench/readme.py -->\n<!-- end of figures -->\n")
    runs = dict(a=("2026-01-02", "cpu", 2), b=("2026-01-02", "cpu", 1), c=("2026-01-03", "cuda", 9), d=("2026-01-01", "cpu", 9))
    for name, (date, kind, cells) in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(machine=dict(date=date, kind=kind), cells=[{}] * cells)))
    (tmp_path / "gpu.json").write_text("{}")
    machine = dict(date="2026-01-04", kind="cpu", recycled_memory=True)
    assert readme.newest(recycled=True) is None
    (tmp_path / "r.json").write_text(json.dumps(dict(machine=machine, cells=[{}] * 20)))
    assert (readme.newest().name, readme.newest(recycled=True).name) == ("a.json", "r.json")


def test_a_run_with_recycled_memory_is_a_column(tmp_path):
    """Beside the normal one, and only where there is one."""
    path = readme.newest()
    result = json.loads(path.read_text())
    for cell in result["cells"]:
        for s in report.timed(cell).values():
            s["both"]["median"] = 1.0
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert "ernels alone" not in readme.render(path)
    text = readme.render(path, (), tmp_path / "r.json")
    assert re.search(r"^\| rms_norm \|.*\| 1\.00 \|$", text, re.M) and "Kernels alone, " in text and "1.00 over" in text
    assert re.search(r"^\| rms_norm \|.*\| 1\.00 \|$", readme.render(path, ["rms_norm"], tmp_path / "r.json"), re.M)


def test_cells_of_another_commit_say_so(tmp_path):
    result = json.loads(readme.newest().read_text())
    for cell in result["cells"]:
        cell.pop("commit", None)
        cell |= dict(commit="0123456789abcdef") if cell["op"] == "exp" else {}
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = readme.render(tmp_path / "r.json")
    assert [line for line in text.splitlines() if "anew" in line] == ["The cells of exp were measured anew at commit 012345678."]


def test_the_tables_shown_are_of_the_newest_results():
    """In the README all ops, and in the pages of the docs each op on one."""
    shown = []
    for page in readme.PAGES:
        text = page.read_text()
        assert readme.updated(text) == text, f"{page.name}: run python bench/readme.py"
        places = [ops for _, ops, _ in readme.PLACE.findall(text) if ops != "training steps"]
        assert text.count("<!-- figures") == text.count("<!-- end of figures") == len(readme.PLACE.findall(text))
        assert places == [""] if page.name == "README.md" else all(places)
        shown += [op for ops in places for op in ops.split()]
    assert sorted(shown) == sorted(OPS)


def test_training_steps_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    machine = dict(threads=2, device="A", capability="avx2", torch="2", rounds=5, date="2026-01-01", kind="cpu")
    sides_ = {side: dict(median=seconds, low=0, high=9) for side, seconds in (("native", 0.2), ("fusegrad", 0.1))}
    network = dict(name="a", what="A network", sides=sides_, ratio=dict(median=0.5, low=0.4, high=0.625))
    (tmp_path / "m.json").write_text(json.dumps(dict(machine=machine, networks=[network])))
    text = "<!-- figures of training steps: python bench/readme.py -->\nold\n<!-- end of figures -->\n"
    assert "| A network | 200 | 100 | 0.50 (0.40 – 0.62) |\n<!-- end" in readme.updated(text)
    (tmp_path / "m.json").unlink()
    with pytest.raises(SystemExit, match="no results"):
        readme.updated(text)


def test_summary():
    def side(seconds):
        figures = dict(median=seconds, low=seconds, high=seconds)
        return dict(forward=figures, backward=figures, both=figures)

    def cell(dtype, seconds, gemm=False):
        own = dict(fusegrad=side(seconds), eager=side(4.0), native=dict(wrong="too far off"))
        size = dict(rows=1, cols=1, gemm=gemm, rotated_bytes=10, bytes=dict(both=2e9))
        return dict(op="a", dtype=dtype, copy=side(1.0), sides=own) | size

    result = dict(cells=[cell("float32", 1.0), cell("bfloat16", 4.00001)], machine=dict(last_level_cache_MB=0))
    found = report.summary(result)
    assert (found.pop("ratio"), found.pop("of_copy"), found.pop("of_copy_with_products")) == pytest.approx((0.5, 2.0, 2.0), rel=1e-4)
    assert report.over_copy(report.summary(result)) == "2.00 of 2 cells"
    assert found == dict(
        above=["a bfloat16 1x1: 1.00"],
        cells=2,
        large_cells=2,
        large_products=0,
        bfloat16_slower=["a bfloat16 1x1: 4.00"],
        host=[f"a bfloat16 1x1 {phase}: 4000010 against 4000000" for phase in ("forward", "forward + backward")],
        repeated=[],
        still_unsteady=[],
        long_phases=[],
        copy_GB_s=[2.0, 2.0],
        wrong=["a float32 1x1 native (too far off)", "a bfloat16 1x1 native (too far off)"],
    )
    assert not report.summary(result | dict(cells=[cell("float32", 1.0), cell("bfloat16", 4.0, gemm=True)]))["bfloat16_slower"]
    with_product = report.summary(result | dict(cells=[*result["cells"], cell("float32", 16.0, gemm=True)]))
    assert report.over_copy(with_product) == "2.00 of 2 cells, 4.00 with the 1 cells of products of matrices"
    assert report.copy_speed(found) == "2 GB/s, 2 to 2" and report.copy_speed(dict(copy_GB_s=[])) == "none"
    apart = cell("float32", 1.0)
    apart["sides"]["eager"]["backward"] = dict(median=9.0, low=8.0, high=10.0)
    assert report.summary(result | dict(cells=[apart]))["long_phases"] == ["a float32 1x1 eager"]
    apart["sides"]["eager"]["backward"] |= dict(low=4.0)  # within the spread of both; but far apart in itself
    again = report.summary(result | dict(cells=[apart | dict(repeated=True)]))
    assert again["long_phases"] == [] and again["still_unsteady"] == ["a float32 1x1"]
    shown = "\n".join(readme.short(result["cells"]))
    assert "| a |  |  | 4000010 against 4000000 | 4000010 against 4000000 |" in shown
    assert "| a | 1 × 1: 4.00 |" in shown
    old = dict(cells=[cell("float32", 2.0)])
    assert report.over_old(result, old) == {("a float32 1x1", "fusegrad"): (0.5, False), ("a float32 1x1", "eager"): (1.0, True)}


def scalar(code):
    """The same instructions on single numbers."""
    return [(at, re.sub(r"p([sd])$", r"s\1", what), re.sub(r"[yz]mm", "xmm", operands)) for at, what, operands in code]


def test_guard(monkeypatch):
    """The vector variants pass; the baseline, which has no such registers, fails for every kernel; and a vector build fails for the
    one kernel whose loops are scalar, all of them or half."""
    for variant in guard.BUILT:
        assert guard.objects(variant), "no objects in build/: build with `make test`"
        kernels, complaints = guard.examine(variant, guard.objects(variant))
        assert kernels >= 4 * len(OPS) and not complaints
    kernels, complaints = guard.examine("default", guard.objects("default"))
    assert len(complaints) == kernels
    functions = guard.functions
    for part in ("", ">::chunks<true"):

        def mutated(path, lost="MapCpu<fusegrad::GatedFwd<(fusegrad::Act)11>, c10::BFloat16" + part):
            for name, code in functions(path):
                yield name, scalar(code) if lost in name else code

        monkeypatch.setattr(guard, "functions", mutated)
        for variant in guard.BUILT:
            complaints = guard.examine(variant, guard.objects(variant))[1]
            assert len(complaints) == 1 and "GatedFwd<Act::silu>, c10::BFloat16" in complaints[0], complaints
