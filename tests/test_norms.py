"""Norms: what goes wrong elsewhere."""

import re

import pytest
import torch
from test_conformance import same_bits

import fusegrad
import fusegrad.functional as fused
from fusegrad._op import OPS
from table import BF16, DEVICE, F16, F32, F64, Make

x = torch.randn(4, 8, device=DEVICE)
w, b = torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)


def random(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(DEVICE, dtype)


# --- layer norm ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, spread", ((1e4, 1e-2), (-3e6, 1.0), (1e7, 4.0), (1e-3, 1e-9)))
@pytest.mark.parametrize("cols", (64, 1000, 4096))
def test_layer_norm_keeps_its_digits(mean, spread, cols):
    """A mean that is up to a million spreads away: value and gradients to float32's last digits, from the same float32 input."""
    rows = (random(7, cols, dtype=F64) * spread + mean).float().requires_grad_()
    weight, dy, eps = random(cols).requires_grad_(), random(7, cols), 1e-20
    y = fused.layer_norm(rows, (cols,), weight, None, eps)
    found = y, *torch.autograd.grad(y, (rows, weight), dy)
    wide, wide_weight = rows.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.nn.functional.layer_norm(wide, (cols,), wide_weight, None, eps)
    for a, r in zip(found, (exact, *torch.autograd.grad(exact, (wide, wide_weight), dy.double()))):
        assert (a - r).abs().max() <= 2e-6 * r.abs().max()


def test_layer_norm_of_a_constant_row():
    for value in (0.0, 1.0, -1e4, 3.4e38, 1e-42):
        row = torch.full((2, 37), value, device=DEVICE)
        assert torch.equal(fused.layer_norm(row, (37,)), torch.zeros_like(row)), value


def test_layer_norm_with_an_outlier_in_front():
    """The element that a row is taken relative to may be far from all others."""
    rows = random(5, 300)
    rows[:, 0] = 1e5
    torch.testing.assert_close(fused.layer_norm(rows, (300,)).double(), torch.nn.functional.layer_norm(rows.double(), (300,)),
                               rtol=1e-5, atol=1e-7)  # fmt: skip


def drawn(op, rows, cols, dtype):
    """Leaves by name, and the other arguments."""
    kwargs = OPS[op].bench(Make(dtype), rows, cols)
    leaves = {k: v.requires_grad_() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    return leaves, {k: v for k, v in kwargs.items() if k not in leaves}


def results(op, leaves, options):
    out = getattr(fused, op)(**leaves, **options)
    return out if isinstance(out, tuple) else (out,)


# --- add + norm ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16))
@pytest.mark.parametrize("op", ("add_rms_norm", "add_layer_norm"))
def test_one_result_of_two(op, dtype):
    """Only the normed one used, only the sum, both; input or residual frozen; all as eager code has it."""
    leaves, options = drawn(op, 6, 40, dtype)
    params = {k: v for k, v in leaves.items() if k in ("weight", "bias")}
    plain = getattr(torch.nn.functional, op.removeprefix("add_"))
    dy, ds = random(6, 40, dtype=dtype), random(6, 40, dtype=dtype)
    for which in ((0,), (1,), (0, 1)):
        for wanted in (list(leaves), ["input"], ["residual"], list(params)):
            if 1 in which and wanted == list(params):
                continue  # the sum does not depend on them
            given = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in leaves.items()}
            exact = {k: v.detach().double().requires_grad_(k in wanted) for k, v in given.items()}
            s = exact["input"] + exact["residual"]
            s = s + ((given["input"] + given["residual"]).double() - s).detach()  # rounded, with the derivatives of the sum
            expected = plain(s, (40,), *(exact[k] for k in params), eps=1e-5), s
            found = results(op, given, options)
            for a, r in zip(found, expected):
                close(a, r)
            cotangents = [(dy, ds)[i] for i in which]
            ours = torch.autograd.grad([found[i] for i in which], [given[k] for k in wanted], cotangents, allow_unused=True)
            theirs = torch.autograd.grad(
                [expected[i] for i in which], [exact[k] for k in wanted], [g.double() for g in cotangents], allow_unused=True
            )
            for a, r in zip(ours, theirs):
                assert (a is None) == (r is None)
                if a is not None:
                    close(a, r)


def close(a, r):
    assert (a.double() - r).abs().max() <= 8 * torch.finfo(a.dtype).eps * max(1.0, r.abs().max())


def test_the_sum_is_that_of_torch():
    for dtype in (F64, F32, BF16, F16):
        a, c = random(9, 70, dtype=dtype), random(9, 70, dtype=dtype)
        for normed, summed in (fused.add_rms_norm(a, c, (70,)), fused.add_layer_norm(a, c, (70,))):
            assert same_bits(summed, a + c) and normed.dtype == dtype
        # and the norm is that of the rounded sum
        assert same_bits(fused.add_rms_norm(a, c, (70,))[0], fused.rms_norm(a + c, (70,)))
        assert same_bits(fused.add_layer_norm(a, c, (70,))[0], fused.layer_norm(a + c, (70,)))


def test_two_dtypes_are_added_as_torch_does():
    a, c = random(9, 70, dtype=BF16).requires_grad_(), random(9, 70).requires_grad_()
    normed, summed = fused.add_rms_norm(a, c, (70,))
    assert same_bits(summed, a + c) and normed.dtype == F32
    da, dc = torch.autograd.grad((normed * random(9, 70)).sum(), (a, c))
    assert da.dtype == BF16 and dc.dtype == F32 and same_bits(da, dc.to(BF16))
    w, b = (random(70, dtype=BF16).requires_grad_() for _ in range(2))
    for narrow in (True, False):  # the layer's output, or the residual
        one, other = (a, c) if narrow else (c, a)
        wide = fused.add_layer_norm(one.float(), other.float(), (70,), w.float(), b.float())
        for x, y in zip(fused.add_layer_norm(one, other, (70,), w, b), wide):
            assert same_bits(x, y)
        assert same_bits(fused.add_rms_norm(one, other, (70,), w)[0], fused.add_rms_norm(one.float(), other.float(), (70,), w.float())[0])
        (dw,) = torch.autograd.grad(fused.add_layer_norm(one, other, (70,), w, b)[0].square().sum(), w)
        assert dw.dtype == BF16


@pytest.mark.parametrize("op", ("add_rms_norm", "add_layer_norm"))
def test_dropout_before_the_add(op):
    """The mask is dropout's, the same in the backward; with one result used or both; none in evaluation."""
    a, c, weight = random(6, 40).requires_grad_(), random(6, 40).requires_grad_(), random(40).requires_grad_()
    call, plain = getattr(fused, op), getattr(fused, op.removeprefix("add_"))
    dy, ds = random(6, 40), random(6, 40)
    for p in (0.1, 0.5, 1.0):
        torch.manual_seed(3)
        found = call(a, c, (40,), weight, p=p)
        torch.manual_seed(3)
        s = fused.dropout(a, p) + c
        for which in ((0,), (1,), (0, 1)):
            wanted = (a, c, weight) if 0 in which else (a, c)
            both = [
                torch.autograd.grad([y[i] for i in which], wanted, [(dy, ds)[i] for i in which], retain_graph=True)
                for y in (found, (plain(s, (40,), weight), s))
            ]
            torch.testing.assert_close(*both)
    assert same_bits(call(a, c, (40,), p=0.5, training=False)[1], a + c)
    with pytest.raises(ValueError, match=rf"^{op}: p must be in \[0, 1\], got 1.5$"):
        call(a, c, (40,), p=1.5)


def test_a_residual_that_is_the_input():
    a = random(5, 16).requires_grad_()
    normed, summed = fused.add_layer_norm(a, a, (16,))
    dy, ds = random(5, 16), random(5, 16)
    expected = torch.autograd.grad((torch.nn.functional.layer_norm(2 * a, (16,)), 2 * a), a, (dy, ds))
    torch.testing.assert_close(torch.autograd.grad((normed, summed), a, (dy, ds)), expected)


# --- L2 --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1e-40, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e37))
def test_norm_of_any_size(size):
    rows = (random(4, 50) * size).float().requires_grad_()
    exact = torch.linalg.vector_norm(rows.detach().double(), 2, 1)
    n = fused.norm(rows, 1)
    assert ((n - exact).abs() <= 4e-7 * exact + 1.5e-45).all()
    dn = random(4)
    (g,) = torch.autograd.grad(n, rows, dn)
    torch.testing.assert_close(g.double(), rows.detach().double() / exact[:, None] * dn[:, None].double(), rtol=1e-5, atol=1e-6)
    if size >= 1:
        y = fused.normalize(rows, dim=1)
        torch.testing.assert_close(y.double(), rows.detach().double() / exact[:, None], rtol=1e-6, atol=1e-7)


def test_rows_of_zeros():
    rows = torch.zeros(3, 7, device=DEVICE)
    rows[1] = random(7)
    dy, dn = random(3, 7), random(3)
    for call, native, g in (
        (lambda t: fused.norm(t, 1), lambda t: torch.linalg.vector_norm(t, 2, 1), dn),
        (lambda t: fused.normalize(t), torch.nn.functional.normalize, dy),
    ):
        a, c = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        ours, theirs = (torch.autograd.grad(f(t), t, g)[0] for f, t in ((call, a), (native, c)))
        torch.testing.assert_close(ours, theirs)
        assert ours[1].any() and ours.isfinite().all()
    assert not torch.autograd.grad(fused.norm(a, 1), a, dn)[0][[0, 2]].any()


def test_other_exponents_go_through_the_reference():
    z = random(4, 9).requires_grad_()
    with pytest.raises(RuntimeError, match="normalize: there is no kernel for p = 1.0"):
        fused.normalize(z, p=1.0)
    for p in (0.5, 1.0, 3, float("inf")):
        with fusegrad.strict(False), pytest.warns(UserWarning, match="normalize: there is no kernel for p"):
            y = fused.normalize(z, p)
        torch.testing.assert_close(y, torch.nn.functional.normalize(z, p))
        g = random(4, 9)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, g)[0] for v in (y, torch.nn.functional.normalize(z, p))))
    with fusegrad.strict(False), pytest.warns(UserWarning, match="normalize: there is no kernel for several dimensions"):
        assert torch.equal(fused.normalize(z, dim=(0, 1)), torch.nn.functional.normalize(z, dim=(0, 1)))
    fusegrad.reset_stats()


