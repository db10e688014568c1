"""fuse and unfuse: what is replaced, what is not and why, and that nothing else of a model changes."""

import copy
import functools
import io
import math
import pickle
import random
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as TF
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusegrad
from fusegrad import nn
from fusegrad._activations import ACTIVATIONS

TORCHS = sorted(name for name in nn.__all__ if hasattr(torch.nn, name))
SIZES = {"Linear": (6, 4), "GroupNorm": (2, 6), "LinearCrossEntropyLoss": (6, 5), "Softmax": (-1,), "LogSoftmax": (-1,)}
SIZES |= {name: (6,) for name in ("LayerNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")}


def snapshot(model):
    """All that fuse must not touch, by identity where it has one."""
    return (
        [(k, id(p), p._version) for k, p in model.named_parameters(remove_duplicate=False)],
        [(k, id(b), b._version) for k, b in model.named_buffers(remove_duplicate=False)],
        [(k, id(m), m.training) for k, m in model.named_modules(remove_duplicate=False)],
        [(k, v.tolist()) for k, v in model.state_dict().items()] if not any(p.is_meta for p in model.parameters()) else None,
        torch.get_rng_state().tolist(),
    )


def whole(model):
    return [(k, type(m), {a: v for a, v in vars(m).items() if not a.startswith("_")}) for k, m in model.named_modules()]


def by_name(entries):
    return {e.name: e for e in entries}


def results(model, *inputs):
    """Output and all gradients under a random cotangent."""
    torch.manual_seed(3)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = model(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype))
    grads = [x.grad for x in leaves] + [p.grad for p in model.parameters()]
    model.zero_grad()
    return [y.detach(), *grads]


def fused_alike(model, *inputs):
    """fuse(model), which computes the same before and after, and in between; returns the report."""
    model, inputs = model.double(), [x.double() for x in inputs]
    original, before, state = copy.deepcopy(model), snapshot(model), whole(model)
    report = fusegrad.fuse(model)
    assert snapshot(model) == before
    torch.testing.assert_close(results(model, *inputs), results(original, *inputs))
    torch.testing.assert_close([b for b in model.buffers()], [b for b in original.buffers()])
    for entry in report.replaced:
        assert type(model.get_submodule(entry.name)).__module__.startswith("fusegrad.")
        assert isinstance(model.get_submodule(entry.name), type(original.get_submodule(entry.name)))
    assert model(*inputs).stride() == original(*inputs).stride()
    assert len(fusegrad.unfuse(model)) == len(report.replaced)
    assert whole(model) == state
    fusegrad.fuse(model)
    return report


@pytest.mark.parametrize("name", TORCHS)
def test_each_layer_of_torch_is_replaced_by_ours(name):
    layer = getattr(torch.nn, name)(*SIZES.get(name, ()))
    model = torch.nn.ModuleDict({"layer": layer})
    before, attributes = snapshot(model), dict(vars(layer))
    if name == "Linear":
        with pytest.raises(ValueError, match="1 x Linear: no activation follows"):
            fusegrad.fuse(model)
        return
    report = fusegrad.fuse(model)
    assert [(e.name, e.layer, e.by) for e in report.replaced] == [("layer", name, f"fusegrad.nn.{name}()")]
    assert type(layer) is getattr(nn, name) and snapshot(model) == before
    ours = getattr(nn, name)(*SIZES.get(name, ()))
    assert {k for k in vars(layer) if k != "_fused_from"} == set(vars(ours)) and repr(layer) == repr(ours)
    assert fusegrad.unfuse(model) == ("layer",)
    assert type(layer) is getattr(torch.nn, name) and vars(layer) == attributes


ACTS = {
    "relu": torch.nn.ReLU, "relu_inplace": lambda: torch.nn.ReLU(inplace=True), "leaky_relu": torch.nn.LeakyReLU,
    "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "gelu": torch.nn.GELU, "gelu_tanh": lambda: torch.nn.GELU("tanh"),
    "silu": torch.nn.SiLU, "softplus": torch.nn.Softplus, "elu": torch.nn.ELU, "mish": torch.nn.Mish, "hardswish": torch.nn.Hardswish,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_linear_takes_in_the_activation_behind_it(name):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), ACTS[name](), torch.nn.Linear(7, 3))
    report = fused_alike(model, torch.randn(4, 5))
    first, act = report.replaced
    assert (first.name, first.by) == ("0", f"fusegrad.nn.Linear(activation={name.removesuffix('_inplace')!r})")
    assert (act.name, act.by) == ("1", "joined to the Linear before it")
    assert [(e.name, e.layer) for e in report.kept] == [("2", "Linear")] and "torch's" in report.kept[0].why


