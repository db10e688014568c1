"""Writes the tables of figures of the README and the docs from the newest results of a CPU run in bench/results/."""

import json
import re
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# "figures" of all ops, with a summary; "figures of rms_norm layer_norm" of these.
PLACE = re.compile(r"(<!-- figures(?: of ([\w ]+))?: python bench/readme.py -->\n).*?(<!-- end of figures -->\n)", re.S)


def newest():
    """The longest CPU run of the last day."""
    runs = {path: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    runs = {path: run for path, run in runs.items() if "cells" in run and run["machine"].get("kind") != "cuda"}
    if not runs:
        raise SystemExit(f"no results of a CPU run in {RESULTS}: make one by bench/run.py --json")
    return max(runs, key=lambda path: (runs[path]["machine"]["date"], len(runs[path]["cells"])))


def shape(cell):
    return f"{cell['rows']} × {cell['cols']}"


def folded(title, head, lines):
    """A table behind its title; nothing if it has no lines."""
    if lines:
        rule = "|".join("---" for _ in head)
        yield from ("", f"<details><summary>{title}</summary>", "", f"| {' | '.join(head)} |", f"|{rule}|")
        yield from (f"| {' | '.join(line)} |" for line in lines)
        yield from ("", "</details>")


def short(cells):
    """What falls short, by op: cells that are not won, host costs; and the sides that cells were not compared with."""
    above, host, refused = {}, {}, {}
    for cell in cells:
        if (ratio := report.ratio(cell) or 0) > 0.95:
            above.setdefault(cell["op"], {}).setdefault(cell["dtype"], []).append(f"{shape(cell)}: {ratio:.2f}")
        if (found := report.host_cost(cell)) and found[0] > found[1] + report.HOST_MARGIN:
            host.setdefault(cell["op"], {})[cell["dtype"]] = f"{found[0]:.0f} against {found[1]:.0f}"
        for side, s in cell["sides"].items():
            if "wrong" in s:
                refused.setdefault((cell["op"], side, s["wrong"].partition(": relative")[0]), []).append(f"{cell['dtype']} {shape(cell)}")
    dtypes = ("float32", "bfloat16")
    title = "The cells above 0.95"
    yield from folded(title, ("op", *dtypes), [(op, *(", ".join(of.get(d, ())) for d in dtypes)) for op, of in above.items()])
    title = f"Forward of the smallest shape more than {report.HOST_MARGIN} µs above the better of eager code and torch's own function"
    yield from folded(title, ("op", *(f"{d}, µs" for d in dtypes)), [(op, *(of.get(d, "") for d in dtypes)) for op, of in host.items()])
    title = "Sides that were not timed, as their result is wrong"
    yield from folded(title, ("op", "side", "what", "cells"), [(*key, ", ".join(where)) for key, where in refused.items()])


def render(path, ops=()) -> str:
    """Of these ops; of none that are named: of all."""
    result = json.loads(path.read_text())
    m, s = result["machine"], report.summary(result)
    lines = [
        f"Forward + backward on {m['threads']} threads of {m['device']} ({m['capability']}, torch {m['torch']}), {m['date']}:",
        "fusegrad's time over that of the best of eager code, torch's own function and `torch.compile`, geometric mean over the",
        "shapes, and in the shape where it does worst; percent of the speed of a copy of as many bytes, where the inputs come",
        "from memory.",
        "",
        "| op | float32 | bfloat16 | worst | % of copy |",
        "|---|---|---|---|---|",
    ]
    for op in ops or dict.fromkeys(cell["op"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["op"] == op and report.ratio(cell) is not None]
        if not cells:
            continue
        means = [report.geometric_mean(report.ratio(c) for c in cells if c["dtype"] == dtype) for dtype in ("float32", "bfloat16")]
        worst = max(cells, key=report.ratio)
        large = report.geometric_mean(100 / report.of_copy(c) for c in cells if report.from_memory(c, m))
        shown = [f"{value:.2f}" if value == value else "" for value in means]
        shown.append(f"{worst['dtype']} {shape(worst)}: {report.ratio(worst):.2f}")
        lines.append("| " + " | ".join([op, *shown, f"{large:.0f}" if large == large else ""]) + " |")
    if ops:
        return "\n".join(lines) + "\n"
    slower = ", ".join(s["bfloat16_slower"]).replace(" bfloat16", "")
    large = f"Time over that of a copy, for the {s['large_cells']} cells whose inputs\ncome from memory: {s['of_copy']:.2f}. "
    lines += [
        "",
        f"Geometric mean of the ratios: {s['ratio']:.2f} over {s['cells']} cells, of which {len(s['above'])} are above 0.95.",
        f"{large if s['large_cells'] else ''}All figures: `bench/results/{path.name}`.",
        "More than 100% of copy is possible where a backward finds in the caches what its forward read, or where results in large pages,",
        "or stores past the caches, beat those of the copy.",
        *filter(None, [report.fresh_memory(result)]),
        f"bfloat16 takes longer than float32, beyond the spread and products of matrices aside, in: {slower or 'no cell'}.",
        *short(result["cells"]),
    ]
    return "\n".join(lines) + "\n"


def updated(text) -> str:
    def figures(place):
        begin, ops, end = place.groups()
        return begin + render(newest(), (ops or "").split()) + end

    return PLACE.sub(figures, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if PLACE.search(text):
            page.write_text(updated(text))
