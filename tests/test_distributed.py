"""E1 to E4: data, model and tensor parallelism over two processes (gloo), and checkpoints, equal one process without them."""

import copy
import itertools
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusegrad.functional as fused
import processes
from fusegrad import nn
from fusegrad._op import OPS, Sample
from table import DEVICE, F32, F64, call, check, cotangents, diffable, draw, names, run, tensors

CLASSES = 12


class Net(torch.nn.Module):
    """Classes of items [batch, seq, 16], by layers of every kind; `devices` has those of its two halves."""

    def __init__(self, devices=(DEVICE, DEVICE), checkpointed=None, p=0.0):
        super().__init__()
        self.devices, self.checkpointed, self.p = devices, checkpointed, p
        first, second = ({"device": d, "dtype": F64} for d in devices)
        self.norm = nn.RMSNorm(16, **first)
        self.gate, self.up = nn.Linear(16, 24, **first), nn.Linear(16, 24, **first)
        self.down = nn.Linear(24, 16, **first)
        self.add_norm = nn.AddLayerNorm(16, **second)
        self.hidden = nn.Linear(16, 20, **second, activation="gelu")
        self.head = nn.Linear(20, CLASSES, bias=False, **second)

    def mlp(self, x):
        return fused.dropout(self.down(fused.swiglu(self.gate(x), self.up(x))), self.p)

    def forward(self, x):
        x = self.norm(x.to(self.devices[0]))
        h = self.mlp(x) if self.checkpointed is None else checkpoint(self.mlp, x, use_reentrant=self.checkpointed)
        h, x = (t.to(self.devices[1]) for t in (h, x))
        return self.head(self.hidden(self.add_norm(h, x)[0]))


def net(**kwargs):
    torch.manual_seed(1)
    return Net(**kwargs)


def data(items=16):
    make = torch.Generator().manual_seed(2)
    return torch.randn(items, 6, 16, generator=make, dtype=F64), torch.randint(CLASSES, (items, 6), generator=make)


def loss_of(model, x, target):
    return fused.cross_entropy(model(x).flatten(0, 1), target.to(model_device(model)).flatten(), label_smoothing=0.1, z_loss=1e-3)


def model_device(model):
    return next(reversed(list(model.parameters()))).device


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(model, batches):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for x, target in batches:
        loss = loss_of(model, x, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole(loss.detach()).cpu())
    return torch.stack(losses), [whole(p.detach()).cpu() for p in model.parameters()]


def same_training(model, rank, world):
    """Three steps of two processes, each with its items of a batch, are those of one process with the batch."""
    x, target = data(24)
    sampler = DistributedSampler(TensorDataset(x, target), world, rank, shuffle=False)
    mine = train(model, DataLoader(TensorDataset(x, target), 4, sampler=sampler))
    losses, params = train(net(), DataLoader(TensorDataset(x, target), 4 * world))
    assert len(losses) == len(mine[0]) == 3
    total = mine[0]
    dist.all_reduce(total)
    close(total / world, losses)
    close(mine[1], params)


def close(found, expected):
    """In float64, where another order of a sum shows in the last digits."""
    found, expected = ([t.detach().cpu() for t in (x if isinstance(x, list) else [x])] for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    for a, b in zip(found, expected):
        processes.note(a, b)


@pytest.fixture(autouse=True)
def _figures(request):
    processes.SEEN.clear()
    yield
    processes.report(request.node.name, len(processes.SEEN), max(processes.SEEN, default=0.0))


# --- data parallelism -----------------------------------------------------------------------------------------------------------


def e1_ddp(rank, world):
    same_training(DistributedDataParallel(net()), rank, world)


def e2_ddp_over_model_parallel(rank, world):
    """Each half of the model on a device of its own, if there are two for each process; else on the one that there is."""
    enough = torch.cuda.device_count() >= 2 * world
    devices = [f"cuda:{2 * rank + i}" if enough else DEVICE for i in range(2)]
    same_training(DistributedDataParallel(net(devices=devices)), rank, world)


def e3_fsdp(rank, world):
    mesh, model = init_device_mesh(DEVICE, (world,)), net(checkpointed=False)
    for layer in (model.norm, model.gate, model.up, model.down, model.add_norm, model.hidden):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.gate.weight, DTensor)
    same_training(model, rank, world)