@pytest.mark.parametrize(
    "act", [lambda: torch.nn.LeakyReLU(0.3), lambda: torch.nn.ELU(0.5), torch.nn.PReLU, torch.nn.RReLU, lambda: torch.nn.Softplus(2.0),
            torch.nn.ReLU6, lambda: torch.nn.CELU(0.5), torch.nn.Softsign, lambda: torch.nn.Hardtanh(-7, 7)]
)  # fmt: skip
def test_an_activation_that_is_another_one_is_not_taken_in(act):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), act())
    report = fusegrad.fuse(model, dry_run=True)
    assert not report.replaced and set(by_name(report.kept)) == {"0", "1"}


@pytest.mark.parametrize("norm, act, shape", [
    (lambda: torch.nn.GroupNorm(2, 6), torch.nn.SiLU, (3, 6, 4, 4)),
    (lambda: torch.nn.BatchNorm2d(6), lambda: torch.nn.ReLU(inplace=True), (3, 6, 4, 4)),
    (lambda: torch.nn.BatchNorm1d(6, momentum=None), torch.nn.GELU, (5, 6)),
    (lambda: torch.nn.BatchNorm3d(6, affine=False), torch.nn.Mish, (3, 6, 2, 2, 2)),
], ids=["group_silu", "batch2_relu", "batch1_gelu", "batch3_mish"])  # fmt: skip
def test_norms_take_in_the_activation_behind_them(norm, act, shape):
    model = torch.nn.Sequential(norm(), torch.nn.Identity(), act())
    report = fused_alike(model, torch.randn(shape))
    assert [e.name for e in report.replaced] == ["0", "2"] and "activation=" in report.replaced[0].by
    evaluated = copy.deepcopy(model).eval()
    fusegrad.unfuse(model)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(evaluated(x), model.eval()(x))


def test_dropouts_in_a_row_are_one():
    model = torch.nn.Sequential(*(torch.nn.Dropout(p) for p in (0.1, 0.2, 0.5)))
    report = fusegrad.fuse(model)
    assert [e.by for e in report.replaced][1:] == ["joined to the Dropout before it"] * 2 and model[0].p == pytest.approx(0.64)
    y = model(torch.ones(100_000))
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.36) < 5 * math.sqrt(0.36 * 0.64 / 100_000)  # five standard deviations
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.36))
    assert model.eval()(y) is y
    fusegrad.unfuse(model)
    assert [m.p for m in model] == [0.1, 0.2, 0.5]
    model.train()[1].eval()
    assert "joined" not in str(fusegrad.fuse(model, dry_run=True))  # the middle one drops at another time


class Block(torch.nn.Module):
    """A forward in code: its own pair, a pair in a list, a pair that something comes between, one whose activation is used twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        self.steps = torch.nn.ModuleList([torch.nn.GroupNorm(2, 4), torch.nn.SiLU()])
        self.between, self.between_act = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        self.twice, self.twice_act = torch.nn.BatchNorm2d(4), torch.nn.GELU()

    def forward(self, x):
        x = self.act(self.norm(x))
        for step in self.steps:
            x = step(x)
        x = self.between_act(self.between(x) + 1)
        return self.twice_act(self.twice_act(self.twice(x)))


def test_pairs_in_a_forward_that_can_be_followed():
    report = fused_alike(Block(), torch.randn(2, 4, 3, 3))
    assert {e.name for e in report.replaced if "joined" in e.by} == {"act", "steps.1"}
    assert {e.name for e in report.replaced} == {"norm", "act", "steps.0", "steps.1", "between", "twice"}
    why = by_name(report.kept)
    assert "called elsewhere too" in why["twice_act"].why and "no layer before it" in why["between_act"].why


class Unfollowed(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class TwoInputs(Block):
    def forward(self, x, skip=None):
        return super().forward(x) if skip is None else x


class Sometimes(Block):
    def forward(self, x):
        if self.training:
            return super().forward(x)
        return self.norm(x)


class WithGradients(Block):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else self.norm(x)


class AtRandom(Block):
    def forward(self, x):
        return super().forward(x) if random.random() < 2.0 else x


class AtTorchsRandom(Block):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) < 2.0 else x


@pytest.mark.parametrize("cls", [Unfollowed, TwoInputs, Sometimes, WithGradients, AtRandom, AtTorchsRandom])
def test_no_pair_where_the_way_may_change(cls):
    report = fusegrad.fuse(cls())
    names = {e.name for e in report.replaced}
    assert "norm" in names and "act" not in names  # the norm alone
    if cls not in (Sometimes, WithGradients):
        assert not any("joined" in e.by for e in report.replaced)


def test_a_pair_that_a_forward_elsewhere_takes_apart():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.ReLU()
            self.one = torch.nn.Sequential(torch.nn.Linear(4, 4), self.act)
            self.features = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())

        def forward(self, x):
            seen = []
            for layer in self.features:
                x = layer(x)
                seen.append(x)
            return self.one(self.act(x)) + seen[0]

    report = fusegrad.fuse(Outer(), dry_run=True)
    assert not report.replaced
    assert {e.name for e in report.kept if "called elsewhere" in e.why} == {"one.0", "act", "features.0", "features.1"}
    assert by_name(report.kept)["act"].also == ("one.1",)


class Keeping(torch.nn.Module):
    """Somebody may look at what is between the two layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.act, self.seen = torch.nn.BatchNorm1d(4), torch.nn.ReLU(), []
        self.steps = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())

    def forward(self, x):
        return self.act(self.norm(x))


