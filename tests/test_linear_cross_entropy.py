# ruff: noqa: E501  (a case a line)
"""The head and its loss: what chunks may not change, and the memory that they are there for."""

import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fusegrad
import fusegrad.functional as fused
from table import BF16, F16, F32, F64, Make, name_of

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
from measure import Call, peak_bytes  # noqa: E402

T, H, V = 12, 6, 23


class Chunks:
    """As torch.nn.LinearCrossEntropyOptions, which torch 2.11 has not: the number of tokens, or a method. Compact: no gradient waits for
    the backward, which makes the logits again."""

    def __init__(self, tokens, dtype=F64, compact=False):
        known = isinstance(tokens, int)
        self.batch_chunk_size, self.chunking_method = tokens if known else None, None if known else tokens
        self.acc_policy, self.acc_dtype = "compact" if compact else "accurate", F64 if dtype == F64 else F32


def drawn(dtype=F64, tokens=T, features=H, classes=V, ignore=-100, seed=0):
    make = Make(dtype, seed=seed)
    x, w, b = make(tokens, features), make(classes, features, scale=0.5), make(classes)
    return x.requires_grad_(), w.requires_grad_(), make.labels(tokens, classes=classes, ignore=ignore), b.requires_grad_()


OPTIONS = (
    dict(),
    dict(label_smoothing=0.2),
    dict(z_loss=0.1, label_smoothing=0.1),
    dict(logit_softcap=1.5, z_loss=0.05, weight=True),
    dict(logit_scale=3.0, weight=True, label_smoothing=0.3),
)


def eager(x, w, target, b, weight=None, reduction="none", label_smoothing=0.0, z_loss=0.0, logit_softcap=None, logit_scale=1.0):
    kept = target != -100
    z = F.linear(torch.where(kept[:, None], x, 0), w, b) * logit_scale
    z = logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap else z
    loss = F.cross_entropy(z, target, weight, label_smoothing=label_smoothing, reduction="none")
    loss = loss + torch.where(kept, z_loss * z.logsumexp(1).square(), 0)
    divisor = kept.sum() if weight is None else torch.where(kept, weight[target.clamp(min=0)], 0).sum()
    return loss if reduction == "none" else loss.sum() / (divisor if reduction == "mean" else 1)


@pytest.mark.parametrize("compact", (False, True), ids=("at_once", "compact"))
@pytest.mark.parametrize("chunk", (1, 5, 100))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_every_option_in_chunks(options, reduction, chunk, compact):
    """Under a random weight per token, or a loss scale that is not 1."""
    x, w, target, b = drawn()
    options = options | (dict(weight=torch.rand(V, dtype=F64)) if "weight" in options else {})
    expected = eager(x, w, target, b, reduction=reduction, **options)
    found = fused.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, options=Chunks(chunk, F64, compact), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected) * 65536.0
    for a, e in zip(torch.autograd.grad(found, (x, w, b), cotangent), torch.autograd.grad(expected, (x, w, b), cotangent)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-7)


def rounding(exact, dtype, magnitude=1.0):
    """Of sums in float32 that are rounded once: half an ulp, and what the sums are off by."""
    return 0.51 * torch.finfo(dtype).eps * exact.abs() + 2e-5 * magnitude**0.5 * exact.abs().max()


