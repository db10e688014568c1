"""Every op of the table beside eager code, torch's own function, torch.compile and the peers that are installed, in one run.

The sides take turns on the same inputs, which rotate through more than the last-level cache; medians and quartiles are quoted, of the
ratio to the best other side the range over the rounds, beside the speed of a copy of as many bytes in the same run. A side whose result
on these very inputs is wrong is not timed. All figures are in a JSON file, which grows cell by cell, and an HTML page.

    python bench/run.py                               the whole table
    python bench/run.py --quick --ops rms_norm        a minute's look
    python bench/run.py --host                        what a call costs before it computes anything
    python bench/run.py --model                       whole training steps of small networks
    python bench/run.py --compare old.json            beside an older run
    python bench/run.py --resume                      go on with one that was interrupted

Beside contiguous inputs each op gets slices of wider rows once; the copy that a side needs of them is in its time. The cells in which the
quartiles of a side are more than a factor of two apart are measured once more at the end.

--recycle runs it with memory that malloc never gives back to the system: without it the sides that take large results from torch's
CPU allocator spend much of their time on page faults, which fusegrad's pool avoids; with it none does.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import measure
import model
import report
import sides
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fusegrad
from fusegrad._op import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OUT = Path(__file__).resolve().parent.parent / "out"
QUICK = ((4, 64), (1024, 1024))
LAYOUTS = ("contiguous", "row_strided", "column_strided", "transposed", "offset")
STRIDED = ((4096, 1024), "row_strided")
RECYCLED = dict(MALLOC_MMAP_THRESHOLD_="4294967296", MALLOC_TRIM_THRESHOLD_="9223372036854775807", MALLOC_TOP_PAD_="67108864")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    known = [*sides.OWN, *sides.PEERS]
    parser.add_argument("--sides", nargs="+", choices=known, metavar="SIDE", help=f"of {', '.join(known)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: float32 bfloat16")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxCOLS", help="default: those of the op's row in the table")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="of the inputs; default: contiguous, and once row_strided")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=positive, help="turns that each side takes; default: 9")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small shapes and three rounds, unless they are given")
    parser.add_argument("--recycle", action="store_true", help="memory that is never given back to the system (glibc)")
    parser.add_argument("--host", action="store_true", help="microseconds of a call with (4, 64) inputs")
    parser.add_argument("--model", action="store_true", help="training steps of small networks")
    parser.add_argument("--compare", type=Path, metavar="OLD.json")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds of this code and machine, add the rest")
    parser.add_argument("--json", type=Path, help="default: out/bench.json, of --model out/model.json")
    parser.add_argument("--html", type=Path, help="default: out/bench.html")
    args = parser.parse_args(argv)
    if args.model:
        other = [f"--{k}" for k in ("ops", "dtypes", "shapes", "layouts", "host", "html") if getattr(args, k)]
        if other:
            parser.error(f"--model: its networks have layers and sizes of their own; it does not go with {', '.join(other)}")
        if not set(args.sides or ()) <= set(model.SIDES):
            parser.error(f"--model: its --sides are {', '.join(model.SIDES)}")
    args.sides = args.sides or (model.SIDES if args.model else known)
    args.ops, args.dtypes = args.ops or list(OPS), args.dtypes or ["float32", "bfloat16"]
    args.json = args.json or OUT / ("model.json" if args.model else "bench.json")
    args.html = args.html or OUT / "bench.html"
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.shapes = args.shapes or (((4, 64),) if args.host else QUICK if args.quick else None)
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare: there is no file {args.compare}")
    args.kind = "networks" if args.model else "cells"
    args.old = read("--compare", args.compare, args.kind, parser) if args.compare else None  # now, as --json may overwrite it
    args.begun = read("--resume", args.json, args.kind, parser) if args.resume and args.json.exists() else None
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return args


def read(option, path, kind, parser) -> dict:
    """A run's JSON, of the same kind: with cells, or with networks."""
    with contextlib.suppress(ValueError):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and {"machine", kind} <= result.keys():
            return result
        if isinstance(result, dict) and {"networks", "cells"} & result.keys():
            parser.error(f"{option}: {path} is of a run with{'out' if kind == 'networks' else ''} --model")
    parser.error(f"{option}: {path} is not what --json writes")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on, got {text!r}")
    return int(text)