class InAnAttribute(Keeping):
    def forward(self, x):
        self.between = self.norm(x)
        return self.act(self.between)


class InAList(Keeping):
    def forward(self, x):
        self.seen.append(self.norm(x))
        return self.act(self.seen[-1])


class InAMethod(Keeping):
    def features(self, x):
        return self.norm(x)


class InALoop(Keeping):
    def forward(self, x, more=None):
        for step in self.steps:
            x = step(x)
            self.seen.append(x)
        return x


class ByIndex(Keeping):
    def forward(self, x, more=None):
        return self.steps[0](x)


@pytest.mark.parametrize("cls", [InAnAttribute, InAList, InAMethod, InALoop, ByIndex])
def test_no_pair_where_somebody_looks_between(cls):
    model, parts = cls(), {"norm", "act"} if cls not in (InALoop, ByIndex) else {"steps.0", "steps.1"}
    report = fusegrad.fuse(model, dry_run=True)
    assert not {e.name for e in report.replaced if "joined" in e.by} & parts
    if cls in (InALoop, ByIndex):
        assert all("may call one alone" in by_name(report.kept)[name].why for name in ("steps.1",))


class Harmless(Keeping):
    """What its other code reads of the layers is nothing that a joined pair changes."""

    def forward(self, x, more=None):
        return self.steps(self._run(x)) if more is None else x

    def _run(self, x):
        return self.steps(x)

    def sizes(self):
        return self.norm.weight.shape, [p.shape for p in self.steps.parameters()]


@pytest.mark.parametrize("wrapper", [torch.compile, torch.optim.swa_utils.AveragedModel])
def test_pairs_within_wrappers_of_torch(wrapper):
    model = wrapper(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()))
    assert len(fusegrad.fuse(model, dry_run=True).replaced) == 2


class Saved(Keeping):
    def forward(self, x, more=None):
        return self.steps(x)

    def save(self):
        return self.steps.state_dict()


def test_a_pair_whose_owner_leaves_it_whole():
    assert any("joined" in e.by for e in fusegrad.fuse(Saved(), dry_run=True).replaced)
    report = fused_alike(Harmless(), torch.randn(3, 4))
    assert {e.name for e in report.replaced if "joined" in e.by} == {"steps.1"}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_hook_between_two_layers_keeps_them_apart(register, which):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    getattr(model[which], register)(lambda *args: None)
    report = fusegrad.fuse(model)
    assert [e.name for e in report.replaced] == ["0"] and "a hook sees" in report.kept[0].why
    assert model[0].activation is None


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_full_backward_hook"])
def test_a_hook_on_all_modules_keeps_them_apart(register):
    hook = getattr(torch.nn.modules.module, register)(lambda *args: None)
    try:
        report = fusegrad.fuse(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()), dry_run=True)
    finally:
        hook.remove()
    assert [e.name for e in report.replaced] == ["0"] and "a hook sees" in report.kept[0].why


def test_hooks_stay_and_fire():
    model, seen = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Softmax(-1)), []
    handles = [
        model[0].register_forward_pre_hook(lambda m, a: seen.append("pre")),
        model[0].register_forward_hook(lambda m, a, y: seen.append("forward")),
        model[0].register_full_backward_hook(lambda m, g, h: seen.append("backward")),
        model[0].weight.register_hook(lambda g: seen.append("weight")),
        model.register_state_dict_post_hook(lambda *a: seen.append("state")),
    ]
    fusegrad.fuse(model)
    model(torch.randn(3, 4, requires_grad=True)).square().sum().backward()
    model.state_dict()
    assert sorted(seen) == ["backward", "forward", "pre", "state", "weight"]
    handles[0].remove()
    model(torch.randn(3, 4))
    assert seen.count("pre") == 1


