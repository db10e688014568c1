"""F: leaving torch. F1 is ONNX by both exporters, checked and run by onnxruntime; F2 `torch.export` and TorchScript traces."""

import copy
import io
from collections import defaultdict

import onnx
import onnxruntime
import pytest
import torch
from torch.onnx import TrainingMode

import fusegrad
from fusegrad import _samples, nn
from fusegrad._op import OPS
from modules import Every, flat, free_dim, modules, other


def reductions():
    """Every loss with each of its reductions."""
    z, p, labels = torch.randn(5, 7), torch.softmax(torch.randn(5, 7), 1), torch.randint(7, (5,))
    calls = dict(CrossEntropyLoss=(z, labels), LinearCrossEntropyLoss=(torch.randn(5, 16), labels))
    calls |= dict.fromkeys(("KLDivLoss", "JSDivLoss"), (z.log_softmax(1), p))
    for name in (name for name in nn.__all__ if name.endswith("Loss")):
        sizes = (16, 7) if name == "LinearCrossEntropyLoss" else ()
        for reduction in ("none", "sum", "mean", *(["batchmean"] if name in ("KLDivLoss", "JSDivLoss") else [])):
            yield getattr(nn, name)(*sizes, reduction=reduction), None, calls.get(name, (z, p))


torch.manual_seed(0)
ONCE = [*modules(), *reductions()]
each_module = pytest.mark.parametrize("module, args", [(m, a) for m, _, a in ONCE], ids=[type(m).__name__ for m, *_ in ONCE])
SEEN = defaultdict(list)  # by what made the graph: how far each result of onnxruntime is from ours
# Both exporters warn of themselves, of Python numbers in traces, and of what is not installed.
pytestmark = pytest.mark.filterwarnings("ignore")


def legacy(model, args, names, free, **options):
    """The graph that the exporter on TorchScript makes, the dimensions free[name] of each argument being free."""
    file = io.BytesIO()
    axes = {name: {dim: f"{name}_{dim}" for dim in dims} for name, dims in free.items()}
    torch.onnx.export(model, args, file, dynamo=False, input_names=names, dynamic_axes=axes, **{"opset_version": 17} | options)
    return onnx.load_from_string(file.getvalue())


def by_export(model, args, names, free, **options):
    """The graph that the exporter on torch.export makes."""
    shapes = tuple({dim: torch.export.Dim.DYNAMIC for dim in free[name]} for name in names)
    return torch.onnx.export(model, args, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False, **options).model_proto


def session(graph, **options):
    """To run a graph in; it is sound, made of standard operators only, and no input or output of it hangs in the air."""
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    inputs, sources = {i.name for i in graph.graph.input}, defaultdict(set)  # which of the inputs each value is made of
    sources.update({name: {name} for name in inputs})
    for node in graph.graph.node:
        made_of = set().union(*(sources[name] for name in node.input))
        sources.update(dict.fromkeys(node.output, made_of))
    made_of = [sources[y.name] for y in graph.graph.output]
    assert all(made_of) and set().union(*made_of) == inputs
    how = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(how, name, value)
    return onnxruntime.InferenceSession(graph.SerializeToString(), how, providers=["CPUExecutionProvider"])


def compare(ran, expected, exporter):
    for a, b in zip(ran, expected, strict=True):
        a, b = torch.from_numpy(a), b.detach()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        SEEN[exporter].append(((a - b).abs().max() / b.abs().max().clamp(min=1)).item())


@pytest.fixture(autouse=True, scope="module")
def _figures():
    """docs/export.md has them."""
    yield
    print(f"\n{len(ONCE)} modules", end="")
    for exporter, differences in SEEN.items():
        print(f"\n{exporter}: {len(differences)} results, largest difference {max(differences):.1e}")


def run(session, args):
    """The results, whose sizes are those that the graph declares, where it declares a number."""
    ran = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args)})
    for declared, result in zip(session.get_outputs(), ran):
        assert [
            size if isinstance(size, str) or size is None else fact for size, fact in zip(declared.shape, result.shape)
        ] == declared.shape
    return ran


def test_every_module_is_exported():
    assert {type(m).__name__ for m, *_ in ONCE} == set(nn.__all__)


# Opset, and whether constants are folded. 14 is the first that has triu, which a causal mask is made with.
OPTIONS = ((14, True), (17, False), (18, True), (20, False))


