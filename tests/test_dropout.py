"""Dropout: which elements are dropped, how many, and that everybody drops the same ones."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusegrad
import fusegrad.functional as F
from fusegrad._samples import LAYOUTS, lay_out
from table import BF16, DEVICE, F16, F32, F64, name_of

mask = torch.ops.fusegrad.dropout_mask


def seed(value):
    return torch.tensor(value, device=DEVICE)


def kept(y):
    return y != 0


def ones(*shape, **options):
    return torch.ones(*shape, device=DEVICE, **options)


# --- the same elements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, F64, F16, BF16), ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_dtype_drops_the_same(layout, dtype):
    torch.manual_seed(3)
    expected = mask(torch.randint(2**63 - 1, (), device=DEVICE), (3, 7, 5, 23), 0.3)
    x = lay_out(ones(3, 7, 5, 23, dtype=dtype), layout)
    torch.manual_seed(3)
    assert torch.equal(kept(F.dropout(x, 0.3)), expected)
    torch.manual_seed(3)
    assert torch.equal(kept(F.bias_dropout_add(x, None, torch.zeros_like(x), 0.3)), expected)


def test_any_number_of_threads_drops_the_same():
    x, threads, found = ones(700, 257), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            found.append(kept(F.dropout(x)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_part_is_a_part_of_the_whole():
    """An element's fate hangs on its number and not on how long the tensor is."""
    whole = mask(seed(5), (100_003,), 0.4)
    for n in (1, 15, 16, 17, 4097, 65_536):
        assert torch.equal(mask(seed(5), (n,), 0.4), whole[:n])
        assert torch.equal(mask(seed(5), (n // 3 + 1, 3), 0.4).flatten()[:n], whole[:n])


@pytest.mark.parametrize("name", ("dropout", "bias_dropout_add"))
def test_forward_and_backward_drop_the_same(name):
    x = torch.randn(33, 65, device=DEVICE, requires_grad=True)
    residual = torch.zeros_like(x)
    y = F.dropout(x, 0.25) if name == "dropout" else F.bias_dropout_add(x, None, residual, 0.25)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(kept(dx), kept(y.detach())) and not kept(y).all()
    torch.testing.assert_close(dx, torch.where(kept(y), g / 0.75, 0))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint_drops_the_same(reentrant):
    x = torch.randn(40, 70, device=DEVICE, requires_grad=True)
    seen = []

    def f(x):
        seen.append(F.dropout(x, 0.5))
        return seen[-1] * x

    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    torch.testing.assert_close(x.grad, 2 * seen[0].detach())


def test_compiled_forward_and_backward_drop_the_same():
    x = torch.randn(40, 70, device=DEVICE, requires_grad=True)
    f = torch.compile(lambda x: F.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    first, second = f(x), f(x)
    assert not torch.equal(kept(first), kept(second))
    for y in (first, second):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(kept(dx), kept(y.detach()))


def test_a_torch_seed_reproduces():
    x = ones(1000)
    torch.manual_seed(8)
    a, b = F.dropout(x), F.dropout(x)
    torch.manual_seed(8)
    assert not torch.equal(a, b)
    assert torch.equal(a, F.dropout(x)) and torch.equal(b, F.dropout(x))
    with fusegrad.use_reference():
        torch.manual_seed(8)
        assert torch.equal(a, F.dropout(x))


# --- how many -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
def test_0_and_1_are_exact(dtype):
    x = torch.randn(100_000, device=DEVICE, dtype=dtype, requires_grad=True)
    assert F.dropout(x, 0.0) is x and F.dropout(x, 0.5, training=False) is x
    y = F.dropout(x, 1.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y.any() and not dx.any()
    assert mask(seed(1), (100_000,), 0.0).all() and not mask(seed(1), (100_000,), 1.0).any()
    bias, residual = ones(10, dtype=dtype), torch.randn(10_000, 10, device=DEVICE, dtype=dtype)
    x = x.detach().view(10_000, 10)
    assert torch.equal(F.bias_dropout_add(x, bias, residual, 1.0), residual)
    for p, training in ((0.0, True), (0.3, False)):
        y = F.bias_dropout_add(x, bias, residual, p, training)
        torch.testing.assert_close(y, (residual.float() + (x.float() + bias.float())).to(dtype), rtol=0, atol=0)


def test_what_is_kept_is_scaled():
    y = F.dropout(ones(10_000, dtype=F64), 0.2)
    assert set(y.tolist()) == {0.0, 1 / (1 - 0.2)}


@pytest.mark.parametrize("p", (0.001, 0.1, 0.25, 0.5, 0.9, 0.999))
def test_keep_rate(p):
    n = 1 << 20
    rates = torch.stack([mask(seed(s), (n,), p).sum() for s in range(20)]).double() - n * (1 - p)
    sigma = math.sqrt(n * p * (1 - p))
    assert rates.abs().max() < 5 * sigma and abs(rates.sum()) < 5 * sigma * math.sqrt(20)


def centred(s, n, p=0.5):
    return (mask(seed(s), (n,), p).float() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", (0.5, 0.1, 0.01))
def test_neighbours_are_independent(p):
    """The correlation of elements at a distance, in units of what chance makes of it: none large, and their mean square 1."""
    n, found = 1 << 20, []
    for s in (0, 1, 2**62 + 12345):
        m = centred(s, n, p)
        found += [
            (m[d:] * m[:-d]).sum().item() / math.sqrt(n - d) for d in (*range(1, 18), 31, 32, 33, 64, 127, 256, 1000, 1024, 4096, 65536)
        ]
    assert max(map(abs, found)) < 5
    assert abs(sum(z * z for z in found) / len(found) - 1) < 5 * math.sqrt(2 / len(found))


def test_seeds_are_independent():
    """Seeds next to each other, and a bit apart; at the same element and at shifted ones."""
    n, found = 1 << 20, []
    pairs = [(s, s + 1) for s in range(8)] + [(s, s ^ (1 << bit)) for s, bit in zip(range(100, 163), range(63))]
    for a, b in pairs:
        m, other = centred(a, n), centred(b, n)
        found += [(m[d:] * other[: n - d]).sum().item() / math.sqrt(n) for d in (0, 1, 16)]
    assert max(map(abs, found)) < 5
    assert abs(sum(z * z for z in found) / len(found) - 1) < 5 * math.sqrt(2 / len(found))


def test_patterns_are_equally_frequent():
    """Each of the 2^12 ways to drop among 12 elements, next to each other or a power of two apart: chi square within 5 sigma."""
    for power in range(0, 13, 3):
        m = mask(seed(power), ((1 << 16) >> power, 12, 1 << power), 0.5).movedim(1, -1).reshape(-1, 12)
        numbers = (m.long() << torch.arange(12, device=DEVICE)).sum(1)
        counts = torch.bincount(numbers, minlength=1 << 12).double()
        expected = m.shape[0] / (1 << 12)
        chi = ((counts - expected).square() / expected).sum().item()
        assert abs(chi - 4095) < 5 * math.sqrt(2 * 4095), power


# --- what torch does ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite(value):
    """As in torch an element that is dropped is multiplied by 0, which makes NaN of infinity."""
    x = torch.full((1000,), value, device=DEVICE)
    native, y = torch.nn.functional.dropout(x), F.dropout(x)
    dropped = native.isnan() if not math.isnan(value) else None
    assert (y.isnan() | (y == value)).all() and (native.isnan() | (native == value)).all()
    if dropped is not None:
        assert 300 < y.isnan().sum() < 700 and 300 < dropped.sum() < 700


def test_inplace():
    x = torch.randn(50, 20, device=DEVICE)
    torch.manual_seed(1)
    expected = F.dropout(x, 0.3)
    torch.manual_seed(1)
    version, given = x._version, x.clone()
    assert F.dropout(given, 0.3, inplace=True) is given and torch.equal(given, expected)
    leaf = x.clone().requires_grad_()
    middle = leaf * 2
    torch.manual_seed(1)
    y = F.dropout(middle, 0.3, inplace=True)
    assert y is middle and x._version == version
    (y * y).sum().backward()
    scale = torch.where(kept(expected), 1 / 0.7, 0)
    torch.testing.assert_close(leaf.grad, 8 * x * scale * scale)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        F.dropout(leaf, 0.3, inplace=True)
    assert fusegrad.nn.Dropout(0.3, inplace=True)(given) is given


@pytest.mark.parametrize("randomness", ("same", "different", "error"))
def test_vmap(randomness):
    x = ones(6, 500)
    f = torch.func.vmap(lambda row: F.dropout(row), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            f(x)
        return
    rows = kept(f(x))
    equal = [torch.equal(a, b) for a, b in itertools.combinations(rows, 2)]
    assert all(equal) if randomness == "same" else not any(equal)
    g = torch.func.vmap(torch.func.grad(lambda row: (F.dropout(row) * row).sum()), randomness=randomness)(x)
    assert set(g.unique().tolist()) == {0.0, 4.0}


def test_second_order():
    """Of a mask that is fixed by torch's seed."""
    x = torch.randn(7, 5, device=DEVICE, dtype=F64, requires_grad=True)
    bias, residual = (torch.randn(*s, device=DEVICE, dtype=F64, requires_grad=True) for s in ((5,), (7, 5)))

    def f(x, bias, residual):
        torch.manual_seed(4)
        return F.dropout(x * x, 0.4) + F.bias_dropout_add(x * x, bias.exp(), residual.sin(), 0.4)

    assert torch.autograd.gradcheck(f, (x, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, bias, residual))


def test_modules_as_torch():
    m = fusegrad.nn.Dropout(0.5)
    x = ones(1000)
    assert 300 < kept(m(x)).sum() < 700 and m.eval()(x) is x
    block = fusegrad.nn.BiasDropoutAdd(8, p=0.5)
    torch.nn.init.constant_(block.bias, 2.0)
    y, r = block(ones(500, 8), ones(500, 8)), block.eval()(ones(500, 8), ones(500, 8))
    assert set(y.unique().tolist()) == {1.0, 7.0} and (r == 4).all()
    assert [*fusegrad.nn.BiasDropoutAdd(8, bias=False).parameters()] == []


BAD = [
    (lambda x: F.dropout(x, 1.5), ValueError, "dropout: p must be in [0, 1], got 1.5"),
    (lambda x: F.dropout(x, float("nan")), ValueError, "dropout: p must be in [0, 1], got nan"),
    (lambda x: F.dropout(x.int()), TypeError, "dropout: input must be a floating-point tensor, got torch.int32"),
    (lambda x: F.bias_dropout_add(x, None, x, -0.1), ValueError, "bias_dropout_add: p must be in [0, 1], got -0.1"),
    (lambda x: F.bias_dropout_add(x, x, x), RuntimeError, "bias_dropout_add: bias must have shape [5], got [4, 5]"),
    (lambda x: F.bias_dropout_add(x, None, x[:2]), RuntimeError, "bias_dropout_add: residual must have the dtype and shape of input"),
    (lambda x: F.bias_dropout_add(x, None, x.double()), TypeError, "bias_dropout_add: residual must have the dtype and shape of input"),
    (lambda x: F.bias_dropout_add(x[0, 0], None, x[0, 0]), RuntimeError, "bias_dropout_add: input must have at least one dimension"),
    (lambda x: torch.ops.fusegrad.dropout_fwd(x, None, None, torch.zeros(()), 0.5), TypeError, "dropout: seed must be a 0-dim int64"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:50] for _, _, text in BAD])
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call(ones(4, 5))
    assert str(caught.value).startswith(text)


def test_the_bias_is_reset():
    m = fusegrad.nn.BiasDropoutAdd(8, device="meta").to_empty(device="cpu")
    torch.nn.init.ones_(m.bias)
    m.reset_parameters()
    assert not m.bias.any()
    fusegrad.nn.BiasDropoutAdd(8, bias=False).reset_parameters()


def test_nothing_is_drawn_where_nothing_is_dropped():
    x = torch.randn(3, 4, device=DEVICE)
    for t in (x, x.int(), x > 0):
        assert F.dropout(t, 0.5, False) is t and F.dropout(t, 0.0) is t
    torch.manual_seed(0)
    expected = torch.rand(1)
    for call in (
        lambda: F.dropout(x, 0.5, False), lambda: F.bias_dropout_add(x, None, x, 0.5, False), lambda: F.bias_dropout_add(x, None, x, 0.0),
        lambda: F.add_rms_norm(x, x, (4,), p=0.5, training=False),
    ):  # fmt: skip
        torch.manual_seed(0)
        call()
        assert torch.equal(torch.rand(1), expected)
