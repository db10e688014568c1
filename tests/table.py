"""The table as test cases. What decides whether a result is right is fusegrad.testing, as for anybody's op."""

import functools
import os

from fusegrad import _samples
from fusegrad._op import OPS, Sample
from fusegrad.testing.budget import (  # noqa: F401  what tests take from here
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    call,
    cotangents,
    diffable,
    laid_out,
    run,
    subsets,
    tensors,
    with_grad,
)
from fusegrad.testing.budget import assert_right as check  # noqa: F401

DEVICE = os.environ.get("FUSEGRAD_TEST_DEVICE", "cpu")  # where the table's tensors are
Make = functools.partial(_samples.Make, device=DEVICE)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def draw(op, sample, dtype=F32, param_dtype=None, seed=0) -> Sample:
    """The sample of that name, drawn anew."""
    return next(s for s in op.samples(Make(dtype, param_dtype, seed=seed)) if s.name == sample)


@functools.cache  # drawing all samples takes its time, and every test asks
def names(op):
    return [s.name for s in op.samples(_samples.Make())]


@functools.cache
def has_params(op, sample):
    return any(t.dtype == F32 for t in tensors(draw(op, sample, F16, F32)).values())


def cases(*pairs, ops=None):
    """(op, sample name, dtype, parameter dtype), each once: samples without parameters have one pair per dtype."""
    for op in OPS.values() if ops is None else ops:
        for sample in names(op):
            for dtype, param in pairs:
                if dtype == param or has_params(op, sample):
                    yield op, sample, dtype, param


def ids(case):
    op, sample, dtype, param = case
    return f"{op.name}-{sample}-{name_of(dtype)}" + ("" if dtype == param else f"-{name_of(param)}")