def test_ties_sharing_optimizer_and_flags():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight
            self.norm = torch.nn.RMSNorm(8, eps=1e-5)
            self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), self.norm, torch.nn.Linear(8, 8), self.norm)
            self.norms = torch.nn.ModuleList([self.norm])

        def forward(self, ids):
            return self.head(self.norms[0](self.body(self.embed(ids))))

    model = Tied().double()
    model.body[0].weight.requires_grad_(False)
    model.norm.eval()
    ids, labels = torch.arange(6), torch.arange(6).flip(0)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, plain)]

    def step(m, optimizer):
        optimizer.zero_grad()
        loss = TF.cross_entropy(m(ids), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    curves = [[step(model, optimizers[0])], [step(plain, optimizers[1])]]
    before, keys = snapshot(model), list(model.state_dict())
    report = fusegrad.fuse(model)
    assert snapshot(model) == before and list(model.state_dict()) == keys
    entry = by_name(report.replaced)["norm"]
    assert entry.also == ("body.2", "body.4", "norms.0") and sum(e.layer == "RMSNorm" for e in report.replaced) == 1
    assert model.norm is model.body[2] is model.body[4] is model.norms[0] and type(model.norm) is nn.RMSNorm
    assert model.head.weight is model.embed.weight and not model.norm.training and not model.body[0].weight.requires_grad
    for curve, m, optimizer in zip(curves, (model, plain), optimizers):
        curve += [step(m, optimizer) for _ in range(5)]
    torch.testing.assert_close(*curves)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


class Written(torch.nn.Module):
    """Norms as people write them, each with what it must become; None if it is something else."""

    def __init__(self, kind, bias=False, n=40):
        super().__init__()
        self.kind, self.variance_epsilon = kind, 1e-3
        self.weight = torch.nn.Parameter(torch.randn(n) * 0.3 + 1)
        self.register_parameter("bias", torch.nn.Parameter(torch.randn(n)) if bias else None)

    def forward(self, x):
        a = x.float() if x.dtype != torch.float64 else x
        mean = a.pow(2).mean(-1, keepdim=True)
        h = a * torch.rsqrt(mean + self.variance_epsilon)
        if self.kind == "llama":
            return self.weight * h.to(x.dtype)
        if self.kind == "gemma":
            return (h * (1 + self.weight.to(a.dtype))).to(x.dtype)
        if self.kind == "torch":
            return (h * self.weight.to(a.dtype)).to(x.dtype)
        if self.kind == "outside":
            return self.weight * (a / (mean.sqrt() + self.variance_epsilon)).to(x.dtype)
        if self.kind == "squared":
            return self.weight.square() * h.to(x.dtype)
        if self.kind == "double":
            return 2 * self.weight * h.to(x.dtype)
        dim = 1 if self.kind == "image" else -1
        mean = a.mean(dim, keepdim=True)
        h = (a - mean) / (a.var(dim, correction=0, keepdim=True) + self.variance_epsilon).sqrt()
        shape = (-1, 1, 1) if self.kind == "image" else (-1,)
        h = h * self.weight.view(shape)
        return (h if self.bias is None else h + self.bias.view(shape)).to(x.dtype)


@pytest.mark.parametrize("kind, by", [
    ("llama", "fusegrad.nn.RMSNorm(weight_offset=0.0, cast_order='llama')"),
    ("gemma", "fusegrad.nn.RMSNorm(weight_offset=1.0, cast_order='torch')"),
    ("torch", "fusegrad.nn.RMSNorm(weight_offset=0.0, cast_order='torch')"),
])  # fmt: skip
def test_written_rms_norms(kind, by):
    model = Written(kind)
    fused = copy.deepcopy(model)
    (entry,) = fusegrad.fuse(fused).replaced
    assert entry.by == by and isinstance(fused, nn.RMSNorm) and isinstance(fused, Written)
    for dtype, param in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                         (torch.float16, torch.float32)):  # fmt: skip
        x = torch.randn(50, 40).to(dtype)
        for m in (model, fused):
            m.weight.data = m.weight.data.to(param)
        with torch.no_grad():
            ours, theirs = fused(x), model(x)
        assert ours.dtype == theirs.dtype
        if dtype.itemsize == 2:  # the order of casts, in bits
            assert (ours != theirs).double().mean() < 0.01
            other = nn.RMSNorm(40, 1e-3, weight_offset=fused.weight_offset, cast_order="torch" if kind == "llama" else "llama")
            other.weight = torch.nn.Parameter(model.weight.detach().to(dtype))
            assert (other(x) != theirs).double().mean() > 0.05
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind, bias, cls", [("rows", False, nn.LayerNorm), ("rows", True, nn.LayerNorm), ("image", True, nn.LayerNorm2d)])
def test_written_layer_norms(kind, bias, cls):
    model = torch.nn.Sequential(Written(kind, bias, n=6))
    fused_alike(model, torch.randn(2, 6, 3, 6))
    assert isinstance(model[0], cls)


class Promoting(torch.nn.Module):
    """A layer norm whose float32 weight makes the result of 16-bit rows float32, as some models write it."""

    def __init__(self, rounds):
        super().__init__()
        self.eps, self.rounds = 1e-5, rounds
        self.weight, self.bias = torch.nn.Parameter(torch.ones(6)), torch.nn.Parameter(torch.zeros(6))

    def forward(self, x):
        a = x.float()
        h = (a - a.mean(-1, keepdim=True)) * torch.rsqrt(a.var(-1, correction=0, keepdim=True) + self.eps)
        y = self.weight * h.to(x.dtype) + self.bias
        return y.to(x.dtype) if self.rounds else y


