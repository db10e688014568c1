"""The table through the CUDA kernels: the same tests as on the CPU, with the kernels of csrc/ops/*.cu run by tests/emulator in the
place of the CPU ones, and beside them the shapes that take every path of the CUDA drivers."""

import sys
import zlib

import pytest
from cuda_paths import *  # noqa: F403  collected here
from emulator import build
from test_conformance import (  # noqa: F401  collected here once more
    each_op,
    holds,
    same_bits,
    test_backward_twice_and_bits,
    test_beyond_2_to_31_elements,
    test_gradgradcheck,
    test_gradient_penalty,
    test_many_rows,
    test_nothing_of_the_caller_changes,
    test_row_lengths,
    test_special_values,
    test_subsets_of_requires_grad,
)

from fusegrad import _op
from fusegrad._op import OPS, Sample
from fusegrad.testing import properties
from table import Make, run

pytestmark = pytest.mark.slow
test_gradcheck = holds(properties.gradcheck, rotating=True)  # takes seconds where many threads are emulated


@pytest.fixture(scope="module")
def kernels():
    """The emulated functions, by the names that the ops' modules know them by."""
    module = build.extension()
    known = [name for name in dir(module) if name.endswith(("_fwd", "_bwd"))]
    return {name: _op.compiled(name, module, "fusegrad_emulated") for name in known}


@pytest.fixture
def emulator(kernels):
    return build.control()


@pytest.fixture
def reorder(emulator):
    """reorder(seed): another order of the threads from here on."""
    return emulator.fusegrad_emulator_seed


@pytest.fixture(autouse=True)
def emulated(kernels, reorder, monkeypatch, request):
    """Within a test every op's kernels are the emulated ones."""
    for family in {op.functional.__module__ for op in OPS.values()}:
        for name in kernels.keys() & vars(sys.modules[family]).keys():
            monkeypatch.setattr(sys.modules[family], name, kernels[name])
    reorder(zlib.crc32(request.node.name.encode()))


@each_op
def test_g3_kernels_run_without_a_gpu(op, emulator):
    """That the rest of this file does not test something else."""
    before = emulator.fusegrad_emulator_launches()
    run(op, Sample("", op.bench(Make(), 4, 8)))
    assert emulator.fusegrad_emulator_launches() >= before + len(op.kernels)


@each_op
def test_a_launch_that_fails(op, emulator):
    """An error that names the op and the device; nothing of it is left to the next call."""
    sample = Sample("", op.bench(Make(), 4, 8))
    expected = run(op, sample)
    emulator.fusegrad_emulator_fail_next()
    name = rf"^({'|'.join({op.name, *(kernel[:-4] for kernel in op.kernels)})})( backward)?"  # whoever has the kernel that comes first
    with pytest.raises(RuntimeError, match=rf"{name}: the kernel failed on cpu \(input \[.*\]\): .*: invalid configuration argument"):
        run(op, sample)
    assert emulator.fusegrad_emulator_last_error() == 0
    assert all(same_bits(a, b) for a, b in zip(run(op, sample).values(), expected.values()))
