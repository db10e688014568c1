# ruff: noqa: E501  (a case of bad input a line)
"""What is peculiar to the element-wise ops and to the layers made of them."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

import fusegrad
import fusegrad.functional as fused
from fusegrad import nn

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype).requires_grad_()


def saved_by(f):
    """Bytes of each tensor that the graph of f() keeps, each counted once; and the result."""
    found = {}

    def pack(t):
        found[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = f()
    return found, result


# --- the smallest ops: three derivatives, by formula ---------------------------------------------------------------------------

ORDERS = {
    "scale": (lambda x: fused.scale(x, -0.7), [lambda x: -0.7 * x, lambda x: -0.7 + 0 * x, lambda x: 0 * x, lambda x: 0 * x]),
    "exp": (fused.exp, [torch.exp] * 4),
    "cube": (fused.cube, [lambda x: x**3, lambda x: 3 * x**2, lambda x: 6 * x, lambda x: 6 + 0 * x]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_derivative(name):
    """f, f', f'', f''', each weighted at random, and the derivative by the incoming gradient."""
    f, formulas = ORDERS[name]
    x, v, *weights = (draw(4, 5, seed=s) for s in range(6))
    y = f(x)
    torch.testing.assert_close(y, formulas[0](x))
    (g,) = torch.autograd.grad(y, x, v, create_graph=True)
    torch.testing.assert_close(g, v * formulas[1](x))
    value, expected = g, v
    for order, w in enumerate(weights[:2], 2):
        expected = expected * w
        (value,) = torch.autograd.grad(value, x, w, create_graph=True, allow_unused=True)
        if value is None:  # of a constant
            assert not formulas[order](x).any()
            break
        torch.testing.assert_close(value, expected * formulas[order](x))
    torch.testing.assert_close(torch.autograd.grad(g, v, weights[3])[0], weights[3] * formulas[1](x))


def test_exp_over_its_whole_range():
    """To two units in the last place, of subnormal results too; beyond the ends 0 and infinity."""
    ends = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf, torch.nan])
    x = torch.cat([torch.linspace(-110, 95, 200_003, dtype=F64).float(), ends])
    y, exact = fused.exp(x), torch.exp(x.double())
    unit = (exact * torch.finfo(torch.float32).eps).clamp_min(2.0**-149)
    assert ((y == exact.float()) | ((y - exact).abs() <= 2 * unit) | (y.isnan() & x.isnan())).all()
    assert not y[x < -104].any() and y[x > 89].isinf().all()


def test_what_the_smallest_ops_save():
    x = draw(6, 7)
    assert saved_by(lambda: fused.scale(x, 3.0))[0] == {} == saved_by(lambda: fused.grad_reverse(x))[0]
    saved, y = saved_by(lambda: fused.exp(x))
    assert list(saved) == [y.data_ptr()]
    assert list(saved_by(lambda: fused.cube(x))[0]) == [x.data_ptr()]


@pytest.mark.parametrize("f, name", ((fused.scale, "factor"), (fused.grad_reverse, "alpha")))
def test_factors_are_numbers(f, name):
    """A tensor would expect a gradient."""
    for value in (torch.tensor(2.0), torch.tensor(2.0, requires_grad=True), "2", None, True):
        with pytest.raises(TypeError, match=f"{name} must be a number .no gradient flows to it., got {type(value).__name__}"):
            f(draw(3), value)
    assert torch.equal(f(draw(3), 2), f(draw(3), 2.0))


# --- gradient reversal ---------------------------------------------------------------------------------------------------------


def test_grad_reverse_is_a_view():
    x = draw(3, 4)
    y = fused.grad_reverse(x, 0.5)
    assert y.data_ptr() == x.data_ptr() and y is not x and torch.equal(x, y)
    with torch.no_grad():
        assert fused.grad_reverse(x) is not x
    (g,) = torch.autograd.grad(y, x, v := torch.randn(3, 4, dtype=F64))
    assert torch.equal(g, -0.5 * v)


def test_grad_reverse_equals_a_backward_hook():
    """Domain-adversarial training: the features get the domain loss's gradient reversed, the domain head gets its own."""
    torch.manual_seed(0)
    x, label, domain = torch.randn(16, 6), torch.randint(3, (16,)), torch.randint(2, (16,))

    class Net(torch.nn.Module):
        def __init__(self, reverse):
            super().__init__()
            self.features, self.head, self.domain = (torch.nn.Linear(*s) for s in ((6, 8), (8, 3), (8, 2)))
            self.reverse = reverse

        def forward(self, x):
            h = torch.tanh(self.features(x))
            return self.head(h), self.domain(self.reverse(h))

    ours = Net(nn.GradientReversal(0.3))
    hooked = copy.deepcopy(ours)
    hooked.reverse = torch.nn.Identity()
    hooked.reverse.register_full_backward_hook(lambda module, grads, _: (-0.3 * grads[0],))
    for net in (ours, hooked):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            a, b = net(x)
            (F.cross_entropy(a, label) + F.cross_entropy(b, domain)).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), hooked.parameters()):
        torch.testing.assert_close(a, b)


