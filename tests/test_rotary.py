"""Rotary embedding and QK norm: what peers do not do (any dim, any layout, exact backward of any table) and the modules."""

import copy
import math
import pickle

import pytest
import torch
from test_conformance import allocated, same_bits

import fusegrad
import fusegrad.functional as F
from table import BF16, DEVICE, F16, F32, F64, name_of


def draw(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE, dtype)


def tables(seq, rot, interleaved=False, dtype=F32):
    m = fusegrad.nn.RotaryEmbedding(rot, max_position=seq, interleaved=interleaved).to(DEVICE)
    return m.cos.to(dtype), m.sin.to(dtype)


def by_complex_numbers(x, rot, interleaved, base=10000.0):
    """The definition: a pair is a complex number, and turning it is a product."""
    z = x[..., :rot].double()
    pairs = z.unflatten(-1, (-1, 2)) if interleaved else z.unflatten(-1, (2, -1)).transpose(-1, -2)
    rates = base ** (-torch.arange(0, rot, 2, device=x.device, dtype=F64) / rot)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=F64)[:, None] * rates
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., rot:].double()), -1)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dim, rot", ((2, 2), (8, 8), (64, 64), (80, 80), (128, 64), (7, 6), (33, 2), (256, 256), (100, 46)))
def test_the_definition(dim, rot, interleaved):
    q, k = draw(2, 4, 9, dim), draw(2, 2, 9, dim, seed=1)
    found = F.rotary_embedding(q, k, *tables(9, rot, interleaved), interleaved=interleaved)
    for y, x in zip(found, (q, k)):
        torch.testing.assert_close(y.double(), by_complex_numbers(x, rot, interleaved), rtol=0, atol=2e-6)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)  # turning does not change a length


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_scores_depend_on_the_distance(interleaved):
    q, k = (draw(1, 1, 1, 32, seed=s).expand(1, 1, 40, 32) for s in (0, 1))
    q, k = F.rotary_embedding(q, k, *tables(40, 32, interleaved), interleaved=interleaved)
    scores = (q @ k.mT)[0, 0]
    for distance in (-7, 0, 3, 20):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=2e-5)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_the_backward_turns_back(interleaved):
    q, k = draw(2, 4, 9, 64).requires_grad_(), draw(2, 2, 9, 64, seed=1).requires_grad_()
    cos, sin = tables(9, 64, interleaved)
    outputs = F.rotary_embedding(q, k, cos, sin, interleaved=interleaved)
    g = (draw(2, 4, 9, 64, seed=2), draw(2, 2, 9, 64, seed=3))
    found = torch.autograd.grad(outputs, (q, k), g)
    for a, b in zip(found, F.rotary_embedding(*g, cos, -sin, interleaved=interleaved)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    again = F.rotary_embedding(*(y.detach() for y in outputs), cos, -sin, interleaved=interleaved)
    for a, b in zip(again, (q, k)):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ("rotary_embedding", "qk_norm_rope"))
def test_one_output_alone(name):
    """The loss may hang on q or on k only: the other gets no gradient, and costs nothing."""
    q, k = draw(2, 4, 9, 16).requires_grad_(), draw(2, 2, 9, 16, seed=1).requires_grad_()
    w = [draw(16, seed=s).requires_grad_() for s in (4, 5)]
    args = (q, k, *tables(9, 16)) if name == "rotary_embedding" else (q, k, *w, *tables(9, 16))
    for i in (0, 1):
        y = getattr(F, name)(*args)[i]
        inputs = [(q, k)[i]] + ([w[i]] if name == "qk_norm_rope" else [])
        others = [(q, k)[1 - i]] + ([w[1 - i]] if name == "qk_norm_rope" else [])
        found = torch.autograd.grad(y, inputs + others, torch.ones_like(y), allow_unused=True, retain_graph=True)
        assert all(g is None or not g.any() for g in found[len(inputs) :])
        with fusegrad.use_reference():
            expected = torch.autograd.grad(getattr(F, name)(*args)[i], inputs, torch.ones_like(y))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=name_of)
