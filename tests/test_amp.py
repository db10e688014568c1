"""D1 to D3: autocast, GradScaler, and gradient penalties under both, as with torch.nn's layers.

A model's result under autocast is as far from the float64 one as rounding to 16 bits makes it. With fused layers it may be as far as with
torch's, times the 3 of `table.budget`."""

import copy
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusegrad.functional as fused
from fusegrad import _op, nn
from fusegrad._op import OPS, Sample
from table import BF16, DEVICE, F16, F32, F64, Make, call, check, cotangents, name_of, run

HALVES = (BF16,) if DEVICE == "cpu" else (BF16, F16)
each_op = pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
each_half = pytest.mark.parametrize("half", HALVES, ids=name_of)


# --- D1: autocast ---------------------------------------------------------------------------------------------------------------


@each_half
@each_op
def test_d1_autocast(op, half):
    """Each op is within its budget under autocast, of float32 and of 16-bit rows beside float32 parameters."""
    for dtype in (F32, half):
        sample = Sample("bench", op.bench(Make(dtype, F32), 6, 40))
        if op.gemm == "torch":  # which autocast rounds first
            sample = Sample("bench", {k: v.to(half) if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()})
        with torch.autocast(DEVICE, dtype=half):
            cotangent = cotangents(call(op, sample))
            results = run(op, sample, cotangent)
        check(op, sample, results, cotangent)


def fake(t, device):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def out_of(op, device, dtype, half):
    """What comes out of an op under autocast. A CUDA tensor is a fake one, if there is no GPU."""
    if device == DEVICE:
        with torch.autocast(device, dtype=half):
            return {y.dtype for y in call(op, Sample("", op.bench(Make(dtype), 4, 16)))}
    sample = op.bench(Make(dtype), 4, 16)
    with FakeTensorMode():
        sample = Sample("", {k: fake(v, device) if isinstance(v, torch.Tensor) else v for k, v in sample.items()})
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, half)
        try:
            return {y.dtype for y in call(op, sample)}
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])


def test_d1_table_of_dtypes(monkeypatch):
    """The table in docs/amp.md is what comes out."""
    monkeypatch.setattr(_op, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(_op._C, "with_cuda", True)
    lines = ["| op | CPU, float32 | CPU, bfloat16 | CUDA, float32 | CUDA, 16 bits |", "|---|---|---|---|---|"]
    found = {}
    for op in OPS.values():
        cells = []
        for device in ("cpu", "cuda"):
            for dtype in (F32, BF16):
                (out,) = out_of(op, device, dtype, BF16)
                if device == "cuda" and dtype == BF16:
                    assert {F16 if out == BF16 else out} == out_of(op, device, F16, F16), op.name
                cells.append("16 bits" if device == "cuda" and out == BF16 else name_of(out))
            assert out_of(op, device, F64, BF16) == {F64}, op.name
        found.setdefault(tuple(cells), []).append(f"`{op.name}`")
    lines += [f"| {', '.join(sorted(ops))} | {' | '.join(cells)} |" for cells, ops in sorted(found.items())]
    text = (Path(__file__).parents[1] / "docs" / "amp.md").read_text()
    assert "\n".join(lines) in text, "\n".join(lines)


# --- a model of fused layers and its twin ---------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, lib):
        super().__init__()
        self.fused = lib is nn
        self.norm, self.last_norm = lib.LayerNorm(16), lib.RMSNorm(24, eps=1e-6)
        self.hidden = lib.Linear(16, 24, activation="gelu") if self.fused else lib.Linear(16, 24)
        self.gate_up, self.head = lib.Linear(24, 48), lib.Linear(24, 10)
        self.loss = lib.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x):
        h = self.hidden(self.norm(x))
        h = h if self.fused else torch.nn.functional.gelu(h)
        g = self.gate_up(h)
        g = fused.swiglu(g) if self.fused else torch.nn.functional.silu(g.chunk(2, -1)[0]) * g.chunk(2, -1)[1]
        return self.head(self.last_norm(h + g))