def test_grad_reverse_twice_differentiated():
    """The gradient is -alpha dy, and the derivative of that, through y, is reversed once more."""
    x = draw(5)
    y = fused.grad_reverse(x, 2.0)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(g, -2.0 * 2 * x)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x)[0], torch.full_like(x, 8.0))


def test_grad_reverse_reference_under_compile():
    """A hook on what is no input of the compiled function would be dropped, without a word."""
    x, v = draw(5), torch.randn(5, dtype=F64)
    compiled = torch.compile(lambda x: fused.grad_reverse(x.sin(), 0.5), backend="aot_eager", fullgraph=True)
    with fusegrad.use_reference():
        (g,) = torch.autograd.grad(compiled(x), x, v)
    torch.testing.assert_close(g, -0.5 * v * x.detach().cos())


# --- gated units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", (fused.swiglu, fused.geglu, fused.geglu_tanh, fused.reglu))
def test_slices_of_a_projection_are_read_where_they_lie(unit):
    packed = torch.randn(256, 2 * 512)
    gate, up = packed.chunk(2, -1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        y = unit(gate, up)
    asked = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0)
    assert asked <= y.nbytes + 1024
    assert torch.equal(y, unit(packed)) and torch.equal(y, unit(gate.contiguous(), up.contiguous()))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    saved, _ = saved_by(lambda: unit(gate, up))
    assert set(saved) == {gate.data_ptr(), up.data_ptr()}


def test_which_half_is_the_gate():
    x = draw(3, 8, dtype=torch.float32)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(fused.swiglu(x), F.silu(a) * b)
    torch.testing.assert_close(fused.geglu(x), F.gelu(a) * b)
    torch.testing.assert_close(fused.geglu_tanh(x), F.gelu(a, approximate="tanh") * b)
    torch.testing.assert_close(fused.reglu(x), F.relu(a) * b)
    torch.testing.assert_close(fused.glu(x), a * torch.sigmoid(b))


# --- bias_act --------------------------------------------------------------------------------------------------------------------


def test_every_activation_at_its_corners():
    """Values and derivatives at 0, at the ends of each piece and far out are torch's."""
    from fusegrad._activations import ACTIVATIONS

    points = [0.0, -0.0, 3.0, -3.0, 20.0, 20.5, -20.0, 100.0, -100.0, 1e-30, -1e-30, float("nan")]
    for name, act in ACTIVATIONS.items():
        x = torch.tensor(points, requires_grad=True)
        ours, theirs = fused.bias_act(x, activation=name, negative_slope=0.1), act(x, 0.1)
        v = torch.randn(len(points), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        # But for NaN, of which torch's scalar and vector loops have two ideas.
        grads = (torch.autograd.grad(y, x, v)[0][:-1] for y in (ours, theirs))
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}': {m}")


