"""Writes the tables of figures of the README and the docs from the newest results of a CPU run in bench/results/."""

import json
import math
import re
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# "figures" of all ops, with a summary; "figures of rms_norm layer_norm" of these; "figures of training steps" of whole networks.
PLACE = re.compile(r"(<!-- figures(?: of ([\w ]+))?: python bench/readme.py -->\n).*?(<!-- end of figures -->\n)", re.S)


def newest(recycled=False, kind="cells"):
    """The longest CPU run of the last day, of those with recycled memory or of those without; None if there is none."""

    def asked_for(run):
        machine = run.get("machine", {})
        return kind in run and machine.get("kind") != "cuda" and bool(machine.get("recycled_memory")) == recycled

    runs = {path: run for path in RESULTS.glob("*.json") if asked_for(run := json.loads(path.read_text()))}
    return max(runs, key=lambda path: (runs[path]["machine"]["date"], len(runs[path][kind])), default=None)


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
    smallest = {op: min(c["rows"] * c["cols"] for c in cells if c["op"] == op) for op in {c["op"] for c in cells}}
    for cell in cells:
        if (report.ratio(cell) or 0) > report.MOST:
            above.setdefault(cell["op"], {}).setdefault(cell["dtype"], []).append(f"{report.shape(cell, ' × ')}: {report.ratio_text(cell)}")
        for phase, own, best in report.host_excess(cell) if cell["rows"] * cell["cols"] == smallest[cell["op"]] else ():
            host.setdefault(cell["op"], {})[cell["dtype"], phase] = f"{own:.0f} against {best:.0f}"
        for side, s in cell["sides"].items():
            if "wrong" in s:
                what = s["wrong"].partition(": relative")[0]
                refused.setdefault((cell["op"], side, what), []).append(f"{cell['dtype']} {report.shape(cell, ' × ')}")
    dtypes = ("float32", "bfloat16")
    title = f"The cells above {report.MOST}, and the range over the rounds where the run has it"
    yield from folded(title, ("op", *dtypes), [(op, *(", ".join(of.get(d, ())) for d in dtypes)) for op, of in above.items()])
    title = f"Calls with the smallest shape more than {report.HOST_MARGIN} µs above the better of eager code and torch's own function"
    columns = [(d, phase) for d in dtypes for phase in report.HOST_PHASES]
    head = ("op", *(f"{d}, {report.HOST_PHASES[phase]}, µs" for d, phase in columns))
    yield from folded(title, head, [(op, *(of.get(column, "") for column in columns)) for op, of in host.items()])
    slower = {}
    for cell, over in report.slower_in_bfloat16(cells):
        slower.setdefault(cell["op"], []).append(f"{report.shape(cell, ' × ')}: {over:.2f}")
    title = "The cells in which bfloat16 takes longer than float32, and how many times as long"
    yield from folded(title, ("op", "shapes"), [(op, ", ".join(of)) for op, of in slower.items()])
    title = "Sides that were not timed, as their result is wrong"
    yield from folded(title, ("op", "side", "what", "cells"), [(*key, ", ".join(where)) for key, where in refused.items()])


def ratios(result, op, *dtypes):
    return [r for c in result["cells"] if c["op"] == op and c["dtype"] in dtypes and (r := report.ratio(c)) is not None]


