"""Writes the README's table of figures from the newest results of a CPU run in bench/results/."""

import json
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python bench/readme.py -->\n", "<!-- end of figures -->\n"


def newest():
    """The longest CPU run of the last day."""
    runs = {path: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    runs = {path: run for path, run in runs.items() if "cells" in run and run["machine"].get("kind") != "cuda"}
    if not runs:
        raise SystemExit(f"no results of a CPU run in {RESULTS}: make one by bench/run.py --json")
    return max(runs, key=lambda path: (runs[path]["machine"]["date"], len(runs[path]["cells"])))


def render(path) -> str:
    result = json.loads(path.read_text())
    m, s = result["machine"], report.summary(result)
    lines = [
        f"Forward + backward on {m['threads']} threads of {m['device']} ({m['capability']}, torch {m['torch']}), {m['date']}: median ms;",
        "ratio to the best of eager code, torch's own function and `torch.compile`; percent of the speed of a copy of as many bytes.",
        "",
        "| op | dtype | rows × cols | fusegrad | best other | ratio | % of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        own, best = report.timed(cell).get("fusegrad"), report.best_other(cell)
        if own and best:
            lines.append(
                f"| {cell['op']} | {cell['dtype']} | {cell['rows']} × {cell['cols']} | {report.ms(own['both']['median'])} "
                f"| {report.ms(best[1])} ({best[0]}) | {report.ratio(cell):.2f} | {own['both']['percent_of_copy']:.0f} |"
            )
    large = f"Time over that of a copy, for the {s['large_cells']} cells beyond\nthe last-level cache: {s['of_copy']:.2f}. "
    above = f"; above 0.95: {', '.join(s['above'])}" if s["above"] else ""
    lines += [
        "",
        f"Geometric mean of the ratios: {s['ratio']:.2f} over {s['cells']} cells{above}.",
        f"{large if s['large_cells'] else ''}All figures: `bench/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def updated(text) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + render(newest()) + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
