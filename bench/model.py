"""Whole training steps of small networks, with torch.nn's layers and with fusegrad's, in turn."""

import sys
from pathlib import Path
from types import SimpleNamespace

import measure
import report
import torch
from rich.table import Table
from torch import nn

import fusegrad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


def gpt(layers, device):
    """GPT: 4 layers of 256 features, 16 × 128 tokens"""
    import train_gpt

    options = SimpleNamespace(dim=256, heads=4, layers=4, context=128, seed=0)
    model = train_gpt.GPT(train_gpt.FUSEGRAD if layers is fusegrad else train_gpt.TORCH, options)
    return model.to(device), torch.randint(256, (16, 129), device=device)


class Classifier(nn.Module):
    """A body and the loss of what comes out of it."""

    def __init__(self, body, loss):
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, batch):
        x, target = batch
        return self.loss(self.body(x), target)


def mlp(layers, device):
    """RMS norms and gated MLPs, 2048 rows of 512 features"""
    import train_gpt

    norm, gated = (fusegrad.nn.RMSNorm, fusegrad.nn.GatedMLP) if layers is fusegrad else (nn.RMSNorm, train_gpt.EagerGatedMLP)
    body = nn.Sequential(*(layer for _ in range(3) for layer in (norm(512), gated(512, 1024))), nn.Linear(512, 1000, bias=False))
    batch = torch.randn(2048, 512, device=device), torch.randint(1000, (2048,), device=device)
    return Classifier(body, layers.nn.CrossEntropyLoss()).to(device), batch


def perceptron(layers, device):
    """MLPs with gelu between the products, 4096 rows of 256 features, 1024 hidden"""

    def block():
        if layers is fusegrad:
            return fusegrad.nn.MLP((256, 1024, 256), "gelu")
        return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    body = nn.Sequential(block(), block(), nn.Linear(256, 100, bias=False))
    batch = torch.randn(4096, 256, device=device), torch.randint(100, (4096,), device=device)
    return Classifier(body, layers.nn.CrossEntropyLoss()).to(device), batch


def conv(layers, device):
    """residual network of examples/train_images.py, 64 images of 32 × 32"""
    import train_images

    network = train_images.Network(train_images.OURS if layers is fusegrad else train_images.TORCH, 64, 4)
    batch = torch.randn(64, 1, 32, 32, device=device), torch.randint(10, (64,), device=device)
    return Classifier(network, layers.nn.CrossEntropyLoss()).to(device), batch


def step_of(make, layers, args):
    torch.manual_seed(args.seed)
    model, batch = make(layers, args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


NETWORKS = dict(gpt=gpt, mlp=mlp, perceptron=perceptron, conv=conv)
SIDES = dict(native=torch, fusegrad=fusegrad)


def measured(name, args) -> dict:
    """The seconds of a step of each side, in turn; none if their losses are not those of the same training."""
    steps = {side: step_of(NETWORKS[name], layers, args) for side, layers in SIDES.items()}
    losses = {side: [step().item() for _ in range(3)] for side, step in steps.items()}
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses.values()))
    network = dict(name=name, what=NETWORKS[name].__doc__, losses=losses, difference=difference, sides={})
    if not difference <= 1e-4:  # float32, a few steps
        return network | dict(wrong="losses")
    clocks = {side: measure.Clock(steps[side], args.device) for side in args.sides}
    times = {side: [] for side in clocks}
    for _ in range(args.rounds):
        for side, clock in clocks.items():
            times[side].append(clock.seconds())
    network["sides"] = {side: measure.spread(t) for side, t in times.items()}
    if times.keys() == SIDES.keys():
        network["ratio"] = measure.by_rounds(times["fusegrad"], times["native"])
    return network


def table(result, old=None) -> Table:
    t = Table("network", "side", "ms", "quartiles", "ratio", *(["over old"] if old else []), title="a training step, median")
    before = {network["name"]: network["sides"] for network in (old or {}).get("networks", ())}
    for network in result["networks"]:
        if "wrong" in network:
            t.add_row(network["name"], "wrong", f"{network['wrong']}: {network['losses']}")
        for side, s in network["sides"].items():
            line = [network["name"], side, f"{s['median'] * 1e3:.1f}", f"{s['low'] * 1e3:.1f} – {s['high'] * 1e3:.1f}"]
            line.append(report.with_range(network["ratio"]) if side == "fusegrad" and "ratio" in network else "")
            if was := before.get(network["name"], {}).get(side):
                line.append(report.change(report.beside(s, was)))
            t.add_row(*line)
    return t


def main(args, console, result, keep):
    """Adds to the result, and keeps it after each network."""
    interrupted = False
    try:
        for name in NETWORKS:
            if not any(network["name"] == name for network in result["networks"]):
                result["networks"].append(measured(name, args))
                keep()
    except KeyboardInterrupt:
        interrupted = True
        keep()
    console.print(table(result, args.old))
    console.print(f"{args.json}", highlight=False, markup=False)
    if interrupted:
        console.print(f"interrupted: {len(result['networks'])} of {len(NETWORKS)} networks were measured")
        return 130
    return any("wrong" in network for network in result["networks"])