def test_out():
    for out in (torch.empty(4, 8, device=DEVICE), torch.empty(8, 4, dtype=F64, device=DEVICE).t()):
        assert fused.normalize(x, out=out) is out
        torch.testing.assert_close(out, torch.nn.functional.normalize(x).to(out.dtype))
    with pytest.raises(RuntimeError, match="normalize: out must be None where a gradient is asked for, got a tensor"):
        fused.normalize(x.clone().requires_grad_(), out=torch.empty(4, 8, device=DEVICE))


# --- modules and errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", (dict(), dict(eps=1e-3), dict(elementwise_affine=False), dict(bias=False), dict(dtype=BF16)))
@pytest.mark.parametrize("shape", (8, (4, 8)))
def test_layer_norm_is_torchs(shape, kwargs):
    ours, native = fusegrad.nn.LayerNorm(shape, **kwargs), torch.nn.LayerNorm(shape, **kwargs)
    assert isinstance(ours, torch.nn.LayerNorm) and repr(ours) == repr(native)
    state, other = ours.state_dict(), native.state_dict()
    assert list(state) == list(other) and all(same_bits(state[k], other[k]) for k in state)
    native.load_state_dict(state, strict=True)


BAD = [
    (lambda: fused.layer_norm(x, 8), TypeError, "layer_norm: normalized_shape must be a sequence of sizes, got int"),
    (lambda: fused.layer_norm(x, (7,)), RuntimeError,
     "layer_norm: normalized_shape must be the last dimensions of input ([4, 8]) and at least one, got [7]"),
    (lambda: fused.layer_norm(x, (8,), w, b[:7]), RuntimeError, "layer_norm: bias must have shape [8], got [7]"),
    (lambda: fused.layer_norm(x.half(), (8,), w.half(), b), TypeError,
     "layer_norm: bias must be Half as the parameters before it, got Float"),
    (lambda: fused.layer_norm(x, (8,), w.double()), TypeError, "layer_norm: weight must be Float, got Double"),
    (lambda: fused.layer_norm(x.to_sparse(), (8,)), RuntimeError,
     "layer_norm: input must be a dense tensor, got a tensor of layout Sparse"),
    (lambda: fused.add_rms_norm(x, x[:3], (8,)), RuntimeError,
     "add_rms_norm: residual must have the shape of input ([4, 8]), got [3, 8]"),
    (lambda: fused.add_rms_norm(x, None, (8,)), TypeError, "add_rms_norm: residual must be a Tensor, got NoneType"),
    (lambda: fused.add_rms_norm(x, x, (8,), cast_order="gemma"), ValueError,
     "add_rms_norm: cast_order must be 'torch' or 'llama', got 'gemma'"),
    (lambda: fused.add_layer_norm(x, x.to("meta"), (8,)), RuntimeError,
     f"add_layer_norm: residual must be on {DEVICE}, where the first argument is, got a tensor on meta"),
    (lambda: fused.dyt(x, torch.ones(2), w, b), RuntimeError, "dyt: alpha must have one element, got [2]"),
    (lambda: fused.dyt(x, 0.5, w, b), TypeError, "dyt: alpha must be a Tensor, got float"),
    (lambda: fused.dyt(x, torch.ones(1, device=DEVICE).double(), w, b), TypeError, "dyt: alpha must be Float, got Double"),
    (lambda: fused.norm(x, 2), IndexError, "norm: dim must be in [-2, 1] for input [4, 8], got 2"),
    (lambda: fused.normalize(x[0]), IndexError, "normalize: dim must be in [-1, 0] for input [8], got 1"),
    (lambda: fused.normalize(x, dim=1.0), TypeError, "normalize: dim must be an int, got float"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:50] for _, _, text in BAD])