@each_module
def test_f1_legacy_exporter(module, args):
    """Two calls of two sizes agree: nothing of the first was folded into the graph. Where nothing is folded parameters are initializers
    by their names, and those of another model give its results: no result hides in a constant."""
    module, names = drawn(module).eval(), [f"x{i}" for i in range(len(args))]
    again = other(module, args)
    for opset, folding in OPTIONS:
        what = f"older exporter, opset {opset}, {'folded' if folding else 'not folded'}"
        free = {name: (free_dim(module),) for name in names}
        graph = legacy(module, args, names, free, opset_version=opset, do_constant_folding=folding)
        ran = session(graph)
        compare(run(ran, args), flat(module(*args)), what)
        compare(run(ran, again), flat(module(*again)), what)
        if not folding:
            compare(run(session(changed(graph, module)), args), flat(module(*args)), what)
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(flat(module(*args)), flat(module(*again))))


def step(module):
    """Other parameters, no two alike: exporters keep those that are equal once."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


def drawn(module):
    module = copy.deepcopy(module)
    step(module)
    return module


def changed(graph, module):
    """The graph after a step of training, by its initializers, and the module too."""
    held = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name, p in module.named_parameters():
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(held[name]).copy()), p)
    step(module)
    for name, p in module.named_parameters():
        held[name].CopyFrom(onnx.numpy_helper.from_array(p.detach().numpy(), name))
    return graph


@each_module
def test_f1_training_mode(module, args):
    """What a step of training computes, but for what is drawn at random."""
    names = [f"x{i}" for i in range(len(args))]
    for mode in (TrainingMode.TRAINING, TrainingMode.PRESERVE):
        exported, trained = (copy.deepcopy(module).train() for _ in range(2))
        graph = legacy(exported, args, names, {name: (free_dim(module),) for name in names}, training=mode)
        ran, kinds = session(graph), {node.op_type for node in graph.graph.node}
        assert exported.training
        if getattr(module, "p", 0):
            assert "Dropout" in kinds
        else:
            compare(run(ran, args), flat(trained(*args)), "older exporter, training")
            again = other(module, args)
            compare(run(ran, again), flat(trained(*again)), "older exporter, training")


@pytest.mark.parametrize(
    "module", (nn.Dropout(0.25), nn.BiasDropoutAdd(50, p=0.25), nn.AddLayerNorm(50, p=0.25)), ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("export", (lambda *call: legacy(*call, training=TrainingMode.PRESERVE), by_export), ids=("legacy", "by_export"))
def test_f1_dropout_in_training(module, export):
    """It is ONNX's operator, which draws its own bits, anew in each run; of zeros and ones the sum shows what it dropped."""
    args = (torch.ones(64, 50), torch.zeros(64, 50))[: 1 if isinstance(module, nn.Dropout) else 2]
    names = [f"x{i}" for i in range(len(args))]
    graph = export(module.train(), args, names, {name: (0,) for name in names})
    # Left to itself onnxruntime takes a dropout between two sums for one of inference, of plain torch code too.
    level = onnxruntime.GraphOptimizationLevel
    ran = session(graph, graph_optimization_level=level.ORT_DISABLE_ALL if isinstance(module, nn.BiasDropoutAdd) else level.ORT_ENABLE_ALL)
    first, second = (torch.from_numpy(run(ran, [torch.cat([a, a]) for a in args])[-1]) for _ in range(2))
    assert first.shape == (128, 50) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs((first == 0).double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 6400) ** 0.5  # five standard deviations


def test_f1_exporter_on_torch_export():
    """All modules in one graph, as most of an export's time does not depend on the graph."""
    chosen = [drawn(m).eval() for m, *_ in ONCE]
    calls = tuple(tuple(a.clone() for a in args) for *_, args in ONCE)  # one input of a graph for each, though they are drawn once
    model = Every(chosen)
    free = tuple(tuple({free_dim(m): torch.export.Dim.DYNAMIC} for _ in args) for m, args in zip(chosen, calls))
    program = torch.onnx.export(model, (calls,), dynamo=True, dynamic_shapes=(free,), verbose=False, optimize=False)
    plain = program.model_proto
    program.optimize()  # as by default
    ran = session(program.model_proto)
    for given in (calls, tuple(other(m, args) for m, args in zip(chosen, calls))):
        compare(run(ran, flat(given)), flat(model(given)), "exporter on torch.export")
    compare(run(session(changed(plain, model)), flat(calls)), flat(model(calls)), "exporter on torch.export")


