"""B: extending `torch.nn`. Each test is named after the row of docs/mission.md that it proves."""

import copy
import io
import pickle

import pytest
import torch

import fusegrad
import fusegrad.functional as F
from fusegrad import nn
from modules import Every, flat, modules
from table import BF16, DEVICE, F16, F64, cotangents

torch.manual_seed(0)
ONCE = [(m.to(DEVICE), None if n is None else n.to(DEVICE), tuple(a.to(DEVICE) for a in args)) for m, n, args in modules()]
each_module = pytest.mark.parametrize("ours, native, args", ONCE, ids=lambda m: type(m).__name__)


def call(module, args):
    """What it draws is the same each time."""
    torch.manual_seed(17)
    return flat(module(*args))


def floats(args, dtype):
    return tuple(a.to(dtype) if a.is_floating_point() else a for a in args)


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# --- B1: a module like any other -------------------------------------------------------------------------------------------------


@each_module
def test_b1_state_dict_both_ways(ours, native, args):
    ours = copy.deepcopy(ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved.keys() == ours.state_dict().keys() and all(isinstance(v, torch.Tensor) for v in saved.values())
    if native is None:
        return
    native = copy.deepcopy(native)
    assert isinstance(ours, type(native)) and repr(ours) == repr(native)
    with torch.no_grad():
        for p in native.parameters():
            p.normal_()
    ours.load_state_dict(native.state_dict(), strict=True)
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [(k, v.shape, v.dtype) for k, v in native.state_dict().items()]
    for a, b in zip(call(ours, args), call(native, args)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    native.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(call(ours, args), call(native, args)):
        torch.testing.assert_close(a, b)


@each_module
def test_b1_copies(ours, native, args):
    expected = call(copy.deepcopy(ours), args)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert repr(twin) == repr(ours) and all(a is not b for a, b in zip(twin.parameters(), ours.parameters()))
        assert equal(call(twin, args), expected)


@each_module
def test_b1_dtypes(ours, native, args):
    for dtype in (F64, F16, BF16):
        results = call(copy.deepcopy(ours).to(dtype), floats(args, dtype))
        assert {y.dtype for y in results} == {dtype}, dtype
    assert {p.dtype for p in copy.deepcopy(ours).half().parameters()} <= {F16}


@each_module
def test_b1_meta_device(ours, native, args):
    """Shapes without memory; then memory, and the state of another."""
    meta = copy.deepcopy(ours).to("meta")
    shapes = [y.shape for y in flat(meta(*(a.to("meta") for a in args)))]
    expected = copy.deepcopy(ours)
    back = meta.to_empty(device=DEVICE)
    for part in back.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    back.load_state_dict(ours.state_dict(), strict=True)
    results = call(expected, args)
    assert shapes == [y.shape for y in results] and equal(call(back, args), results)


def test_b1_default_dtype():
    try:
        torch.set_default_dtype(F64)
        for module, _, args in modules():
            assert {t.dtype for t in (*module.parameters(), *flat(module(*args)))} == {F64}, module
    finally:
        torch.set_default_dtype(torch.float32)


@each_module
def test_b1_apply_and_modes(ours, native, args):
    """apply(init_fn) reaches every parameter, train and eval every part; deep in a container too."""
    twin = copy.deepcopy(ours)
    box = torch.nn.ModuleDict({"a": torch.nn.Sequential(twin), "b": torch.nn.ModuleList([twin])})
    visited = []

    def init(part):
        visited.append(part)
        for p in part.parameters(recurse=False):
            torch.nn.init.constant_(p, 0.25)

    box.apply(init)
    assert twin in visited and all((p == 0.25).all() for p in twin.parameters())
    assert list(box.state_dict()) == [f"{place}.0.{k}" for place in "ab" for k in twin.state_dict()]
    assert len(list(box.parameters())) == len(list(twin.parameters()))
    assert not any(m.training for m in box.eval().modules()) and all(m.training for m in box.train().modules())
    if native is not None:
        native = copy.deepcopy(native).apply(init)
        for a, b in zip(call(twin.eval(), args), call(native.eval(), args)):
            torch.testing.assert_close(a, b)


def test_b1_parameter_containers():
    """Parameters in a ParameterList and a ParameterDict: those of a layer are held with it, and functionals take them."""
    layer = fusegrad.nn.LayerNorm(8)
    held = torch.nn.ModuleDict({"layer": layer, "list": torch.nn.ParameterList(layer.parameters())})
    held["dict"] = torch.nn.ParameterDict(dict(layer.named_parameters()))
    assert len(list(held.parameters())) == 2
    assert list(held.state_dict()) == ["layer.weight", "layer.bias", "list.0", "list.1", "dict.bias", "dict.weight"]
    held.double()
    x = torch.randn(3, 8, dtype=torch.float64)
    y = fusegrad.functional.layer_norm(x, (8,), held["list"][0], held["dict"]["bias"])
    assert torch.equal(y, layer(x))
    y.backward(torch.randn_like(y))
    assert layer.weight.grad is held["list"][0].grad is not None and layer.bias.grad is held["dict"]["bias"].grad is not None
    twin = copy.deepcopy(held)
    twin.load_state_dict({k: v + 1 for k, v in held.state_dict().items()})
    assert torch.equal(twin["layer"].weight, layer.weight + 1) and twin["list"][0] is twin["layer"].weight


def test_b1_compile():
    """Module.compile(): every module in one graph, with its gradients."""
    model = Every([copy.deepcopy(m).eval() for m, *_ in ONCE])
    twin = copy.deepcopy(model)
    twin.compile(backend="aot_eager", fullgraph=True)
    calls = [args for *_, args in ONCE]
    found = []
    for m in (model, twin):
        outputs = flat(m(calls))
        used = [y for y in outputs if y.requires_grad]
        found.append([*outputs, *torch.autograd.grad(used, list(m.parameters()), cotangents(used))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


class Of1(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, a):
        return self.part(a)


class Of2(Of1):
    def forward(self, a, b):
        return self.part(a, b)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@each_module
def test_b1_fx_takes_a_module_as_one_node(ours, native, args):
    """As it does torch's: what depends on sizes and on `training` is asked when the graph runs."""
    model = (Of1, Of2)[len(args) - 1](copy.deepcopy(ours).train())
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes if n.op.startswith("call")] == ["call_module"]
    for training in (True, False):
        model.train(training), traced.train(training)
        assert equal(call(traced, args), call(model, args))


def test_b1_fx_goes_into_what_is_not_ours():
    """A forward of somebody's that calls ours is followed; a module that is the whole model too."""
    x = torch.randn(3, 4, device=DEVICE)
    for model in (Of1(Twice(4, 4).to(DEVICE)), nn.Linear(4, 4).to(DEVICE)):
        traced = torch.fx.symbolic_trace(model)
        assert not [n for n in traced.graph.nodes if n.op == "call_module"]
        assert torch.equal(traced(x), model(x))
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda m, name: False
    model = Of1(nn.Linear(4, 4).to(DEVICE))
    graph = tracer.trace(model)
    assert not [n for n in graph.nodes if n.op == "call_module"]
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


def test_b1_fx_leaves_hooks_and_what_is_set_on_an_object_where_they_are():
    x = torch.randn(3, 4, device=DEVICE)
    hooked, patched = nn.Linear(4, 4).to(DEVICE), nn.Linear(4, 4).to(DEVICE)
    hooked.register_forward_hook(lambda m, args, y: 2 * y)
    hooked.register_forward_pre_hook(lambda m, args: args[0] + 1)
    patched.forward = lambda x: 3 * nn.Linear.forward(patched, x)
    for part in (hooked, patched):
        assert torch.equal(torch.fx.symbolic_trace(Of1(part))(x), part(x))


# --- B2: hooks ---------------------------------------------------------------------------------------------------------------------


def hooked(module, args):
    """What hooks of every kind are given in a forward and a backward, in order; and the gradients."""
    module, seen = copy.deepcopy(module), []
    leaves = tuple(a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in args)

    def note(name, *values):
        seen.append((name, [t.detach().clone() for t in flat(values)]))

    module.register_forward_pre_hook(lambda m, args, kwargs: note("forward pre", args), with_kwargs=True)
    module.register_forward_hook(lambda m, args, y: note("forward", args, y))
    module.register_full_backward_pre_hook(lambda m, gy: note("backward pre", gy))
    module.register_full_backward_hook(lambda m, gx, gy: note("backward", gx, gy))
    for name, p in module.named_parameters():
        p.register_hook(lambda g, name=name: note(f"gradient of {name}", g))
        p.register_post_accumulate_grad_hook(lambda p, name=name: note(f"accumulated {name}", p.grad))
    torch.manual_seed(17)
    outputs = [y for y in flat(module(*leaves)) if y.requires_grad]
    for y in outputs:
        y.register_hook(lambda g: note("gradient of a result", g))
    torch.autograd.backward(outputs, cotangents(outputs))
    return seen, [t.grad for t in (*leaves, *module.parameters())]


@each_module
def test_b2_hooks(ours, native, args):
    """They are called as often, and given the same, as around plain torch code."""
    seen, grads = hooked(ours, args)
    with fusegrad.use_reference():
        expected, plain = hooked(ours, args)
    names = [name for name, _ in seen]
    assert names[:2] == ["forward pre", "forward"] and "gradient of a result" in names
    assert names.index("backward pre") < names.index("backward")
    assert sorted(names) == sorted(name for name, _ in expected)
    assert sum(name.startswith("accumulated") for name in names) == len(list(ours.parameters()))
    for name in set(names):
        a, b = ([t for n, values in found if n == name for t in values] for found in (seen, expected))
        assert len(a) == len(b)
        if names.count(name) == 1:
            for x, y in zip(a, b):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_module
def test_b2_hooks_of_the_state(ours, native, args):
    module, seen = copy.deepcopy(ours), []
    module.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("state pre"))
    module.register_state_dict_post_hook(lambda m, state, prefix, metadata: seen.append("state"))
    module.register_load_state_dict_pre_hook(lambda m, state, *_: seen.append("load pre"))
    module.register_load_state_dict_post_hook(lambda m, keys: seen.append("load"))
    module.load_state_dict(module.state_dict())
    assert seen == ["state pre", "state", "load pre", "load"]


def test_b2_a_hook_may_change_what_it_sees():
    layer, x = nn.RMSNorm(8), torch.randn(3, 8, requires_grad=True)
    expected, v = layer(2 * x) * 3, torch.randn(3, 8)
    (gradient,) = torch.autograd.grad(expected, x, v)
    layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    layer.register_forward_hook(lambda m, args, y: y * 3)
    layer.register_full_backward_hook(lambda m, gx, gy: (gx[0] * 5,))
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, v)[0], 5 * gradient)


