"""Writes the README's table of figures from the newest results of a CPU run in bench/results/."""

import json
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: python bench/readme.py -->\n", "<!-- end of figures -->\n"


def newest():
    return max(path for path in RESULTS.glob("*.json") if "cells" in json.loads(path.read_text()))


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
    above = f"; above 0.95: {', '.join(s['above'])}" if s["above"] else ""
    lines += [
        "",
        f"Geometric mean of the ratios: {s['ratio']:.2f} over {s['cells']} cells{above}. Time over that of a copy, for the "
        f"{s['large_cells']} cells beyond",
        f"the last-level cache: {s['of_copy']:.2f}. All figures: `bench/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def updated(text) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + render(newest()) + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