def shape(text):
    try:
        rows, cols = map(positive, text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"a shape is ROWSxCOLS, got {text!r}") from None
    return rows, cols


def write(path, result):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def check_same(path, old, new):
    """Ends a run that would not go on as the one before it did: their machine lines say how."""
    for k in old | new:
        if k not in ("date", "commit") and new.get(k) != old.get(k):
            sys.exit(f"--resume: {path} was measured with {k} {old.get(k)}, this run is with {new.get(k)}")
    commit = old.get("commit") or "unknown"
    if not measure.code_is_that_of(commit):
        why = "which changes nobody knows" if commit.endswith("-dirty") else "and the code is not the same since"
        sys.exit(f"--resume: {path} was measured at commit {commit}, {why}")


def stop(*_):
    raise KeyboardInterrupt


def cells_of(args):
    """(op, dtype, rows, cols, layout), by name: the dtypes of a shape one after the other, so that they find the machine in the same
    state."""
    for op in args.ops:
        found = [(s, layout) for s in args.shapes or OPS[op].shapes for layout in args.layouts or ("contiguous",)]
        if not (args.shapes or args.layouts):
            found.append(STRIDED)
        yield from ((op, dtype, *s, layout) for s, layout in found for dtype in args.dtypes)


def main():
    args = parse()
    if args.recycle and not all(os.environ.get(k) == v for k, v in RECYCLED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RECYCLED})
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, stop)
    console = Console(width=None if sys.stdout.isatty() else 190)
    installed, absent = ({}, {}) if args.model else sides.peers(args.device)
    result = {"machine": measure.machine(args, sides.versions(installed)), args.kind: []}
    if args.begun:
        check_same(args.json, args.begun["machine"], result["machine"])
        result = args.begun
    if args.model:
        return model.main(args, console, result, lambda: write(args.json, result))
    result = dict(machine=result["machine"], absent=absent) | result
    cells = {(c["op"], c["dtype"], c["rows"], c["cols"], report.layout(c)): c for c in result["cells"]}
    wanted = list(cells_of(args))
    result["wanted"] = len(cells.keys() | set(wanted))

    def queue():
        yield from (key for key in wanted if key not in cells)
        # What was disturbed, when all is done and the disturbance perhaps is over.
        yield from [key for key in wanted if key in cells and not cells[key].get("repeated") and report.unsteady(cells[key])]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interrupted, failed = False, []
    try:
        with fusegrad.strict(), Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(wanted), completed=len(cells.keys() & set(wanted)))
            for key in queue():
                name, dtype, *rest = key
                op, again = OPS[name], key in cells
                what = report.name(dict(zip(("op", "dtype", "rows", "cols", "layout"), key)))
                progress.update(task, description=f"{what}, once more" if again else what)
                try:
                    cell = measure.measure(op, DTYPES[dtype], *rest, sides.sides_of(op, args.sides, installed), args)
                    cells[key] = cell | dict(repeated=True) if again else cell
                    result["cells"] = list(cells.values())
                except Exception as error:  # its arguments do not fit into memory, say; the others are measured all the same
                    failed.append(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
                write(args.json, result)
                progress.advance(task, not again)
    except KeyboardInterrupt:
        interrupted = True
        write(args.json, result)  # the last cell may not have been
    console.print(report.host_table(result) if args.host else report.table(result, args.old))
    console.print(report.footer(result, args.old), highlight=False, markup=False)
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(report.html(result, args.old))
    console.print(*failed, f"{args.json}  {args.html}", sep="\n", highlight=False, markup=False)
    if interrupted:
        console.print(f"interrupted: {len(cells.keys() & set(wanted))} of {len(wanted)} cells were measured")
        return 130
    return bool(failed) or any("wrong" in cell["sides"].get("fusegrad", {}) for cell in result["cells"])


if __name__ == "__main__":
    sys.exit(main())