@pytest.mark.parametrize("name", ("rotary_embedding", "qk_norm_rope"))
def test_packed_projection_is_not_copied(name, dtype):
    """q and k where one projection [batch, seq, 3, heads, dim] has put them: nothing but the results is allocated, and their memory
    has the same order, so that what follows finds them as it would find a projection of its own."""
    qkv = draw(2, 128, 3, 8, 64, dtype=dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    w = () if name == "rotary_embedding" else (draw(64), draw(64))
    args = (q, k, *w, *tables(128, 64))
    y = getattr(F, name)(*args)
    expected = getattr(F, name)(q.contiguous(), k.contiguous(), *args[2:])
    assert all(same_bits(a, b) and a.transpose(1, 2).is_contiguous() for a, b in zip(y, expected))
    held = []

    def forward():
        held[:] = getattr(F, name)(*args)

    small = 2 * 2 * 8 * 128 * 4 + 8192  # rstd
    assert allocated(forward) <= sum(t.nbytes for t in y) + small
    qkv.requires_grad_()
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    outputs = getattr(F, name)(q, k, *args[2:])
    g = tuple(torch.ones_like(t) for t in outputs)
    assert allocated(lambda: torch.autograd.grad(outputs, (q, k), g, retain_graph=True)) <= sum(t.nbytes for t in y) + small


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_position_ids(interleaved):
    q, k = draw(3, 4, 5, 16), draw(3, 2, 5, 16, seed=1)
    cos, sin = tables(50, 16, interleaved)
    shifted = torch.arange(7, 12, device=DEVICE)
    whole = F.rotary_embedding(
        *(torch.cat((x.new_zeros(*x.shape[:2], 7, 16), x), 2) for x in (q, k)), cos[:12], sin[:12], interleaved=interleaved
    )
    for a, b in zip(F.rotary_embedding(q, k, cos, sin, interleaved=interleaved, position_ids=shifted), whole):
        assert torch.equal(a, b[:, :, 7:])
    each = torch.randint(50, (3, 5), device=DEVICE)
    found = F.rotary_embedding(q, k, cos, sin, interleaved=interleaved, position_ids=each)
    batched = F.rotary_embedding(q, k, cos[each], sin[each], interleaved=interleaved)
    for i in range(3):
        one = F.rotary_embedding(q[i], k[i], cos, sin, interleaved=interleaved, position_ids=each[i])
        assert all(torch.equal(f[i], o) and torch.equal(b[i], o) for f, b, o in zip(found, batched, one))
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            F.rotary_embedding(q, k, cos, sin, position_ids=each + 50)


def test_float32_tables_beside_16_bits():
    """Angles of far positions keep their precision: bfloat16 tables would be off by 2^-9."""
    q, k = draw(1, 2, 4, 32, dtype=BF16), draw(1, 2, 4, 32, dtype=BF16, seed=1)
    cos, sin = tables(4096, 32)
    found = F.rotary_embedding(q, k, cos, sin, position_ids=torch.arange(4000, 4004, device=DEVICE))
    wide = F.rotary_embedding(q.float(), k.float(), cos[4000:4004], sin[4000:4004])
    assert all(y.dtype == BF16 and same_bits(y, w.to(BF16)) for y, w in zip(found, wide))


def test_learned_tables():
    """Tables that require grad are differentiated, through the reference: no argument is silently a constant."""
    q, k = draw(2, 2, 3, 8, dtype=F64).requires_grad_(), draw(2, 1, 3, 8, dtype=F64, seed=1).requires_grad_()
    angles = draw(3, 4, dtype=F64, seed=2).requires_grad_()
    weight = draw(8, dtype=F64, seed=3).requires_grad_()

    def f(q, k, weight, angles):
        both = torch.cat((angles, angles), -1)
        return (*F.rotary_embedding(q, k, both.cos(), both.sin()), *F.qk_norm_rope(q, k, weight, None, both.cos(), both.sin()))

    assert torch.autograd.gradcheck(f, (q, k, weight, angles))
    assert torch.autograd.gradgradcheck(f, (q, k, weight, angles), fast_mode=True)
    assert ("rotary_embedding", "cos or sin requires grad") in fusegrad.stats()


@pytest.mark.parametrize("dim", (1, 2, 3, 5, 64, 80, 96, 112, 127, 256, 320, 512, 576, 1000, 7000))
def test_any_head_size(dim):
    q, k = draw(2, 3, 4, dim, dtype=F32).requires_grad_(), draw(2, 1, 4, dim, seed=1).requires_grad_()
    w = [draw(dim, seed=s).requires_grad_() for s in (4, 5)]
    rot = dim - dim % 2
    args = (q, k, *w, *(t.to(DEVICE) for t in (torch.rand(4, rot), torch.rand(4, rot))))
    outputs = F.qk_norm_rope(*args)
    g = tuple(draw(*y.shape, seed=7) for y in outputs)
    found = (*outputs, *torch.autograd.grad(outputs, (q, k, *w), g))
    with fusegrad.use_reference():
        expected = F.qk_norm_rope(*args)
        expected = (*expected, *torch.autograd.grad(expected, (q, k, *w), g))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1, b.abs().max().item()))


