"""Train on clean digits for blurred, noisy ones that come without labels, with and without a reversed gradient.

A network's features feed two heads: one tells the digit, one tells clean from noisy images. The second head's gradient is reversed
on its way into the features, which so become useless for it, and what is learnt from clean images carries over (Ganin & Lempitsky
2015, arXiv:1409.7495). Without the reversal the features know of clean images only. Accuracy is that on noisy images never seen in
training, mean and spread over several seeds.
"""

import math
import sys
from copy import deepcopy
from statistics import mean, stdev
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

BATCH = 64
STRENGTH = 0.1  # of the reversed gradient, reached gradually


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU, as two layers of torch.nn."""

    def forward(self, x):
        return F.silu(super().forward(x))


class Reversal(nn.Module):
    """Gradient reversal in torch's own operations: the value of x, the gradient of -alpha x."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return (1 + self.alpha) * x.detach() - self.alpha * x


TORCH = SimpleNamespace(
    norm=GroupNormSiLU,
    reversal=Reversal,
    linear_relu=lambda i, o: nn.Sequential(nn.Linear(i, o), nn.ReLU()),
    cross_entropy=F.cross_entropy,
    binary=F.binary_cross_entropy_with_logits,
)
OURS = SimpleNamespace(
    norm=lambda groups, channels: fusegrad.nn.GroupNorm(groups, channels, activation="silu"),
    reversal=fusegrad.nn.GradientReversal,
    linear_relu=lambda i, o: nn.Sequential(fusegrad.nn.Linear(i, o, activation="relu")),
    cross_entropy=fusegrad.functional.cross_entropy,
    binary=fusegrad.functional.binary_cross_entropy_with_logits,
)


def worse_camera(x, generator):
    """Blurred, darker, and noisy."""
    return 0.8 * (0.6 * F.avg_pool2d(x, 3, 1, 1) + 0.4 * x) + 0.5 * torch.rand(x.shape, generator=generator)


class Network(nn.Module):
    """Features for two heads: the digit, and the domain it comes from."""

    def __init__(self, layers, width=32):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1, bias=False), layers.norm(4, width), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), layers.norm(4, 2 * width), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        self.digit = nn.Linear(8 * width, 10)
        self.reversal = layers.reversal(0.0)
        self.domain = nn.Sequential(layers.linear_relu(8 * width, 64), nn.Linear(64, 1))


def loss_of(layers, reverse):
    """The loss of clean images, their labels and noisy images; the strength rises with the progress of training."""

    def loss(model, clean, labels, noisy, progress):
        h = model.features(torch.cat([clean, noisy]))
        model.reversal.alpha = STRENGTH * (2 / (1 + math.exp(-10 * progress.item())) - 1)
        domain = model.domain(model.reversal(h) if reverse else h.detach()).squeeze(1)
        side = torch.cat([torch.zeros_like(domain[: len(clean)]), torch.ones_like(domain[len(clean) :])])
        return layers.cross_entropy(model.digit(h[: len(clean)]), labels) + layers.binary(domain, side)

    return loss


def classify(model, x):
    return model.digit(model.features(x))


def train(seed, options, advance):
    """The runs of one seed by name, what they reach on noisy images, and how well gradients agree."""
    generator = torch.Generator().manual_seed(seed)
    x, y = images(generator)
    half = len(x) // 2
    noisy = worse_camera(x[half:], generator)
    unlabelled, test, test_y = noisy[: half * 2 // 3], noisy[half * 2 // 3 :], y[half + half * 2 // 3 :]
    torch.manual_seed(seed)
    start = Network(TORCH)
    ours = Network(OURS)
    ours.load_state_dict(start.state_dict())
    runs = {
        "fusegrad, reversed": Run(deepcopy(ours), loss_of(OURS, True), options.steps),
        "fusegrad, not reversed": Run(deepcopy(ours), loss_of(OURS, False), options.steps),
        "torch.nn, reversed": Run(deepcopy(start), loss_of(TORCH, True), options.steps),
    }
    batches = []
    for step in range(options.steps):
        i = torch.randint(half, (BATCH,), generator=generator)
        j = torch.randint(len(unlabelled), (BATCH,), generator=generator)
        batches.append((x[i], y[i], unlabelled[j], torch.tensor(step / options.steps)))
        for each in runs.values():
            each.step(*batches[-1])
        advance()
    errors = agreement(start, loss_of(TORCH, True), ours, loss_of(OURS, True), batches)
    return runs, {name: each.accuracy(classify, test, test_y) for name, each in runs.items()}, errors


def compare(options):
    """Train for every seed, report, and return whether the reversal helps and fusegrad follows torch.nn."""
    out = folder(options.out)
    print(machine(), flush=True)
    console, found, errors = Console(), [], []
    with Progress(BarColumn(20), MofNCompleteColumn(), TextColumn("steps"), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=options.seeds * options.steps)
        for seed in range(options.seeds):
            runs, accuracy, agrees = train(seed, options, lambda: progress.advance(task))
            found.append(accuracy)
            errors.append(agrees)
            if not console.is_terminal:
                print(f"seed {seed}: " + ", ".join(f"{name} {100 * a:.1f}%" for name, a in accuracy.items()), flush=True)
    table = Table("", "accuracy on noisy digits", "lowest", "highest", "ms per step")
    spread = {}
    for name in found[0]:
        values = [100 * accuracy[name] for accuracy in found]
        spread[name] = dict(mean=mean(values), deviation=stdev(values) if len(values) > 1 else 0.0)
        low, high = f"{min(values):.1f}%", f"{max(values):.1f}%"
        table.add_row(name, "{mean:.1f}% ± {deviation:.1f}".format(**spread[name]), low, high, f"{milliseconds(runs[name]):.2f}")
    console.print(table)
    gains = [100 * (a["fusegrad, reversed"] - a["fusegrad, not reversed"]) for a in found]
    gain = dict(mean=mean(gains), deviation=stdev(gains) if len(gains) > 1 else 0.0)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="Accuracy on noisy digits, one line per seed", ylabel="%", ylim=(0, 100))
    left.set_xticks((0, 1), ("not reversed", "reversed"))
    for accuracy in found:
        left.plot([100 * accuracy["fusegrad, not reversed"], 100 * accuracy["fusegrad, reversed"]], "o-", color="tab:blue", alpha=0.6)
    right.set(title="Loss, last seed", xlabel="step", ylabel="nats")
    for name, style in (("torch.nn, reversed", dict(color="tab:orange", linewidth=4)), ("fusegrad, reversed", dict(color="tab:blue"))):
        right.plot(runs[name].losses, label=name, **style)
    right.legend()
    worst = max(errors, key=lambda e: e[0] / e[2])
    record = dict(machine=machine(), options=vars(options), accuracy=found, spread=spread, gain=gain, errors=errors)
    write(record, figure, out / "domain_adaptation")
    said = (
        "The reversal gains {mean:.1f} ± {deviation:.1f} points".format(**gain)
        + f"; it helps for {sum(g > 0 for g in gains)} of {len(gains)} seeds"
    )
    helps = gain["mean"] > gain["deviation"]
    if helps:
        print(said)
    else:
        print(f"domain_adaptation: FAILED: {said}: no more than its spread", file=sys.stderr)
    return verdict("domain_adaptation", worst) and helps


if __name__ == "__main__":
    chosen = arguments("domain_adaptation", __doc__, (("seeds", 1, 5, "seeds"), ("steps", 2, 420, "training steps")))
    sys.exit(run("domain_adaptation", compare, chosen))
