"""What the examples on images share: scikit-learn's 8 x 8 digits, networks trained beside each other, and whether they agree.

A network is trained three times, from the same weights on the same batches: with torch.nn in float64, with torch.nn in float32 and
with fusegrad in float32. The first is what both others approximate: fusegrad's losses may be at most SLACK times as far from it as
torch.nn's. Only the first STEPS steps are compared: later, rounding has grown until any two runs differ.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from sklearn.datasets import load_digits

STEPS = 50
SLACK, FLOOR = 3, 1e-6


class InputError(Exception):
    """An input the program cannot work with; the message is for the user."""


def images(generator):
    """The 1797 images [N, 1, 8, 8] from 0 to 1 and their labels, shuffled."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=generator)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(y)[order]


class Run:
    """A model in training: `loss(model, *batch)` is what it minimises. Records the loss and the seconds of every step."""

    def __init__(self, model, loss, lr, dtype=torch.float32):
        self.model, self.loss, self.dtype = model.to(dtype), loss, dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr)
        self.losses, self.seconds = [], []

    def step(self, *batch):
        batch = [t.to(self.dtype) if t.is_floating_point() else t for t in batch]
        start = perf_counter()
        loss = self.loss(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, classify, x, y):
        self.model.eval()
        found = classify(self.model, x.to(self.dtype)).argmax(1)
        self.model.train()
        return (found == y).double().mean().item()


def agreement(exact, theirs, ours):
    """(how far fusegrad is from the float64 run, how far torch.nn is, the limit)."""
    losses = [torch.tensor(run.losses[:STEPS], dtype=torch.float64) for run in (ours, theirs, exact)]
    errors = [(run - losses[2]).abs().max().item() for run in losses[:2]]  # NaN if one loss is
    return *errors, SLACK * errors[1] + FLOOR


def verdict(program, errors):
    """Prints whether the runs agree, and returns it."""
    ours, theirs, limit = errors
    said = f"largest distance from the float64 losses in the first {STEPS} steps: fusegrad {ours:.1e}, torch.nn {theirs:.1e}"
    if ours <= limit:  # not so for NaN
        print(f"PASSED: fusegrad trains like torch.nn; {said}")
        return True
    print(f"{program}: FAILED: {said}, limit {limit:.1e}", file=sys.stderr)
    return False


def milliseconds(run):
    return median(run.seconds[len(run.seconds) // 10 :]) * 1e3


def machine():
    """What the times depend on: processor, PyTorch version and CPU threads."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    return f"{found[1] if found else platform.machine()}, PyTorch {torch.__version__}, CPU threads: {torch.get_num_threads()}"


def arguments(program, about, numbers):
    """The command line: --out and whole numbers, as (name, least, default, meaning)."""
    parser = argparse.ArgumentParser(program, description=about.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", metavar="DIR", default="out", help="where the results go (default: %(default)s)")
    numbers = (*numbers, ("threads", 1, torch.get_num_threads(), "CPU threads"))
    for name, _, default, meaning in numbers:
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    options = parser.parse_args()
    for name, least, _, _ in numbers:
        if not least <= getattr(options, name) < 2**31:
            parser.error(f"argument --{name}: expected a number from {least} to {2**31 - 1}, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    return options


def folder(path):
    """The directory, made and tried out before hours of work depend on it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"cannot write to {path}: expected a writable directory, got: {error.strerror}") from error
    return Path(path)


def write(record, figure, path):
    """The JSON and the picture, path.json and path.png."""
    try:
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        figure.savefig(path.with_suffix(".png"), dpi=120)
    except OSError as error:
        raise InputError(f"cannot write to {path}.*: {error.strerror}") from error
    print(f"Wrote {path.with_suffix('.json')} and {path.with_suffix('.png')}", flush=True)


def run(program, compare, options):
    """The exit code of the program: 0 if `compare(options)` says so."""
    try:
        return 0 if compare(options) else 1
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