@pytest.mark.parametrize("dtype", (BF16, F16), ids=name_of)
@pytest.mark.parametrize("chunk", (1, 5, 100))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_every_option_in_blocks_of_classes(options, reduction, chunk, dtype):
    """Where a backward that makes the logits again goes along the classes: each row of dw is whole at once."""
    x, w, target, b = (t.detach() for t in drawn(dtype, tokens=10))
    weight = torch.rand(V, dtype=dtype) if "weight" in options else None
    options = {k: v for k, v in options.items() if k != "weight"} | dict(reduction=reduction)
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    loss = eager(wide[0], wide[1], target, wide[2], weight if weight is None else weight.double(), **options)
    cotangent = torch.rand(loss.shape, dtype=dtype) * 8
    exact = torch.autograd.grad(loss, wide, cotangent.double())
    leaves = [t.requires_grad_() for t in (x, w, b)]
    found = fused.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, options=Chunks(chunk, dtype, True), **options)
    for asked in (leaves, leaves[:1], leaves[1:2], leaves[2:]):
        for g, leaf in zip(torch.autograd.grad(found, asked, cotangent, retain_graph=True), asked):
            r = exact[next(i for i, t in enumerate(leaves) if t is leaf)]
            assert ((g.double() - r).abs() <= rounding(r, dtype, 10)).all()


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype, tokens", ((F64, T), (BF16, 10)), ids=str)  # the latter along the classes
def test_what_an_ignored_token_holds_does_not_matter(dtype, tokens, value, reduction):
    x, w, target, b = drawn(dtype, tokens)
    bad = x.detach().clone()
    bad[target == -100] = value
    bad.requires_grad_()
    outcomes = []
    for features in (x, bad):
        options = Chunks(4, dtype, compact=dtype == BF16)
        loss = fused.linear_cross_entropy(features, w, target, linear_bias=b, reduction=reduction, options=options, z_loss=0.1)
        cotangent = torch.linspace(1, 2, loss.numel(), dtype=dtype).view(loss.shape)
        outcomes.append((loss, *torch.autograd.grad(loss, (features, w, b), cotangent)))
    assert all(torch.equal(a, e) for a, e in zip(*outcomes))
    assert not outcomes[1][1][target == -100].any()
    logp, lse = fused.linear_token_log_probs(bad, w, target, return_lse=True)
    dx, dw = torch.autograd.grad(logp.sum() + lse.square().sum(), (bad, w))
    assert not logp[target == -100].any() and not lse[target == -100].any() and not dx[target == -100].any() and dw.isfinite().all()


def test_all_ignored():
    x, w, _, b = drawn()
    nobody = torch.full((T,), -100)
    assert fused.linear_cross_entropy(x, w, nobody).isnan() and fused.linear_cross_entropy(x, w, nobody, empty="zero") == 0
    assert fused.linear_cross_entropy(x, w, nobody, reduction="sum") == 0
    for options in (dict(), dict(empty="zero"), dict(reduction="sum"), dict(return_lse=True), dict(weight=torch.rand(V, dtype=F64))):
        loss = fused.linear_cross_entropy(x, w, nobody, linear_bias=b, **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, w, b)))
    each = fused.linear_cross_entropy(x, w, nobody, linear_bias=b, reduction="none")
    assert not each.any() and not any(g.any() for g in torch.autograd.grad(each, (x, w, b), torch.randn(T, dtype=F64)))


@pytest.mark.parametrize("dtype", (F64, BF16), ids=name_of)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_an_infinite_gradient_does_not_reach_what_is_ignored(reduction, dtype):
    """As that of a sum has, where a mean over many processes is of no token. Of 10 tokens the backward of 16 bits goes along the
    classes."""
    x, w, target, b = (t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in drawn(tokens=10))
    nobody = torch.full((10,), -100)
    for labels in (target, nobody):
        loss = fused.linear_cross_entropy(x, w, labels, linear_bias=b, reduction=reduction)
        dx, dw, db = torch.autograd.grad(loss, (x, w, b), torch.full_like(loss, float("inf")))
        assert not dx[labels == -100].any()
        assert not (dw.any() or db.any()) if labels is nobody else not (dw.isfinite().all() or db.isfinite().all())
        loss = fused.cross_entropy(x, labels.clamp(max=H - 1), reduction=reduction)
        assert not torch.autograd.grad(loss, x, torch.full_like(loss, float("inf")))[0][labels == -100].any()


