"""A run's figures: summary, table for the terminal, HTML with plots."""

import html as escape
import io
import math
import statistics

from rich.markup import escape as plain
from rich.table import Table

PHASES = ("forward", "backward", "both")
TARGET, MOST, COPIES = 0.5, 0.95, 2  # what is aimed at: the mean ratio, the largest one, and the mean time over that of a copy
OTHERS = ("eager", "native", "compile")
SMALL = 4096  # elements, of the smallest shape of each op: next to nothing
HOST_MARGIN = 8  # µs that a call on next to nothing may cost more than the better of eager and native
HOST_PHASES = {"forward": "forward", "both": "forward + backward"}


def geometric_mean(values):
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def layout(cell):
    """Of its inputs; older results have only contiguous ones."""
    return cell.get("layout", "contiguous")


def shape(cell, times="x"):
    return f"{cell['rows']}{times}{cell['cols']}" + (f" {layout(cell)}" if layout(cell) != "contiguous" else "")


def name(cell):
    return f"{cell['op']} {cell['dtype']} {shape(cell)}"


def timed(cell):
    """The sides that were timed."""
    return {side: s for side, s in cell["sides"].items() if "wrong" not in s}


def best_other(cell):
    """(side, seconds) of the fastest of what torch has, forward and backward."""
    found = {side: s["both"]["median"] for side, s in timed(cell).items() if side in OTHERS}
    return min(found.items(), key=lambda item: item[1]) if found else None


def ratio(cell):
    """fusegrad's time over the best that torch has, forward and backward."""
    best, own = best_other(cell), timed(cell).get("fusegrad")
    return own["both"]["median"] / best[1] if own and best else None


def ratio_text(cell) -> str:
    """That, and the range of it over the rounds where the run has it."""
    if (r := ratio(cell)) is None:
        return ""
    rounds = cell["sides"][best_other(cell)[0]]["both"].get("ratio")
    return with_range(rounds | dict(median=r)) if rounds else f"{r:.2f}"


def with_range(s) -> str:
    return f"{s['median']:.2f} ({s['low']:.2f} – {s['high']:.2f})"


def of_copy(cell):
    own = timed(cell).get("fusegrad")
    return own and own["both"]["median"] / cell["copy"]["both"]["median"]


def from_memory(cell, machine) -> bool:
    """Whether its inputs were read from memory: calls rotate through more of them than the last-level cache holds."""
    return cell["rotated_bytes"] > machine["last_level_cache_MB"] * 2**20


def host_us(cell, side, phase):
    """Microseconds of a call, where it computes next to nothing; else None."""
    s = timed(cell).get(side)
    return s[phase]["median"] * 1e6 if s and cell["rows"] * cell["cols"] <= SMALL else None


def host_excess(cell):
    """(phase, fusegrad's microseconds, those of the better of eager and native) where it costs more, beyond the margin."""
    for phase in HOST_PHASES:
        own, *others = (host_us(cell, side, phase) for side in ("fusegrad", "eager", "native"))
        best = min(filter(None, others), default=None)
        if own and best and own > best + HOST_MARGIN:
            yield phase, own, best


def unsteady(cell) -> bool:
    """Whether the quartiles of some side and phase are more than a factor of two apart."""
    spreads = (s[phase] for s in timed(cell).values() for phase in PHASES)
    return any(s["high"] > 2 * s["low"] for s in spreads)


def long_phases(cell):
    """The sides of which forward or backward alone took longer than both, beyond the spread: the memory came from elsewhere."""
    return [f"{name(cell)} {side}" for side, s in timed(cell).items() if max(s[p]["low"] for p in PHASES[:2]) > s["both"]["high"]]


def slower_in_bfloat16(cells):
    """(bfloat16 cell, its time over that in float32) where that is more than the spread, products of matrices aside."""
    named = {name(c): c for c in cells}
    for cell in cells:
        twin = named.get(name(cell | dict(dtype="float32"))) if cell["dtype"] == "bfloat16" and not cell["gemm"] else None
        own, wide = (timed(c).get("fusegrad") if c else None for c in (cell, twin))
        if own and wide and own["both"]["low"] > wide["both"]["high"]:
            yield cell, own["both"]["median"] / wide["both"]["median"]


