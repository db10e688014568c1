"""Calls under torch.func: the kernels run, and the numbers are those of a loop over the samples."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

import fusegrad
import fusegrad.functional as fused
from fusegrad import _autograd, _transforms
from fusegrad._op import OPS, Sample
from table import BF16, F32, F64, Make, call, check, cotangents, draw, names, run


def rotated(f):
    """Of q and k that are made of x, as one result."""

    def call(x, *weights):
        q = x if x.dim() > 1 else x[None]
        angles = torch.arange(q.shape[-2], dtype=F64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03] * 2, dtype=F64)
        q, k = f(q, q.cos(), *weights, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return (q * k).view(x.shape)

    return call


def of_labels(x):
    """An unreduced loss of classes where cross_entropy has them."""
    labels = torch.ones(x.select(min(1, x.dim() - 1), 0).shape, dtype=torch.int64)
    return fused.cross_entropy(x, labels, reduction="none", label_smoothing=0.1, z_loss=0.1)


# Ops whose kernels are vmapped, on (3, 8) rows or (8,) ones.
PARAMS = {"w": (8,), "b": (8,), "matrix": (6, 8), "six": (6,)}
CALLS = {
    "rms_norm": (lambda x, w: fused.rms_norm(x, (8,), w, eps=1e-3), "w"),
    "rms_norm two dims": (lambda x: fused.rms_norm(x, x.shape[-2:], eps=1e-3) if x.dim() > 1 else fused.rms_norm(x, (8,)), ""),
    "layer_norm": (lambda x, w, b: fused.layer_norm(x, (8,), w, b), "w b"),
    "bias_act": (lambda x, b: fused.bias_act(x, b, "silu", scale=0.5), "b"),
    "linear": (fused.linear, "matrix six"),
    "linear gelu": (lambda x, w, b: fused.linear(x, w, b, activation="gelu"), "matrix six"),
    "linear tanh": (lambda x, w: fused.linear(x, w, activation="tanh"), "matrix"),
    "dyt": (lambda x, w, b: fused.dyt(x, w[0], w, b), "w b"),
    "swiglu": (fused.swiglu, ""),
    "log_softmax": (lambda x: fused.log_softmax(x, 0), ""),
    "scaled_masked_softmax": (lambda x: fused.scaled_masked_softmax(x, x.cos(), scale=0.5, causal=x.dim() > 1), ""),
    "add_rms_norm": (lambda x, w: torch.mul(*fused.add_rms_norm(x, x.cos(), (8,), w, eps=1e-3)), "w"),
    "add_layer_norm": (lambda x, w, b: torch.mul(*fused.add_layer_norm(x, x.cos(), (8,), w, b)), "w b"),
    "norm": (lambda x: fused.norm(x, 0), ""),
    "normalize": (lambda x: fused.normalize(x, dim=-1), ""),
    "rotary_embedding": (rotated(fused.rotary_embedding), ""),
    "qk_norm_rope": (rotated(lambda q, k, v, w, cos, sin: fused.qk_norm_rope(q, k, v, w, cos, sin)), "w b"),
    "group_norm": (lambda x, w, b: fused.group_norm(x.reshape(-1, 8), 2, w, b, activation="silu").view(x.shape), "w b"),
    "layer_norm_2d": (lambda x, w, b: fused.layer_norm_2d(x.reshape(-1, 4, 2, 1), w[:4], b[:4]).view(x.shape), "w b"),
    "cross_entropy": (of_labels, ""),
    "cross_entropy of images": (lambda x: of_labels(x[None])[0], ""),
    "mse_loss": (lambda x: fused.mse_loss(x, x.cos(), reduction="none"), ""),
    "binary_cross_entropy_with_logits": (
        lambda x: fused.binary_cross_entropy_with_logits(x, x.sigmoid(), pos_weight=torch.full((8,), 1.5, dtype=x.dtype), reduction="none"),
        "",
    ),
    "exp": (fused.exp, ""),
}
each_call = pytest.mark.parametrize("name", CALLS)


def make(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def drawn(name, rows=(5, 3), dtype=F64):
    """The call, a loss under a random cotangent that is not linear in the result, x and the parameters."""
    f, params = CALLS[name]
    values = tuple(make(*PARAMS[p], seed=i + 1, dtype=dtype) for i, p in enumerate(params.split()))
    x = make(*rows, 8, seed=9, dtype=dtype)
    c = make(*f(x[0], *values).shape, seed=10, dtype=dtype)
    return f, lambda x, *values: (f(x, *values).sin() * c).sum(), x, values


def same(found, expected, tolerance=1e-10):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def loop(f, x, *values):
    return tuple(torch.stack(parts) for parts in zip(*(f(row, *values) for row in x)))


def plain(loss, *values):
    """The gradients by autograd, without transforms, and through the reference."""
    leaves = tuple(v.detach().clone().requires_grad_() for v in values)
    with fusegrad.use_reference():
        return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("rows", ((5, 3), (5,), (1, 2), (70, 2)), ids=str)
@each_call
def test_per_sample_gradients(name, rows):
    """Of parameters and rows, by the kernels alone; 70 small samples take the way of many."""
    f, loss, x, values = drawn(name, rows)
    every = tuple(range(1 + len(values)))
    dims = (0, *(None for _ in values))
    found = vmap(grad(loss, every), dims)(x, *values)
    many = bool(values) and rows[0] > _autograd._FEW_SAMPLES and name.split()[0] not in ("linear", "bias_act")
    assert {reason for _, reason in fusegrad.stats()} == ({"the backward is differentiated"} if many else set())
    same(found, loop(lambda *v: plain(loss, *v), x, *values))
    for which in itertools.chain(every, [every[1:]] if values else []):
        expected = found[which] if isinstance(which, int) else [found[i] for i in which]
        same(vmap(grad(loss, which), dims)(x, *values), expected)


@each_call
def test_kernels_run(name):
    """What the profiler sees: no reference beneath vmap(grad)."""
    f, loss, x, values = drawn(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        vmap(grad(loss), (0, *(None for _ in values)))(x, *values)
    ours = {e.key.removeprefix("fusegrad::") for e in profile.key_averages() if e.key.startswith("fusegrad::")}
    if name != "linear":  # whose products are torch's
        assert any(k.endswith("_fwd") for k in ours) and any(k.endswith("_bwd") for k in ours)
    assert not fusegrad.stats()


@each_call
def test_dimensions_chunks_and_nesting(name):
    f, loss, x, values = drawn(name)
    none = tuple(None for _ in values)
    every = tuple(range(1 + len(values)))
    expected = vmap(grad(loss, every), (0, *none))(x, *values)
    same(vmap(grad(loss, every), (1, *none))(x.movedim(0, 1), *values), expected)
    same([g.movedim(-1, 0) for g in vmap(grad(loss, every), (-1, *none), -1)(x.movedim(0, -1), *values)], expected)
    same(vmap(grad(loss, every), (0, *none), chunk_size=2)(x, *values), expected)
    same(vmap(f, (2, *none), 1)(x.movedim(0, 2), *values).movedim(1, 0), torch.stack([f(row, *values) for row in x]))
    stack = torch.stack([x, 2 * x], 2)
    nested = vmap(vmap(grad(loss, every), (0, *none)), (2, *none))(stack, *values)
    same(nested, [torch.stack(p) for p in zip(*(vmap(grad(loss, every), (0, *none))(y, *values) for y in (x, 2 * x)))])
    assert not fusegrad.stats()


@each_call
def test_every_order(name):
    """Second derivatives through each nesting of transforms, and across their border with autograd: those of the reference."""
    f, loss, x, values = drawn(name)
    every = tuple(range(1 + len(values)))
    dims = (0, *(None for _ in values))

    def penalty(*v):
        return sum(g.square().sum() for g in tree_leaves(grad(loss, every)(*v)))

    def per_sample(*v):
        return sum(g.square().sum() for g in vmap(grad(loss, every), dims)(*v))

    def outside():
        leaves = tuple(v.clone().requires_grad_() for v in (x, *values))
        found = vmap(grad(loss, every), dims)(*leaves)
        return torch.autograd.grad(sum(g.square().sum() for g in found), leaves)

    def batched():
        leaves = tuple(v.clone().requires_grad_() for v in (x, *values))
        y = f(*leaves)
        g = torch.stack([torch.ones_like(y), y.detach()])
        return vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(g)

    def of_a_pullback(transform):
        y, pull = vjp(f, x[0], *values)
        return transform(pull, y.detach())

    def everything():
        yield grad(penalty, every)(x[0], *values)
        yield vmap(grad(penalty, every), dims)(x, *values)
        yield grad(per_sample, every)(x, *values)
        yield jacrev(f, every)(x[0], *values)
        yield jacrev(jacrev(loss, every), every)(x[0], *values)
        yield jacfwd(f, every)(x[0], *values)
        yield hessian(loss, every)(x[0], *values)
        yield vmap(hessian(loss, every), dims)(x[:2], *values)
        yield jvp(lambda *v: grad(loss, every)(*v), (x[0], *values), (x[1], *values))
        yield outside()
        yield batched()
        yield of_a_pullback(lambda pull, g: pull(g))
        yield of_a_pullback(lambda pull, g: vmap(pull)(torch.stack([g, 2 * g])))
        yield of_a_pullback(lambda pull, g: jvp(pull, (g,), (2 * g,)))
        yield vjp(lambda x: grad(loss)(x, *values), x[0])[1](x[1])
        yield of_a_pullback(lambda pull, g: grad(lambda g: sum(t.square().sum() for t in pull(g)))(g))

    ours = list(everything())
    with fusegrad.use_reference():
        same(ours, list(everything()))
    same(hessian(loss)(x[0], *values), jacrev(jacrev(loss))(x[0], *values))


@each_call
def test_gradcheck_of_per_sample_gradients(name):
    f, loss, x, values = drawn(name, (2, 2))
    dims = (0, *(None for _ in values))
    leaves = tuple(v.requires_grad_() for v in (x, *values))
    assert torch.autograd.gradcheck(vmap(grad(loss, tuple(range(len(leaves)))), dims), leaves, fast_mode=True)


def test_no_transform_knows_of_others():
    """grad alone takes the kernels of every op, vmap of a parameter and forward mode the reference; all of it is counted."""
    x, w = make(4, 8), make(4, 8)
    grad(lambda x: fused.mse_loss(fused.swiglu(x), x[..., 4:]))(x)
    assert not fusegrad.stats()
    vmap(lambda x, w: fused.rms_norm(x, (8,), w))(x, w)
    vmap(lambda x: fused.batch_norm(x, None, None, training=True))(make(3, 4, 8))
    vmap(lambda x: fused.mse_loss(x, x.cos()))(x)
    vmap(lambda x: fused.add_rms_norm(x, x, (8,), p=0.5), randomness="same")(x)
    tables = make(2, 4, 8), make(2, 4, 8)
    vmap(lambda x: fused.rotary_embedding(x, x, *tables))(make(3, 2, 1, 4, 8))
    jvp(lambda x: fused.swiglu(x), (x,), (x,))
    torch.func.functionalize(lambda x: fused.swiglu(x))(x)
    assert fusegrad.stats() == {
        ("rms_norm", "a parameter is vmapped"): 1,
        ("batch_norm", "vmap has no kernel"): 1,
        ("mse_loss", "vmap of a reduced loss has no kernel"): 1,
        ("add_rms_norm", "vmap of a dropout has no kernel"): 1,
        ("rotary_embedding", "vmap has no kernel where each item has tables of its own"): 1,
        ("swiglu", "forward mode is active"): 1,
        ("swiglu", "a transform other than grad and vmap is active"): 1,
    }


def test_some_arguments_alone():
    """A gate that is vmapped beside an `up` that is not, and the other way round."""
    gate, up = make(5, 3, 8), make(3, 8, seed=1)
    for dims in ((0, None), (None, 0)):
        values = (gate, up) if dims[0] == 0 else (up, gate)
        found = vmap(grad(lambda g, u: fused.swiglu(g, u).sin().sum(), (0, 1)), dims)(*values)
        assert not fusegrad.stats()
        for i in range(5):
            one = (gate[i], up) if dims[0] == 0 else (up, gate[i])
            same([g[i] for g in found], plain(lambda g, u: fused.swiglu(g, u).sin().sum(), *one))


@pytest.mark.parametrize("dims", ((0, 0), (None, 0), (1, -1), (0, None)), ids=str)
@pytest.mark.parametrize("shape", ((3, 8), (8,), (3, 8, 2)), ids=str)
def test_labels_of_each_sample(shape, dims):
    """Cross entropy of classes with weights: logits and labels vmapped along any dimension, or one of them alone."""
    labels_shape = (*shape[:-1][:1], *shape[2:])
    x, w = make(*((5, *shape) if dims[0] is not None else shape)), make(8).abs()
    labels = torch.randint(8, (5, *labels_shape) if dims[1] is not None else labels_shape, generator=torch.Generator().manual_seed(1))

    def loss(x, labels):
        return fused.cross_entropy(x, labels, w, reduction="none", label_smoothing=0.1, ignore_index=3).sin().sum()

    of_x, of_labels = (t if d is None else t.movedim(0, d) for t, d in zip((x, labels), dims))
    found = vmap(grad(loss), dims)(of_x, of_labels)
    assert not fusegrad.stats()
    for i in range(5):
        one, its_labels = (t if d is None else t[i] for t, d in zip((x, labels), dims))
        same(found[i], plain(lambda x, labels=its_labels: loss(x, labels), one)[0])


def test_functionalize_of_running_statistics():
    """They are among its arguments, as what a functional call changes has to be."""
    x, found = make(6, 4).float(), []
    for nn in (fusegrad.nn, torch.nn):
        norm = nn.BatchNorm1d(4)
        state = dict(norm.named_parameters()) | dict(norm.named_buffers())
        y = torch.func.functionalize(lambda state, x, norm=norm: torch.func.functional_call(norm, state, (x,)))(state, x)
        found.append([y, *norm.state_dict().values()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", ({}, dict(reduction="sum", label_smoothing=0.2, z_loss=0.1), dict(weight=True)), ids=str)
def test_one_label_of_each_sample(options):
    """Logits [C] and a label without dimensions are a sample's, and reduced."""
    x, labels = make(5, 8), torch.tensor([1, 0, 7, 3, 2])
    options = options | (dict(weight=make(8).abs()) if "weight" in options else {})
    for f in (grad, torch.func.hessian):
        found = vmap(f(lambda x, label: fused.cross_entropy(x, label, **options)))(x, labels)
        for i in range(5):
            same([found[i]], [f(lambda x, label: fused.cross_entropy(x, label, **options))(x[i], labels[i])])


