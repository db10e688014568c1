"""Train a small byte-level GPT on real text with torch.nn's layers and with fusegrad's, and compare the two.

Both start from the same weights and see the same batches, and their steps alternate, so that a busy machine slows both
alike. A third run, torch.nn with every batch in two accumulated halves, differs from the first only by rounding: it
shows how far rounding alone moves the loss curve, and so how close fusegrad's curve has to be.
"""

import argparse
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
from copy import deepcopy
from itertools import accumulate
from math import cos, log, pi
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch import nn

import fusegrad

TEXT_LIMIT = 8_000_000
HELD_OUT_LIMIT = 32_768
LEARNING_RATE = 1e-3
WARM_UP = 20
# Different roundings grow at different paces, and a float32 loss itself has steps of 5e-7.
SLACK, FLOOR = 3, 1e-5


class InputError(Exception):
    """An input the program cannot work with; the message is for the user."""


# What torch.nn has no layer for, in PyTorch's own operations.
class EagerAddRMSNorm(nn.RMSNorm):
    """The sum of two tensors, normalized, and the sum itself."""

    def forward(self, x, residual):
        total = x + residual
        return super().forward(total), total


class EagerGatedMLP(nn.Module):
    """down(silu(gate) * up), gate and up by one product."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def eager_rotary_embedding(q, k, cos, sin):
    """Queries and keys turned by an angle that grows with their position."""
    return tuple(x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin for x in (q, k))


class EagerLinearCrossEntropyLoss(nn.Module):
    """A linear layer to the classes, and the cross entropy of what comes out."""

    def __init__(self, features, classes):
        super().__init__()
        self.linear = nn.Linear(features, classes, bias=False)

    def forward(self, x, target):
        return F.cross_entropy(self.linear(x), target)


TORCH = SimpleNamespace(
    RMSNorm=nn.RMSNorm,
    AddRMSNorm=EagerAddRMSNorm,
    GatedMLP=EagerGatedMLP,
    rotary_embedding=eager_rotary_embedding,
    LinearCrossEntropyLoss=EagerLinearCrossEntropyLoss,
)
FUSEGRAD = SimpleNamespace(
    RMSNorm=fusegrad.nn.RMSNorm,
    AddRMSNorm=fusegrad.nn.AddRMSNorm,
    GatedMLP=fusegrad.nn.GatedMLP,
    rotary_embedding=fusegrad.functional.rotary_embedding,
    LinearCrossEntropyLoss=fusegrad.nn.LinearCrossEntropyLoss,
)


class Block(nn.Module):
    """Causal attention, then a gated feed-forward network, each added to the residual stream and the sum normalized for the next."""

    def __init__(self, layers, dim, heads):
        super().__init__()
        self.heads, self.rotary_embedding = heads, layers.rotary_embedding
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.attention_norm = layers.AddRMSNorm(dim, eps=1e-5)
        self.mlp = layers.GatedMLP(dim, 8 * dim // 3)
        self.mlp_norm = layers.AddRMSNorm(dim, eps=1e-5)

    def forward(self, normed, x, cos, sin):
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rotary_embedding(q, k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        normed, x = self.attention_norm(self.attention_out(attended.transpose(1, 2).flatten(2)), x)
        return self.mlp_norm(self.mlp(normed), x)


class GPT(nn.Module):
    """A byte-level language model; calling it with [batch, context + 1] bytes returns the mean loss per byte."""

    def __init__(self, layers, options):
        super().__init__()
        self.embedding = nn.Embedding(256, options.dim)
        self.norm = layers.RMSNorm(options.dim, eps=1e-5)
        self.blocks = nn.ModuleList(Block(layers, options.dim, options.heads) for _ in range(options.layers))
        self.loss = layers.LinearCrossEntropyLoss(options.dim, 256)
        size = options.dim // options.heads
        angles = torch.arange(options.context)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.embedding(inputs)
        normed = self.norm(x)
        for block in self.blocks:
            normed, x = block(normed, x, self.cos, self.sin)
        return self.loss(normed.flatten(0, 1), targets.flatten())


class Run:
    """A model in training, with its optimizer and the loss and the seconds of every step so far."""

    def __init__(self, layers, options, parts=1):
        torch.manual_seed(options.seed)
        self.model = GPT(layers, options).to(options.device)
        self.parts = parts
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / WARM_UP, 0.55 + 0.45 * cos(pi * step / options.steps))
        )
        self.losses, self.seconds = [], []

    def step(self, batch):
        """Train on one batch and record the loss and the time."""
        start = perf_counter()
        total = 0
        for part in batch.chunk(self.parts):
            loss = self.model(part) / self.parts
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(total.item())  # waits for a GPU to finish, so the time is the whole step's
        self.seconds.append(perf_counter() - start)

    def figures(self, windows, batch):
        """Return what the training came to; the batch is for one step more, to measure its memory."""
        with torch.no_grad():
            nats = sum(self.model(part).item() * len(part) for part in windows.split(32)) / len(windows)
        return {
            "loss, first step": self.losses[0],
            "loss, last step": self.losses[-1],
            "held-out bits per byte": nats / log(2),
            "time per step, median, ms": median(self.seconds) * 1e3,
            "tokens per second": batch[:, 1:].numel() / median(self.seconds),
            "peak memory of a step, MB": peak_memory(deepcopy(self), batch) / 1e6,
        }


def peak_memory(run, batch):
    """Return the bytes of tensors live at the peak of a training step, above those live before it."""
    if batch.is_cuda:
        before = torch.cuda.memory_allocated(batch.device)
        torch.cuda.reset_peak_memory_stats(batch.device)
        run.step(batch)
        return torch.cuda.max_memory_allocated(batch.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run.step(batch)
    # One event per allocation, and one of negative size per release.
    return max(accumulate(event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"))


def read_text(path, context):
    """Return a file's bytes, by default those of Python's standard library, as training text and held-out windows."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    name = stdlib if path is None else path
    text = bytearray()
    try:
        for file in sorted(stdlib.glob("*.py")) if path is None else [path]:
            with open(file, "rb") as stream:
                text += stream.read(TEXT_LIMIT - len(text))
    except OSError as error:
        raise InputError(f"cannot read {name}: expected a readable file, got: {error.strerror}") from error
    least = 10 * (context + 1)
    if len(text) < least:
        raise InputError(f"{name} is too short: expected {least} bytes or more (a tenth is held out), got {len(text)}")
    text = torch.frombuffer(text, dtype=torch.uint8)
    cut = len(text) - len(text) // 10
    windows = text[cut:].unfold(0, context + 1, context)  # each byte but the first is predicted once
    return text[:cut], windows[: max(1, HELD_OUT_LIMIT // context)].long()


def train(runs, text, options, console):
    """Train the runs side by side on the same random batches; return the last batch."""
    reference, ours, halves = runs.values()
    generator = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.context + 1)
    columns = BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=options.steps)
        for step in range(1, options.steps + 1):
            starts = torch.randint(len(text) - options.context, (options.batch, 1), generator=generator)
            batch = text[starts + window].long().to(options.device)
            for run in (reference, ours, halves) if step % 2 else (ours, reference, halves):
                run.step(batch)
            losses = f"loss: torch.nn {reference.losses[-1]:.4f}, fusegrad {ours.losses[-1]:.4f}"
            progress.update(task, advance=1, description=losses)
            if not console.is_terminal and step % max(1, options.steps // 20) == 0:
                print(f"step {step}/{options.steps}  {losses}", flush=True)
    return batch


def differences(run, reference):
    """Return the absolute differences of two runs' losses, step by step."""
    return (torch.tensor(run.losses) - torch.tensor(reference.losses)).abs()


def draw(runs, limit, path):
    """Save the chart: the loss curves, how far they differ, and the time of every step."""
    reference, ours, halves = runs.values()
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.set(title="Training loss, same seed and batches", xlabel="step", ylabel="nats per byte")
    middle.set(title="Largest loss difference from torch.nn so far", xlabel="step", yscale="log", ylim=(1e-8, 1))
    slower = max(median(reference.seconds), median(ours.seconds))
    right.set(title="Time per step", xlabel="step", ylabel="ms", ylim=(0, 1.6e3 * slower))
    for run, name, color, width in ((reference, "torch.nn", "tab:orange", 4), (ours, "fusegrad", "tab:blue", 1.2)):
        milliseconds = [seconds * 1e3 for seconds in run.seconds]
        left.plot(run.losses, color=color, linewidth=width, label=name)
        right.plot(milliseconds, ".", color=color, alpha=0.3)
        right.axhline(median(milliseconds), color=color, label=f"{name}: median {median(milliseconds):.1f} ms")
    for run, name, color in ((halves, "torch.nn in halves", "tab:gray"), (ours, "fusegrad", "tab:blue")):
        middle.plot(differences(run, reference).cummax(0).values, color=color, label=name)
    middle.axhline(limit, color="tab:red", linestyle="--", label="limit for fusegrad")
    for axes in (left, middle, right):
        axes.legend(loc="upper right" if axes is left else "lower right")
    figure.savefig(path, dpi=120)


def machine(device):
    """Return what the times depend on: processor, PyTorch version and CPU threads."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    cpu = found[1] if found else platform.machine()
    processor = cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{processor}, PyTorch {torch.__version__}, CPU threads: {torch.get_num_threads()}"


def compare(options):
    """Train the three runs, report what they show, and return whether fusegrad's loss follows torch.nn's."""
    text, windows = read_text(options.data, options.context)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"cannot write to {out}: expected a writable directory, got: {error.strerror}") from error
    torch.set_num_threads(options.threads)
    reference, ours, halves = Run(TORCH, options), Run(FUSEGRAD, options), Run(TORCH, options, parts=2)
    runs = {"torch.nn": reference, "fusegrad": ours, "torch.nn in halves": halves}
    weights, theirs = ours.model.state_dict(), reference.model.state_dict()
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in weights)
    size = sum(weight.numel() for weight in weights.values())
    print(f"{machine(options.device)}\n{size / 1e6:.1f} M parameters, {len(text) / 1e6:.1f} MB of text", flush=True)
    console = Console()
    batch = train(runs, text, options, console)
    figures = {name: run.figures(windows.to(options.device), batch) for name, run in runs.items()}
    rounding, difference = differences(halves, reference).max().item(), differences(ours, reference).max().item()
    limit = SLACK * rounding + FLOOR
    passed = difference <= limit  # not so if a loss is NaN

    table = Table("", *(Column(name, justify="right") for name in ("torch.nn", "fusegrad", "fusegrad / torch.nn")))
    for row, theirs in figures["torch.nn"].items():
        value, digits = figures["fusegrad"][row], 4 if theirs < 20 else 1 if theirs < 2000 else 0
        table.add_row(row, f"{theirs:.{digits}f}", f"{value:.{digits}f}", f"{value / theirs:.3f}" if theirs else "")
    console.print(table)
    print("Peak memory: tensors live at the peak of a training step, above those live before it.")
    print(f"Largest difference from torch.nn's loss: fusegrad {difference:.1e}, torch.nn in halves {rounding:.1e}")
    record = {
        "machine": machine(options.device),
        "options": {**vars(options), "device": str(options.device)},
        "figures": figures,
        "largest difference": {"fusegrad": difference, "torch.nn in halves": rounding, "limit": limit},
        "passed": passed,
        "losses": {name: run.losses for name, run in runs.items()},
        "seconds": {name: run.seconds for name, run in runs.items()},
    }
    try:
        (out / "train_gpt.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(runs, limit, out / "train_gpt.png")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from error
    print(f"Wrote {out / 'train_gpt.json'} and {out / 'train_gpt.png'}", flush=True)
    limit = f"the limit {SLACK} x {rounding:.1e} + {FLOOR:.0e} = {limit:.1e}"
    if passed:
        print(f"PASSED: fusegrad trains like torch.nn: {difference:.1e} is within {limit}")
    else:
        print(f"train_gpt: FAILED: the losses differ by {difference:.1e}, beyond {limit}", file=sys.stderr)
    return passed


def parse_options():
    """Return the checked options of the command line."""
    parser = argparse.ArgumentParser("train_gpt", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: Python's standard library)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--out", metavar="DIR", default="out", help="where the results go (default: %(default)s)")
    numbers = (
        ("steps", 1, 200, "training steps"),
        ("batch", 2, 16, "sequences per step, even"),
        ("context", 2, 128, "bytes per sequence"),
        ("dim", 1, 128, "model width"),
        ("layers", 1, 4, "transformer blocks"),
        ("heads", 1, 4, "attention heads of even size"),
        ("seed", 0, 0, "seed of weights and batches"),
        ("threads", 1, torch.get_num_threads(), "CPU threads"),
    )
    for name, _, default, meaning in numbers:
        help = f"{meaning} (default: %(default)s)"
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=help)
    options = parser.parse_args()
    for name, least, _, _ in numbers:
        if not least <= (value := getattr(options, name)) < 2**31:
            parser.error(f"argument --{name}: expected a number from {least} to {2**31 - 1}, got {value}")
    if options.batch % 2:
        parser.error(f"argument --batch: expected an even number, got {options.batch}")
    if options.dim % (2 * options.heads):
        parser.error(f"argument --heads: expected {options.dim} (--dim) / heads to be an even number, got {options.heads}")
    count = torch.cuda.device_count()
    known = ["cpu", *["cuda"][:count], *(f"cuda:{index}" for index in range(count))]
    if options.device not in (None, *known):
        parser.error(f"argument --device: this machine has {', '.join(known)}, got {options.device!r}")
    options.device = torch.device(options.device or ("cuda" if count else "cpu"))
    return options


def main():
    """Run the comparison and return the exit code."""
    options = parse_options()
    try:
        return 0 if compare(options) else 1
    except InputError as error:
        print(f"train_gpt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_gpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