def test_a_layer_norm_keeps_the_dtype_of_its_result():
    assert not fusegrad.fuse(Promoting(False), dry_run=True).replaced
    model, x = Promoting(True), torch.randn(5, 6).bfloat16()
    expected = model(x)
    fusegrad.fuse(model)
    assert isinstance(model, nn.LayerNorm) and model(x).dtype == expected.dtype
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["outside", "squared", "double"])
def test_what_looks_like_a_norm_and_is_none(kind):
    report = fusegrad.fuse(Written(kind), dry_run=True)
    assert not report.replaced and report.kept[0].why == "fusegrad has no layer for it"


class OtherGradient(torch.nn.Module):
    """The values of what fusegrad has, and gradients of another one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.eps = kind, 1e-5
        self.weight = torch.nn.Parameter(torch.ones(6))

    def forward(self, x):
        a = x.float()
        root = (a.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.kind == "weight":
            return self.weight.detach() * (a * root).to(x.dtype)
        return self.weight * (a * root.detach()).to(x.dtype)


class StraightThroughReLU(torch.nn.Module):
    def forward(self, x):
        return x + (x.relu() - x).detach()


class ClampedReLU(torch.nn.Module):
    def forward(self, x):
        return x.relu().clamp(max=90)


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_a_norm_with_another_gradient_is_kept(kind):
    assert not fusegrad.fuse(OtherGradient(kind), dry_run=True).replaced


@pytest.mark.parametrize("act", [StraightThroughReLU, ClampedReLU])
def test_an_activation_with_another_gradient_or_bound_is_kept(act):
    model = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(5, 7), act()), GatedMLP(act(), "gate first")])
    assert not fusegrad.fuse(model, dry_run=True).replaced
    assert not fusegrad.fuse(NormAct(4, act), dry_run=True).replaced


class Labelled(torch.nn.Linear):
    activation = "none of ours"


def test_a_layer_with_an_attribute_of_our_name_is_kept():
    norm = torch.nn.BatchNorm1d(7)
    norm.activation = "none of ours"
    model = torch.nn.Sequential(Labelled(5, 7), torch.nn.ReLU(), norm, torch.nn.ReLU())
    report = fusegrad.fuse(model, dry_run=True)
    assert not report.replaced and "an attribute of its own where ours has one (activation)" in by_name(report.kept)["2"].why


class Composed(torch.nn.Module):
    """The activation of some models, of eight kernels."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class ComposedGELU(Composed):
    pass


def test_an_activation_in_python_code_is_one_kernel():
    report = fused_alike(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), ComposedGELU()), torch.randn(2, 3, 4, 4))
    assert [(e.name, e.by) for e in report.replaced] == [("1", "fusegrad.nn.BiasAct(activation='gelu_tanh')")]


class GEGLU(torch.nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * TF.gelu(gate)


class WideReLU(torch.nn.Module):
    def forward(self, x):
        return TF.relu(x.float())


@pytest.mark.parametrize("act", [torch.nn.GLU, GEGLU, WideReLU])
def test_what_changes_shape_or_dtype_is_no_activation(act):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), act(), torch.nn.Softmax(-1))
    report = fusegrad.fuse(model)
    assert "0" not in by_name(report.replaced) and ("1" in by_name(report.replaced)) is (act is torch.nn.GLU)


class GatedMLP(torch.nn.Module):
    def __init__(self, act, order, packed=False):
        super().__init__()
        self.order, self.act_fn = order, act
        if packed:
            self.both = torch.nn.Linear(6, 20)
        else:
            self.w1, self.w3 = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)
        self.w2 = torch.nn.Linear(10, 6)

    def forward(self, x):
        if hasattr(self, "both"):
            gate, up = self.both(x).chunk(2, dim=-1)
        else:
            gate, up = self.w1(x), self.w3(x)
        if self.order == "up first":
            return self.w2(up * self.act_fn(gate))
        if self.order == "clamped":
            return self.w2(self.act_fn(gate) * up.clamp(-1, 1))
        return self.w2(self.act_fn(gate) * up)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["gate first", "up first"])
@pytest.mark.parametrize("name, act", [("swiglu", torch.nn.SiLU), ("geglu", torch.nn.GELU), ("geglu_tanh", ComposedGELU),
                                       ("reglu", torch.nn.ReLU)])  # fmt: skip
def test_gated_mlps(name, act, order, packed):
    model = torch.nn.Sequential(GatedMLP(act(), order, packed))
    report = fused_alike(model, torch.randn(3, 6))
    assert {e.name: e.by for e in report.replaced} == {"0": f"fusegrad.functional.{name}", "0.act_fn": "in the kernel of its GatedMLP"}