def test_error_texts(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$") as info:
        call()
    assert type(info.value) is error


def test_no_columns_and_no_dimensions():
    empty = torch.empty(3, 0, device=DEVICE)
    assert fused.layer_norm(empty, (0,)).shape == fused.normalize(empty).shape == (3, 0)
    assert torch.equal(fused.norm(empty), torch.zeros(3, device=DEVICE))
    three = torch.tensor(-3.0, device=DEVICE)
    assert fused.norm(three) == fused.norm(three, keepdim=True) == 3 and fused.normalize(three, dim=0) == -1


@pytest.mark.parametrize("value", (1e30, float("inf")))
def test_a_gradient_beyond_the_range(value):
    """Divided by a small norm it is infinite, and no NaN."""
    rows = torch.tensor([[0.0] * 40, [1e-20] + [0.0] * 39], device=DEVICE).requires_grad_()
    dy = torch.zeros(2, 40, device=DEVICE)
    dy[:, 5] = value
    found, expected = (torch.autograd.grad(f(rows, dim=-1), rows, dy)[0] for f in (fused.normalize, torch.nn.functional.normalize))
    torch.testing.assert_close(found[:, 5], expected[:, 5])
    assert not found[0].isnan().any()


def test_sums_have_the_same_bits_whatever_else_is_asked_for():
    """Of every second channel of images in channels_last too, whose gradient is denser than they are."""
    base = random(3, 128, 9, 9).to(memory_format=torch.channels_last)
    images, params = base[:, ::2], [random(64).requires_grad_() for _ in range(2)]
    dy = random(3, 64, 9, 9)
    for x in (images.detach(), images.detach().contiguous()):
        alone = torch.autograd.grad(fused.layer_norm_2d(x, *params), params, dy)
        beside = torch.autograd.grad(fused.layer_norm_2d(x.requires_grad_(), *params), (*params, x), dy)
        assert all(same_bits(a, b) for a, b in zip(alone, beside))
