"""A: extending autograd. Each test is named after the row of docs/mission.md that it proves."""

import copy
import itertools

import pytest
import torch

import fusegrad.functional as F
from fusegrad import nn
from fusegrad._activations import ACTIVATIONS
from fusegrad._autograd import Function, first_order_only
from fusegrad._op import OPS
from fusegrad.ops.cross_entropy import CrossEntropyFn
from fusegrad.ops.linear import LinearFn
from fusegrad.ops.pointwise import GradReverseFn
from fusegrad.ops.rms_norm import RMSNormFn
from table import DEVICE, F64, call, cotangents, diffable, draw, names, with_grad

each_op = pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)


def leaf(*shape, **options):
    return torch.randn(*shape, dtype=F64, device=DEVICE, **options).requires_grad_()


def first(op, seed=0):
    """The first sample in float64 with leaves that require grad, and the leaves."""
    sample, leaves = with_grad(op, draw(op, names(op)[0], F64, seed=seed))
    return sample, list(leaves.values())


def saved(f):
    """The tensors that the graph of f() keeps, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return kept, f()


# --- A1: the protocol of a Function ------------------------------------------------------------------------------------------------


@each_op
def test_a1_each_call_has_its_own_context(op):
    """Two calls of other numbers, their backwards in the other order: each as if it were alone."""
    calls = [first(op, seed) for seed in range(2)]
    alone = []
    for seed, (sample, leaves) in enumerate(calls):
        outputs = call(op, sample)
        alone.append(torch.autograd.grad(outputs, leaves, cotangents(outputs, seed)))
    both = [call(op, sample) for sample, _ in calls]
    for seed in (1, 0):
        for a, b in zip(torch.autograd.grad(both[seed], calls[seed][1], cotangents(both[seed], seed)), alone[seed]):
            assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(*alone))


@each_op
def test_a1_needs_input_grad(op):
    """Only what requires grad has an edge in the graph, and what does not gets no gradient; what is left of the others is the same."""
    sample, leaves = first(op)
    outputs = call(op, sample)
    full = dict(zip(diffable(op, sample), torch.autograd.grad(outputs, leaves, cotangents(outputs))))
    for name, gradient in full.items():
        one, (only,) = (lambda s, l: (s, l.values()))(*with_grad(op, draw(op, names(op)[0], F64), [name]))
        outputs = call(op, one)
        assert sum(fn is not None for fn, _ in outputs[0].grad_fn.next_functions) == 1
        assert torch.equal(torch.autograd.grad(outputs, only, cotangents(outputs))[0], gradient)


def test_a1_statistics_are_not_differentiable():
    """What a forward returns only to save it is marked: no graph hangs on it."""
    y, rstd = RMSNormFn.apply(leaf(3, 8), leaf(8), 1, 1e-5, 0.0, False)
    assert y.requires_grad and not rstd.requires_grad
    loss, lse, top, log_sum, divisor = CrossEntropyFn.apply(
        leaf(3, 8), torch.tensor([0, 1, 2], device=DEVICE), None, None, -100, 0.0, 0.0, 0.0, 1.0, True, True, 0.0, False, False, True
    )
    assert loss.requires_grad and lse.requires_grad and not any(t.requires_grad for t in (top, log_sum, divisor))


def test_a1_gradients_that_are_not_there():
    """An output without a gradient is None to the backward, which makes none of zeros."""
    h, residual, w = leaf(4, 8), leaf(4, 8), leaf(8)
    y, s = F.add_rms_norm(h, residual, (8,), w)
    v = torch.randn_like(s)
    gh, gr, gw = torch.autograd.grad(s, (h, residual, w), v, allow_unused=True)
    assert torch.equal(gh, v) and torch.equal(gr, v) and (gw is None or not gw.any())

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    ops = (lambda x: F.scale(x, 2.0), F.exp, F.cube, F.grad_reverse, F.swiglu, F.bias_act)
    for y in (F.rms_norm(h, (8,), w), *(f(h) for f in ops)):
        Nothing.apply(y).sum().backward()
        assert h.grad is None and w.grad is None


def test_a1_options_have_no_gradient():
    """The slots of what is no tensor are None."""
    x, w = leaf(5, 8), leaf(8)
    found = {}

    class Spied(RMSNormFn):
        @staticmethod
        def backward(ctx, *grads):
            found["slots"] = RMSNormFn.backward(ctx, *grads)
            return found["slots"]

    y, _ = Spied.apply(x, w, 1, 1e-5, 0.0, False)
    y.backward(torch.randn_like(y))
    assert [g is None for g in found["slots"]] == [False, False, True, True, True, True]


def test_a1_in_place():
    """What really writes into its input says so: the version goes up, and a backward that needs the old values raises."""
    x = leaf(6, 9)
    y = x.exp()
    version = y._version
    assert F.dropout(y, 0.5, inplace=True) is y and y._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))
    z = x * 1
    F.dropout(z, 0.5, inplace=True).backward(v := torch.randn_like(z))
    torch.testing.assert_close(x.grad, v * (z != 0) * 2)


# --- A2 to A7: the ops that a tutorial writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
@pytest.mark.parametrize("bias", (True, False))
def test_a2_linear(bias, activation):
    """Function, functional and Module; to the second order."""
    x, w, b = leaf(3, 5), leaf(4, 5), leaf(4) if bias else None
    act = list(ACTIVATIONS).index(activation or "identity")
    expected = ACTIVATIONS[activation or "identity"](x @ w.t() + (b if bias else 0), 0.01)
    layer = nn.Linear(5, 4, bias, activation=activation, device=DEVICE).double()
    layer.load_state_dict({"weight": w} | ({"bias": b} if bias else {}))
    for y in (LinearFn.apply(x, w, b, act)[0], F.linear(x, w, b, activation=activation), layer(x)):
        torch.testing.assert_close(y, expected)
    inputs = [t for t in (x, w, b) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: F.linear(*t, activation=activation), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: F.linear(*t, activation=activation), inputs)


def test_a3_multiply_by_a_constant():
    x = leaf(4, 3)
    kept, y = saved(lambda: F.scale(x, -2.5))
    assert kept == [] and torch.equal(y, -2.5 * x)
    v = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(y, x, v)[0], -2.5 * v)
    assert torch.equal(nn.Scale(-2.5)(x), y)


def test_a4_exp_saves_its_output():
    x = leaf(4, 3)
    kept, y = saved(lambda: F.exp(x))
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]
    v = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, v)[0], v * y.detach())


def test_a5_cube_to_any_order():
    x = leaf(7)
    derivative = F.cube(x)
    for expected in (3 * x**2, 6 * x, 6 + 0 * x):
        (derivative,) = torch.autograd.grad(derivative, x, torch.ones_like(x), create_graph=True)
        torch.testing.assert_close(derivative, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a6_activations(activation):
    """Bias, activation and scale are one node, with the derivatives of the three."""
    x, b = leaf(6, 5), leaf(5)
    y = F.bias_act(x, b, activation, scale=0.7)
    expected = 0.7 * ACTIVATIONS[activation](x + b, 0.01)
    assert {fn for fn, _ in y.grad_fn.next_functions} == {t.view_as(t).grad_fn.next_functions[0][0] for t in (x, b)}
    torch.testing.assert_close(y, expected)
    v = leaf(6, 5)
    ours, theirs = (torch.autograd.grad(t, (x, b), v, create_graph=True) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)
    penalties = (sum(g.square().sum() for g in grads) for grads in (ours, theirs))
    torch.testing.assert_close(*(torch.autograd.grad(p, (x, b, v), materialize_grads=True) for p in penalties))


def test_a7_gradient_reversal():
    """Function and Module do what a full backward hook does that turns the gradient round."""
    x, v = leaf(4, 3), torch.randn(4, 3, dtype=F64, device=DEVICE)
    hooked = torch.nn.Identity()
    hooked.register_full_backward_hook(lambda module, gx, gy: (-0.3 * gx[0],))
    (expected,) = torch.autograd.grad(hooked(x), x, v)
    for f in (lambda x: GradReverseFn.apply(x, 0.3), lambda x: F.grad_reverse(x, 0.3), nn.GradientReversal(0.3)):
        y = f(x)
        assert torch.equal(y, x)
        torch.testing.assert_close(torch.autograd.grad(y, x, v)[0], expected)


# --- A8 to A10: what every op does -------------------------------------------------------------------------------------------------


def test_a8_a_step_with_a_gradient_penalty():
    """WGAN-GP: the critic's parameters get the gradients that torch.nn's layers give them."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(nn.Linear(6, 16, activation="gelu"), nn.LayerNorm(16), nn.Linear(16, 8), nn.SwiGLU(), nn.RMSNorm(4)).double()
    native = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)).double()
    for layer, twin in zip((ours[0], ours[1], ours[2]), (native[0], native[2], native[3])):
        twin.load_state_dict(layer.state_dict())
    rms = copy.deepcopy(ours[4])

    def plain(x):
        gate, up = native(x).chunk(2, -1)
        return torch.nn.functional.rms_norm(torch.nn.functional.silu(gate) * up, (4,), rms.weight, rms.eps)

    real, fake = torch.randn(2, 10, 6, dtype=F64)
    found = []
    for critic, params in ((ours, list(ours.parameters())), (plain, [*native.parameters(), rms.weight])):
        x = (0.3 * real + 0.7 * fake).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        loss = critic(fake).mean() - critic(real).mean() + 10 * (g.norm(2, dim=1) - 1).square().mean()
        found.append((loss, *torch.autograd.grad(loss, params)))
    torch.testing.assert_close(*found)


