"""What only CUDA kernels have to show. Collected by test_emulated.py, and by test_cuda.py on a machine with a GPU: the fixture
`reorder` changes the order in which threads run, where that is in our hands."""

import itertools
import os

import pytest
import torch
from test_conformance import drawn, each, in_turns, same_bits

import fusegrad
from fusegrad._op import OPS, Sample
from fusegrad._samples import LAYOUTS, lay_out
from table import BF16, DEVICE, F32, PAIRS, Make, call, check, cotangents, laid_out, name_of, run

# Under a sanitizer, which is slow and looks at where memory is touched: one order, and a part of the shapes.
SANITIZED = "FUSEGRAD_EMULATOR_SANITIZE" in os.environ
ORDERS = (0,) if SANITIZED else (0, 1)


def check_in_any_order(op, sample, reorder, layout="contiguous"):
    """Within the budget, and the same bits again, whatever the order of the threads."""
    cotangent = tuple(lay_out(g, layout) for g in cotangents(call(op, sample)))
    found = []
    for seed in ORDERS:
        reorder(seed)
        found.append(run(op, sample, cotangent))
    assert all(same_bits(a, b) for a, b in zip(found[0].values(), found[-1].values())), f"{sample}: a race: other bits the next time"
    check(op, sample, found[0], cotangent)


@each(*PAIRS, rotating=DEVICE == "cpu")
def test_values_and_gradients(case, reorder):
    check_in_any_order(*drawn(case), reorder)


@pytest.mark.parametrize("layout", in_turns(LAYOUTS))
@each((F32, F32))
def test_layouts(case, layout, reorder):
    op, sample = drawn(case)
    check_in_any_order(op, laid_out(sample, layout), reorder, layout)


ROWS = (1, 3, 70)
COLS = (1, 2, 7, 8, 31, 32, 33, 64, 127, 128, 255, 256, 1000, 1024, 1025, 4096, 5000, 20_000, 40_000)
# Teams within a warp, of a warp and of a block; one tile and several; packs of 16 bytes and single elements.
SHAPES = [(r, c) for r, c in itertools.product(ROWS, COLS) if r * c <= 80_000]


PATHS = [(*pair, "contiguous") for pair in PAIRS]
PATHS += [(*pair, layout) for pair in ((F32, F32), (BF16, F32)) for layout in LAYOUTS if layout not in ("contiguous", "channels_last")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "-".join(map(name_of, path[:2])) + "-" + path[2])
@pytest.mark.parametrize("op", in_turns(OPS.values()), ids=lambda op: op.name)
def test_paths(op, path, reorder):
    *pair, layout = path
    apart = 8 if SANITIZED else 1 if layout == "contiguous" and pair[0] == pair[1] else 4
    for rows, cols in SHAPES[PATHS.index(path) % apart :: apart]:
        sample = Sample(f"{rows}x{cols}", op.bench(Make(*pair, seed=rows), rows, cols))
        check_in_any_order(op, laid_out(sample, layout), reorder, layout)


def test_rows_next_to_each_other(reorder):
    """A transposed input with more rows than the device has threads: neighbouring threads take neighbouring rows."""
    for op in OPS.values():
        check_in_any_order(op, laid_out(Sample("transposed", op.bench(Make(), 70_000, 6)), "transposed"), reorder)


@pytest.mark.parametrize("name", ("cross_entropy", "vocab_parallel_cross_entropy", "linear_cross_entropy", "linear_token_log_probs"))
def test_a_label_that_is_no_class(name):
    """Where a look at the labels would wait for the device, its row becomes NaN, and no other; and with it what all rows share."""
    x, w = (torch.randn(rows, 40, device=DEVICE, requires_grad=True) for rows in (5, 40))
    labels = torch.tensor([0, 40, 39, -1, -100], device=DEVICE)
    of_a_head, options = name.startswith("linear"), {} if name == "linear_token_log_probs" else dict(reduction="none")
    loss = getattr(fusegrad.functional, name)(x, *([w] if of_a_head else []), labels, **options)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    g, *of_w = torch.autograd.grad(loss, (x, w) if of_a_head else (x,), torch.ones_like(loss))
    assert g.isnan().all(1).tolist() == [False, True, False, True, False] and g[[0, 2, 4]].isfinite().all()
    assert all(t.isnan().all() for t in of_w)
