"""Per-sample gradients, `vmap(grad(f))`, by the kernels and by the reference in turn: the table of docs/func.md.

python bench/per_sample.py --threads 1
"""

import argparse
import os
import sys

import measure
import torch
from run import RECYCLED
from torch.func import grad, vmap

import fusegrad
import fusegrad.functional as F

SAMPLES = 64
PARAMS = {
    "weight": lambda cols: torch.randn(cols),
    "matrix": lambda cols: torch.randn(256, cols) * cols**-0.5,
    "256": lambda _: torch.randn(256),
}
CALLS = {  # the call, its parameters, rows x columns of a sample
    "`rms_norm`": (lambda x, w: F.rms_norm(x, x.shape[-1:], w), ("weight",), ((64, 256), (128, 512))),
    "`layer_norm`": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), ("weight", "weight"), ((64, 256), (128, 512))),
    "`bias_act`, silu": (lambda x, b: F.bias_act(x, b, "silu"), ("weight",), ((64, 256), (64, 1024), (128, 1024))),
    "`bias_act`, gelu": (lambda x, b: F.bias_act(x, b, "gelu"), ("weight",), ((64, 256), (64, 1024), (128, 1024))),
    "`linear`, silu": (lambda x, w, b: F.linear(x, w, b, activation="silu"), ("matrix", "256"), ((512, 64), (64, 256))),
    "`linear`, gelu": (lambda x, w, b: F.linear(x, w, b, activation="gelu"), ("matrix", "256"), ((512, 64), (64, 256))),
    "`linear`": (F.linear, ("matrix", "256"), ((512, 64), (64, 256))),
}


def measured(call, params, rows, cols, rounds):
    """Milliseconds by the kernels and by the reference, medians."""
    x, values = torch.randn(SAMPLES, rows, cols), [PARAMS[p](cols) for p in params]
    cotangent = torch.randn_like(call(x[0], *values)).flatten()

    def loss(x, *values):  # that costs next to nothing
        return torch.dot(call(x, *values).flatten(), cotangent)

    gradients = vmap(grad(loss, tuple(range(1 + len(values)))), (0, *(None for _ in values)))

    def by_reference():
        with fusegrad.use_reference():
            gradients(x, *values)

    clocks = measure.Clock(lambda: gradients(x, *values), "cpu"), measure.Clock(by_reference, "cpu")
    times = [[clock.seconds() * 1e3 for clock in clocks] for _ in range(rounds)]
    return [measure.spread(side)["median"] for side in zip(*times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recycle", action="store_true")
    args = parser.parse_args()
    if args.recycle and not all(os.environ.get(k) == v for k, v in RECYCLED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RECYCLED})
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| op | rows × columns of a sample | kernels | reference | ratio |\n|---|---|---|---|---|")
    for name, (call, params, shapes) in CALLS.items():
        for rows, cols in shapes:
            own, other = measured(call, params, rows, cols, args.rounds)
            print(f"| {name} | {rows} × {cols} | {own:.1f} | {other:.1f} | {own / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