def test_ensembles():
    """Stacked models, and per-sample gradients of each."""
    torch.manual_seed(3)
    nn = fusegrad.nn
    models = [torch.nn.Sequential(nn.Linear(8, 12, activation="gelu"), nn.LayerNorm(12), nn.Linear(12, 4)).double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x, target = make(5, 8), make(5, 4, seed=1)

    def loss(params, buffers, x, target):
        return (functional_call(models[0], (params, buffers), (x,)) - target).square().mean()

    of_all = vmap(vmap(grad(loss), (None, None, 0, 0)), (0, 0, None, None))(params, buffers, x, target)
    together = vmap(grad(loss), (0, 0, None, None))(params, buffers, x, target)
    for i, model in enumerate(models):
        fusegrad.reset_stats()
        single = vmap(grad(loss), (None, None, 0, 0))(dict(model.named_parameters()), {}, x, target)
        assert not fusegrad.stats()
        for k, p in model.named_parameters():
            same(of_all[k][i], single[k])
            same(single[k].mean(0), together[k][i])
            expected = torch.autograd.grad((model(x) - target).square().mean(), p)[0]
            same(together[k][i], expected)


def test_randomness():
    """What draws stays with torch's rules."""
    x = make(4, 1000)
    f = vmap(lambda x: fused.dropout(fused.bias_act(x), 0.5), randomness="different")
    masks = f(x) == 0
    assert not torch.equal(masks[0], masks[1])
    masks = vmap(lambda x: fused.dropout(fused.bias_act(x), 0.5), randomness="same")(x) == 0
    assert torch.equal(masks[0], masks[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda x: fused.dropout(fused.bias_act(x), 0.5))(x)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("name", ("rms_norm", "layer_norm", "bias_act", "linear"))
def test_within_the_budget_of_a_loop(name, dtype):
    """Each sample's values and gradients are within the budget of the call on that sample alone."""
    op = OPS[name]
    kwargs = op.bench(Make(dtype), 24, 40)
    keys = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]
    x, *values = (kwargs[k] for k in keys)
    batch = torch.stack([x[i : i + 8] for i in range(0, 24, 8)])
    (c,) = cotangents((op.functional(**kwargs | {keys[0]: x[:8]}),))

    def f(*values):
        y, pull = vjp(lambda *v: op.functional(**kwargs | dict(zip(keys, v))), *values)
        return y, *pull(c)

    found = vmap(f, (0, *(None for _ in values)))(batch, *values)
    assert not fusegrad.stats()
    for i in range(3):
        sample = Sample("", kwargs | {keys[0]: batch[i]})
        results = {"output 0": found[0][i]} | {f"gradient of {k}": g[i] for k, g in zip(keys, found[1:])}
        check(op, sample, results, (c,))


WITHOUT = {
    "vmap of a reduced loss has no kernel",
    "vmap of a dropout has no kernel",
    "vmap has no kernel where each item has tables of its own",
}


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.fn.params is not None], ids=lambda op: op.name)
def test_more_rows_is_what_the_rule_says(op):
    """Of every op with a rule, each sample of the table as a batch of three: the kernels on each alone, or where the rule says that
    it has none for such a call the reference."""
    of_kernels = 0
    for name in names(op):
        fusegrad.reset_stats()
        kwargs = draw(op, name, F64).kwargs
        x, k = next((v, k) for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
        batch = torch.stack([x, x * 0.5, x + 0.25])

        def f(x, kwargs=kwargs, k=k):
            return call(op, Sample("", kwargs | {k: x}))

        found = vmap(f, randomness="same")(batch)
        of_kernels += not fusegrad.stats()
        assert {reason for _, reason in fusegrad.stats()} <= WITHOUT
        for i, row in enumerate(batch):
            same([y[i] for y in found], f(row))
    assert of_kernels >= 3


def test_create_graph_runs_the_kernel():
    """The first gradient is the kernel's, bit for bit; the reference is asked when that is differentiated, and not before."""
    for op in (OPS["rms_norm"], OPS["layer_norm"], OPS["swiglu"], OPS["linear"], OPS["cross_entropy"], OPS["softmax"]):
        fusegrad.reset_stats()
        sample = draw(op, names(op)[0])
        cotangent = cotangents(call(op, sample))
        expected = run(op, sample, cotangent)
        leaves = {k: v.detach().clone().requires_grad_() for k, v in sample.kwargs.items() if f"gradient of {k}" in expected}
        outputs = call(op, Sample("", sample.kwargs | leaves))
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangent, create_graph=True)
        assert not fusegrad.stats() and all(g.requires_grad for g in grads)
        assert all(torch.equal(g, expected[f"gradient of {k}"]) for g, k in zip(grads, leaves))
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()), allow_unused=True)
        assert fusegrad.stats() == {(op.name, "the backward is differentiated"): 1}