def summary(result) -> dict:
    cells = result["cells"]
    ratios = [(c, r) for c in cells if (r := ratio(c)) is not None]
    large = [c for c in cells if from_memory(c, result["machine"]) and of_copy(c)]
    moved = [c for c in large if not c["gemm"]]  # a product of matrices takes as long as its arithmetic
    return dict(
        ratio=geometric_mean(r for _, r in ratios),
        above=[f"{name(c)}: {ratio_text(c)}" for c, r in ratios if r > MOST],
        of_copy=geometric_mean(map(of_copy, moved)),
        of_copy_with_products=geometric_mean(map(of_copy, large)),
        cells=len(ratios),
        large_cells=len(moved),
        large_products=len(large) - len(moved),
        bfloat16_slower=[f"{name(c)}: {over:.2f}" for c, over in slower_in_bfloat16(cells)],
        host=[f"{name(c)} {HOST_PHASES[phase]}: {own:.0f} against {other:.0f}" for c in cells for phase, own, other in host_excess(c)],
        repeated=[name(c) for c in cells if c.get("repeated")],
        still_unsteady=[name(c) for c in cells if c.get("repeated") and unsteady(c)],
        long_phases=[what for c in cells for what in long_phases(c)],
        copy_GB_s=sorted(c["bytes"]["both"] / c["copy"]["both"]["median"] / 1e9 for c in large),
        wrong=[f"{name(c)} {side} ({s['wrong']})" for c in cells for side, s in c["sides"].items() if "wrong" in s],
    )


def over_copy(s) -> str:
    """What a summary says of the time over that of a copy."""
    more = f", {s['of_copy_with_products']:.2f} with the {s['large_products']} cells of products of matrices"
    return f"{s['of_copy']:.2f} of {s['large_cells']} cells{more if s['large_products'] else ''}"


def beside(new, old):
    """(what was measured over the older one, whether what is quoted around the two medians overlaps)."""
    return new["median"] / old["median"], new["low"] <= old["high"] and old["low"] <= new["high"]


def copy_speed(s) -> str:
    """What a summary says of the copies themselves."""
    speeds = s["copy_GB_s"]
    return f"{statistics.median(speeds):.0f} GB/s, {speeds[0]:.0f} to {speeds[-1]:.0f}" if speeds else "none"


def change(found) -> str:
    """That as text: a star where it is more than the spread."""
    over, same = found
    return f"{over:.2f}{'' if same else '*'}"


def over_old(result, old):
    """{(cell, side): (time over that of the older run, whether the quartiles of the two overlap)}."""
    before = {name(c): timed(c) for c in old["cells"]}
    found = {}
    for cell in result["cells"]:
        for side, s in timed(cell).items():
            if was := before.get(name(cell), {}).get(side):
                found[name(cell), side] = beside(s["both"], was["both"])
    return found


def ratios_over_old(result, old):
    """The same of fusegrad's ratio to the best that torch has now, whose ranges are those of the rounds, of cells of which both have it."""
    before = {name(c): timed(c) for c in old["cells"]}
    for cell in result["cells"]:
        if best := best_other(cell):
            now, was = (sides.get(best[0], {}).get("both", {}).get("ratio") for sides in (timed(cell), before.get(name(cell), {})))
            if now and was:
                yield beside(now, was)


def differences(old, new) -> list[str]:
    """Between two machine lines."""
    return [f"{k}: {old.get(k)}, now {new.get(k)}" for k in new.keys() | old.keys() if k != "date" and old.get(k) != new.get(k)]