def test_module():
    m = fusegrad.nn.RotaryEmbedding(16, max_position=8).to(DEVICE)
    assert not m.state_dict() and not list(m.parameters())
    q, k = draw(2, 4, 6, 16), draw(2, 2, 6, 16, seed=1)
    y = m(q, k)
    for a, x in zip(y, (q, k)):
        torch.testing.assert_close(a.double(), by_complex_numbers(x, 16, False), rtol=0, atol=2e-6)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert repr(twin) == repr(m) and all(same_bits(a, b) for a, b in zip(twin(q, k), y))
    long = draw(1, 1, 100, 16)  # longer than the tables
    torch.testing.assert_close(m(long, long)[0].double(), by_complex_numbers(long, 16, False), rtol=0, atol=1e-5)
    half = copy.deepcopy(m).to(BF16)
    assert half.cos.dtype == F32 and torch.equal(half.cos, m.cos) and half(q.bfloat16(), k.bfloat16())[0].dtype == BF16
    double = copy.deepcopy(m).double()
    exact = by_complex_numbers(q.double(), 16, False)
    torch.testing.assert_close(double(q.double(), k.double())[0], exact, rtol=0, atol=1e-14)
    positions = torch.tensor([3, 1, 5, 0, 2, 4], device=DEVICE)
    torch.testing.assert_close(m(q, k, positions)[0], F.rotary_embedding(q, k, *tables(8, 16), position_ids=positions)[0])
    assert copy.deepcopy(m).to("meta")(q.to("meta"), k.to("meta"))[0].is_meta


def test_norm_of_heads():
    """Each head of q has the length sqrt(dim) before the weight, and turning keeps it."""
    q, k = draw(2, 4, 9, 64) * 100, draw(2, 2, 9, 64, seed=1)
    for y in F.qk_norm_rope(q, k, None, None, *tables(9, 64), eps=0.0):
        torch.testing.assert_close(y.norm(dim=-1), torch.full(y.shape[:-1], math.sqrt(64), device=DEVICE))


q, k, t = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(5, 8)
BAD = [
    (lambda: F.rotary_embedding(q[0, 0, 0], k[0, 0, 0], t, t), "q must be [..., heads, seq, dim], got [8]"),
    (lambda: F.rotary_embedding(q, k[..., :6], t, t), "k must have the dtype and shape of q"),
    (lambda: F.rotary_embedding(q, k.double(), t, t), "k must have the dtype and shape of q"),
    (lambda: F.rotary_embedding(q, k, t, t[:4]), "sin must have the shape of cos ([5, 8]), got [4, 8]"),
    (lambda: F.rotary_embedding(q, k, t[:, :7], t[:, :7]), "cos must have an even number of columns, at most the 8 of q, got [5, 7]"),
    (lambda: F.rotary_embedding(q[..., :6], k[..., :6], t, t), "cos must have an even number of columns, at most the 6 of q, got [5, 8]"),
    (lambda: F.rotary_embedding(q, k, t[:4], t[:4]), "cos must be [5, rot_dim] or [2, 5, rot_dim] for q [2, 4, 5, 8], got [4, 8]"),
    (lambda: F.rotary_embedding(q, k, t.expand(3, 5, 8), t.expand(3, 5, 8)), "cos must be [5, rot_dim] or [2, 5, rot_dim]"),
    (lambda: F.rotary_embedding(q, k, t, t, position_ids=torch.zeros(5)), "position_ids must be [seq] or [batch, seq] of integers"),
    (lambda: F.rotary_embedding(q, k, t.double(), t.double()), "cos and sin must be Float, got Double and Double"),
    (lambda: F.rotary_embedding(q.half(), k.half(), t.bfloat16(), t.bfloat16()), "cos and sin must be Half or Float, got BFloat16"),
]


@pytest.mark.parametrize("call, text", BAD, ids=[text[:40] for _, text in BAD])
def test_errors(call, text):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        call()
    assert str(caught.value).startswith("rotary_embedding: " + text)


