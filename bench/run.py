"""Forward + backward of every op beside eager torch and torch.compile, in one run, driven by the table of ops.

The sides take turns, inputs rotate through more than the last-level cache, medians are quoted, and nothing is timed whose result on
these very inputs differs from its reference. `python bench/run.py --help` lists the options.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fusegrad
from fusegrad import _C
from fusegrad._op import OPS
from fusegrad._samples import Make

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ("64x1024", "512x2048", "2048x2048", "4096x2048")
SHAPES_OF = {"cross_entropy": ("1024x32000",)}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLS", help=f"default: {' '.join(SHAPES)}, cross_entropy 1024x32000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def sides(op):
    """fusegrad; torch's own function or, where it has none, the op's reference; and torch.compile of that."""
    torch._dynamo.reset()

    def plain(kwargs):
        return op.functional(**kwargs) if op.torch is None else op.torch(**kwargs)

    def by_reference(f):
        def call(kwargs):
            with fusegrad.use_reference():
                return f(kwargs)

        return call

    return {"fusegrad": lambda kwargs: op.functional(**kwargs), "eager": by_reference(plain), "compile": by_reference(torch.compile(plain))}


def prepare(op, dtype, rows, cols, seed):
    kwargs = op.bench(Make(dtype, seed=seed), rows, cols)
    leaves = [v.requires_grad_() for v in kwargs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    y = op.functional(**kwargs)
    return kwargs, leaves, torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(f, kwargs, leaves, cotangent):
    return torch.autograd.grad(f(kwargs), leaves, cotangent)


def right(op, f, arguments):
    """Whether the gradients of a side are those of the reference in float64, as far as its dtype and its way of adding up allow."""
    kwargs, leaves, cotangent = arguments
    wide = {
        k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in kwargs.items() if isinstance(v, torch.Tensor)
    }
    with fusegrad.use_reference():
        expected = torch.autograd.grad(op.functional(**(kwargs | wide)), [v for v in wide.values() if v.requires_grad], cotangent.double())
    eps = torch.finfo(cotangent.dtype).eps
    return all((a - b).norm() <= 100 * eps * b.norm() for a, b in zip(step(f, *arguments), expected))


def measure(op, dtype, rows, cols, repeats):
    each = rows * cols * dtype.itemsize
    sets = [prepare(op, dtype, rows, cols, seed) for seed in range(max(1, min(8, math.ceil(64e6 / each))))]
    found = {name: f for name, f in sides(op).items() if right(op, f, sets[0])}
    inner = max(1, round(2e6 / (rows * cols)))
    times = {name: [] for name in found}
    for i in range(repeats + 2):
        for name, f in found.items():
            start = time.perf_counter()
            for j in range(inner):
                step(f, *sets[(i * inner + j) % len(sets)])
            if i >= 2:
                times[name].append((time.perf_counter() - start) / inner)
    return {name: dict(median=statistics.median(t), low=min(t), high=max(t)) for name, t in times.items()}


def copy_speed(nbytes):
    a = torch.empty(nbytes // 4).normal_()
    b = torch.empty_like(a)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2 * a.nbytes / statistics.median(times)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    cells = [
        (OPS[name], dtype, *map(int, shape.split("x")))
        for name in args.ops
        for dtype in args.dtypes
        for shape in (args.shapes or SHAPES_OF.get(name, SHAPES))
    ]
    machine = dict(
        cpu=platform.processor() or platform.machine(),
        torch=torch.__version__,
        fusegrad=fusegrad.__version__,
        capability=_C.cpu_capability(),
        threads=args.threads,
        copy_GB_s=round(copy_speed(64 * 2**20) / 1e9, 1),
    )
    console, results = Console(width=132 if not sys.stdout.isatty() else None), []
    for op, dtype, rows, cols in track(cells, "measuring", console=Console(stderr=True)):
        times = measure(op, DTYPES[dtype], rows, cols, args.repeats)
        best = min((t["median"] for name, t in times.items() if name != "fusegrad"), default=math.nan)
        ratio = times["fusegrad"]["median"] / best if "fusegrad" in times else math.nan
        results.append(dict(op=op.name, dtype=dtype, rows=rows, cols=cols, times=times, ratio=ratio))
    table = Table(title="forward + backward, ms (median); ratio: fusegrad over the better of the two others")
    for column in ("op", "dtype", "rows × cols", "fusegrad", "eager", "compile", "ratio"):
        table.add_column(column, justify="left" if column in ("op", "dtype") else "right")
    for r in results:
        shown = [f"{r['times'][s]['median'] * 1e3:.3f}" if s in r["times"] else "wrong" for s in ("fusegrad", "eager", "compile")]
        table.add_row(r["op"], r["dtype"], f"{r['rows']} × {r['cols']}", *shown, f"{r['ratio']:.2f}")
    console.print(table)
    mean = math.exp(statistics.fmean(math.log(r["ratio"]) for r in results))
    console.print(f"geometric mean of the ratios: {mean:.2f}    " + "  ".join(f"{k}: {v}" for k, v in machine.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(machine=machine, results=results, geometric_mean=mean), indent=1))


if __name__ == "__main__":
    main()