def test_f1_running_statistics_of_an_export_in_training():
    """The exporter runs the model: they move as those of torch's layer do, in either mode, and stand still without."""
    x = torch.randn(6, 4)
    for training in (TrainingMode.TRAINING, TrainingMode.PRESERVE, TrainingMode.EVAL):
        layers = nn.BatchNorm1d(4, activation="relu").train(), torch.nn.BatchNorm1d(4).train()
        for layer in layers:
            legacy(layer, (x,), ["x"], {"x": (0,)}, training=training)
        torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
        assert (layers[0].num_batches_tracked == 0) == (training is TrainingMode.EVAL)


def test_f1_batch_norm_in_training_on_torch_export():
    """A step by the statistics of the batch, of any size; those of the model stand still, as nothing runs it."""
    layer, y = drawn(nn.BatchNorm1d(4, activation="relu")).train(), torch.randn(9, 4)
    graph = by_export(layer, (torch.randn(6, 4),), ["x"], {"x": (0,)})
    assert layer.num_batches_tracked == 0
    compare(run(session(graph), (y,)), flat(layer(y)), "batch norm in training, exporter on torch.export")


class Decoder(torch.nn.Module):
    """A layer of a language model, with its loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(13, 16), nn.RMSNorm(16, weight_offset=1.0)
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.rope, self.softmax = nn.RotaryEmbedding(8), nn.ScaledMaskedSoftmax(scale=8**-0.5, causal=True)
        self.add, self.mlp = nn.AddRMSNorm(16, p=0.1), nn.GatedMLP(16, 24, recompute=True)
        self.end, self.head = nn.BiasDropoutAdd(16, p=0.1), nn.LinearCrossEntropyLoss(16, 13, logit_softcap=30.0)

    def forward(self, tokens, target):
        h = self.embed(tokens)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(q, k)
        attended = (self.softmax(q @ k.transpose(-1, -2)) @ v).transpose(1, 2).flatten(2)
        normed, h = self.add(self.out(attended), h)
        h = self.end(self.mlp(normed), h)
        return self.head(h.flatten(0, 1), target.flatten()), h


class Image(torch.nn.Module):
    """A block of a residual network on images of any size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(n, 8, 3, padding=1, bias=False) for n in (3, 8))
        self.norm, self.end = nn.BatchNorm2d(8, activation="relu"), nn.BatchNorm2d(8, activation="silu")
        self.group, self.across = nn.GroupNorm(2, 8, activation="gelu"), nn.LayerNorm2d(8)
        self.head, self.loss = nn.Linear(8, 5, activation="tanh"), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, image, label):
        x = self.norm(self.first(image))
        x = self.across(self.group(self.end(self.second(x), x)))
        z = self.head(x.mean((2, 3)))
        return z, self.loss(z, label)


def tokens(batch, length):
    return torch.randint(13, (batch, length)), torch.randint(13, (batch, length))


MODELS = {
    "decoder": (Decoder, tokens, {"tokens": (0, 1), "target": (0, 1)}, ((2, 6), (3, 11), (1, 2))),
    "image": (Image, lambda n, h, w: (torch.randn(n, 3, h, w), torch.randint(5, (n,))), {"image": (0, 2, 3), "label": (0,)},
              ((2, 6, 5), (3, 9, 8))),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_f1_models_of_any_size(name):
    """Batch, length and image size are free, and nothing folded: other sizes and numbers agree."""
    make, draw, free, sizes = MODELS[name]
    model = make().eval()
    ran = session(by_export(model, draw(*sizes[0]), list(free), free))
    for size in sizes:
        args = draw(*size)
        compare(run(ran, args), flat(model(*args)), "models, exporter on torch.export")


def watched(model, backward):
    """The model with hooks of every kind that only look, those of the backward too if asked."""
    seen = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda m, args: seen.append(m))
        part.register_forward_hook(lambda m, args, y: seen.append(m))
        if backward:
            part.register_full_backward_hook(lambda m, gx, gy: seen.append(m))
            part.register_full_backward_pre_hook(lambda m, gy: seen.append(m))
    return model, seen