def findings(result, old=None) -> list[tuple[str, list[str] | None]]:
    """What a run has shown, as sentences, and with those that name cells their list."""
    s, m = summary(result), result["machine"]
    mean = f"geometric mean {s['ratio']:.2f} of {s['cells']} cells (aimed at: {TARGET})"
    found = [
        (f"forward + backward over the best of eager, native and compile: {mean}", None),
        (f"cells above {MOST}", s["above"]),
        (f"time over that of a copy, inputs coming from memory: geometric mean {over_copy(s)} (aimed at: {COPIES})", None),
        (f"speed of those copies: {copy_speed(s)}", None),
        ("bfloat16 slower than float32 beyond the spread, products of matrices aside", s["bfloat16_slower"]),
        (f"calls on next to nothing more than {HOST_MARGIN} µs above the better of eager and native", s["host"]),
        ("measured once more, as quartiles were more than a factor of two apart", s["repeated"]),
        ("of which they still are", s["still_unsteady"]),
        ("sides of which forward or backward alone took longer than both", s["long_phases"]),
        ("not timed", s["wrong"]),
        ("absent", [f"{peer} ({why})" for peer, why in result["absent"].items()]),
        ("  ".join(f"{k}: {v}" for k, v in m.items()), None),
    ]
    if old:
        found.insert(0, ("measured otherwise than the older run", differences(old["machine"], m)))
        changes = (over_old(result, old).values(), "times", "the quartiles"), (list(ratios_over_old(result, old)), "ratios", "the rounds")
        for each, what, around in changes:
            alike = f"{sum(same for _, same in each)} of {len(each)} {what} within {around}"
            mean = f", geometric mean {geometric_mean(r for r, _ in each):.2f} of its {what}" if each else ""
            found.insert(0, (f"beside the older run: {alike}{mean}", None))
    return found


def footer(result, old=None) -> str:
    return "\n".join(line if items is None else f"{line}: {', '.join(items) or 'none'}" for line, items in findings(result, old))


def ms(seconds):
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


HEADER = ("cell", "side", *(f"{phase} ms" for phase in PHASES), "quartiles", "GB/s", "% of copy", "saved MB", "peak MB", "host µs", "ratio")


def header(old):
    return (*HEADER, "over old") if old else HEADER


def rows(result, old=None):
    """The lines of the table, as text."""
    changes = over_old(result, old) if old else {}
    for cell in result["cells"]:
        for side, s in cell["sides"].items():
            first = name(cell) if side == next(iter(cell["sides"])) else ""
            if "wrong" in s:
                yield first, side, "wrong", *[""] * (len(header(old)) - 3)
                continue
            both = s["both"]
            line = (first, side, ms(s["forward"]["median"]), ms(s["backward"]["median"]), ms(both["median"]))
            line += (f"{ms(both['low'])} – {ms(both['high'])}", f"{both['GB_s']:.1f}", f"{both['percent_of_copy']:.0f}")
            host = [f"{us:.0f}" for phase in HOST_PHASES if (us := host_us(cell, side, phase))]
            line += (f"{s['saved'] / 1e6:.2f}", f"{s['peak'] / 1e6:.2f}", " / ".join(host), ratio_text(cell) if side == "fusegrad" else "")
            if old:
                line += (change(found) if (found := changes.get((name(cell), side))) else "",)
            yield line


def table(result, old=None) -> Table:
    t = Table(title="ratio: forward + backward over the best of eager, native and compile")
    for i, column in enumerate(header(old)):
        t.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for line in rows(result, old):
        t.add_row(*map(plain, line), style="bold" if line[1] == "fusegrad" else "", end_section=False)
    return t


def host_table(result) -> Table:
    t = Table("cell", "side", *(f"{phase} µs" for phase in HOST_PHASES.values()), title="a call with next to nothing to compute")
    for cell in result["cells"]:
        for side, s in cell["sides"].items():
            shown = (plain(s["wrong"]), "") if "wrong" in s else (f"{s[phase]['median'] * 1e6:.1f}" for phase in HOST_PHASES)
            t.add_row(name(cell), side, *shown)
    return t


def drawn(figure, title) -> str:
    """With what all plots share: the line of the copy, one legend beside the title and none over the data."""
    for axes in figure.axes:
        axes.axhline(100, color="gray", lw=0.8, ls=":")
        axes.set_ylabel("% of copy speed")
        axes.grid(axis="y", color="#eee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, size=11, x=0.125, y=0.98, ha="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.91, 1.0), ncols=len(labels), fontsize=8, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def grouped_bars(axes, groups, colors, value, labels):
    """One bar for each side within each group; `value` is None where there is none."""
    width = 0.8 / max(1, len(colors))
    for i, (side, color) in enumerate(colors.items()):
        found = [(j + i * width, v) for j, group in enumerate(groups) if (v := value(group, side)) is not None]
        axes.bar([at for at, _ in found], [v for _, v in found], width, label=side, color=color)
    axes.set_xticks([j + 0.4 for j in range(len(groups))], labels, rotation=60, ha="right", size=7)
    axes.margins(x=0.01)