# --- B3 to B6 ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_b3_running_statistics_with_activation_and_residual(dims):
    """Steps of training, buffers and evaluation of batch norm, residual add and ReLU: torch's."""
    ours, native = (getattr(kind, f"BatchNorm{dims}d") for kind in (nn, torch.nn))
    ours, native = ours(4, activation="relu").double(), native(4).double()
    assert (ours.momentum, ours.eps) == (0.1, 1e-5)
    for step in range(4):
        x, r = (torch.randn(5, 4, *(3, 2, 2)[:dims], dtype=F64).add(step) for _ in range(2))
        if step == 3:
            ours.eval(), native.eval()
        leaves = [[t.clone().requires_grad_() for t in (x, r)] for _ in range(2)]
        a, b = ours(*leaves[0]), torch.relu(native(leaves[1][0]) + leaves[1][1])
        v = torch.randn_like(a)
        torch.testing.assert_close(a, b)
        grads = (torch.autograd.grad(y, [*t, *m.parameters()], v) for y, t, m in ((a, leaves[0], ours), (b, leaves[1], native)))
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(native.named_buffers()))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activations", (("relu", "sigmoid"), ("leaky_relu", "leaky_relu")), ids="-".join)
def test_b4_small_networks(activations, optimizer):
    """The first with cross entropy, the second with MSE; as fused layers and as MLP: torch's losses, step by step."""
    plain = {"relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid, "leaky_relu": torch.nn.LeakyReLU}
    torch.manual_seed(0)
    mlp = nn.MLP((6, 16, 3), *activations).double()
    fused = torch.nn.Sequential(nn.Linear(6, 16, activation=activations[0]), nn.Linear(16, 3, activation=activations[1])).double()
    native = torch.nn.Sequential(torch.nn.Linear(6, 16), plain[activations[0]](), torch.nn.Linear(16, 3), plain[activations[1]]()).double()
    for layers in ((fused[0], fused[1]), (native[0], native[2])):
        for layer, like in zip(layers, mlp.children()):
            layer.load_state_dict(like.state_dict())
    x, classes, target = torch.randn(32, 6, dtype=F64), torch.randint(3, (32,)), torch.randn(32, 3, dtype=F64)
    loss, target = ("CrossEntropyLoss", classes) if activations[1] == "sigmoid" else ("MSELoss", target)
    curves = []
    for net, of in ((mlp, nn), (fused, nn), (native, torch.nn)):
        step, loss_fn, seen = OPTIMIZERS[optimizer](net.parameters()), getattr(of, loss)(), []
        for _ in range(12):
            step.zero_grad()
            value = loss_fn(net(x), target)
            value.backward()
            step.step()
            seen.append(value.item())
        curves.append(torch.tensor(seen, dtype=F64))
    assert curves[2][-1] < curves[2][0]
    torch.testing.assert_close(curves[0], curves[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(curves[1], curves[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "ours, native, args", [c for c in ONCE if type(c[0]).__name__.endswith("Loss") and c[1]], ids=lambda m: type(m).__name__
)
def test_b5_losses(ours, native, args):
    """Value and gradient of each loss that torch.nn has, under a random weight."""
    native.load_state_dict(ours.state_dict())
    found = []
    for loss in (ours, native):
        x = args[0].double().requires_grad_()
        y = copy.deepcopy(loss).double()(x, *floats(args[1:], F64))
        found.append((y, *torch.autograd.grad(y, x, cotangents((y,)))))
    torch.testing.assert_close(*found)


def test_b6_norm_of_a_vector():
    x = torch.randn(4, 9, dtype=F64, requires_grad=True)
    for ours, theirs in (
        (F.norm(x, dim=1), torch.norm(x, dim=1)),
        (F.norm(x, dim=0, keepdim=True), torch.norm(x, dim=0, keepdim=True)),
        (F.normalize(x, dim=1), torch.nn.functional.normalize(x, dim=1)),
    ):
        v = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x, v), torch.autograd.grad(theirs, x, v))
    y = F.norm(x, dim=1)
    y.backward(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=F64))
    torch.testing.assert_close(x.grad, x.detach() / y.detach()[:, None] * torch.tensor([[1.0], [0.1], [0.01], [0.001]], dtype=F64))
