"""Do larger models lose less to few bits?

    python -m launch.study experiments/resilience/study.py --slots 2

Four sizes, a factor of 8 in the number of experts, and three widths, a factor of 9 in quantized parameters; no MTP
module. For rounding and for QAT: the loss above the control of the same size, and a power law in the number of
quantized parameters through it, with the uncertainty that seeds give it.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import scales
from experiments.scales import Scale, grid_name
from launch.study import Report, Results, Row, Study
from launch.study_tables import Group, above_control, by_seed, judged, mean_se, select, with_se
from qatmoe.text_table import markdown

PTQ = {"2 bits, PTQ": "q2_0/search", "3 bits, PTQ": "IQ3_S/imatrix", "4 bits, PTQ": "q4_0/search"}
COLORS = {"2": "tab:red", "3": "tab:green", "4": "tab:blue"}
CONTROL = "the control's loss"


def get_study(scale: str, corpus: str) -> Study:
    """Trunks of every size with Q2_0 QAT, and Q4_0 QAT from them, where K-quants fit Q3_K QAT too; then the widths."""
    s = scales.on(scale, corpus)
    pattern = "^(control|qat)$|^control/(" + "|".join(PTQ.values()) + ")$"
    trunks = [s.size(size, pattern) for size in s.experts]
    grids = (s.on_grid(t, grid) for t in trunks for grid in grids_of(s))
    return s.study(*trunks, *grids, *s.by_width(pattern))


def grids_of(s: Scale) -> tuple[str, ...]:
    """What is trained besides Q2_0."""
    return ("q3_k", "q4_0") if s.k_quants else ("q4_0",)


def report(results: Results) -> Report:
    """For each size: gaps, and laws through them."""
    tables = {}
    figure = Figure(figsize=(13, 0.5 + 4.5 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (scale, rows), (axes, right) in zip(results.items(), panels, strict=True):
        s = scales.get(scale)
        if s.widths:
            tables |= width_tables(s, rows, right)
        else:
            right.set_visible(False)
        found = series(s, rows)
        if not found:
            tables |= {f"{scale}_{name}": "No size is complete." for name in ("gaps", "laws")}
            continue
        whole = {g.label for groups in found.values() for g in groups}
        lost = [label for size in s.experts if (label := f"{size} experts") not in whole]
        left_out = f"\n\nLeft out, as runs failed or were not run: {', '.join(lost)}." if lost else ""
        tables[f"{scale}_gaps"] = gaps_table(found, rows) + left_out
        del found[CONTROL]  # a loss and no gap
        laws = {name: law(groups, rows) for name, groups in found.items()}
        tables[f"{scale}_laws"] = laws_table(laws, found, rows)
        draw(axes, found, laws, rows)
        axes.set_title(f"{scale}: what few bits cost, by the number of experts", fontsize=10)
    return Report(tables, figure)


def width_tables(s: Scale, rows: Sequence[Row], axes: Axes) -> dict[str, str]:
    """Gaps at every width, and laws through them, which are drawn."""
    found = widths(s, rows)
    if not found:
        axes.set_visible(False)
        return {f"{s.name}_width_{name}": "No width is complete." for name in ("gaps", "laws")}
    gaps = gaps_table(found, rows)
    del found[CONTROL]  # a loss and no gap
    laws = {name: law(groups, rows) for name, groups in found.items()}
    draw(axes, found, laws, rows)
    axes.set_title(f"{s.name}: what few bits cost, by width, rate {s.widths[0]['optim.lr']:g}", fontsize=10)
    return {f"{s.name}_width_gaps": gaps, f"{s.name}_width_laws": laws_table(laws, found, rows)}


def widths(s: Scale, rows: Sequence[Row]) -> dict[str, list[Group]]:
    """{name: a group for each width that has rows}."""
    found: dict[str, list[Group]] = {}
    stage = f"{s.name}_width"
    wanted = {CONTROL: "control"} | {name: f"control/{row}" for name, row in PTQ.items()} | {"2 bits, QAT": "qat"}
    for point in s.widths:
        of_point = [r for r in judged(rows) if r["stage"] == stage and point.items() <= r["overrides"].items()]
        if not {r["row"] for r in of_point} >= {"control", "qat"}:
            continue
        label = f"width {point['model.dim']}, rate {point['optim.lr']:g}"
        for name, row in wanted.items():
            found.setdefault(name, []).append(select(rows, label, stage, row=row, **point))
    return found


def draw(axes: Axes, found: dict[str, list[Group]], laws: dict[str, list[float]], rows: Sequence[Row]) -> None:
    """Gaps by size, and their laws as lines."""
    axes.set_xlabel("quantized parameters")
    axes.set_ylabel("loss above control (nats per token)")
    lowest = math.inf
    for name, groups in found.items():
        x = np.asarray([g.rows[0]["quantized"] for g in groups])
        y, se = zip(*(mean_se(above_control(g, rows)) for g in groups), strict=True)
        lowest = min(lowest, *y)
        style = {"color": COLORS[name[0]], "ls": "--" if "PTQ" in name else "-"}
        axes.errorbar(x, y, se, fmt="s" if "PTQ" in name else "o", color=style["color"], capsize=3, label=name)
        if laws[name]:
            b = mean_se(laws[name])[0]
            middle = np.exp(np.mean(np.log(y)) - b * np.mean(np.log(x)))
            axes.plot(x, middle * x**b, lw=1, **style)
    axes.set_xscale("log")
    if lowest > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=0.003)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def series(s: Scale, rows: Sequence[Row]) -> dict[str, list[Group]]:
    """{name: a group for each size that has rows of all of them}."""
    found: dict[str, list[Group]] = {}
    whole = {r["stage"] for r in judged(rows)}
    for size in s.experts:
        trunks = s.size_name(size)
        if not whole >= {trunks, *(grid_name(trunks, grid) for grid in grids_of(s))}:
            continue
        label = f"{size} experts"
        found.setdefault(CONTROL, []).append(select(rows, label, trunks, row="control"))
        for name, row in PTQ.items():
            found.setdefault(name, []).append(select(rows, label, trunks, row=f"control/{row}"))
        found.setdefault("2 bits, QAT", []).append(select(rows, label, trunks))
        if s.k_quants:
            found.setdefault("3 bits, QAT", []).append(select(rows, label, grid_name(trunks, "q3_k")))
        found.setdefault("4 bits, QAT", []).append(select(rows, label, grid_name(trunks, "q4_0")))
    return found


def gaps_table(found: dict[str, list[Group]], rows: Sequence[Row]) -> str:
    """Loss above control by size."""
    sizes = next(iter(found.values()))
    lines = [["", *(f"{g.label}: {g.rows[0]['quantized']:,} quantized" for g in sizes)]]
    lines.append(["config", *(g.config for g in sizes)])
    lines.append(["seeds", *(g.seeds for g in sizes)])
    lines.append(["tokens of a branch, its trunk's included", *(f"{g.rows[0]['tokens']:,}" for g in sizes)])
    for name, groups in found.items():
        value = (lambda g: [r["loss"] for r in g.rows]) if name == CONTROL else (lambda g: above_control(g, rows))
        lines.append([name, *(with_se(value(g)) for g in groups)])
    return markdown(lines)


def law(groups: Sequence[Group], rows: Sequence[Row]) -> list[float]:
    """b of gap = a (N / N_0)^b by least squares of logarithms, N_0 the smallest size: one exponent a seed.

    A seed's models see the same batches, so what a seed shifts, it may shift at all sizes: fits are made seed by seed.
    Empty where there is a single size, or a gap is not above 0: a power law cannot hold it.
    """
    gaps = np.asarray([above_control(Group("", seed), rows) for seed in by_seed(*groups)])
    if len(groups) < 2 or not gaps.size or gaps.min() <= 0:
        return []
    x = np.log([g.rows[0]["quantized"] / groups[0].rows[0]["quantized"] for g in groups])
    return [float(np.polyfit(x, np.log(gap), 1)[0]) for gap in gaps]


def laws_table(laws: dict[str, list[float]], found: dict[str, list[Group]], rows: Sequence[Row]) -> str:
    """Exponents: mean over seeds and Student's 95 % interval."""
    lines = [["", "gap of the smallest", "exponent b", "95 % interval"]]
    for name, exponents in laws.items():
        smallest = with_se(above_control(found[name][0], rows))
        if not exponents:
            lines.append([name, smallest, "no law: a single size, or a gap that is not above 0", ""])
            continue
        mean, se = mean_se(exponents)
        half = se * stats.t.ppf(0.975, len(exponents) - 1) if len(exponents) > 1 else math.nan
        interval = "-" if math.isnan(half) else f"{mean - half:+.2f} .. {mean + half:+.2f}"
        lines.append([name, smallest, f"{mean:+.2f}", interval])
    return markdown(lines)