def test_errors_of_weights_and_modules():
    with pytest.raises(RuntimeError, match=r"qk_norm_rope: q_weight must have shape \[8\]"):
        F.qk_norm_rope(q, k, torch.ones(4), None, t, t)
    with pytest.raises(TypeError, match="qk_norm_rope: k_weight must be torch.float32 or torch.float32, got torch.float64"):
        F.qk_norm_rope(q, k, None, torch.ones(8).double(), t, t)
    with pytest.raises(ValueError, match="RotaryEmbedding: dim must be even, got 7"):
        fusegrad.nn.RotaryEmbedding(7)


def test_tables_of_the_module_outlive_where_they_were_made():
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    expected = fusegrad.nn.RotaryEmbedding(8, max_position=8)(q, q)[0]
    moved = fusegrad.nn.RotaryEmbedding(8, max_position=8, device="meta").to_empty(device="cpu")
    assert torch.equal(moved(q, q)[0], expected)
    grown = fusegrad.nn.RotaryEmbedding(8, max_position=4)
    with torch.inference_mode():
        grown(q, q)
    y = grown(q, q)[0]
    y.backward(torch.ones_like(y))
    assert torch.equal(y, expected)
    with pytest.raises(IndexError):
        grown(q, q, position_ids=torch.tensor([0, 1, 2, 3, 4, -1]))


def test_whatever_takes_the_buffers_of_a_model_leaves_the_tables_alone():
    """Meta tensors that get memory, other default devices, running averages of models of which one has seen a longer sequence."""
    q = torch.randn(1, 2, 6, 8)
    expected = fusegrad.nn.RotaryEmbedding(8)(q, q)[0]
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), fusegrad.nn.RotaryEmbedding(8))
        assert model[1].cos.is_meta and model[1](q.to("meta"), q.to("meta"))[0].is_meta
    model.to_empty(device="cpu")
    assert torch.equal(model[1](q, q)[0], expected)
    model.to_empty(device="cpu")
    assert torch.equal(model[1](q, q)[0], expected)
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(8, 8), fusegrad.nn.RotaryEmbedding(8))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty[1](q, q)[0], expected) and not empty[1].sin.is_meta
    assert torch.equal(torch.nn.utils.skip_init(fusegrad.nn.RotaryEmbedding, 8)(q, q)[0], expected)
    for use_buffers in (False, True):
        model[1] = fusegrad.nn.RotaryEmbedding(8, max_position=4)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
        model[1](q, q)
        average.update_parameters(model)
        assert torch.equal(average.module[1](q, q)[0], expected)
        assert len(model[1].cos) == 4  # in every replica


def test_longer_tables_are_made_once_and_never_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = torch.randn(1, 2, 60, 8)
    expected = fusegrad.nn.RotaryEmbedding(8)(q, q)[0]
    m, made = fusegrad.nn.RotaryEmbedding(8, max_position=4), []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(q)
        assert m(fake, fake)[0].shape == q.shape
    assert torch.equal(m(q, q)[0], expected)
    m, tables = fusegrad.nn.RotaryEmbedding(8, max_position=4), m._tables
    m._tables = lambda *args: made.append(args) or tables(*args)
    for seq in range(1, 61):
        assert torch.equal(m(q[:, :, :seq], q[:, :, :seq])[0], expected[:, :, :seq])
    assert [positions for positions, *_ in made] == [8, 16, 32, 64]
    m.double()
    torch.testing.assert_close(m(q.double(), q.double())[0].float(), expected)
    assert len(made) == 6  # the buffers, and those beside them


def test_positions_on_another_device():
    with pytest.raises(RuntimeError, match="rotary_embedding: position_ids must be on cpu, where cos is, got a tensor on meta"):
        F.rotary_embedding(q, k, t, t, position_ids=torch.zeros(5, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("backward", (lambda a, b: a.sum() + b.sum(), lambda a, b: a.sum(), lambda a, b: b.sum()))
def test_no_heads(backward):
    q, k = draw(2, 0, 5, 16).requires_grad_(), draw(2, 0, 5, 16).requires_grad_()
    weights = [draw(16).requires_grad_() for _ in range(2)]
    loss = backward(*F.qk_norm_rope(q, k, *weights, *tables(5, 16)))
    for t, g in zip(weights, torch.autograd.grad(loss, (*weights, q, k), materialize_grads=True)):
        assert g.shape == t.shape and not g.any()
