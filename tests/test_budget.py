"""The budget rule must hold and bite: it accepts correct kernels over many draws and rejects small, realistic mistakes."""

import pytest
import torch

from fusegrad._op import OPS, Sample
from table import BF16, F16, F32, Make, call, check, cotangents, run

DRAWS = 334  # with --all, × 3 dtypes: 1,000 an op


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, id=str(dtype)[6:], marks=pytest.mark.rotating(n)) for n, dtype in enumerate((F32, F16, BF16))]
)
@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_accepts_correct_kernels(op, dtype, pytestconfig):
    for seed in range(DRAWS if pytestconfig.getoption("--all") else DRAWS // 10):
        sample = Sample("", op.bench(Make(dtype, seed=seed), 1 + seed % 7, 2 + seed % 61))
        cotangent = cotangents(call(op, sample), seed)
        check(op, sample, run(op, sample, cotangent), cotangent)


def rms_norm_case(dtype, rows=64):
    op = OPS["rms_norm"]
    sample = Sample("", op.bench(Make(dtype), rows, 256))
    cotangent = cotangents(call(op, sample))
    return op, sample, cotangent, run(op, sample, cotangent)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_rejects_a_scaled_result(op, dtype):
    factor = 1.03 if op.gemm == "torch" and dtype == BF16 else 1.004  # a product that is rounded before it is used
    sample = Sample("", op.bench(Make(dtype), 16, 64))
    cotangent = cotangents(call(op, sample))
    results = run(op, sample, cotangent)
    for k in results:
        with pytest.raises(AssertionError, match="over the budget"):
            check(op, sample, results | {k: results[k] * factor}, cotangent)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
def test_rejects_a_rounded_rstd(dtype):
    op, sample, cotangent, results = rms_norm_case(dtype)
    x, w = sample.kwargs["input"].float(), sample.kwargs["weight"].float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5).to(BF16).float()
    with pytest.raises(AssertionError, match="output 0: error .* over the budget"):
        check(op, sample, results | {"output 0": (x * rstd * w).to(dtype)}, cotangent)


@pytest.mark.parametrize("partial", (F16, BF16), ids=("float16", "bfloat16"))
def test_rejects_16_bit_partial_sums(partial):
    op, sample, cotangent, results = rms_norm_case(BF16, rows=512)
    x = sample.kwargs["input"].float()
    terms = cotangent[0].float() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    total = torch.zeros(256, dtype=partial)
    for term in terms:
        total = total + term.to(partial)
    with pytest.raises(AssertionError, match="gradient of weight: error .* over the budget"):
        check(op, sample, results | {"gradient of weight": total.to(BF16)}, cotangent)


def test_rejects_nan_and_inf_that_do_not_belong():
    op, sample, cotangent, results = rms_norm_case(F32)
    for value, text in ((float("nan"), "NaN in other places"), (float("inf"), "Inf in other places")):
        wrong = results["output 0"].clone()
        wrong[0, 0] = value
        with pytest.raises(AssertionError, match=text):
            check(op, sample, results | {"output 0": wrong}, cotangent)
