"""What the examples on images share: scikit-learn's 8 x 8 digits, training, and whether two networks have the same gradients.

A network is trained in float64 by torch.nn, and at each of its first STEPS steps torch.nn and fusegrad in float32 are given its weights:
fusegrad's gradient may be at most SLACK times as far from that of float64 as torch.nn's. It is not two trainings that are compared:
they part for good at the first ReLU or maximum that the last bit decides, whoever trains. For the same reason the median of the steps
counts.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from sklearn.datasets import load_digits

LR = 1e-3
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
    """A model in training for so many steps: `loss(model, *batch)` is what it minimises. Records the loss and the seconds of every step."""

    def __init__(self, model, loss, steps, dtype=torch.float32):
        self.model, self.loss, self.dtype = model.to(dtype), loss, dtype
        self.optimizer = torch.optim.Adam(model.parameters(), LR)
        # Down to 0, so that it matters little which step is the last.
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1, 0, steps)
        self.losses, self.seconds = [], []

    def gradient(self, *batch):
        """Leaves it with the parameters; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model, *(t.to(self.dtype) if t.is_floating_point() else t for t in batch))
        loss.backward()
        return loss.item()

    def step(self, *batch):
        start = perf_counter()
        loss = self.gradient(*batch)
        self.optimizer.step()
        self.seconds.append(perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss)

    @torch.no_grad()
    def accuracy(self, classify, x, y):
        self.model.eval()
        found = classify(self.model, x.to(self.dtype)).argmax(1)
        self.model.train()
        return (found == y).double().mean().item()


def agreement(model, loss, our_model, our_loss, batches):
    """(how far fusegrad's gradients are from those of float64, how far torch.nn's are, the limit); relative, the median of the steps."""
    exact, errors = Run(deepcopy(model), loss, STEPS, torch.float64), ([], [])
    ours, theirs = Run(deepcopy(our_model), our_loss, STEPS), Run(deepcopy(model), loss, STEPS)
    for batch in batches[:STEPS]:
        gradients = []
        for run in (ours, theirs, exact):
            run.model.load_state_dict(exact.model.state_dict())
            run.gradient(*batch)
            gradients.append(torch.cat([p.grad.double().flatten() for p in run.model.parameters()]))
        for found, gradient in zip(errors, gradients):
            found.append(((gradient - gradients[2]).norm() / gradients[2].norm()).item())
        exact.optimizer.step()
    ours, theirs = (torch.tensor(found).median().item() for found in errors)  # NaN if one is
    return ours, theirs, SLACK * theirs + FLOOR


def verdict(program, errors):
    """Prints whether the runs agree, and returns it."""
    ours, theirs, limit = errors
    said = f"distance of the gradients from those of float64, median of at most {STEPS} steps: fusegrad {ours:.1e}, torch.nn {theirs:.1e}"
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