@pytest.mark.parametrize("magnitude", (1.0, 40.0, 640.0))
@pytest.mark.parametrize("dtype", (BF16, F16), ids=name_of)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_error_does_not_grow_with_the_number_of_chunks(dtype, reduction, magnitude):
    """The gradient of the weight is summed in float32 over the chunks and rounded once: half an ulp, however many there are."""
    make = Make(dtype, seed=3)
    x, w = make(256, 16, scale=magnitude**0.5), make(600, 16, scale=magnitude**0.5 / 4)
    target = make.labels(256, classes=600)
    cotangent = torch.rand(256, dtype=dtype) if reduction == "none" else torch.tensor(512.0, dtype=dtype)
    wide = [t.double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(eager(*wide, target, None, reduction=reduction), wide, cotangent.double())
    leaves = x.requires_grad_(), w.requires_grad_()
    for chunks, compact in itertools.product((1, 2, 8, 64, 256), (False, True)):
        loss = fused.linear_cross_entropy(*leaves, target, reduction=reduction, options=Chunks(256 // chunks, dtype, compact))
        for found, r in zip(torch.autograd.grad(loss, leaves, cotangent), exact):
            assert ((found.double() - r).abs() <= rounding(r, dtype, magnitude)).all(), (chunks, compact)


def test_scaled_float16_neither_overflows_nor_vanishes():
    """A loss scale of 65536 over a mean of many tokens: what is kept for the backward is float32."""
    x, w, target, _ = drawn(F16, tokens=4000, ignore=None)
    loss = fused.linear_cross_entropy(x, w, target)
    scale = torch.tensor(60000.0, dtype=F16)
    (dx,) = torch.autograd.grad(loss, x, scale)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(eager(wide, w.double(), target, None, reduction="mean"), wide, scale.double())
    torch.testing.assert_close(dx.double(), exact, rtol=1e-3, atol=1e-6)


def held(f, *args, leaves):
    """The most bytes beyond its arguments that a forward and backward holds."""
    y = f(*args)
    return peak_bytes(lambda **_: f(*args), Call({}, dict(enumerate(leaves)), (torch.ones_like(y),)), "cpu")


@pytest.mark.slow
@pytest.mark.rotating(1)
def test_peak_memory_of_a_large_vocabulary():
    """A head of 128,256 classes and 4,096 tokens in bfloat16, whose logits alone are 1 GB: beyond arguments and gradients those of a
    chunk, and the gradients in float32."""
    x, w, target, _ = drawn(BF16, 4096, 512, 128256)
    found = held(lambda x, w: fused.linear_cross_entropy(x, w, target), x, w, leaves=(x, w)) - x.nbytes - w.nbytes
    assert found <= 2**26 * 3 // 2 + 2**25 + 4 * (x.numel() + w.numel()) + (1 << 22) < 1.5e9, f"{found / 1e6:.1f} MB"


def test_peak_memory_of_the_reference():
    """The logits three times: as they are, and their gradient beside their log-softmax."""
    x, w, target, _ = drawn(F64, 512, 16, 4096)

    def loss(x, w):
        with fusegrad.use_reference():
            return fused.linear_cross_entropy(x, w, target)

    logits = 8 * 512 * 4096
    found = held(loss, x, w, leaves=(x, w))
    assert found <= 3 * logits + 2 * (x.nbytes + w.nbytes), f"{found / logits:.2f} times the logits"


@pytest.mark.parametrize("dtype", (F32, BF16), ids=name_of)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_peak_memory(dtype, reduction):
    """Within what the docstring says: by default 64 MB of logits, here those of 524 tokens."""
    tokens, features, classes = 512, 256, 32000
    x, w, target, _ = drawn(dtype, tokens, features, classes)
    small = 1 << 20

    def loss(x, w):
        return fused.linear_cross_entropy(x, w, target, reduction=reduction)

    for leaves in ((x, w), (x,), (w,)):
        frozen = [t.requires_grad_(any(t is leaf for leaf in leaves)) for t in (x, w)]
        grads = sum(t.nbytes for t in leaves)
        wide_grads = sum(4 * t.numel() for t in leaves)
        part = 0 if dtype == F32 else min(2**25, 4 * w.numel())
        limit = 2**26 + 8 * tokens * features + part + wide_grads + grads + small
        found = held(loss, *frozen, leaves=leaves)
        assert found <= limit, f"{found / 1e6:.1f} MB instead of {limit / 1e6:.1f}"
        if leaves[0] is x and len(leaves) == 1:  # frozen weight: nothing of its size but the part that is cast
            assert found <= 2**26 + part + 16 * tokens * features + small
    x.requires_grad_(), w.requires_grad_()
    many, labels = x.detach().repeat(3, 1).requires_grad_(), target.repeat(3)  # three chunks, whose logits are 197 MB
    found = held(lambda x, w: fused.linear_cross_entropy(x, w, labels, reduction=reduction), many, w, leaves=(many, w))
    assert found <= 2**26 + 8 * many.numel() + part + 4 * (many.numel() + w.numel()) + many.nbytes + w.nbytes + small
    # torch's "aspect_ratio": 512 / (32000 / 256), up to a power of 2
    by_ratio = ((Chunks("aspect_ratio", dtype), 8),) if reduction == "mean" and dtype == F32 else ()
    for options, chunk in ((Chunks(16, dtype), 16), *by_ratio):
        few = held(
            lambda x, w, options=options: fused.linear_cross_entropy(x, w, target, reduction=reduction, options=options),
            x,
            w,
            leaves=(x, w),
        )
        assert few <= 4 * chunk * classes + part + 4 * (x.numel() + w.numel()) + x.nbytes + w.nbytes + small


@pytest.mark.parametrize("dtype, acc_dtype", ((F32, None), (BF16, None), (BF16, F32), (F16, None)), ids=str)
@pytest.mark.parametrize("policy", ("accurate", "balanced", "compact", "auto"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_peak_memory_is_within_torchs(reduction, policy, dtype, acc_dtype):
    """Under torch's options, but for the features of all tokens and the logits of a chunk in float32, and parts of the weight and its
    gradient of 1 MB. What "compact" is there for, a gradient of the weight in float32, is 8 MB here."""
    tokens, features, classes = 256, 128, 16000
    x, w, target, _ = drawn(dtype, tokens, features, classes)
    options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy, acc_dtype=acc_dtype)
    ours, torchs = (
        held(lambda x, w, f=f: f(x, w, target, reduction=reduction, options=options), x, w, leaves=(x, w))
        for f in (fused.linear_cross_entropy, F.linear_cross_entropy)
    )
    parts = 0 if dtype == F32 else 2 << 20
    few = 8 * tokens * features + 6 * 4 * classes + parts + (1 << 18)  # 4 tokens a chunk, torch's "aspect_ratio" of these
    assert ours <= torchs + few, f"{ours / 1e6:.1f} MB, torch {torchs / 1e6:.1f} MB"
    if policy == "compact":
        assert ours <= x.nbytes + w.nbytes + few + (1 << 18), f"{ours / 1e6:.1f} MB"


def test_no_gradient_is_made_that_nobody_asks_for(monkeypatch):
    x, w, target, b = drawn(F32)
    module = importlib.import_module("fusegrad.ops.linear_cross_entropy")
    seen, kernel = [], module.linear_cross_entropy_fwd

    def recorded(*args):
        seen.append(args[-1])
        return kernel(*args)

    monkeypatch.setattr(module, "linear_cross_entropy_fwd", recorded)
    fused.linear_cross_entropy(x, w.detach(), target, linear_bias=b)
    fused.linear_cross_entropy(x, w, target, reduction="none")
    fused.linear_cross_entropy(x, w, target, return_lse=True)
    fused.linear_cross_entropy(x, w, target, options=Chunks(4, F32, compact=True))
    with torch.no_grad():
        fused.linear_cross_entropy(x, w, target)
    assert [list(s) for s in seen] == [[True, False, True], *[[False] * 3] * 4]


def test_micro_batches_add_up():
    x, w, target, _ = drawn()
    items = int((target != -100).sum())
    whole = torch.autograd.grad(fused.linear_cross_entropy(x, w, target), (x, w))
    parts = sum(fused.linear_cross_entropy(x[i], w, target[i], num_items=items) for i in (slice(0, 5), slice(5, T)))
    for a, e in zip(torch.autograd.grad(parts, (x, w)), whole):
        torch.testing.assert_close(a, e)


def test_a_loss_of_log_probs():
    """A preference loss and an importance ratio from the primitive, equal to eager; and the loss is its negative."""
    x, w, target, b = drawn()
    rejected = target.roll(1)

    def preference(log_probs):
        return -F.logsigmoid(log_probs(target).sum() - 0.5 * log_probs(rejected).exp().sum())

    ours = preference(lambda t: fused.linear_token_log_probs(x, w, t, linear_bias=b, logit_scale=0.7))
    theirs = preference(lambda t: -eager(x, w, t, b, logit_scale=0.7))
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(theirs, (x, w, b))):
        torch.testing.assert_close(a, e)
    assert torch.equal(fused.linear_token_log_probs(x, w, target), -fused.linear_cross_entropy(x, w, target, reduction="none"))


def test_log_probs_of_16_bits_in_float32():
    x, w, target, _ = drawn(BF16)
    found = fused.linear_token_log_probs(x, w, target, wide=True)
    assert found.dtype == F32
    torch.testing.assert_close(found.double(), -eager(x.double(), w.double(), target, None), rtol=1e-5, atol=1e-5)


def test_what_goes_through_the_whole_logits():
    """Weights of several dimensions and probabilities, equal to torch and with our options."""
    x, w, target, b = drawn(F32)
    wide, bias = torch.randn(5, 2, 3, H, requires_grad=True), torch.randn(5, 2, 3)
    labels = torch.randint(5, (T, 2, 3))
    soft = torch.rand(T, V).softmax(1)
    with pytest.raises(RuntimeError, match="linear_weight has more than two dimensions"):
        fused.linear_cross_entropy(x, wide, labels)
    with fusegrad.strict(False), pytest.warns(UserWarning, match="using the reference"):
        found = fused.linear_cross_entropy(x, wide, labels, linear_bias=bias)
        torch.testing.assert_close(found, F.linear_cross_entropy(x, wide, labels, linear_bias=bias))
        found = fused.linear_cross_entropy(x, w, soft, linear_bias=b, label_smoothing=0.1)
        torch.testing.assert_close(found, F.linear_cross_entropy(x, w, soft, linear_bias=b, label_smoothing=0.1))
        loss = fused.linear_cross_entropy(x, wide, labels, z_loss=0.1, reduction="sum")
        z = F.linear(x, wide.reshape(-1, H)).reshape(T, 5, 2, 3)
        torch.testing.assert_close(loss, F.cross_entropy(z, labels, reduction="sum") + 0.1 * z.logsumexp(1).square().sum())
        head, native = (m.LinearCrossEntropyLoss(H, 5, out_features=(2, 3), bias=True) for m in (fusegrad.nn, torch.nn))
        head.load_state_dict(native.state_dict())
        torch.testing.assert_close(head(x, labels), native(x, labels))
        for wrong in (labels[:, 0, 0], labels[:-1], labels[0, 0, 0]):
            with pytest.raises(ValueError, match="cross_entropy: target must have one class per item"):
                fused.linear_cross_entropy(x, wide, wrong)
        assert fused.linear_cross_entropy(x[:, :0], w[:, :0], soft).isclose(torch.tensor(float(V)).log())
        labels[3], labels[5, 1, 0] = -100, -100
        (expected,) = torch.autograd.grad(fused.linear_cross_entropy(x, wide, labels), wide)
        broken = x.detach().clone()
        broken[3] = torch.nan  # an ignored token
        loss = fused.linear_cross_entropy(broken, wide, labels)
        assert torch.equal(*(torch.autograd.grad(loss, wide)[0], expected))
        for a, b in ((F32, BF16), (F64, F32), (F16, BF16)):
            for weight, target in ((wide, labels), (w, soft)):
                with pytest.raises(TypeError, match=f"linear_cross_entropy: linear_weight must be {a}.*, got {b}"):
                    fused.linear_cross_entropy(x.to(a), weight.to(b), target)


def test_torchs_options():
    x, w, target, _ = drawn(F32, tokens=64)
    Options = torch.nn.LinearCrossEntropyOptions
    expected = fused.linear_cross_entropy(x, w, target)
    for options in (Options(), Options(batch_chunk_size=7), Options(chunking_method="aspect_ratio:3"), Options(acc_policy="compact")):
        torch.testing.assert_close(fused.linear_cross_entropy(x, w, target, options=options), expected)
        module = fusegrad.nn.LinearCrossEntropyLoss(H, V, options=options)
        assert repr(module) == repr(torch.nn.LinearCrossEntropyLoss(H, V, options=options))
        loss = module(x, target)  # as often as one likes, unlike torch's
        one, two = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(one, two)


def test_autocast():
    x, w, target, _ = drawn(F32)
    for a, dtype in itertools.product((x, x.detach().bfloat16().requires_grad_()), (F32,)):
        with torch.autocast("cpu", dtype=BF16):
            loss = fused.linear_cross_entropy(a, w, target)
        assert loss.dtype == dtype
        assert [g.dtype for g in torch.autograd.grad(loss, (a, w))] == [a.dtype, w.dtype]
    for a, b in ((F32, BF16), (F16, BF16), (BF16, F16), (F32, F16)):  # what meets only under autocast
        both = x.detach().to(a).requires_grad_(), w.detach().to(b).requires_grad_()
        with torch.autocast("cpu", dtype=BF16):
            loss = fused.linear_cross_entropy(*both, target, weight=torch.ones(V, dtype=b))
            assert fused.linear_token_log_probs(*both, target).dtype == F32
        assert loss.dtype == F32 and [g.dtype for g in torch.autograd.grad(loss, both)] == [a, b]
        torch.testing.assert_close(loss, fused.linear_cross_entropy(*(t.float() for t in both), target))
    bias = torch.randn(V, dtype=BF16)
    with torch.autocast("cpu", dtype=BF16), fusegrad.strict(False):
        for weight, labels in ((w, target), (w, torch.rand(T, V).softmax(1)), (w.view(V, 1, H), target[:, None])):
            loss = fused.linear_cross_entropy(x, weight, labels, linear_bias=bias.view(weight.shape[:-1]))
            assert loss.dtype == F32 and loss.isfinite()


def test_a_tied_head_trains_as_torchs():
    """Embedding and head are one parameter; twenty steps are those of torch's module."""

    def train(nn):
        torch.manual_seed(0)
        embedding, head = torch.nn.Embedding(V, H).double(), nn.LinearCrossEntropyLoss(H, V).double()
        head.linear.weight = embedding.weight
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        tokens, losses = torch.randint(V, (40,)), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = head(embedding(tokens[:-1]).tanh(), tokens[1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=F64)

    torch.testing.assert_close(train(fusegrad.nn), train(torch.nn), rtol=1e-9, atol=1e-9)


x, w, labels = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 1, 2, 8])
BAD = [
    (lambda: fused.linear_cross_entropy([1.0], w, labels), TypeError, "linear_cross_entropy: input must be a Tensor, got list"),
    (lambda: fused.linear_cross_entropy(x, torch.empty(0), labels), RuntimeError, "linear_cross_entropy: linear_weight must have shape [C, 6] for input [4, 6] (gather the head first if it is sharded), got [0]"),
    (lambda: fused.linear_cross_entropy(x, w, labels, linear_bias=torch.ones(8)), RuntimeError, "linear_cross_entropy: linear_bias must have shape [9], got [8]"),
    (lambda: fused.linear_cross_entropy(x, w, labels[:3]), ValueError, "linear_cross_entropy: target must have one class per token, shape [4] for input [4, 6], got [3]"),
    (lambda: fused.linear_cross_entropy(x, w, labels.int()), RuntimeError, "linear_cross_entropy: target must be int64 (class indices), got torch.int32"),
    (lambda: fused.linear_cross_entropy(x, w, labels + 1), IndexError, "linear_cross_entropy: target must be in [0, 9) or ignore_index (-100), got 9"),
    (lambda: fused.linear_cross_entropy(x, w.double(), labels), TypeError, "linear_cross_entropy: linear_weight must be Float, got Double"),
    (lambda: fused.linear_cross_entropy(x, w, labels, linear_bias=torch.ones(9).half()), TypeError, "linear_cross_entropy: linear_bias must be Float, got Half"),
    (lambda: fused.linear_cross_entropy(x, w.to("meta"), labels), RuntimeError, "linear_cross_entropy: linear_weight must be a dense tensor on cpu, where the first argument is, got a tensor of layout Strided on meta"),
    (lambda: fused.linear_cross_entropy(x, w.to_sparse(), labels), RuntimeError, "linear_cross_entropy: linear_weight must be a dense tensor on cpu, where the first argument is, got a tensor of layout Sparse on cpu"),
    (lambda: fused.linear_cross_entropy(x[None], w, labels[None]), RuntimeError, "linear_cross_entropy: input must have one or two dimensions, got [1, 4, 6]"),
    (lambda: fused.linear_cross_entropy(x, w, labels, weight=torch.ones(8)), RuntimeError, "linear_cross_entropy: weight must have one element per class ([9]), got [8]"),
    (lambda: fused.linear_cross_entropy(x, w, labels, weight=torch.ones(9).long()), TypeError, "linear_cross_entropy: weight must be torch.float32, got torch.int64"),
    (lambda: fused.linear_cross_entropy(x, w, labels, reduction="max"), ValueError, "linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got 'max'"),
    (lambda: fused.linear_cross_entropy(x, w, labels, empty="one"), ValueError, "linear_cross_entropy: empty must be 'nan' or 'zero', got 'one'"),
    (lambda: fused.linear_cross_entropy(x, w, labels, label_smoothing=2.0), RuntimeError, "linear_cross_entropy: label_smoothing must be in [0, 1], got 2.0"),
    (lambda: fused.linear_cross_entropy(x, w, labels, num_items=0), ValueError, "linear_cross_entropy: num_items must be positive, got 0.0"),
    (lambda: fused.linear_cross_entropy(x, w, labels, num_items=3, reduction="sum"), ValueError, "linear_cross_entropy: num_items is the divisor of reduction='mean', got reduction='sum'"),
    (lambda: fused.linear_cross_entropy(x, w, labels, options=3), TypeError, "linear_cross_entropy: options must be a torch.nn.LinearCrossEntropyOptions or None, got int"),
    (lambda: fused.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions(acc_dtype=BF16)), RuntimeError, "linear_cross_entropy: options.acc_dtype must be None or torch.float32 for input of torch.float32, got torch.bfloat16"),
    (lambda: fused.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method="aspect_ratio")), ValueError, "linear_cross_entropy: options must have batch_chunk_size or chunking_method, got 2 and 'aspect_ratio'"),
    (lambda: fused.linear_cross_entropy(x, w, torch.rand(4, 9), ignore_index=3), RuntimeError, "linear_cross_entropy: ignore_index goes with class indices, got 3 and a target of probabilities"),
    (lambda: fused.linear_cross_entropy(x[0], w[None], labels[0]), RuntimeError, "linear_cross_entropy: input must be [N, H] with a linear_weight of several dimensions [1, 9, 6], got [6]"),
    (lambda: fused.linear_token_log_probs(x, w[None], labels), RuntimeError, "linear_token_log_probs: linear_weight must have two dimensions, got [1, 9, 6]"),
    (lambda: fused.linear_token_log_probs(x, w, labels, logit_softcap=-1), ValueError, "linear_token_log_probs: logit_softcap must be positive or None, got -1"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[22:70] for _, _, text in BAD])
def test_error_texts(call, error, text):
    with pytest.raises(error, match=re.escape(text) + "$") as info:
        call()
    assert type(info.value) is error


def test_options_are_not_ignored_in_silence():
    """Where the logits are made as a whole, a chunk size that is asked for is a warning."""
    x, w, options = torch.randn(6, 8), torch.randn(5, 8), torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    for weight, target in ((w, torch.softmax(torch.randn(6, 5), 1)), (w.view(5, 1, 8), torch.randint(5, (6, 1)))):
        with fusegrad.strict(False), pytest.warns(UserWarning, match="linear_cross_entropy: options are ignored beside"):
            fused.linear_cross_entropy(x, weight, target, options=options)


def test_labels_of_8_bits():
    x, w, target = torch.randn(6, 8), torch.randn(5, 8), torch.randint(5, (6,))
    for f in (fused.linear_cross_entropy, fused.linear_token_log_probs):
        assert torch.equal(f(x, w, target.byte()), f(x, w, target))
    for f in (fused.cross_entropy, fused.vocab_parallel_cross_entropy):
        assert torch.equal(f(x, target.byte()), f(x, target))
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: target must be int64 \(class indices\), got torch.int32"):
        fused.linear_cross_entropy(x, w, target.int())