def compare(procedure, half):
    """`procedure(models, x, target, half)`, a list of tensors, with fused layers, with torch's, and with torch's in float64."""
    torch.manual_seed(1)
    fused_ones = [Net(nn).to(DEVICE) for _ in range(2)]
    torchs = [Net(torch.nn).to(DEVICE) for _ in range(2)]
    for ours, native in zip(fused_ones, torchs):
        native.load_state_dict(ours.state_dict(), strict=True)
    exact = [copy.deepcopy(model).double() for model in torchs]
    x, target = torch.randn(4, 32, 16, device=DEVICE), torch.randint(10, (4, 32), device=DEVICE)

    def results(models, x, half):
        return procedure(copy.deepcopy(models), x, target, half)

    allowed = None
    for seed in range(4):  # of torch's layers on these inputs and some a little beside them
        near = x * (1 + 1e-3 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) - 0.5)) if seed else x
        expected = results(exact, near.double(), None)
        errors = torch.stack([(a - b).norm() for a, b in zip(results(torchs, near, half), expected)])
        allowed = errors if allowed is None else torch.maximum(allowed, errors)
    for i, (a, b, limit) in enumerate(zip(results(fused_ones, x, half), results(exact, x.double(), None), allowed)):
        error = (a - b).norm()
        assert a.shape == b.shape and a.isfinite().all()
        assert error <= 3 * limit + 4 * torch.finfo(F32).eps * b.norm(), f"result {i}: {error} with fused layers, {limit} with torch's"


def scaler_of(half, **options):
    return torch.amp.GradScaler(DEVICE, enabled=half is not None, **options)


def autocast(half):
    return torch.autocast(DEVICE, dtype=half or BF16, enabled=half is not None)


def grads(models):
    return [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]


@each_half
def test_d1_a_model_under_autocast(half):
    def procedure(models, x, target, half):
        with autocast(half):
            loss = models[0].loss(models[0](x[0]), target[0])
        loss.backward()
        return [loss.detach(), *grads(models)]

    compare(procedure, half)


# --- D2: GradScaler ------------------------------------------------------------------------------------------------------------


@each_half
def test_d2_accumulation_and_clipping(half):
    """Scaled losses of two micro-batches, unscaled, clipped, stepped: three steps."""

    def procedure(models, x, target, half):
        model, norms = models[0], []
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_of(half, init_scale=2.0**10, growth_interval=2)
        for step in range(3):
            for part in (step, step + 1):
                with autocast(half):
                    loss = model.loss(model(x[part]), target[part]) / 2
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert half is None or scaler.get_scale() == 2.0**11
        return [*norms, *(p.detach() for p in model.parameters())]

    compare(procedure, half)


@each_half
def test_d2_several_losses_and_optimizers(half):
    """Two models, two losses of both with one graph, an optimizer each, one scaler."""

    def procedure(models, x, target, half):
        optimizers, scaler = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models], scaler_of(half, init_scale=2.0**10)
        with autocast(half):
            a, b = models[0](x[0]), models[1](x[1])
            first, second = models[0].loss(2 * a + 3 * b, target[0]), models[1].loss(3 * a - 5 * b, target[1])
        scaler.scale(first).backward(retain_graph=True)
        scaler.scale(second).backward()
        scaler.unscale_(optimizers[0])  # the other is unscaled by its step
        kept = grads(models[:1])
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return kept + [p.detach() for m in models for p in m.parameters()]

    compare(procedure, half)


@each_half
def test_d2_an_infinity_skips_the_step(half):
    """It reaches the gradients through every layer, nothing is changed, the scale is halved, and training goes on."""
    model = Net(nn).to(DEVICE)
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=0.1), scaler_of(half, init_scale=2.0**10)
    x, target = torch.randn(8, 16, device=DEVICE), torch.randint(10, (8,), device=DEVICE)
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()
        with autocast(half):
            loss = model.loss(model(x) * factor, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = step == 1
        assert scaler.get_scale() == (scale / 2 if skipped else scale)
        assert all(torch.equal(v, before[k]) == skipped for k, v in model.state_dict().items())


# --- D3: gradient penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", (False, True))
@each_half
def test_d3_gradient_penalty(half, scaled):
    def procedure(models, x, target, half):
        model = models[0]
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), scaler_of(half if scaled else None, init_scale=2.0**6)
        x = x[0].clone().requires_grad_()
        with autocast(half):
            loss = model.loss(model(x), target[0])
        of_scaled = torch.autograd.grad(scaler.scale(loss), [x, *model.parameters()], create_graph=True)
        with autocast(half):
            norm = sum((g / scaler.get_scale()).square().sum() for g in of_scaled).sqrt()
            loss = loss + norm
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [norm.detach(), x.grad / scaler.get_scale(), *grads(models)]

    compare(procedure, half)