def test_a_gate_of_another_width_or_dtype():
    """One for many columns, which torch broadcasts; and a part that is kept in float32, say."""
    model = torch.nn.Sequential(GatedMLP(torch.nn.SiLU(), "gate first"))
    model[0].w1 = torch.nn.Linear(6, 1)
    assert "0" in by_name(fused_alike(model, torch.randn(3, 6)).replaced)
    part = GatedMLP(torch.nn.SiLU(), "gate first")
    part.w1.register_forward_hook(lambda m, args, y: y.double())
    part.w2.double()
    x = torch.randn(3, 6)
    expected = part(x)
    fusegrad.fuse(part)
    torch.testing.assert_close(part(x), expected)


def test_what_looks_like_a_gated_mlp_and_is_none():
    report = fusegrad.fuse(GatedMLP(torch.nn.SiLU(), "clamped"), dry_run=True)
    assert "" not in by_name(report.replaced)  # gate and its activation are a pair, as in any forward
    assert by_name(report.replaced)["w1"].by == "fusegrad.nn.Linear(activation='silu')"

    class Kept(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down, self.act = *(torch.nn.Linear(4, 4) for _ in range(3)), torch.nn.SiLU()

        def forward(self, x):
            self.hidden = self.act(self.gate(x))
            return self.down(self.hidden * self.up(x))

    assert {e.name for e in fusegrad.fuse(Kept(), dry_run=True).replaced} == {"gate", "act"}  # a pair, whose result is still there
    model = GatedMLP(torch.nn.Sigmoid(), "gate first")
    assert "its activation must be silu" in by_name(fusegrad.fuse(model, dry_run=True).kept)[""].why


class NormAct(torch.nn.BatchNorm2d):
    """Norm and activation in one module, as libraries of image models have them."""

    def __init__(self, n, act=torch.nn.ReLU, factor=1):
        super().__init__(n)
        self.drop, self.act, self.factor = torch.nn.Identity(), act(), factor

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(0)
        return self.act(self.drop(super().forward(x))) * self.factor


class LayerNorm2d(torch.nn.LayerNorm):
    def forward(self, x):
        return TF.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def test_layers_of_image_models():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 1), NormAct(6), torch.nn.Conv2d(6, 6, 1), LayerNorm2d(6), NormAct(6, torch.nn.Identity)
    )
    report = fused_alike(model, torch.randn(2, 3, 4, 4))
    assert {e.name: e.by for e in report.replaced} == {
        "1": "fusegrad.nn.BatchNorm2d(activation='relu')", "1.act": "in the kernel of its NormAct", "3": "fusegrad.nn.LayerNorm2d()",
        "4": "fusegrad.nn.BatchNorm2d()",
    }  # fmt: skip
    assert not fusegrad.fuse(NormAct(6, factor=2), dry_run=True).replaced


def model_of_each():
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU(), Written("llama", n=6), GatedMLP(torch.nn.SiLU(), "gate first"))


def test_copies_pickles_and_devices():
    model = model_of_each()
    x = torch.randn(3, 6)
    plain = model(x)
    fusegrad.fuse(model)
    y = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(other(x), y) and [type(m) for m in other] == [type(m) for m in model]
        fusegrad.unfuse(other)
        assert torch.equal(other(x), plain) and [type(m) for m in model] != [type(m) for m in other]
    fusegrad.unfuse(model)
    assert torch.equal(model(x), plain)

    with torch.device("meta"):
        empty = model_of_each()
        report = fusegrad.fuse(empty)
    assert len(report.replaced) == 5 and all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(empty(x), y)