def test_the_gradient_of_a_bfloat16_bias_is_summed_in_float32():
    """A sum of ones stops at 256 if it is kept in bfloat16, by columns and by rows."""
    for shape, dim in (((4096, 3), 1), ((8, 3, 512), 1)):
        x, b = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
        (g,) = torch.autograd.grad(fused.bias_act(x, b, None, dim=dim).float().sum(), b)
        assert g.tolist() == [4096.0] * 3


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_an_image_keeps_its_memory_format(memory_format):
    x = torch.randn(2, 8, 5, 6).to(memory_format=memory_format).requires_grad_()
    y = fused.bias_act(x, torch.randn(8), "silu", dim=1)
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.stride() == x.stride() == g.stride()


BAD = [
    (lambda x: fused.bias_act(x, torch.ones(7)), RuntimeError, "bias_act: bias must have shape [8] (input is [4, 8], its dimension 1), got [7]"),
    (lambda x: fused.bias_act(x, torch.ones(8), dim=0), RuntimeError, "bias_act: bias must have shape [4] (input is [4, 8], its dimension 0), got [8]"),
    (lambda x: fused.bias_act(x, torch.ones(8), dim=2), IndexError, "bias_act: dim must be in [-2, 1] for input [4, 8], got 2"),
    (lambda x: fused.bias_act(x, activation="swish"), ValueError, "bias_act: activation must be one of identity, relu"),
    (lambda x: fused.bias_act(x, torch.ones(8).double()), TypeError, "bias_act: bias must be Float, got Double"),
    (lambda x: fused.linear(x, torch.ones(3, 7)), RuntimeError, "linear: weight must have shape [out, in] or [in] for input [*, in] ([4, 8]), got [3, 7]"),
    (lambda x: fused.linear(x, torch.ones(3, 8), torch.ones(2)), RuntimeError, "linear: bias must have shape [3], got [2]"),
    (lambda x: fused.linear(x, torch.ones(3, 8).half()), TypeError, "linear: weight must be torch.float32, as input is, got torch.float16"),
    (lambda x: fused.linear(x, torch.ones(3, 8), activation="x"), ValueError, "linear: activation must be one of identity"),
    (lambda x: fused.glu(x[:, :7]), RuntimeError, "glu: input must have an even size in dimension 1, got [4, 7]"),
    (lambda x: fused.exp(x.to_sparse()), RuntimeError, "exp: input must be a dense tensor, got a tensor of layout Sparse"),
    (lambda x: nn.MLP([3]), ValueError, "MLP: sizes must be at least two, got [3]"),
    (lambda x: nn.GatedMLP(3, 4, "tanh"), ValueError, "GatedMLP: activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:50] for *_, text in BAD])
def test_errors(call, error, text):
    with pytest.raises(error) as raised:
        call(torch.randn(4, 8))
    assert str(raised.value).startswith(text)


# --- linear ----------------------------------------------------------------------------------------------------------------------


def test_linear_takes_torchs_arguments_first():
    names = list(inspect.signature(fused.linear).parameters)
    assert names[:3] == ["input", "weight", "bias"] and names[3:] == ["activation"]
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    torch.testing.assert_close(fused.linear(x, w, b), F.linear(x, w, b))


@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
def test_linear_saves_the_product_only_for_an_activation(activation):
    x, w, b = (t.detach().requires_grad_() for t in (torch.randn(9, 5), torch.randn(7, 5), torch.randn(7)))
    saved, y = saved_by(lambda: fused.linear(x, w, b, activation=activation))
    extra = [t for at, t in saved.items() if at not in {x.data_ptr(), w.data_ptr(), b.data_ptr()}]
    assert [t.shape for t in extra] == ([] if activation is None else [y.shape])


def test_linear_makes_only_the_gradients_that_are_asked_for():
    """One matrix product in the backward for one factor, none for the bias alone."""
    x, w, b = torch.randn(9, 5), torch.randn(7, 5), torch.randn(7)
    for which, products in (((0,), 1), ((1,), 1), ((2,), 0), ((0, 1, 2), 2)):
        args = [t.detach().requires_grad_(i in which) for i, t in enumerate((x, w, b))]
        y = fused.linear(*args, activation="gelu")
        with torch.profiler.profile() as profile:
            torch.autograd.grad(y, [args[i] for i in which], torch.randn_like(y))
        assert sum(e.name == "aten::mm" for e in profile.events()) == products


def test_linear_under_autocast():
    layer, native = nn.Linear(8, 4), torch.nn.Linear(8, 4)
    layer.load_state_dict(native.state_dict())
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = layer(x), native(x)
    assert a.dtype == b.dtype == torch.bfloat16
    for y, m in ((a, layer), (b, native)):
        y.float().square().sum().backward()
        assert m.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, native.weight.grad, rtol=0.02, atol=0.02)


# --- MLP -------------------------------------------------------------------------------------------------------------------------


def eager_gated(mlp, x):
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "relu": F.relu}[mlp.activation]
    gate, up = F.linear(x, mlp.gate_up.weight, mlp.gate_up.bias).chunk(2, -1)
    return F.linear(act(gate) * up, mlp.down.weight, mlp.down.bias)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh", "relu"))