@pytest.mark.parametrize("export", (by_export, legacy))
def test_f1_hooks_and_flags_do_not_leak(export):
    """Neither into the graph nor back into the model: flags, buffers and hooks are as before, and gradients can be had."""
    make, draw, free, sizes = MODELS["image"]
    torch.manual_seed(0)
    plain = make().eval()
    torch.manual_seed(0)
    model, seen = watched(make(), backward=export is by_export)  # TorchScript traces no module that has hooks of the backward
    model.eval()
    if export is by_export:  # the older exporter sets every part as the model is, torch's own too
        model.loss.train()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    args = draw(*sizes[0])
    a, b = (export(m, args, list(free), free) for m in (plain, model))
    kinds = [[node.op_type for node in graph.graph.node if node.op_type != "Identity"] for graph in (a, b)]
    assert kinds[0] == kinds[1]
    assert [m.training for m in model.modules()] == flags and torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export()
    assert all(type(v) is torch.Tensor and torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(v) is torch.Tensor for v in model.buffers())
    seen.clear()
    model.eval()
    args = draw(*sizes[1])
    compare(run(session(b), args), flat(model(*args)), "models with hooks")
    fusegrad.reset_stats()
    flat(model(*args))[1].backward()
    assert set(seen) == set(model.modules()) and all(p.grad is not None for p in model.parameters()) and not fusegrad.stats()


# --- F2: torch.export, torch.compile, TorchScript ------------------------------------------------------------------------------------


class EveryOp(torch.nn.Module):
    """A benchmark's call of each op; its tensors are the arguments."""

    def __init__(self, ops, options):
        super().__init__()
        self.ops, self.options = ops, options

    def forward(self, calls):
        return [flat(op.functional(**given, **options)) for op, given, options in zip(self.ops, calls, self.options)]


def bench_calls(ops, rows):
    """The tensors of each call, and what else it takes."""
    calls = [op.bench(_samples.Make(seed=rows), rows, 16) for op in ops]
    tensors = [{k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)} for kwargs in calls]
    return tensors, [{k: v for k, v in kwargs.items() if k not in given} for kwargs, given in zip(calls, tensors)]


def test_f2_export_of_every_op():
    """One graph of all ops, each one named operator, for any number of rows."""
    ops = list(OPS.values())
    (calls, options), (others, _) = (bench_calls(ops, rows) for rows in (6, 10))
    free = [
        {k: {d: torch.export.Dim.DYNAMIC for d in range(t.dim()) if t.shape[d] != other[k].shape[d]} for k, t in call.items()}
        for call, other in zip(calls, others)
    ]
    model = EveryOp(ops, options)
    program = torch.export.export(model, (calls,), dynamic_shapes=(free,))
    named = [str(node.target) for node in program.graph.nodes if node.op == "call_function" and "fusegrad" in str(node.target)]
    assert named == [f"fusegrad.{kernel}.default" for op in ops for kernel in op.kernels if kernel.endswith("_fwd")]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for given in (calls, others):
            torch.manual_seed(17)
            found = flat(exported(given))
            torch.manual_seed(17)
            for a, b in zip(found, flat(model(given)), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_f2_trace(op):
    """A TorchScript trace is plain torch code: it is saved, runs for other rows and numbers, and is differentiated."""
    ((given,), (options,)), ((other,), _) = (bench_calls([op], rows) for rows in (6, 10))
    names = [k for k, t in given.items() if t.is_floating_point() and k not in op.constants]

    def f(*tensors):
        return tuple(flat(op.functional(**dict(zip(given, tensors)), **options)))

    traced = torch.jit.trace(f, tuple(given.values()), check_trace=not op.random)
    assert "fusegrad::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    leaves = {k: t.clone().requires_grad_(k in names) for k, t in other.items()}
    found = []
    for run in (f, traced, loaded):
        torch.manual_seed(17)
        outputs = flat(run(*leaves.values()))
        v = [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, [leaves[k] for k in names], v)))
    for other in found[1:]:
        assert [t.shape for t in other] == [t.shape for t in found[0]]
        if not op.random:  # which draws otherwise
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_f2_the_same_tensor_twice():
    """In one graph, though Dynamo takes no tensor twice."""
    x = torch.randn(4, 8, requires_grad=True)
    compiled = torch.compile(lambda x: fusegrad.functional.swiglu(x, x), fullgraph=True, backend="aot_eager")
    v = torch.randn(4, 8)
    for f in (compiled, lambda x: torch.export.export(Twice(), (x,), strict=True).module()(x)):
        y, expected = f(x), fusegrad.functional.swiglu(x, x)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, v) for y in (compiled(x), expected)))


class Twice(torch.nn.Module):
    def forward(self, x):
        return fusegrad.functional.swiglu(x, x)
