"""What softmax is known for getting wrong: masks, rows without anything in them, long rows, 16-bit gradients."""

import pytest
import torch

import fusegrad.functional as fused
import table
from fusegrad._op import OPS, Sample
from table import BF16, DEVICE, F16, F32, F64, Make, check, cotangents, run


def drawn(*shape, dtype=F32, grad=True):
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def attention(x, mask=None, scale=1.0, causal=False):
    """By torch alone, in float64."""
    z = x.double() * scale
    if mask is not None:
        z = z.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else z + mask.double()
    if causal:
        z = z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(z.shape[-1] - z.shape[-2] + 1), -torch.inf)
    return torch.softmax(z, -1)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16))
@pytest.mark.parametrize("kind", ("boolean", "additive", "causal"))
def test_a_fully_masked_row(dtype, kind):
    """It is 0 with gradient 0, whatever comes in from behind, and its neighbours do not notice."""
    x, dead = drawn(2, 6, 4, dtype=dtype), 2
    mask = torch.zeros(6, 4, dtype=torch.bool, device=DEVICE)
    mask[:dead] = True
    options = dict(boolean=dict(mask=mask), additive=dict(mask=torch.zeros(6, 4, device=DEVICE).masked_fill(mask, -torch.inf)))
    y = fused.scaled_masked_softmax(x, **options.get(kind, dict(causal=True)))
    g = torch.randn_like(y)
    g[:, :dead] = torch.tensor([torch.inf, torch.nan, 1.0, -torch.inf], device=DEVICE)
    (dx,) = torch.autograd.grad(y, x, g)
    assert (y[:, :dead] == 0).all() and (dx[:, :dead] == 0).all()
    assert y[:, dead:].isfinite().all() and dx[:, dead:].isfinite().all()
    torch.testing.assert_close(y[:, dead:].double().sum(-1), torch.ones(2, 4, dtype=F64, device=DEVICE), rtol=2e-2, atol=0)


def test_nan_is_kept_where_it_is_seen():
    x = drawn(4, 5, grad=False)
    x[0, 1] = x[2, 3] = torch.nan
    mask = torch.zeros(4, 5, dtype=torch.bool, device=DEVICE)
    mask[2, 3] = mask[0, 0] = True
    x.requires_grad_()
    for m in (mask, torch.zeros(4, 5, device=DEVICE).masked_fill(mask, -torch.inf)):
        y = fused.scaled_masked_softmax(x, m)
        assert y[0].isnan().tolist() == [False, True, True, True, True] and y[0, 0] == 0
        assert y[1:].isfinite().all() and y[2, 3] == 0
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert dx[0, 1:].isnan().all() and dx[1:].isfinite().all() and dx[2, 3] == 0
    assert fused.softmax(x, 1)[0].isnan().all() and fused.softmax(torch.full((3,), -torch.inf), 0).isnan().all()


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("cols", (32_767, 32_768, 40_001))
def test_rows_of_which_nothing_is_kept(cols, dtype):
    """Beyond 32768 columns the exponentials are taken twice instead of stored in between."""
    mask = torch.zeros(2, cols, dtype=torch.bool, device=DEVICE)
    mask[0, 5:77] = True
    for name, options in (("softmax", dict(dim=-1)), ("log_softmax", dict(dim=-1)), ("scaled_masked_softmax", dict(mask=mask, scale=0.3))):
        sample = Sample(name, dict(input=Make(dtype, device=DEVICE)(2, cols)) | options)
        cotangent = cotangents(table.call(OPS[name], sample))
        check(OPS[name], sample, run(OPS[name], sample, cotangent), cotangent)


@pytest.mark.parametrize("queries, keys", ((5, 5), (3, 9), (9, 3), (1, 4), (4, 1)))
def test_causal_is_aligned_at_the_end(queries, keys):
    x = drawn(2, 3, queries, keys)
    y, expected = fused.scaled_masked_softmax(x, scale=0.7, causal=True), attention(x, scale=0.7, causal=True).nan_to_num(0)
    torch.testing.assert_close(y, expected.float())
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g.double()))
    assert y[..., -1, :].all() and (y[..., 0, max(0, keys - queries + 1) :] == 0).all()


@pytest.mark.parametrize("shape", ((2, 3, 4, 7), (2, 1, 1, 7), (3, 4, 1), (7,), (1,), (), (4, 7), (2, 1, 4, 7)))
@pytest.mark.parametrize("additive", (False, True))
def test_masks_broadcast(shape, additive):
    x = drawn(2, 3, 4, 7)
    mask = drawn(*shape) if additive else torch.rand(shape, device=DEVICE) < 0.2
    y = fused.scaled_masked_softmax(x, mask, scale=1.3)
    expected = attention(x, mask, 1.3)
    expected = torch.where(expected.isnan(), 0, expected)
    torch.testing.assert_close(y, expected.float())
    leaves = [x, mask] if additive else [x]
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g.double())):
        torch.testing.assert_close(a, b.nan_to_num(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask_dtype", (F16, BF16, F32, F64))
@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64))
def test_masks_of_other_dtypes(dtype, mask_dtype):
    x, mask = drawn(3, 8, 40, dtype=dtype), drawn(8, 1, dtype=mask_dtype)
    mask = mask.detach().expand(8, 40).clone().mul_(torch.rand(8, 40, device=DEVICE)).requires_grad_()
    y = fused.scaled_masked_softmax(x, mask)
    assert y.dtype == dtype
    g = torch.randn_like(y)
    dmask = torch.autograd.grad(y, mask, g)[0]
    expected = torch.autograd.grad(attention(x, mask), mask, g.double())[0]
    assert dmask.dtype == mask_dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(mask_dtype).eps, 1e-6)
    torch.testing.assert_close(dmask, expected, rtol=2 * eps, atol=2 * eps, check_dtype=False)