def shown(value, digits=2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def where_there_is(result, recycled):
    """Sentences about what not every run has."""
    if fresh := report.fresh_memory(result):
        yield fresh
    if result.get("wanted", 0) > len(result["cells"]):
        yield f"The run was stopped after {len(result['cells'])} of its {result['wanted']} cells: not every op has all of its shapes."
    if found := [cell for cell in result["cells"] if report.layout(cell) == "row_strided"]:
        yield f"The inputs of {len(found)} cells (row_strided) are slices of wider rows; a copy that a side needs of them is in its time."
    if found := report.summary(result)["repeated"]:
        still = len(report.summary(result)["still_unsteady"])
        why = "as quartiles of a side were more than a factor of two apart"
        yield f"{len(found)} cells were measured once more, {why}; of {still} they still are."
    later = {}
    for cell in result["cells"]:
        if "commit" in cell:
            later.setdefault(cell["commit"], {})[cell["op"]] = None
    yield from (f"The cells of {', '.join(ops)} were measured anew at commit {commit[:9]}." for commit, ops in later.items())
    if refused := sum(any("wrong" in s for s in cell["sides"].values()) for cell in result["cells"]):
        yield f"In {refused} cells a side is not compared with, as its result there is wrong: they are listed below."
    if recycled:
        kernels = json.loads(recycled.read_text())
        s = report.summary(kernels)
        shapes = ", ".join(dict.fromkeys(f"{c['rows']} × {c['cols']}" for c in kernels["cells"]))
        yield f"Kernels alone, {kernels['machine']['date']}: {s['ratio']:.2f} over {s['cells']} cells ({shapes}),"
        yield f"`bench/results/{recycled.name}`."


def render(path, ops=(), recycled=None) -> str:
    """Of these ops; of none that are named: of all. With a column of the run with recycled memory, where there is one."""
    result, kernels = (p and json.loads(p.read_text()) for p in (path, recycled))
    m, s, dtypes = result["machine"], report.summary(result), ("float32", "bfloat16")
    lines = [
        f"Forward + backward on {m['threads']} threads of {m['device']} ({m['capability']}, torch {m['torch']}), {m['rounds']} rounds,",
        f"{m['date']}, commit {m['commit'][:9]}:",
        "fusegrad's time over that of the best of eager code, torch's own function and `torch.compile`, geometric mean over the",
        "shapes, and in the shape where it does worst; percent of the speed of a copy of as many bytes, where the inputs come",
        "from memory.",
        *(["Kernels alone: the ratio in a run in which all sides have memory that is kept (`--recycle`)."] if kernels else []),
        "",
        f"| op | float32 | bfloat16 | worst | % of copy |{' kernels alone |' if kernels else ''}",
        f"|---|---|---|---|---|{'---|' if kernels else ''}",
    ]
    for op in ops or dict.fromkeys(cell["op"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["op"] == op and report.ratio(cell) is not None]
        if not cells:
            continue
        worst = max(cells, key=report.ratio)
        line = [op, *(shown(report.geometric_mean(ratios(result, op, dtype))) for dtype in dtypes)]
        line.append(f"{worst['dtype']} {report.shape(worst, ' × ')}: {report.ratio(worst):.2f}")
        line.append(shown(report.geometric_mean(100 / report.of_copy(c) for c in cells if report.from_memory(c, m)), 0))
        line += [shown(report.geometric_mean(ratios(kernels, op, *dtypes)))] if kernels else []
        lines.append(f"| {' | '.join(line)} |")
    if ops:
        return "\n".join(lines) + "\n"
    large = (
        f"Time over that of a copy, where the inputs come from memory: geometric mean\n{report.over_copy(s)} (aimed at: {report.COPIES}). "
    )
    large += f"Those copies: {report.copy_speed(s)}.\n"
    lines += [
        "",
        f"Geometric mean of the ratios: {s['ratio']:.2f} over {s['cells']} cells (aimed at: {report.TARGET}).",
        f"Above {report.MOST} are {len(s['above'])} (aimed at: none); no call is handed to torch's function by its size.",
        f"{large if s['large_cells'] else ''}All figures: `bench/results/{path.name}`.",
        "More than 100% of copy is possible where a backward finds in the caches what its forward read, or where results in large pages,",
        "or stores past the caches, beat those of the copy.",
        *where_there_is(result, recycled),
        f"bfloat16 takes longer than float32, beyond the spread and products of matrices aside, in {len(s['bfloat16_slower'])} cells.",
        *short(result["cells"]),
    ]
    return "\n".join(lines) + "\n"


def training_steps(path) -> str:
    result = json.loads(path.read_text())
    m = result["machine"]
    lines = [
        f"{m['threads']} threads of {m['device']} ({m['capability']}, torch {m['torch']}), float32, {m['rounds']} rounds, {m['date']}:",
        "",
        "| network | torch.nn, ms | fusegrad, ms | ratio, and its range over the rounds |",
        "|---|---|---|---|",
    ]
    for network in result["networks"]:
        ms = (f"{network['sides'][side]['median'] * 1e3:.0f}" for side in ("native", "fusegrad"))
        lines.append(f"| {' | '.join((network['what'], *ms, report.with_range(network['ratio'])))} |")
    return "\n".join(lines) + "\n"


def updated(text) -> str:
    def found(kind):
        if (path := newest(kind=kind)) is None:
            raise SystemExit(f"no results of a CPU run in {RESULTS}: make one by bench/run.py --json")
        return path

    def figures(place):
        begin, ops, end = place.groups()
        if ops == "training steps":
            return begin + training_steps(found("networks")) + end
        return begin + render(found("cells"), (ops or "").split(), newest(recycled=True)) + end

    return PLACE.sub(figures, text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if PLACE.search(text):
            page.write_text(updated(text))