def percent_of_copy(cell, side):
    return timed(cell)[side]["both"]["percent_of_copy"] if side in timed(cell) else None


def plots(result):
    """All ops beside each other, over the cells whose inputs come from memory; then each op, cell by cell, and these over the length
    of their rows."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:  # on a machine with a GPU, which may have nothing but torch's needs: the figures are worth having without plots
        yield "<p>No plots: there is no matplotlib.</p>"
        return
    per_op = {}
    for cell in result["cells"]:
        per_op.setdefault(cell["op"], []).append(cell)
    sides = dict.fromkeys(side for c in result["cells"] for side in timed(c))
    colors = dict(zip(sides, colormaps["tab20"].colors))

    def mean(op, side):
        found = [percent_of_copy(c, side) for c in per_op[op] if from_memory(c, result["machine"]) and side in timed(c)]
        return geometric_mean(found) if found else None

    large = [op for op in per_op if any(mean(op, side) for side in sides)]
    if large:
        figure = Figure(figsize=(11, 3.6))
        grouped_bars(figure.subplots(), large, colors, mean, large)
        yield drawn(figure, "all ops, forward + backward")
    for op, cells in per_op.items():
        here = {side: color for side, color in colors.items() if any(side in timed(c) for c in cells)}
        figure = Figure(figsize=(11, 3.2))
        bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
        labels = [f"{c['dtype'].replace('float', 'f')} {shape(c, '×')}" for c in cells]
        grouped_bars(bars, cells, here, percent_of_copy, labels)
        for side, color in here.items():
            per_length = {}
            for c in cells:
                alike = (c["dtype"], layout(c)) == (cells[0]["dtype"], layout(cells[0]))
                if side in timed(c) and alike and from_memory(c, result["machine"]):
                    per_length.setdefault(c["cols"], []).append(percent_of_copy(c, side))
            lengths = sorted(per_length)
            lines.plot(lengths, [statistics.fmean(per_length[n]) for n in lengths], marker="o", label=side, color=color)
        lines.set_xscale("log", base=2)
        lines.set_ylim(bottom=0)
        lines.set_xlabel(f"columns ({cells[0]['dtype']})")
        yield drawn(figure, f"{op}, forward + backward")


STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}svg{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:12px;font-variant-numeric:tabular-nums}td,th{padding:2px 8px;text-align:right;white-space:nowrap}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}tr.own{font-weight:600;background:#eef5ee}thead th{border-bottom:2px solid #888}
tr.first td{border-top:1px solid #ccc}summary{cursor:pointer}details[open]{color:#555}"""


def fresh_memory(result) -> str:
    if result["machine"]["recycled_memory"] or result["machine"]["kind"] != "cpu":
        return ""
    return "Large results of the other sides are in fresh memory, as torch gives it on a CPU: their times include its page faults."


def note(line, items) -> str:
    """A finding; the list of cells, which may be long, opens at a click."""
    line = escape.escape(line if items else f"{line}: none" if items == [] else line)
    return f"<details><summary>{line}: {len(items)}</summary>{escape.escape(', '.join(items))}</details>" if items else line


def html(result, old=None) -> str:
    """One file that needs nothing else."""
    body = []
    for line in rows(result, old):
        kind = " ".join(filter(None, ("own" if line[1] == "fusegrad" else "", "first" if line[0] else "")))
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{escape.escape(str(v))}</td>" for v in line) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in header(old))
    notes = "".join(f"<li>{note(line, items)}</li>" for line, items in findings(result, old))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fusegrad bench</title><style>{STYLE}</style>'
        f"<h1>fusegrad bench, {result['machine']['date']}</h1><ul>{notes}</ul>"
        "<p>Times are medians. GB/s counts each tensor once: forward the arguments and the result, backward what is kept of the "
        "arguments, the incoming gradient and the gradients. 100% of copy is a copy of as many bytes, in the same run; more is possible "
        "where a backward finds in the caches what its forward read, or where results in large pages, or stores past the caches, beat "
        f"those of the copy. {fresh_memory(result)}</p>"
        + "".join(plots(result))
        + f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></html>\n"
    )
