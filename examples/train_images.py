"""Train a small residual network on scikit-learn's 8 x 8 digits with torch.nn's layers and with fusegrad's, and compare the two.

fusegrad's BatchNorm2d takes the residual addition and the ReLU along, its GroupNorm the SiLU, and BiasAct the bias of the head's
first layer with its GELU: one pass over memory each way where torch.nn makes several.
"""

import sys
from copy import deepcopy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from digits import Run, agreement, arguments, folder, images, machine, milliseconds, run, verdict, write
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import nn

import fusegrad


class BatchNorm(nn.BatchNorm2d):
    """Batch norm, then the residual if there is one, then ReLU, as torch.nn has them."""

    def forward(self, x, residual=None):
        y = super().forward(x)
        return F.relu(y if residual is None else y + residual)


class GroupNormSiLU(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class BiasGELU(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return F.gelu(x + self.bias)


TORCH = SimpleNamespace(batch_norm=BatchNorm, group_norm=GroupNormSiLU, bias_gelu=BiasGELU, loss=F.cross_entropy)
OURS = SimpleNamespace(
    batch_norm=lambda channels: fusegrad.nn.BatchNorm2d(channels, activation="relu"),
    group_norm=lambda groups, channels: fusegrad.nn.GroupNorm(groups, channels, activation="silu"),
    bias_gelu=lambda features: fusegrad.nn.BiasAct(features, activation="gelu"),
    loss=fusegrad.functional.cross_entropy,
)


def conv(i, o):
    return nn.Conv2d(i, o, 3, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, layers, width):
        super().__init__()
        self.conv1, self.norm1 = conv(width, width), layers.batch_norm(width)
        self.conv2, self.norm2 = conv(width, width), layers.batch_norm(width)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


class Network(nn.Module):
    def __init__(self, layers, width, blocks):
        super().__init__()
        self.stem = nn.Sequential(conv(1, width), layers.batch_norm(width))
        self.blocks = nn.Sequential(*(Block(layers, width) for _ in range(blocks)))
        self.top = nn.Sequential(nn.MaxPool2d(2), conv(width, 2 * width), layers.group_norm(8, 2 * width), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Sequential(nn.Linear(2 * width, 128, bias=False), layers.bias_gelu(128), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.top(self.blocks(self.stem(x))).flatten(1))


def loss_of(layers):
    return lambda model, x, y: layers.loss(model(x), y)


def compare(options):
    """Train the runs side by side, report, and return whether fusegrad follows torch.nn."""
    out = folder(options.out)
    print(machine(), flush=True)
    generator = torch.Generator().manual_seed(options.seed)
    x, y = images(generator)
    cut = len(x) * 4 // 5
    torch.manual_seed(options.seed)
    start, ours = Network(TORCH, options.width, options.blocks), Network(OURS, options.width, options.blocks)
    ours.load_state_dict(start.state_dict())
    runs = {
        "torch.nn": Run(deepcopy(start), loss_of(TORCH), options.steps),
        "fusegrad": Run(deepcopy(ours), loss_of(OURS), options.steps),
    }
    console, batches = Console(), []
    with Progress(BarColumn(20), MofNCompleteColumn(), TextColumn("steps"), console=console, disable=not console.is_terminal) as progress:
        for step in progress.track(range(options.steps)):
            i = torch.randint(cut, (options.batch,), generator=generator)
            batches.append((x[i], y[i]))
            for each in list(runs.values())[:: 1 if step % 2 else -1]:
                each.step(*batches[-1])
    figures = {
        name: dict(accuracy=each.accuracy(lambda model, x: model(x), x[cut:], y[cut:]), ms=milliseconds(each), loss=each.losses[-1])
        for name, each in runs.items()
    }
    table = Table("", "held-out accuracy", "last loss", "ms per step")
    for name, row in figures.items():
        table.add_row(name, f"{100 * row['accuracy']:.2f}%", f"{row['loss']:.4f}", f"{row['ms']:.2f}")
    console.print(table)
    print(f"Time per step: fusegrad / torch.nn {figures['fusegrad']['ms'] / figures['torch.nn']['ms']:.3f}")
    errors = agreement(start, loss_of(TORCH), ours, loss_of(OURS), batches)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="Training loss, same weights and batches", xlabel="step", ylabel="nats", yscale="log")
    right.set(title="Time per step", xlabel="step", ylabel="ms", ylim=(0, 1.6 * max(row["ms"] for row in figures.values())))
    for name, color, width in (("torch.nn", "tab:orange", 4), ("fusegrad", "tab:blue", 1.2)):
        left.plot(runs[name].losses, color=color, linewidth=width, label=name)
        right.plot([1e3 * s for s in runs[name].seconds], ".", color=color, alpha=0.3, label=name)
    for axes in (left, right):
        axes.legend()
    write(dict(machine=machine(), options=vars(options), figures=figures, errors=errors), figure, out / "train_images")
    return verdict("train_images", errors)


if __name__ == "__main__":
    numbers = (
        ("steps", 2, 300, "training steps"),
        ("batch", 2, 64, "images per step"),
        ("width", 4, 32, "channels, a multiple of 4"),
        ("blocks", 1, 3, "residual blocks"),
        ("seed", 0, 0, "seed of weights and batches"),
    )
    sys.exit(run("train_images", compare, arguments("train_images", __doc__, numbers)))