def test_fused_models_compile_and_differentiate_twice():
    model = model_of_each().double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(model)
    fusegrad.fuse(model)
    assert torch.autograd.gradgradcheck(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    per_sample = torch.func.vmap(torch.func.grad(lambda x, m=model: m(x).square().sum()))
    torch.testing.assert_close(per_sample(x), torch.autograd.grad(plain(x).square().sum(), x)[0])


class Collecting(Block):
    """Its forward leaves traces, which must not be there after fuse has followed it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counted", torch.zeros(()))
        self.seen, self.calls, self.total, self.nested = [], 0, torch.zeros(()), {"a": {"b": 0}}
        self.norm.seen = []

    def forward(self, x):
        self.counted.add_(1)
        self.total += 1
        self.calls += 1
        self.seen.append(x)
        self.nested["a"]["b"] += 1
        self.norm.seen.append(x)
        self.norm.num_batches_tracked.add_(1)
        self.norm.eps = 0.5
        return super().forward(x)


def test_following_a_forward_leaves_no_trace():
    model = Collecting()
    report = fusegrad.fuse(model)
    assert "joined" in str(report)  # it was followed
    assert (model.seen, model.calls, model.total.item(), model.counted.item()) == ([], 0, 0, 0)
    assert (model.nested, model.norm.seen, model.norm.num_batches_tracked, model.norm.eps) == ({"a": {"b": 0}}, [], 0, 1e-5)


def test_following_a_forward_draws_nothing():
    model, torchs, pythons = torch.nn.ModuleList([AtRandom(), AtTorchsRandom()]), torch.get_rng_state(), random.getstate()
    fusegrad.fuse(model)
    assert torch.equal(torch.get_rng_state(), torchs) and random.getstate() == pythons


def test_dry_run_changes_nothing():
    model = torch.nn.ModuleList([model_of_each(), Block()])
    before, state = snapshot(model), whole(model)
    report = fusegrad.fuse(model, dry_run=True)
    assert snapshot(model) == before and whole(model) == state
    assert fusegrad.fuse(model) == report
    text = str(report)
    assert text.startswith(f"ModuleList: {len(report.replaced)} replaced, {len(report.kept)} kept\n")
    for entry in (*report.replaced, *report.kept):
        assert (entry.by or entry.why) in text and entry.layer in text and bool(entry.by) != bool(entry.why)
    assert len(text.splitlines()) < len(report.replaced) + len(report.kept)  # alike ones share a line


@pytest.mark.parametrize("op", [fusegrad.fuse, fusegrad.unfuse], ids=["fuse", "unfuse"])
def test_no_module(op):
    for wrong, name in ((torch.nn.LayerNorm, "LayerNorm"), (None, "NoneType"), (torch.ones(3), "Tensor"), ({}, "dict")):
        with pytest.raises(TypeError, match=f"{op.__name__}: model must be a torch.nn.Module, got .*{name}"):
            op(wrong)
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.LayerNorm(4)))
    with pytest.raises(TypeError, match=f"{op.__name__}: model must not be scripted"):
        op(scripted)


@pytest.fixture
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("part", ("", "2"))
@pytest.mark.parametrize("dry_run", (False, True))
def test_e3_what_fully_shard_was_given_is_refused(part, dry_run, mesh):
    """As a whole, though only a part of it is sharded."""
    model = model_of_each()
    fully_shard(model.get_submodule(part), mesh=mesh)
    before = whole(model)
    text = f"fuse: model must not be sharded already (fuse it before fully_shard), got FSDP{'Written at 2' if part else 'Sequential'}"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        fusegrad.fuse(model, dry_run=dry_run)
    assert whole(model) == before


def shard(model, mesh):
    fusegrad.fuse(model)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(model, of=lambda parallel: parallel):
    parallel = DistributedDataParallel(model)
    fusegrad.fuse(of(parallel))
    return parallel


WAYS = {
    "before fully_shard": shard,
    "before DistributedDataParallel": lambda model, mesh: fusegrad.fuse(model) and DistributedDataParallel(model),
    "after DistributedDataParallel": lambda model, mesh: wrap(model),
    "its module": lambda model, mesh: wrap(model, lambda parallel: parallel.module),
}


@pytest.mark.parametrize("way", WAYS)
def test_e3_fused_models_in_parallel(way, mesh):
    """Three steps are those of the plain model."""
    plain = model_of_each().double()
    parallel = WAYS[way](copy.deepcopy(plain), mesh)
    x, losses = torch.randn(8, 6, dtype=torch.float64), []
    assert any(isinstance(m, nn.Linear) and m.activation for m in parallel.modules())
    for model in (plain, parallel):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3])


@pytest.mark.parametrize("activation", (None, "relu"))
def test_what_torch_makes_of_a_batch_norm(activation):
    """torch's conversions copy what its own layer has: they are right without an activation, and lose it, as the docs say. What fuse
    has joined is whole again after unfuse, and then converted."""
    conv, norm = torch.nn.Conv2d(3, 6, 3).eval(), nn.BatchNorm2d(6, activation=activation).eval()
    with torch.no_grad():
        for t in (*norm.parameters(), *norm.buffers()):
            t.copy_(torch.rand(t.shape) + 0.5)
    x = torch.randn(2, 3, 8, 8)
    expected, plain = norm(conv(x)), torch.nn.BatchNorm2d(6).eval()
    plain.load_state_dict(norm.state_dict())
    before = plain(conv(x))
    torch.testing.assert_close(before if activation is None else before.relu(), expected)
    for convert in CONVERSIONS:
        torch.testing.assert_close(convert(conv, norm)(x), before)

        model = torch.nn.Sequential(conv, plain, torch.nn.ReLU()).eval()
        y = model(x)
        fusegrad.fuse(model)
        fusegrad.unfuse(model)
        torch.testing.assert_close(model[2](convert(*model[:2])(x)), y)


CONVERSIONS = (
    fuse_conv_bn_eval,
    lambda conv, norm: torch.nn.Sequential(conv, torch.nn.SyncBatchNorm.convert_sync_batchnorm(norm)),
)


def test_parts_that_cannot_be_changed_say_why():
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    own = torch.nn.LayerNorm(4)
    own.forward = lambda x: x
    model = torch.nn.ModuleDict({
        "scripted": torch.jit.script(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.ReLU())),
        "pair": torch.nn.Sequential(parametrized, torch.nn.ReLU()),
        "own": own, "lazy": torch.nn.LazyBatchNorm1d(), "ours": nn.LayerNorm(4), "embedding": torch.nn.Embedding(3, 4),
    })  # fmt: skip
    with pytest.raises(ValueError, match="fuse: model must have a layer that can be replaced, got ModuleDict .*Embedding: fusegrad has no"):
        fusegrad.fuse(model)
    model["norm"] = torch.nn.LayerNorm(4)
    report = fusegrad.fuse(model)
    assert [e.name for e in report.replaced] == ["norm"]
    why = {e.name: e.why for e in report.kept}
    assert why["scripted"] == "it is scripted" and not any(name.startswith("scripted.") for name in why)
    assert why["pair.0"] == "it is parametrized" and why["own"] == "its forward is set on the object"
    assert "not there yet" in why["lazy"] and why["ours"] == "it is a layer of fusegrad"
    again = fusegrad.fuse(model, dry_run=True)
    assert not again.replaced and by_name(again.kept)["norm"].why == "it is fused already"
    with pytest.raises(ValueError, match="it is fused already"):
        fusegrad.fuse(model)


def test_unfuse_says_what_is_wrong():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.ReLU())
    with pytest.raises(ValueError, match="unfuse: model must have a fused layer, got Sequential without one"):
        fusegrad.unfuse(model)
    fusegrad.fuse(model)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match="unfuse: 1 must have the class that fuse gave it, got ParametrizedLinear"):
        fusegrad.unfuse(model)
    assert type(model[0]) is nn.LayerNorm  # nothing is restored by halves
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert fusegrad.unfuse(model) == ("0", "1", "2")


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_joined_layers_are_restored_together_or_not_at_all(part, copied):
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Dropout(0.2), torch.nn.Dropout(0.3), torch.nn.LayerNorm(4))
    fusegrad.fuse(model)
    if copied:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    error = "whole groups of joined layers, got a Dropout where it is one of 3 layers that are joined, and 1 of them are in it"
    error = error if part == 0 else error.replace("a Dropout", "a FusedDropout")
    with pytest.raises(ValueError, match=error):
        fusegrad.unfuse(model[part])
    with pytest.raises(ValueError, match="0 is one of 3 layers that are joined, and 2"):
        fusegrad.unfuse(model[:2])
    assert fusegrad.unfuse(model[3]) == ("",)
    assert fusegrad.unfuse(model) == ("0", "1", "2") and [m.p for m in model[:3]] == [0.1, 0.2, 0.3]


def test_a_failure_half_way_takes_all_back(monkeypatch):
    class Stubborn(torch.nn.LayerNorm):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = torch.nn.Sequential(torch.nn.RMSNorm(4), torch.nn.Linear(4, 4), torch.nn.ReLU(), Stubborn(4))
    state = whole(model)
    with pytest.raises(RuntimeError, match="no"):
        fusegrad.fuse(model)
    assert whole(model) == state


def test_activations_are_known_by_their_values():
    from fusegrad._fuse_rules import _activation

    for name, function in ACTIVATIONS.items():
        made = type("Activation", (torch.nn.Module,), {"forward": lambda self, x, f=function: f(x, 0.01)})
        assert _activation(made()) == (None if name == "identity" else (name, 0.01))


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def counted(forward):
    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        self.calls += 1
        return forward(self, *args, **kwargs)

    return call


def hidden(forward):
    """Not in a variable that could be seen."""
    functions = [forward]
    return functools.wraps(forward)(lambda *args, **kwargs: functions[0](*args, **kwargs))


class Attention(torch.nn.Module):
    calls = 0

    def turned(self, q, k, cos, sin):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return torch.cat((q, k), 1)


@pytest.mark.parametrize("decorators", [(), (counted,), (counted, counted), (hidden,)], ids=lambda d: "-".join(f.__name__ for f in d))
def test_a_forward_with_decorators_turns_by_our_kernel(decorators):
    forward = functools.reduce(lambda f, decorator: decorator(f), decorators, Attention.turned)
    model = type("Turning", (Attention,), {"forward": forward})()
    args = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = model(*args)
    report = fusegrad.fuse(model, dry_run=True)
    assert bool(report.replaced) is (hidden not in decorators)
    if report.replaced:
        fusegrad.fuse(model)
        before, inner = model.calls, type(model).forward
        torch.testing.assert_close(model(*args), expected)
        assert model.calls == before + len(decorators) and inner is not forward
        while hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        assert "apply_rotary_pos_emb" not in inner.__code__.co_names
        fusegrad.unfuse(model)
        assert type(model).forward is forward
