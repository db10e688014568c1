"""Collected with FUSEGRAD_TEST_DEVICE=cuda, beside test_conformance.py: what a real device adds to the table. See gpu.py."""

import pytest
import torch
from cuda_paths import *  # noqa: F403  collected here
from test_conformance import each_op, same_bits

import fusegrad
from fusegrad._op import Sample
from table import BF16, F16, F32, Make, call, check, cotangents, name_of, run, with_grad


@pytest.fixture
def reorder():
    """A device orders its threads as it likes; to run again is all that can be asked."""
    return lambda seed: None


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert same_bits(a[k], b[k].to(a[k].device)), k


@each_op
def test_many_more_rows(op):
    sample = Sample("", op.bench(Make(), 2**20, 9))
    cotangent = cotangents(call(op, sample))
    check(op, sample, run(op, sample, cotangent), cotangent)


@pytest.mark.parametrize("shape", ((2**21 + 3, 1024), (2, 2**30 + 8)), ids=("rows", "columns"))
@each_op
def test_more_than_2_to_31_elements(op, shape):
    """The first and the last row of a huge tensor give what they give alone, and all of it is finite."""
    torch.cuda.empty_cache()
    rows, cols = shape
    main, small = next(iter(op.bench(Make(F16), 2, 64).items()))
    kwargs = op.bench(Make(F16), 2, cols * 64 // small.shape[1])  # a packed input is twice as wide as it is told
    options = {"reduction": "none"} if "target" in kwargs else {}
    huge = kwargs[main][:1].repeat(rows, 1)
    huge[-1] = kwargs[main][-1]
    others = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == 2}
    others = {k: torch.cat((v[:1].expand(rows - 1, *v.shape[1:]), v[1:])) for k, v in others.items()}
    few, many = Sample("few", kwargs | options), Sample("many", kwargs | options | others | {main: huge})
    found, alone = (run(op, s, tuple(torch.ones_like(y) for y in call(op, s)), which=[main]) for s in (many, few))
    for k, v in found.items():
        assert v.isfinite().all(), k
        assert same_bits(v[0], alone[k][0]) and same_bits(v[-1], alone[k][-1]), k


@each_op
def test_side_stream(op):
    """Work is queued on the current stream: behind what makes its input, and before what overwrites it."""
    kwargs = op.bench(Make(), 300, 512)
    main = next(iter(kwargs))
    sample = Sample("", kwargs)
    cotangent = cotangents(call(op, sample))
    expected = run(op, sample, cotangent)
    late = torch.zeros_like(kwargs[main])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(kwargs[main])
        found = run(op, Sample("", kwargs | {main: late}), cotangent)
        late.zero_()
    stream.synchronize()
    same(expected, found)


@each_op
def test_nothing_waits_for_the_device(op):
    sample = Sample("", op.bench(Make(), 64, 512))
    cotangent = cotangents(call(op, sample))
    run(op, sample, cotangent)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, sample, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@each_op
def test_graph_capture_and_replay(op, dtype):
    """Forward and backward, captured once, give the bits of an eager call on new inputs."""
    sample, leaves = with_grad(op, Sample("", op.bench(Make(dtype), 128, 1000)))
    cotangent = cotangents(call(op, sample))

    def step():
        outputs = call(op, sample)
        return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(leaves.values()), cotangent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = op.bench(Make(dtype, seed=seed), 128, 1000)
        with torch.no_grad():
            for k, leaf in leaves.items():
                leaf.copy_(fresh[k])
        expected = step()
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(captured, expected))


@each_op
def test_every_device(op):
    """A call on another device than the current one runs there, and leaves the current one current."""
    kwargs = op.bench(Make(), 33, 257)
    cotangent = cotangents(call(op, Sample("", kwargs)))
    expected = run(op, Sample("", kwargs), cotangent)
    for device in range(torch.cuda.device_count()):
        there = {k: v.to(f"cuda:{device}") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        same(expected, run(op, Sample("", there), tuple(g.to(f"cuda:{device}") for g in cotangent)))
        assert torch.cuda.current_device() == 0


def test_tensors_on_two_devices():
    with pytest.raises(RuntimeError, match="rms_norm: weight must be on cuda:0, where the first argument is, got a tensor on cpu"):
        fusegrad.functional.rms_norm(torch.ones(2, 8, device="cuda"), (8,), torch.ones(8))
    with pytest.raises(RuntimeError, match="rms_norm: weight must be on cpu, where the first argument is, got a tensor on cuda:0"):
        fusegrad.functional.rms_norm(torch.ones(2, 8), (8,), torch.ones(8, device="cuda"))