def test_gradients_that_are_the_incoming_one():
    """A residual's gradient is the tensor that came in: it is differentiated like any other."""
    x, r = make(4, 8).requires_grad_(), make(4, 8, seed=1).requires_grad_()

    def f(x, r):
        return fused.bias_dropout_add(x, None, r, p=0.0) * r

    assert torch.autograd.gradgradcheck(f, (x, r))
    same(grad(lambda r: f(x.detach(), r).sum())(r.detach()), x.detach() + 2 * r.detach())


@pytest.mark.parametrize("without", ("_BASE", "known"))
def test_without_private_names(monkeypatch, without):
    f, loss, x, values = drawn("layer_norm")
    expected = vmap(grad(loss, (0, 1, 2)), (0, None, None))(x, *values)
    monkeypatch.setattr(_transforms, without, None if without == "_BASE" else False)
    same(vmap(grad(loss, (0, 1, 2)), (0, None, None))(x, *values), expected)
    assert bool(fusegrad.stats()) == (without == "known")


def test_compiled():
    f, loss, x, values = drawn("rms_norm", dtype=F32)
    transformed = vmap(grad(loss, 1), (0, None))
    compiled = torch.compile(transformed, backend="aot_eager")
    same(compiled(x, *values), transformed(x, *values), 1e-5)
