"""Collected with FUSEGRAD_TEST_DEVICE=cuda, beside test_conformance.py: what a real device adds to the table. See gpu.py."""

import pytest
import torch
from cuda_paths import *  # noqa: F403  collected here
from test_conformance import each_op, same_bits

import fusegrad
from fusegrad._op import OPS, Sample
from fusegrad.testing.budget import seed_torch
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


class OnDevice(Make):
    """Draws there: as float64 and on the host one huge tensor takes its minute and tens of GB."""

    def _normal(self, shape, dtype, layout, scale=1.0, shift=0.0):
        return (torch.randn(shape, device=self.device, dtype=dtype) * scale).add_(shift)


# Not of what drops other elements in another row, of statistics of a batch, and of products, whose bits are those of a size.
BY_ROWS = [op for op in OPS.values() if not (op.random or op.gemm or op.name == "batch_norm")]


@pytest.mark.parametrize("shape", ((2**21 + 3, 1024), (2, 2**30 + 8)), ids=("rows", "columns"))
@pytest.mark.parametrize("op", BY_ROWS, ids=lambda op: op.name)
def test_more_than_2_to_31_elements(op, shape):
    """The first and the last row of a huge tensor give what they give alone, and all of it is finite."""
    torch.cuda.empty_cache()
    rows, cols = shape
    main, small = next(iter(op.bench(Make(F16), 2, 64).items()))
    kwargs = op.bench(OnDevice(F16), 2, cols * 64 // small.shape[1])  # a packed input is twice as wide as it is told
    options = {"reduction": "none"} if "target" in kwargs else {}
    huge = kwargs[main][:1].repeat(rows, *[1] * (kwargs[main].dim() - 1))
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
        seed_torch(17)  # as step does; a replay draws from where the generator is
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


def test_small_probabilities_of_many_tokens():
    """In float16 the gradient of a logit that was divided by the tokens before it is multiplied would be 0."""
    make = Make(F16, seed=1)
    x, w, target = make(8192, 64, scale=0.1), make(4096, 64, scale=0.1), make.labels(8192, classes=4096)
    leaves = [t.requires_grad_() for t in (x, w)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    ours = fusegrad.functional.linear_cross_entropy(*leaves, target)
    theirs = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, target)
    found, exact = (torch.autograd.grad(y, of, torch.full_like(y, 1024.0)) for y, of in ((ours, leaves), (theirs, wide)))
    for a, b in zip(found, exact):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()