def test_a8_no_second_order_is_an_error():
    class Once(Function):
        op, reference = "once", staticmethod(lambda x: x * x)

        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            ctx.save_for_backward(*inputs)

        @first_order_only
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    x = leaf(3)
    y = Once.apply(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(g, 2 * x)
    with pytest.raises(RuntimeError, match="once: the backward of this op cannot be differentiated"):
        torch.autograd.grad(y.sum() + g.square().sum(), x)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.true_gradient], ids=lambda op: op.name)
def test_a9_gradcheck(op):
    """In float64, on the device at hand; test_conformance.py does it with every sample, and for the second order."""
    sample, leaves = first(op)
    keys = diffable(op, sample)

    def f(*values):
        return call(op, type(sample)("", sample.kwargs | dict(zip(keys, values))))

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@each_op
def test_a10_vector_outputs(op):
    """backward(v) twice on one graph, then of a second call: .grad adds up; retain_grad shows v; several outputs at once or one by one."""
    sample, leaves = first(op)
    outputs = call(op, sample)
    v = cotangents(outputs)
    expected = torch.autograd.grad(outputs, leaves, v, retain_graph=True)
    for y in outputs:
        y.retain_grad()
    torch.autograd.backward(outputs, v, retain_graph=True)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, expected))
    assert all(torch.equal(y.grad, g) for y, g in zip(outputs, v))
    torch.autograd.backward(outputs, v)
    torch.autograd.backward(call(op, sample), v)
    for t, g in zip(leaves, expected):
        torch.testing.assert_close(t.grad, 3 * g)
    outputs = call(op, sample)
    parts = [torch.autograd.grad(y, leaves, g, retain_graph=True, allow_unused=True) for y, g in zip(outputs, v)]
    for g, each in itertools.zip_longest(expected, zip(*parts)):
        torch.testing.assert_close(sum(part for part in each if part is not None), g)