# --- DTensor --------------------------------------------------------------------------------------------------------------------


def distributed(sample, mesh, dim, alike):
    """The sample with its first tensor split along dim, those of its shape too if `alike`, and the others replicated."""
    first = next(iter(tensors(sample).values()))

    def placed(t):
        split = t is first or (alike and t.shape == first.shape)
        dims = (0, dim)[-mesh.ndim :]
        return distribute_tensor(t, mesh, [Shard(d) if split and t.dim() and t.shape[d] > 1 else Replicate() for d in dims])

    return Sample(sample.name, sample.kwargs | {k: placed(v) for k, v in tensors(sample).items()})


def test_e3_every_op_has_a_rule_for_dtensors():
    """But these: torch has it for a linear layer, and the other takes what each process has."""
    assert {op.name for op in OPS.values() if op.shards is None} == {"linear", "vocab_parallel_cross_entropy"}


def the_table(turn, rank, world):
    """Every op and sample, split along one dimension or another, is within its budget."""
    meshes = init_device_mesh(DEVICE, (world,)), init_device_mesh(DEVICE, (1, world))
    for op in OPS.values():
        if op.random or (op.shards is None and op.name != "linear"):
            continue
        for i, name in enumerate(names(op)):
            sample = draw(op, name, F32)
            if i % 3 != turn or sample.kwargs.get("p"):  # every part draws its own mask
                continue
            first, cotangent, mesh = next(iter(tensors(sample).values())), cotangents(call(op, sample)), meshes[i // 3 % 2]
            split = distributed(sample, mesh, i % max(1, first.dim()), i % 2)
            leaves = {k: split.kwargs[k].requires_grad_() for k in diffable(op, split)}
            outputs = call(op, split)
            dcotangent = [distribute_tensor(g, mesh, [Replicate()] * mesh.ndim) for g in cotangent]
            grads = torch.autograd.grad(outputs, list(leaves.values()), dcotangent) if leaves else ()
            results = {f"output {i}": whole(y.detach()) for i, y in enumerate(outputs)}
            results |= {f"gradient of {k}": whole(g) for k, g in zip(leaves, grads)}
            if rank == 0:
                try:
                    check(op, sample, results, cotangent)
                except AssertionError as error:
                    raise AssertionError(f"{op.name}, sample {name}") from error
                expected = run(op, sample, cotangent)
                for what, t in results.items():
                    processes.note(t.nan_to_num(), expected[what].nan_to_num())


def e3_dtensor_0(rank, world):
    the_table(0, rank, world)


def e3_dtensor_1(rank, world):
    the_table(1, rank, world)


def e3_dtensor_2(rank, world):
    the_table(2, rank, world)


def e3_dtensor_keeps_what_is_split(rank, world):
    """Nothing is gathered that need not be: rows and sequences stay split, and columns where they are not summed over."""
    mesh = init_device_mesh(DEVICE, (world,))

    def at(*shape, dim=None):
        return distribute_tensor(torch.randn(shape), mesh, [Replicate() if dim is None else Shard(dim)])

    w, bias, labels = at(8), at(8, dim=0), distribute_tensor(torch.zeros(4, 6, dtype=torch.int64), mesh, [Shard(1)])
    for dim in (0, 1):
        x = at(4, 6, 8, dim=dim)
        norms = (fused.rms_norm(x, (8,), w), fused.layer_norm(x, (8,), w, w), fused.dyt(x, at(1), w, w), fused.normalize(x, dim=-1))
        sums = (*fused.add_rms_norm(x, x, (8,), w), *fused.add_layer_norm(x, x, (8,), w, w))
        for y in (*norms, *sums, fused.softmax(x, -1), fused.log_softmax(x, -1), fused.scaled_masked_softmax(x), fused.norm(x, -1)):
            assert y.placements == (Shard(dim),)
    for dim, ops in (
        (0, "layer_norm_2d group_norm batch_norm"),
        (1, "batch_norm"),
        (2, "layer_norm_2d batch_norm"),
        (3, "layer_norm_2d batch_norm"),
    ):
        image, channels = at(4, 6, 2, 4, dim=dim), at(6)
        rest = dict(layer_norm_2d=(), group_norm=(2,), batch_norm=(channels, channels.abs()))
        for op in ops.split():
            assert getattr(fused, op)(image, *rest[op], channels, channels).placements == (Shard(dim),)
    assert fused.batch_norm(at(4, 6, 2, dim=0), None, None, training=True).placements == (Replicate(),)
    for dim in (0, 1, 2):
        q, tables = at(2, 4, 6, 8, dim=dim), (at(6, 8), at(6, 8))
        for y in (*fused.rotary_embedding(q, q, *tables), *fused.qk_norm_rope(q, q, w, w, *tables)):
            assert y.placements == (Shard(dim),)
    tokens = at(6, 8, dim=0), at(9, 8), distribute_tensor(torch.zeros(6, dtype=torch.int64), mesh, [Shard(0)])
    for y in (fused.linear_cross_entropy(*tokens, reduction="none"), fused.linear_token_log_probs(*tokens)):
        assert y.placements == (Shard(0),)
    columns = at(4, 8, dim=1)
    biased = (
        fused.bias_act(at(4, 8), bias, "gelu"),
        fused.bias_act(columns, at(8), "silu"),
        fused.bias_dropout_add(columns, bias, columns),
    )
    gated = [gate(columns, at(4, 8)) for gate in (fused.swiglu, fused.geglu, fused.geglu_tanh, fused.reglu)]
    simple = (fused.dropout(columns), fused.scale(columns, 2.0), fused.exp(columns), fused.cube(columns), fused.grad_reverse(columns))
    pairs = (fused.mse_loss, fused.l1_loss, fused.huber_loss, fused.smooth_l1_loss, fused.kl_div, fused.js_div)
    losses = [loss(columns, at(4, 8), reduction="none") for loss in (*pairs, fused.binary_cross_entropy_with_logits)]
    losses.append(fused.sigmoid_focal_loss(columns, at(4, 8)))
    for y in (*biased, *gated, *simple, *losses):
        assert y.placements == (Shard(1),)
    assert fused.glu(at(4, 8, dim=0)).placements == (Shard(0),) and fused.glu(columns, 0).placements == (Shard(1),)
    assert fused.cross_entropy(at(4, 9, 6, dim=2), labels, reduction="none").placements == (Shard(1),)
    assert fused.rms_norm(at(4, 8, dim=1), (8,), w).placements == (Replicate(),)


def e3_dtensor_of_summands(rank, world):
    """An input that is `Partial`: the sum is taken first, and each summand has its gradient."""
    mesh = init_device_mesh(DEVICE, (world,))
    parts, w = torch.randn(world, 4, 8, dtype=F64), torch.randn(8, dtype=F64)
    ops = {
        "rms_norm": lambda x, w: fused.rms_norm(x, (8,), w),
        "add_rms_norm": lambda x, w: fused.add_rms_norm(x, x, (8,), w)[0],
        "bias_act": lambda x, w: fused.bias_act(x, w, "gelu"),
    }
    for op in ops.values():
        x, weight = parts.sum(0).requires_grad_(), w.clone().requires_grad_()
        y = op(x, weight)
        g = torch.randn(y.shape, dtype=F64)
        mine = parts[rank].to(DEVICE).requires_grad_()
        dweight = distribute_tensor(w, mesh, [Replicate()]).requires_grad_()
        z = op(DTensor.from_local(mine, mesh, [Partial()]), dweight)
        found = torch.autograd.grad(z, (mine, dweight), distribute_tensor(g, mesh, [Replicate()]))
        close([whole(z.detach()), *map(whole, found)], [y.detach(), *torch.autograd.grad(y, (x, weight), g)])


def e3_dtensor_second_order(rank, world):
    """Where gradients have to be placed anew on the way."""
    mesh = init_device_mesh(DEVICE, (world,))
    x, target = data(4)
    x, w = x[:, :, :CLASSES], torch.randn(CLASSES, dtype=F64)

    def penalty(x, w, target, spread):
        y = spread(fused.rms_norm(x, (CLASSES,), w))
        loss = fused.cross_entropy(spread(fused.bias_act(y, w, "gelu")).flatten(0, 1), target.flatten(), label_smoothing=0.1)
        g = torch.autograd.grad(loss, (x, w), create_graph=True)
        h = sum(spread(t).square().sum() for t in g)
        third = torch.autograd.grad(h, (x, w), create_graph=True)
        last = sum(spread(t).pow(3).sum() for t in third)
        return [whole(t) for t in (loss, *g, *third, *torch.autograd.grad(last, (x, w)))]

    def placed(t, placement):
        return distribute_tensor(t, mesh, [placement])

    expected = penalty(x.clone().requires_grad_(), w.clone().requires_grad_(), target, lambda t: t)
    split = placed(x, Shard(1)).requires_grad_(), placed(w, Replicate()).requires_grad_(), placed(target, Shard(1))
    for spread in (lambda t: t.redistribute(mesh, [Replicate()]), lambda t: t.redistribute(mesh, [Shard(0)])):
        close(penalty(*split, spread), expected)


def e3_dropout_of_parts(rank, world):
    """Parts drop elements of their own, a replicated tensor the same everywhere; the backward the same as the forward."""
    mesh = init_device_mesh(DEVICE, (world,))
    for placement in (Shard(0), Replicate()):
        x = distribute_tensor(torch.ones(40, 50), mesh, [placement]).requires_grad_()
        norms = (
            (lambda x, p: fused.add_rms_norm(x, x.detach() * 0, (50,), p=p)[1]),
            (lambda x, p: fused.add_layer_norm(x, x.detach() * 0, (50,), p=p)[1]),
        )
        for f in (fused.dropout, lambda x, p: fused.bias_dropout_add(x, None, x.detach() * 0, p), *norms):
            y = f(x, 0.5)
            assert torch.equal(whole(torch.autograd.grad(y.sum(), x)[0]), whole(y.detach()))
            mine, parts = y.to_local().detach(), [torch.empty_like(y.to_local()) for _ in range(world)]
            dist.all_gather(parts, mine)
            assert torch.equal(parts[0], parts[1]) == placement.is_replicate() and 0.4 < (mine == 0).float().mean() < 0.6


def e3_batch_norm_of_running_statistics(rank, world):
    """Those of the whole batch, in training and after it."""
    mesh, x = init_device_mesh(DEVICE, (world,)), [torch.randn(8, 6, dtype=F64) for _ in range(3)]
    expected, model = (nn.BatchNorm1d(6, dtype=F64, activation="relu") for _ in range(2))
    distribute_module(model.to(DEVICE), mesh)
    for step, batch in enumerate(x):
        if step == 2:
            model.eval(), expected.eval()
        y = model(distribute_tensor(batch, mesh, [Shard(0)]))
        close(whole(y.detach()), expected(batch))
        close([whole(b) for b in model.buffers()][:2], list(expected.buffers())[:2])
        assert int(whole(model.num_batches_tracked)) == int(expected.num_batches_tracked)


def e3_tensor_and_sequence_parallel(rank, world):
    """A model in the layout of sequence and tensor parallelism, with the vocabulary of its head split: loss and gradients."""
    mesh, expected, (x, target) = init_device_mesh(DEVICE, (world,)), net(), data(4)
    loss_of(expected, x, target).backward()
    model = net()
    column = dict(input_layouts=Shard(1), use_local_output=False)
    plan = {
        "norm": SequenceParallel(),
        "gate": ColwiseParallel(**column),
        "up": ColwiseParallel(**column),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "hidden": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate(), use_local_output=False),
        "head": ColwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    distribute_module(model.add_norm, mesh)  # SequenceParallel knows modules of one argument
    logits = model(distribute_tensor(x, mesh, [Shard(1)]))
    assert logits.shape[-1] == CLASSES // world
    options = dict(label_smoothing=0.1, z_loss=1e-3)
    loss = fused.vocab_parallel_cross_entropy(logits.flatten(0, 1), target.flatten().to(DEVICE), mesh.get_group(), **options)
    loss.backward()
    close(loss, loss_of(expected, x, target))
    close([whole(p.grad) for p in model.parameters()], [p.grad for p in expected.parameters()])


def e3_row_parallel_with_an_activation(rank, world):
    """What each process has is a summand of the product: the activation is of the sum, wherever the result is to be."""
    mesh, x = init_device_mesh(DEVICE, (world,)), torch.randn(4, 8, dtype=F64, device=DEVICE)
    for activation, bias, layout in itertools.product(("gelu", "relu", None), (True, False), (Replicate(), Shard(0), Shard(1))):
        layer = nn.Linear(8, 6, bias=bias, activation=activation, device=DEVICE, dtype=F64)
        split = parallelize_module(copy.deepcopy(layer), mesh, RowwiseParallel(output_layouts=layout, use_local_output=False))
        results = []
        for linear, given in ((split, distribute_tensor(x, mesh, [Shard(1)])), (layer, x.clone())):
            y = linear(given.requires_grad_())
            results.append([whole(t) for t in (y, *torch.autograd.grad(y.square().sum(), (given, *linear.parameters())))])
        close(*results)


def e3_linear_of_any_placement(rank, world):
    """Input, weight and bias, each split or whole: one result, and every gradient."""
    mesh = init_device_mesh(DEVICE, (world,))
    tensors = [torch.randn(shape, dtype=F64, device=DEVICE) for shape in ((8, 6), (4, 6), (4,))]
    some, of_bias = (Replicate(), Shard(0), Shard(1)), (Replicate(), Shard(0))
    for activation in (None, "silu"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        expected = fused.linear(*leaves, activation=activation)
        right = [expected, *torch.autograd.grad(expected.square().sum(), leaves)]
        for placements in itertools.product(some, some, of_bias):
            split = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, placements)]
            y = fused.linear(*split, activation=activation)
            close([whole(t) for t in (y, *torch.autograd.grad(y.square().sum(), split))], right)