def test_gated_mlp_is_its_formula(activation, recompute):
    torch.manual_seed(0)
    mlp = nn.GatedMLP(6, 10, activation, bias=activation == "gelu", recompute=recompute).double()
    x = draw(2, 5, 6)
    inputs = [x, *mlp.parameters()]
    y, expected = mlp(x), eager_gated(mlp, x)
    torch.testing.assert_close(y, expected)
    v = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, inputs, v, create_graph=True) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)
    second = (torch.autograd.grad(sum(g.square().sum() for g in grads), x)[0] for grads in (ours, theirs))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("recompute", (False, True))
def test_mlp_trains_like_torchs_layers(recompute):
    """Linear-LeakyReLU-Linear-Sigmoid, step by step."""
    torch.manual_seed(0)
    native = torch.nn.Sequential(
        torch.nn.Linear(5, 9), torch.nn.LeakyReLU(0.01), torch.nn.Linear(9, 4), torch.nn.LeakyReLU(0.01), torch.nn.Linear(4, 2),
        torch.nn.Sigmoid(),
    )  # fmt: skip
    ours = nn.MLP((5, 9, 4, 2), "leaky_relu", "sigmoid", recompute=recompute)
    for layer, twin in zip((ours[0], ours[1], ours[2]), native[::2]):
        layer.load_state_dict(twin.state_dict())
    x, target = torch.randn(20, 5), torch.rand(20, 2)
    losses = []
    for net in (ours, native):
        optimizer, seen = torch.optim.Adam(net.parameters(), 0.05), []
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), target)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    torch.testing.assert_close(*losses)
    assert ours.state_dict().keys() == {f"{i}.{k}" for i in range(3) for k in ("weight", "bias")}


MLPS = ((lambda r: nn.MLP((64, 256, 256, 64), "gelu", recompute=r), 2 * 2), (lambda r: nn.GatedMLP(64, 256, recompute=r), 3))


@pytest.mark.parametrize("make, values", MLPS, ids=("MLP", "GatedMLP"))
def test_what_is_kept_for_the_backward(make, values):
    """So many values of each hidden unit and row, as docs/elementwise.md says; with recompute none."""
    torch.manual_seed(0)
    kept, results = [], []
    state = None
    for recompute in (False, True):
        mlp = make(recompute)
        state = state or mlp.state_dict()
        mlp.load_state_dict(state)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        # What outlives the forward: bytes allocated and not given back but for the output.
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            y = mlp(x)
        net = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]") - y.nbytes
        kept.append(net)
        results.append((y, *torch.autograd.grad(y, [x, *mlp.parameters()], torch.ones_like(y))))
    hidden = 32 * 256 * 4
    assert kept[0] == values * hidden and kept[1] <= hidden / 8 + torch.get_rng_state().nbytes
    torch.testing.assert_close(*results)


