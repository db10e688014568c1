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
    return train_gpt.GPT(layers, options).to(device), torch.randint(256, (16, 129), device=device)


class MLP(nn.Module):
    """Wide and shallow: the layers between the products are a large part of it."""

    def __init__(self, layers):
        super().__init__()
        self.body = nn.Sequential(
            *(
                layer
                for _ in range(3)
                for layer in (layers.RMSNorm(512), nn.Linear(512, 2048, bias=False), layers.SwiGLU(), nn.Linear(1024, 512, bias=False))
            ),
            nn.Linear(512, 1000, bias=False),
        )
        self.loss = layers.CrossEntropyLoss()

    def forward(self, batch):
        x, target = batch
        return self.loss(self.body(x), target)


def mlp(layers, device):
    return MLP(layers).to(device), (torch.randn(2048, 512, device=device), torch.randint(1000, (2048,), device=device))


def step_of(make, layers, device):
    torch.manual_seed(0)
    model, batch = make(layers, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(args, console):
    import measure
    import train_gpt

    table = Table("network", "torch.nn ms", "fusegrad ms", "ratio", title="a training step, median")
    for name, make in dict(gpt=gpt, mlp=mlp).items():
        both = (train_gpt.TORCH, fusegrad.nn)
        clocks = [measure.Clock(step_of(make, layers, args.device), args.device, args.threads) for layers in both]
        times = [[], []]
        for _ in range(max(args.rounds, 3)):
            for t, clock in zip(times, clocks):
                t.append(clock.seconds())
        native, own = (measure.spread(t)["median"] for t in times)
        table.add_row(name, f"{native * 1e3:.1f}", f"{own * 1e3:.1f}", f"{own / native:.2f}")
    console.print(table)
