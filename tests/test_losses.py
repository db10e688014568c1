# ruff: noqa: E501  (a case a line)
"""Elementwise losses against torch: every reduction, weights, broadcasting, old arguments, empty and huge inputs."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

import fusegrad
import fusegrad.functional as fused
from table import BF16, DEVICE, F16, F32, F64

SAME = ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div")
LOSSES = (*SAME, "sigmoid_focal_loss", "js_div")
REDUCTIONS = ("mean", "sum", "none")


def pair(name, *shape, dtype=F32):
    x, t = (torch.randn(*shape, device=DEVICE) for _ in range(2))
    if name in ("kl_div", "js_div"):
        x, t = torch.log_softmax(x, -1), torch.softmax(t, -1)
    elif name in ("binary_cross_entropy_with_logits", "sigmoid_focal_loss"):
        t = torch.sigmoid(t)
    return x.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()


def compare(ours, theirs, leaves, rtol=1e-5, atol=1e-6):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def both(name, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(fused, name)(*args, **kwargs), getattr(F, name)(*args, **kwargs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", SAME)
def test_like_torch(name, reduction):
    options = dict(
        huber_loss=[{}, dict(delta=0.3)],
        smooth_l1_loss=[{}, dict(beta=0.3), dict(beta=0.0)],
        kl_div=[{}, dict(log_target=True)],
    )
    x, t = pair(name, 37, 53)
    for extra in options.get(name, [{}]):
        target = t.detach().log().requires_grad_() if extra.get("log_target") else t
        compare(*both(name, x, target, reduction=reduction, **extra), [x, target])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "huber_loss"))
@pytest.mark.parametrize("grad", (False, True))
def test_weight(name, reduction, grad):
    """The mean of mse and l1 is over the sum of the weights, that of huber over the elements; the weight has its gradient."""
    x, t = pair(name, 9, 41)
    w = torch.rand(9, 41, device=DEVICE).requires_grad_(grad)
    compare(*both(name, x, t, reduction=reduction, weight=w), [x, t, w] if grad else [x, t])
    with pytest.raises(ValueError, match=f"{name}: weight must have the shape of input"):
        getattr(fused, name)(x, t, weight=w[:1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", itertools.product((None, (), (5,), (3, 1), (4, 3, 5)), (None, (), (5,), (4, 1, 1))), ids=str)
def test_bce_weights(weights, reduction):
    x, t = pair("binary_cross_entropy_with_logits", 4, 3, 5)
    w, p = (None if s is None else torch.rand(s, device=DEVICE) + 0.5 for s in weights)
    compare(*both("binary_cross_entropy_with_logits", x, t, w, reduction=reduction, pos_weight=p), [x, t])


@pytest.mark.parametrize("weight", (1e-3, 1e-6, 1e6))
@pytest.mark.parametrize("target", (0.0, 0.5, 1.0))
def test_bce_keeps_the_digits_of_any_weight(target, weight):
    """In the gradient, of a positive that was missed by far too."""
    x = torch.tensor([-30.0, -5.0, -1.0, 0.5, 3.0], device=DEVICE, requires_grad=True)
    exact = x.detach().double().requires_grad_()

    def gradient(f, x):
        loss = f(x, torch.full_like(x, target), reduction="sum", pos_weight=torch.tensor(weight).to(x))
        return torch.autograd.grad(loss, x)[0].double()

    found = gradient(fused.binary_cross_entropy_with_logits, x)
    expected = gradient(F.binary_cross_entropy_with_logits, exact)
    # Element by element: the error budget is relative to the largest one, beside which all digits of a small one could be wrong.
    torch.testing.assert_close(found, expected, rtol=16 * torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha, gamma", ((0.25, 2.0), (-1, 2), (0.9, 0.0), (0.5, 1.0), (0.3, 3.5), (0.0, 0.5)))
def test_focal_is_the_eager_formula(alpha, gamma, reduction):
    x, t = pair("sigmoid_focal_loss", 31, 17)
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = ce * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    loss = loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss
    expected = dict(mean=loss.mean(), sum=loss.sum(), none=loss)[reduction]
    compare(fused.sigmoid_focal_loss(x, t, alpha, gamma, reduction), expected, [x, t], rtol=1e-4, atol=2e-6)


def test_js_div():
    x, t = pair("js_div", 12, 50, dtype=F64)
    y = fused.js_div(x, t)
    m = (x.exp() + t) / 2
    half = F.kl_div(m.log(), t, reduction="batchmean") / 2
    compare(y, half + F.kl_div(m.log(), x, reduction="batchmean", log_target=True) / 2, [x, t])
    torch.testing.assert_close(y, fused.js_div(t.log(), x.exp()))  # symmetric
    torch.testing.assert_close(fused.js_div(x, t, 0.2), fused.js_div(t.log(), x.exp(), 0.8))
    torch.testing.assert_close(fused.js_div(x, t.log(), 0.2, log_target=True), fused.js_div(x, t, 0.2))
    torch.testing.assert_close(fused.js_div(x, t, 1e-6) / 1e-6, F.kl_div(x, t, reduction="batchmean"), rtol=1e-3, atol=1e-5)
    # Distributions that are alike: the difference of their logarithms has no digits left for it in float32.
    near = (x.detach() + 1e-4 * torch.randn_like(x)).log_softmax(-1)
    exact = fused.js_div(x, near, log_target=True)
    with fusegrad.use_reference():
        assert ((fused.js_div(x, near, log_target=True) - exact) / exact).abs() < 1e-8
    assert 0 < exact < 1e-8


def test_js_div_of_zeros():
    x = torch.tensor([0.0, -torch.inf, -torch.inf, -0.7], device=DEVICE, requires_grad=True)
    t = torch.tensor([0.0, 1.0, 0.0, 0.5], device=DEVICE, requires_grad=True)
    for reference in (False, True):
        with fusegrad.use_reference() if reference else warnings.catch_warnings():
            y = fused.js_div(x, t, reduction="none")
            dx, dt = torch.autograd.grad(y, [x, t], torch.ones_like(y))
        torch.testing.assert_close(y[:3].cpu(), torch.tensor([0.5, 0.5, 0.0]) * torch.log(torch.tensor(2.0)))
        assert dx.isfinite().all() and dt.isfinite().all()
    with pytest.raises(ValueError, match="js_div: beta must be between 0 and 1"):
        fused.js_div(x, t, 0.0)


@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits"))
@pytest.mark.parametrize("size_average, reduce", ((None, True), (True, None), (False, None), (True, False), (False, False), (False, True)))
def test_old_arguments(name, size_average, reduce):
    x, t = pair(name, 5, 8)
    with pytest.warns(UserWarning, match=f"{name}: size_average and reduce are deprecated"):
        getattr(fused, name)(x, t, size_average=size_average, reduce=reduce)
    compare(*both(name, x, t, size_average=size_average, reduce=reduce), [x, t])
    if name == "kl_div":
        compare(*both(name, x, t, size_average=size_average, reduce=reduce, reduction="batchmean"), [x, t])


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_elements(name, reduction):
    x, t = pair(name, 0, 8)
    compare(*both(name, x, t, reduction=reduction), [x, t])
    if reduction != "none":
        seconds = []
        for loss in both(name, x, t, reduction=reduction):
            g = torch.ones_like(loss, requires_grad=True)
            (dx,) = torch.autograd.grad(loss, x, g, create_graph=True)
            seconds += torch.autograd.grad(dx.sum(), g)
        assert torch.equal(*seconds) and seconds[0] == 0


WEIGHTED = ("mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits")


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool))
def test_weights_of_numbers(name, dtype):
    x, t = pair(name, 4, 6)
    weight = torch.randint(2, (4, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for reduction in REDUCTIONS:
        compare(*both(name, x, t, weight=weight, reduction=reduction), [x])
    if name not in WEIGHTED[:3]:
        compare(*both(name, x, t, pos_weight=torch.tensor(3, device=DEVICE)), [x])


@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "smooth_l1_loss", "kl_div"))
@pytest.mark.parametrize("dtypes", ((F32, F64), (F64, F32), (F32, BF16)), ids=str)
@pytest.mark.parametrize("shapes", (((3,), ()), ((), (3,)), ((), ())), ids=str)
def test_dtype_beside_a_number(name, dtypes, shapes):
    """torch expands most of them before their dtypes meet, and those of kl_div not."""
    x, t = (torch.full(shape, 0.5, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    for reduction in REDUCTIONS:
        ours, theirs = both(name, x, t, reduction=reduction)
        assert ours.dtype == theirs.dtype
        near = 2**-7 if BF16 in dtypes else 1e-6  # torch's takes the logarithm of the target in its own dtype
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_huber_reads_its_target_as_it_is():
    """In its own dtype, whether or not it has a gradient."""
    x = torch.randn(40, 70, device=DEVICE).bfloat16()
    t = torch.randn(40, 70, device=DEVICE)
    expected = fused.huber_loss(x, t)
    for grad in (False, True):
        found = fused.huber_loss(x, t.clone().requires_grad_(grad))
        assert found.dtype == BF16 and torch.equal(found, expected)
        each = fused.huber_loss(x, t.clone().requires_grad_(grad), reduction="none")
        torch.testing.assert_close(each.double(), F.huber_loss(x.double(), t.double(), reduction="none"), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "kl_div"))
@pytest.mark.parametrize("shapes", (((6, 5), (5,)), ((6, 1), (1, 5)), ((5,), (6, 5)), ((), (3,)), ((2, 6, 5), (6, 1))), ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_broadcasting(name, shapes, dtype):
    (x, _), (_, t) = (pair(name, *shape, dtype=dtype) if shape else pair(name, 1, dtype=dtype) for shape in shapes)
    x = x.detach().reshape(shapes[0]).requires_grad_()
    for reduction in (*REDUCTIONS, *(["batchmean"] if name == "kl_div" else [])):
        if name == "kl_div":
            ours = both(name, x, t, reduction=reduction)[0]
        else:
            with pytest.warns(UserWarning, match=f"{name}: target size .* is different from the input size"):
                ours = getattr(fused, name)(x, t, reduction=reduction)
        wide = [v.detach().double().requires_grad_() for v in (x, t)]
        expected = both(name, *wide, reduction=reduction)[1]
        assert ours.dtype == dtype and ours.shape == expected.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), expected, rtol=eps, atol=eps)
        g = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, [x, t], g), torch.autograd.grad(expected, wide, g.double())):
            torch.testing.assert_close(a.double(), b, rtol=eps, atol=2e-6)


@pytest.mark.parametrize("dtypes", ((BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (F32, F64), (F64, F32)), ids=str)
@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits"))
def test_target_of_another_dtype(name, dtypes):
    x, t = (v.detach().to(d).requires_grad_() for v, d in zip(pair(name, 40, 70), dtypes))
    for reduction, grad in itertools.product(REDUCTIONS, (True, False)):
        t.requires_grad_(grad)
        ours, theirs = both(name, x, t, reduction=reduction)
        wide = [v.detach().double().requires_grad_() for v in (x, t)]
        expected = both(name, *wide, reduction=reduction)[1]
        eps = 4 * max(torch.finfo(d).eps for d in dtypes)
        assert ours.dtype == theirs.dtype
        near = max(1e-6, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours.double(), expected, rtol=near, atol=1e-6)
        leaves = [x, t] if grad else [x]
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, wide)) if reduction != "none" else ():
            torch.testing.assert_close(a.double(), b, rtol=eps, atol=1e-7)


def test_targets_of_numbers():
    x = torch.randn(6, 7, device=DEVICE, requires_grad=True)
    for t in (torch.rand(6, 7, device=DEVICE) < 0.5, torch.randint(0, 2, (6, 7), device=DEVICE)):
        for name in ("mse_loss", "binary_cross_entropy_with_logits", "sigmoid_focal_loss"):
            compare(getattr(fused, name)(x, t), getattr(fused, name)(x, t.float()), [x], rtol=0, atol=0)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16))
def test_autocast(name, dtype):
    x, t = pair(name, 6, 8, dtype=dtype)
    for reduction in REDUCTIONS:
        with torch.autocast(DEVICE, dtype=BF16):
            ours, theirs = both(name, x, t, reduction=reduction)
        assert ours.dtype == theirs.dtype
        wide = getattr(fused, name)(x.double(), t.double(), reduction=reduction)
        torch.testing.assert_close(ours.double(), wide, rtol=2e-6, atol=2e-6)
    if name in WEIGHTED:
        for of_weight in (F32, F64, BF16, F16):
            with torch.autocast(DEVICE, dtype=BF16):
                ours, theirs = both(name, x, t, weight=torch.ones_like(t, dtype=of_weight))
            assert ours.dtype == theirs.dtype, of_weight


@pytest.mark.parametrize("name", LOSSES)
def test_one_huge_row(name):
    """No element is left out or taken twice, and the number of threads changes no bit."""
    x, t = pair(name, 1_000_003)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(getattr(fused, name)(x, t, reduction="sum"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    exact = getattr(fused, name)(x.double(), t.double(), reduction="none").sum()
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_errors():
    x, t = pair("mse_loss", 4, 5)
    bce = fused.binary_cross_entropy_with_logits
    w = torch.rand(5, requires_grad=True)
    cases = [
        (
            lambda: fused.mse_loss(x, t, reduction="average"),
            ValueError,
            "mse_loss: reduction must be 'mean', 'sum' or 'none', got 'average'",
        ),
        (
            lambda: fused.mse_loss(x, t, reduction="batchmean"),
            ValueError,
            "mse_loss: reduction must be 'mean', 'sum' or 'none', got 'batch",
        ),
        (lambda: fused.huber_loss(x, t, delta=0.0), RuntimeError, "huber_loss: delta must be positive, got 0.0"),
        (lambda: fused.smooth_l1_loss(x, t, beta=-1.0), RuntimeError, "smooth_l1_loss: beta must not be negative, got -1.0"),
        (
            lambda: bce(x, t[:1]),
            ValueError,
            r"binary_cross_entropy_with_logits: target must have the shape of input \(\[4, 5\]\), got \[1, 5\]",
        ),
        (lambda: bce(x, t, pos_weight=w), RuntimeError, "binary_cross_entropy_with_logits: pos_weight must not require grad"),
        (lambda: bce(x, t, x[:, :4].detach()), RuntimeError, r"weight must broadcast to the input's shape \[4, 5\], got \[4, 4\]"),
        (
            lambda: fused.mse_loss(x, t, weight=t.detach().to_sparse()),
            RuntimeError,
            "mse_loss: weight must be a dense tensor, got torch.sparse_coo",
        ),
        (lambda: fused.mse_loss(x, 1.0), TypeError, "mse_loss: target must be a Tensor, got float"),
        (lambda: fused.kl_div(x, t.to("meta"), reduction="sum"), RuntimeError, "kl_div: target must be on"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    with pytest.warns(UserWarning, match="kl_div: reduction='mean' divides by all elements"):
        fused.kl_div(x, t)


@pytest.mark.parametrize("beta", (1e-46, 1e-40, 1e-38, 1e-20))
def test_a_tiny_beta(beta):
    x, t = torch.tensor([0.0, 1.0, -2.0], device=DEVICE).requires_grad_(), torch.tensor([0.0, 1.0, 3.0], device=DEVICE)
    compare(*both("smooth_l1_loss", x, t, reduction="none", beta=beta), [x])
