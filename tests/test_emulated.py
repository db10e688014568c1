"""The table through the CUDA kernels: the same tests as on the CPU, and those of what an op means where others go wrong, with the
kernels of csrc/ops/*.cu run by tests/emulator in the place of the CPU ones; and beside them the shapes that take every path of the CUDA
drivers."""

import sys
import zlib

import pytest
from cuda_paths import *  # noqa: F403  collected here
from emulator import build
from test_channel_norms import test_far_from_zero, test_running_statistics_are_torchs  # noqa: F401  collected here once more
from test_conformance import (  # noqa: F401
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
from test_dropout import (  # noqa: F401
    test_0_and_1_are_exact,
    test_a_part_is_a_part_of_the_whole,
    test_any_layout_and_dtype_drops_the_same,
    test_forward_and_backward_drop_the_same,
    test_what_is_not_finite,
)
from test_errors import test_ignored_rows_are_not_read, test_nobody_left, test_the_gradient_of_lse_beside_a_divisor_of_0  # noqa: F401
from test_losses import test_js_div_of_zeros, test_one_huge_row  # noqa: F401
from test_norms import (  # noqa: F401
    test_layer_norm_keeps_its_digits,
    test_norm_of_any_size,
    test_one_result_of_two,
    test_rows_of_zeros,
)
from test_rotary import test_one_output_alone, test_position_ids, test_the_definition  # noqa: F401
from test_softmax import test_a_fully_masked_row, test_nan_is_kept_where_it_is_seen, test_rows_of_which_nothing_is_kept  # noqa: F401

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


# Beside one for the forward and one for the backward: what adds up the sums over rows of the slices, or the losses of the rows.
ADDING_UP = ("bias_dropout_add", "layer_norm", "rms_norm", "add_rms_norm", "add_layer_norm", "bias_act", "group_norm", "layer_norm_2d")
ADDING_UP += ("linear", "cross_entropy", "linear_cross_entropy", "qk_norm_rope", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss")
ADDING_UP += ("binary_cross_entropy_with_logits", "sigmoid_focal_loss", "kl_div", "js_div")
MORE_LAUNCHES = dict.fromkeys(ADDING_UP, 1) | dict(dyt=2, batch_norm=4)  # with the gradient of alpha; statistics and sums of cells


@each_op
def test_g3_kernels_run_without_a_gpu(op, emulator):
    """That the rest of this file does not test something else; q and k, or the groups of a norm, are one launch."""
    before = emulator.fusegrad_emulator_launches()
    run(op, Sample("", op.bench(Make(), 4, 8)))
    assert emulator.fusegrad_emulator_launches() == before + len(op.kernels) + MORE_LAUNCHES.get(op.name, 0)


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