def e3_linear_cross_entropy_of_tokens(rank, world):
    mesh = init_device_mesh(DEVICE, (world,))
    x, w, target = torch.randn(9, 8, dtype=F64), torch.randn(8, 8, dtype=F64), torch.randint(8, (9,))
    target[:5] = -100  # more of them in one part
    results = []
    for place in (lambda t, p: t.clone(), lambda t, p: distribute_tensor(t, mesh, [p])):
        leaves = place(x, Shard(0)).requires_grad_(), place(w, Replicate()).requires_grad_()
        labels = place(target, Shard(0))
        losses = [f(*leaves, labels) for f in (fused.linear_cross_entropy, fused.linear_token_log_probs)]
        results.append([whole(t) for t in (losses[0], losses[1], *torch.autograd.grad(losses[0] - losses[1].mean(), leaves))])
    close(results[1], results[0])


def e3_compiled(rank, world):
    """A graph breaks at an op of a DTensor, which is what it is in eager, and its backward too; in functions and in modules."""
    mesh = init_device_mesh(DEVICE, (world,))
    torch.manual_seed(3)
    x = distribute_tensor(torch.randn(2, 4 * world, 8, dtype=F64), mesh, [Shard(1)]).requires_grad_()
    w = distribute_tensor(torch.randn(8, dtype=F64), mesh, [Replicate()]).requires_grad_()
    layer = distribute_module(nn.LayerNorm(8, dtype=F64), mesh)

    def f(x, w):
        return layer(fused.bias_act(fused.rms_norm(x, (8,), w) * 2, activation="silu") + x)

    results = []
    for g in (f, torch.compile(f, backend="aot_eager")):
        y = g(x, w)
        assert y.placements == (Shard(1),)
        grads = torch.autograd.grad(y.square().sum(), (x, w, *layer.parameters()))
        results.append([whole(t) for t in (y.detach(), *grads)])
    close(results[1], results[0])