def test_a_mask_of_floats_alone_requires_grad():
    x, mask = drawn(3, 5, grad=False), drawn(5)
    y = fused.scaled_masked_softmax(x, mask)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(torch.softmax(x + mask, -1), mask, g)[0]
    torch.testing.assert_close(torch.autograd.grad(y, mask, g)[0], expected)


@pytest.mark.parametrize("length", (1, 2048, 2049, 16_385, 70_000, 131_072))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_no_cap_on_length(length, dtype):
    x, mask = drawn(2, length, dtype=dtype), torch.rand(2, length, device=DEVICE) < 0.3
    mask[:, 0] = False
    y, expected = fused.scaled_masked_softmax(x, mask, scale=3.0), attention(x, mask, 3.0)
    eps = max(torch.finfo(dtype).eps, 4e-6)
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=1e-30)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(a, x, b)[0].double() for a, b in ((y, g), (expected, g.double())))
    assert (ours - theirs).norm() <= 2 * eps * theirs.norm()


@pytest.mark.parametrize("dtype", (F16, BF16))
def test_gradient_of_a_16_bit_logarithm(dtype):
    """As exact as its own rounding, where a backward from the rounded output is off by percents."""
    x, g = drawn(16, 500, dtype=dtype), torch.randn(16, 500, device=DEVICE).to(dtype) + 1
    errors = []
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(torch.log_softmax(wide, 1), wide, g.double())[0]
    for f in (fused.log_softmax, torch.log_softmax):
        errors.append((torch.autograd.grad(f(x, 1), x, g)[0].double() - exact).norm() / exact.norm())
    assert errors[0] <= torch.finfo(dtype).eps / 2 and errors[1] > 2 * errors[0]


@pytest.mark.parametrize("dtype", (F16, BF16))
def test_gradient_of_a_16_bit_softmax(dtype):
    """It starts from the rounded output, as torch's does, and is no worse."""
    x, g = drawn(64, 500, dtype=dtype), torch.randn(64, 500, device=DEVICE).to(dtype)
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(torch.softmax(wide, 1), wide, g.double())[0]
    ours, theirs = ((torch.autograd.grad(f(x, 1), x, g)[0].double() - exact).norm() / exact.norm() for f in (fused.softmax, torch.softmax))
    assert ours <= 1.01 * theirs and ours < torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", range(-4, 4))
@pytest.mark.parametrize("f", ("softmax", "log_softmax"))
def test_every_dimension_and_strides_as_torch(f, dim):
    x = drawn(3, 20, 4, 9)
    y, expected = getattr(fused, f)(x, dim), getattr(torch.nn.functional, f)(x, dim)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    dx = torch.autograd.grad(y, x, g)[0]
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, g)[0])
    assert dx.is_contiguous()
    last = x.detach().to(memory_format=torch.channels_last)
    assert getattr(fused, f)(last, 1).is_contiguous(memory_format=torch.channels_last)


def test_third_order():
    x = drawn(4, dtype=F64)
    for f in (lambda t: fused.softmax(t, 0), lambda t: fused.log_softmax(t, 0), lambda t: fused.scaled_masked_softmax(t, scale=0.5)):

        def second(t, f=f):
            (g,) = torch.autograd.grad((f(t) * torch.arange(4.0)).sum(), t, create_graph=True)
            return torch.autograd.grad(g.square().sum(), t, create_graph=True)[0]

        assert torch.autograd.gradgradcheck(second, x)


def test_errors():
    x = drawn(2, 5)
    cases = [
        (lambda: fused.softmax(x, 2), IndexError, r"softmax: dim must be in \[-2, 1\] for input \[2, 5\], got 2"),
        (lambda: fused.log_softmax(x, -3), IndexError, "log_softmax: dim must be in"),
        (lambda: fused.softmax([1.0], 0), TypeError, "softmax: input must be a Tensor, got list"),
        (lambda: fused.scaled_masked_softmax(x, x.long()), TypeError, "mask must be bool or floating-point, got torch.int64"),
        (
            lambda: fused.scaled_masked_softmax(x, x[:, :4]),
            RuntimeError,
            r"mask must broadcast to the input's shape \[2, 5\], got \[2, 4\]",
        ),
        (lambda: fused.scaled_masked_softmax(x, x[None]), RuntimeError, "mask must broadcast"),
        (lambda: fused.scaled_masked_softmax(x[0], causal=True), RuntimeError, r"input must have at least 2 dimensions, got \[5\]"),
        (lambda: fused.scaled_masked_softmax(x, x.to("meta")), RuntimeError, "scaled_masked_softmax: mask must be on"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    with pytest.warns(UserWarning, match="softmax: the choice of dim"):
        fused.softmax(x)
