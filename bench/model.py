"""Whole training steps of small networks, with torch.nn's layers and with fusegrad's, in turn."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.table import Table
from torch import nn

import fusegrad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


def gpt(layers, device):
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
    """Wide and shallow: the layers between the products are a large part of it."""
    import train_gpt

    norm, gated = (fusegrad.nn.RMSNorm, fusegrad.nn.GatedMLP) if layers is fusegrad else (nn.RMSNorm, train_gpt.EagerGatedMLP)
    body = nn.Sequential(*(layer for _ in range(3) for layer in (norm(512), gated(512, 1024))), nn.Linear(512, 1000, bias=False))
    batch = torch.randn(2048, 512, device=device), torch.randint(1000, (2048,), device=device)
    return Classifier(body, layers.nn.CrossEntropyLoss()).to(device), batch


def conv(layers, device):
    """The residual network of the example on images, on larger ones."""
    import train_images

    network = train_images.Network(train_images.OURS if layers is fusegrad else train_images.TORCH, 64, 4)
    batch = torch.randn(64, 1, 32, 32, device=device), torch.randint(10, (64,), device=device)
    return Classifier(network, layers.nn.CrossEntropyLoss()).to(device), batch


def step_of(make, layers, device):
    torch.manual_seed(0)
    model, batch = make(layers, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main(args, console):
    import measure

    table = Table("network", "torch.nn ms", "quartiles", "fusegrad ms", "quartiles", "ratio", title="a training step, median")
    failed = False
    for name, make in dict(gpt=gpt, mlp=mlp, conv=conv).items():
        steps = [step_of(make, layers, args.device) for layers in (torch, fusegrad)]
        native, own = ([step().item() for _ in range(3)] for step in steps)
        if not all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(native, own)):  # float32, a few steps
            table.add_row(name, "wrong: losses", f"{native}", f"{own}")
            failed = True
            continue
        times = [[], []]
        clocks = [measure.Clock(step, args.device) for step in steps]
        for _ in range(max(args.rounds, 3)):
            for t, clock in zip(times, clocks):
                t.append(clock.seconds() * 1e3)
        spreads = native, own = [measure.spread(t) for t in times]
        shown = (text for s in spreads for text in (f"{s['median']:.1f}", f"{s['low']:.1f} – {s['high']:.1f}"))
        table.add_row(name, *shown, f"{own['median'] / native['median']:.2f}")
    console.print(table)
    return failed