def e3_transforms(rank, world):
    """Under grad and vmap an op of DTensors is its reference, which torch splits."""
    mesh = init_device_mesh(DEVICE, (world,))
    torch.manual_seed(4)
    x, w = torch.randn(3, 2 * world, 8, dtype=F64), torch.randn(8, dtype=F64)
    split, copied = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(w, mesh, [Replicate()])

    def loss(x, w):
        return fused.bias_act(fused.layer_norm(x, (8,), w), activation="gelu").square().sum()

    grad, per_sample = torch.func.grad(loss, (0, 1)), torch.vmap(torch.func.grad(loss), (0, None))
    close([whole(g) for g in grad(split, copied)], list(grad(x, w)))
    close(whole(per_sample(split, copied)), per_sample(x, w))
    close(whole(torch.func.grad(lambda w: loss(split, w))(copied)), grad(x, w)[1])


def e3_refusals(rank, world):
    mesh = init_device_mesh(DEVICE, (world,))
    x, w = (distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]) for _ in range(2))
    labels = distribute_tensor(torch.zeros(8, dtype=torch.int64), mesh, [Shard(0)])
    unknown = distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)])
    unknown._spec = copy.copy(unknown._spec)
    unknown._spec.placements = (Placement(),)
    elsewhere = distribute_tensor(torch.randn(8, 8), init_device_mesh(DEVICE, (1, world)), [Replicate()] * 2)
    copied, bias = (distribute_tensor(t, mesh, [p]) for t, p in ((torch.randn(8, 8), Replicate()), (torch.randn(8), Shard(0))))
    biases = bias.redistribute(mesh, [Replicate()])
    biased = "linear_token_log_probs: linear_bias must not be sharded (gather it first"
    number = fused.linear(copied, biases, torch.tensor(1.0))
    close(whole(number), fused.linear(whole(copied), whole(biases), torch.tensor(1.0)))
    for case, text in (
        (lambda: fused.linear_token_log_probs(x, copied, labels, linear_bias=bias), biased),
        (lambda: fused.linear_cross_entropy(x, copied, labels, linear_bias=bias), biased.replace("token_log_probs", "cross_entropy")),
        (lambda: fused.linear_cross_entropy(x, w, labels), "linear_cross_entropy: linear_weight must not be sharded (gather it first"),
        (lambda: fused.linear_cross_entropy(x.to_local(), w, labels.to_local()), "linear_cross_entropy: linear_weight must not be sharded"),
        (lambda: fused.vocab_parallel_cross_entropy(x, labels), "vocab_parallel_cross_entropy: there is no rule for a DTensor, got"),
        (lambda: fused.rms_norm(x, (8,), torch.ones(8)), "rms_norm: all tensors must be DTensors if one is (distribute_tensor"),
        (lambda: fused.rms_norm(torch.ones(8, 8), (8,), biases), "rms_norm: all tensors must be DTensors if one is (distribute_tensor"),
        (lambda: fused.softmax(unknown, -1), "softmax: a DTensor must be placed by Shard, Replicate or Partial, got"),
        (lambda: fused.swiglu(x, elsewhere), "swiglu: all tensors must be on the mesh"),
        (lambda: fused.linear(torch.ones(8, 8), w), "linear: all tensors must be DTensors if one is (distribute_tensor"),
        (lambda: fused.linear(x, torch.ones(8, 8)), "linear: all tensors must be DTensors if one is (distribute_tensor"),
        (lambda: fused.linear(x, copied, torch.ones(8)), "linear: all tensors must be DTensors if one is (distribute_tensor"),
        (lambda: fused.linear(x, copied, torch.ones(8), activation="silu"), "linear: all tensors must be DTensors if one is"),
        (lambda: fused.linear(unknown, copied), "linear: a DTensor must be placed by Shard, Replicate or Partial, got"),
        (lambda: fused.linear(x, elsewhere), "linear: all tensors must be on the mesh"),
        (lambda: fused.linear(x, copied, torch.ones(1, 8)), "linear: all tensors must be DTensors if one is"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            case()


CHECKS = (
    e1_ddp,
    e2_ddp_over_model_parallel,
    e3_fsdp,
    pytest.param(e3_dtensor_0, marks=pytest.mark.rotating(0)),
    pytest.param(e3_dtensor_1, marks=pytest.mark.rotating(1)),
    pytest.param(e3_dtensor_2, marks=pytest.mark.rotating(2)),
    e3_dtensor_keeps_what_is_split,
    e3_dtensor_of_summands,
    e3_dtensor_second_order,
    e3_dropout_of_parts,
    e3_batch_norm_of_running_statistics,
    e3_tensor_and_sequence_parallel,
    e3_row_parallel_with_an_activation,
    e3_linear_of_any_placement,
    e3_linear_cross_entropy_of_tokens,
    e3_compiled,
    e3_transforms,
    e3_refusals,
)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    chosen = [item.callspec.params["case"] for item in request.session.items if item.name.startswith("test_two_processes[")]
    return processes.make(chosen, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.__name__)
def test_two_processes(case, made):
    assert not made[case.__name__], made[case.__name__]


def test_e1_data_parallel():
    """Without a GPU it passes the call through; with one it runs on it."""
    gpu = DEVICE == "cuda"
    model, (x, target) = net(), data()
    parallel = DataParallel(model, device_ids=[0]) if gpu else DataParallel(model)
    expected = torch.autograd.grad(loss_of(model, x, target), list(model.parameters()))
    found = torch.autograd.grad(loss_of(parallel, x, target), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_e2_model_parallel():
    """With a GPU, half of the model on it and half on the CPU; without one both are the CPU."""
    losses, params = train(net(devices=("cpu", DEVICE)), [data()] * 2)
    expected, expected_params = train(net(devices=("cpu", "cpu")), [data()] * 2)
    close(losses, expected)
    close(params, expected_params)


@pytest.mark.parametrize("reentrant", (True, False))
def test_e4_checkpoint(reentrant):
    """The gradients without one, with the elements that dropout dropped."""
    x, target = data()
    x = x.requires_grad_()
    results = []
    for checkpointed in (None, reentrant):
        model = net(checkpointed=checkpointed, p=0.3)
        torch.manual_seed(3)
        x.grad = None
        loss_of(model, x, target).backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    close(*results)


# --- the example ----------------------------------------------------------------------------------------------------------------

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "train_distributed.py")
SMALL = ("--steps", "11", "--dim", "32", "--context", "32", "--layers", "1")


def printed(text):
    return [float(loss) for loss in re.findall(r"loss (\S+),", text)]


@pytest.fixture
def losses_of_one(monkeypatch, capsys):
    """Of the example in one process: this one, as torchrun would start it. Printed with five digits."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *SMALL])
    runpy.run_path(EXAMPLE, run_name="__main__")
    monkeypatch.undo()
    losses = printed(capsys.readouterr().out)
    assert len(losses) == 2 and losses[1] < losses[0] - 0.1
    return pytest.approx(losses, abs=2e-5)


def started(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("parallel", [pytest.param(p, marks=pytest.mark.rotating(i)) for i, p in enumerate(("ddp", "fsdp", "tensor"))])
def test_example(parallel, losses_of_one):
    """Two processes, which it starts itself, have the losses of one."""
    process = started(EXAMPLE, *SMALL, "--parallel", parallel)
    out, err = process.communicate()
    assert process.returncode == 0 and out.startswith("2 processes"), out + err
    assert printed(out) == losses_of_one


@pytest.mark.rotating(1)
def test_e1_example_on_two_nodes(losses_of_one):
    """Two agents of torchrun, as on two machines: they find each other by the address of the first, and so do their processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torchrun = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost", f"--master-port={port}")
    nodes = [started(*torchrun, f"--node-rank={rank}", EXAMPLE, *SMALL, "--parallel", "fsdp") for rank in range(2)]
    try:
        said = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()  # one that waits for an agent that is gone
    assert [node.returncode for node in nodes] == [0, 0] and said[0][0].startswith("2 processes"), said
    assert printed(said[0][0]) == losses_of_one and printed(said[1][0]) == []


@pytest.mark.parametrize(
    "options, text",
    (
        (("--batch", "3"), "argument --batch: must be a multiple of the 2 processes, got 3"),
        (("--parallel", "tensor", "--heads", "1"), "argument --heads: must be a multiple of the 2 processes, got 1"),
        (("--dim", "100"), "argument --dim: must be a multiple of 2 heads (8), got 100"),
        (("--steps", "0"), "argument --steps: expected a positive number, got 0"),
    ),
)
def test_bad_options_of_the_example(options, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *options])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(EXAMPLE, run_name="__main__")
    assert info.value.code == 2 and text in capsys.readouterr().err
