"""G: beyond others. Each test is named after the row of docs/mission.md that it proves; those of G3 and G5 are in test_emulated.py and
test_bench.py."""

import re
from pathlib import Path

import pytest
import torch

import fusegrad.functional as F
from fusegrad import testing
from fusegrad._op import OPS, Sample, use_reference
from fusegrad.ops.dropout import draw_seed, dropped
from fusegrad.testing import properties
from fusegrad.testing.budget import close, gradients
from table import F64, call, check, cotangents, draw, names, run, with_grad

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "csrc" / "ops"
each_op = pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)


@pytest.mark.parametrize("header", [p.stem.removesuffix("_cpu") for p in sorted(KERNELS.glob("*_cpu.cpp"))])
def test_g1_one_description_of_the_math(header):
    """The files of the CPU and of CUDA hand the same functors of one header to their drivers, and have no math of their own; those that
    bring a driver of their own (rotary) call the functors of that header all the same."""
    files = [(KERNELS / f"{header}{suffix}").read_text() for suffix in ("_cpu.cpp", "_cuda.cu")]
    structs = set(re.findall(r"^struct (\w+(?:Fwd|Bwd))\b", (KERNELS / f"{header}.h").read_text(), re.M))
    assert structs
    handed = [sorted(re.findall(r"^FUSEGRAD_\w+\((.*)\)$", text, re.M)) for text in files]
    assert handed[0] == handed[1]
    for text in files:
        assert f'#include "{header}.h"' in text
        if handed[0]:
            assert all(re.match(r"#include|FUSEGRAD_\w+\(|//|$", line) for line in text.splitlines()), "math of its own"
        else:
            assert all(re.search(rf"\b{name}\b", text) for name in structs)


@each_op
def test_g2_every_order_and_transform(op):
    """The third derivative, forward mode, vmap and per-sample gradients, each the reference's."""
    sample = draw(op, names(op)[0], F64)

    def third():
        s, leaves = with_grad(op, sample)
        loss = sum(y.square().sum() for y in call(op, s))
        for _ in range(2):
            loss = loss + sum(g.square().sum() for g in gradients((loss,), leaves, (torch.ones_like(loss),), create_graph=True))
        return gradients((loss,), leaves, (torch.ones_like(loss),))

    found = third()
    with use_reference():
        expected = third()
    for a, b in zip(found, expected):
        close("third order", a, b, *properties.loosely(b))
    for holds in (properties.forward_mode, properties.jvp, properties.vmap, properties.per_sample_gradients):
        assert holds(op, sample) is None


def test_g4_one_suite_for_ours_and_anybodys():
    """Our table's tests are the properties that `check` runs, and `check` tells a user's right op from a wrong one by them."""
    table = (TESTS / "test_conformance.py").read_text()
    weaker = {"no_silent_second_order"}  # an error will do; ours has gradient_penalty, where none will
    assert {name for name in testing.PROPERTIES if f"properties.{name}" not in table} == weaker

    def doubled(slope):
        class Double(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(x):
                return 2 * x

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def backward(ctx, grad):
                return slope * grad

        return testing.check(Double.apply, lambda x: 2 * x, samples, only=some)

    def samples(make):
        return [(make(3, 5),)]

    some = ["values_and_gradients", "gradcheck", "gradient_penalty", "per_sample_gradients"]
    testing.check(F.cube, lambda x: x**3, samples, only=some).raise_for_failures()
    doubled(2).raise_for_failures()
    assert {"values_and_gradients", "gradcheck"} <= set(doubled(3).failures)


def test_g6_cross_entropy_with_every_option_at_once():
    """Class weights, ignored items, smoothing, z-loss, soft cap, scale, divisor and the log-partition function, in images' order of
    dimensions: value and gradient are those of the formula."""
    x = torch.randn(4, 3, 7, dtype=F64).transpose(1, 2).requires_grad_()
    target, weight = torch.randint(7, (4, 3)), torch.rand(7, dtype=F64)
    target[1, 2] = target[3, 0] = -1
    options = dict(z_loss=0.01, logit_softcap=5.0, logit_scale=1.5, num_items=9.0, return_lse=True)
    found = F.cross_entropy(x, target, weight, ignore_index=-1, label_smoothing=0.1, **options)

    z = 5.0 * torch.tanh(1.5 * x / 5.0)
    lse = z.logsumexp(1).masked_fill(target == -1, 0.0)
    nll = (weight.view(1, 7, 1) * (lse.unsqueeze(1) - z)).masked_fill((target == -1).unsqueeze(1), 0.0)
    picked = nll.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    loss = (0.9 * picked + 0.1 * nll.mean(1) + 0.01 * lse.square()).sum() / 9.0
    for a, b in zip(found, (loss, lse)):
        torch.testing.assert_close(a, b)
    ours, theirs = (torch.autograd.grad(y.square() + log.sin().sum(), x)[0] for y, log in (found, (loss, lse)))
    torch.testing.assert_close(ours, theirs)


def test_g6_norm_with_every_option_at_once():
    """Several dimensions, dropout, residual, offset of the weight, order of casts, float32 weights beside 16-bit rows, both used."""
    x, residual = (torch.randn(6, 4, 8).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(4, 8).requires_grad_()
    torch.manual_seed(5)
    found = F.add_rms_norm(x, residual, (4, 8), weight, 1e-3, weight_offset=1.0, cast_order="llama", p=0.4)
    torch.manual_seed(5)
    mask = dropped(torch.ones(x.shape), draw_seed(x), 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()

    total = (x.float() * mask + residual.float()).bfloat16()
    wide = total.float()
    y = (wide * torch.rsqrt(wide.square().mean((1, 2), keepdim=True) + 1e-3)).bfloat16()
    expected = ((y.float() * (weight + 1.0)).bfloat16(), total)
    assert (found[0] == expected[0]).float().mean() > 0.97  # another order of casts rounds a quarter of them otherwise
    assert torch.equal(found[1], expected[1])
    options = dict(normalized_shape=(4, 8), eps=1e-3, weight_offset=1.0, cast_order="llama", p=0.4)
    sample = Sample("", dict(input=x.detach(), residual=residual.detach(), weight=weight.detach(), **options))
    given = cotangents(expected)
    check(OPS["add_rms_norm"], sample, run(OPS["add_rms_norm"], sample, given), given)