class Adapted(torch.nn.Module):
    """A layer with something random around it."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + F.dropout(self.base(x), 0.5)


@pytest.mark.parametrize("how", ("module", "hook", "pre-hook", "forward", "every module's hook"))
def test_recomputed_layers_draw_the_same(how, request):
    torch.manual_seed(0)
    for mlp, name in ((nn.MLP((8, 16, 4)), "0"), (nn.GatedMLP(8, 16), "gate_up")):
        layer = getattr(mlp, name)
        if how == "module":
            setattr(mlp, name, Adapted(layer))
        elif how == "hook":
            layer.register_forward_hook(lambda m, args, y: F.dropout(y, 0.5))
        elif how == "pre-hook":
            layer.register_forward_pre_hook(lambda m, args: F.dropout(args[0], 0.5))
        elif how == "forward":
            layer.forward = lambda x, layer=layer: F.dropout(nn.Linear.forward(layer, x), 0.5)
        else:
            hook = torch.nn.modules.module.register_module_forward_hook(lambda m, args, y: F.dropout(y, 0.5))
            request.addfinalizer(hook.remove)
        x, grads = draw(6, 8, dtype=torch.float32), []
        for mlp.recompute in (False, True):
            torch.manual_seed(1)
            y = mlp(x)
            torch.rand(3)  # the generator goes on between forward and backward
            grads.append((y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])))
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", (False, True))
def test_layers_compile_in_one_graph(recompute):
    torch._dynamo.reset()
    net = torch.nn.Sequential(nn.MLP((4, 6, 4), recompute=recompute), nn.GatedMLP(4, 5, "gelu", recompute=recompute))
    x = torch.randn(3, 4, requires_grad=True)
    inputs = [x, *net.parameters()]
    ours, plain = torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x)
    grads = (torch.autograd.grad(y, inputs, torch.ones_like(y)) for y in (ours, plain))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*grads)


def test_recompute_under_function_transforms():
    mlp = nn.GatedMLP(4, 6, recompute=True).double()
    x = draw(3, 4).detach()
    per_sample = torch.func.vmap(torch.func.grad(lambda t: mlp(t).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    mlp(leaf).square().sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)


def test_strict_runs_no_reference():
    x = torch.randn(4, 8, requires_grad=True)
    with fusegrad.strict():
        nn.MLP((8, 6, 8), "mish")(nn.GatedMLP(8, 12)(fused.grad_reverse(fused.cube(fused.exp(fused.scale(x, 0.1)))))).sum().backward()
    assert fusegrad.stats() == {}


@pytest.mark.parametrize("name, torchs", (("relu", F.relu), ("hardswish", F.hardswish), ("squared_relu", lambda x: F.relu(x).square())))
def test_where_an_activation_is_flat_no_gradient_passes(name, torchs):
    """Not even an infinite one or NaN."""
    x = torch.tensor([-9.0, -4.0, -3.0, -1.0, 0.0, 1.0, 5.0], dtype=torch.float32).repeat(9).requires_grad_()
    for value in (float("inf"), float("nan"), 1.0):
        dy = torch.full_like(x, value)
        found, expected = (torch.autograd.grad(f(x), x, dy)[0] for f in (lambda x: fused.bias_act(x, None, name), torchs))
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_channels():
    x, b = torch.randn(2, 0, 3, requires_grad=True), torch.zeros(0, requires_grad=True)
    dx, db = torch.autograd.grad(fused.bias_act(x, b, dim=1).sum(), (x, b))
    assert dx.shape == x.shape and db.shape == b.shape
