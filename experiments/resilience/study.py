"""Do larger models lose less to few bits?

    python -m launch.study experiments/resilience/study.py --slots 2

Four sizes, a factor of 8 in the number of experts, and four widths, a factor of 16 in quantized parameters; no MTP
module. For rounding and for QAT: the loss above the control of the same size, and a power law in the number of
quantized parameters through it, with the uncertainty that seeds give it.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import scales
from experiments.resilience import width
from experiments.resilience.laws import CONTROL, JUDGED, PTQ, Found, draw, gaps_table, laws_table, left_out
from experiments.scales import Scale, grid_name
from launch.study import Report, Results, Study
from launch.study_results import Row
from launch.study_tables import judged, select


def get_study(scale: str, corpus: str) -> Study:
    """Trunks of every size with Q2_0 QAT, and Q4_0 QAT from them, where K-quants fit Q3_K QAT too; then the widths."""
    s = scales.on(scale, corpus)
    trunks = [s.size(size, JUDGED) for size in s.experts]
    grids = (s.on_grid(t, grid) for t in trunks for grid in grids_of(s))
    return s.study(*trunks, *grids, *s.by_width(width.JUDGED))


def grids_of(s: Scale) -> tuple[str, ...]:
    """What is trained besides Q2_0."""
    return ("q3_k", "q4_0") if s.k_quants else ("q4_0",)


def report(results: Results) -> Report:
    """For each scale: gaps by the number of experts, by width and by text, and laws through them."""
    tables = {}
    figure = Figure(figsize=(19, 0.5 + 4.5 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False)
    for (scale, rows), (by_experts, by_width, by_text) in zip(results.items(), panels, strict=True):
        s = scales.get(scale)
        tables |= expert_tables(s, rows, by_experts)
        if s.widths:
            tables |= width.tables(s, rows, by_width, by_text)
        else:
            by_width.set_visible(False)
            by_text.set_visible(False)
    return Report(tables, figure)


def expert_tables(s: Scale, rows: Sequence[Row], axes: Axes) -> dict[str, str]:
    """Gaps at every number of experts, and laws through them, which are drawn."""
    found = series(s, rows)
    if not found:
        axes.set_visible(False)
        return {f"{s.name}_{name}": "No size is complete." for name in ("gaps", "laws")}
    lost = [f"{size} experts" for size in s.experts if not is_whole(s, rows, size)]
    draw(axes, found, rows)
    axes.set_title(f"{s.name}: what few bits cost, by the number of experts", fontsize=10)
    return {f"{s.name}_gaps": gaps_table(found, rows) + left_out(lost), f"{s.name}_laws": laws_table(found, rows)}


def is_whole(s: Scale, rows: Sequence[Row], size: int) -> bool:
    """Whether every stage of a number of experts has rows."""
    trunks = s.size_name(size)
    return {r["stage"] for r in judged(rows)} >= {trunks, *(grid_name(trunks, grid) for grid in grids_of(s))}


def series(s: Scale, rows: Sequence[Row]) -> Found:
    """{name: a group for each size that has rows of all of them}."""
    found: Found = {}
    for size in filter(lambda size: is_whole(s, rows, size), s.experts):
        trunks = s.size_name(size)
        label = f"{size} experts"
        found.setdefault(CONTROL, []).append(select(rows, label, trunks, row="control"))
        for name, row in PTQ.items():
            found.setdefault(name, []).append(select(rows, label, trunks, row=f"control/{row}"))
        found.setdefault("2 bits, QAT", []).append(select(rows, label, trunks))
        if s.k_quants:
            found.setdefault("3 bits, QAT", []).append(select(rows, label, grid_name(trunks, "q3_k")))
        found.setdefault("4 bits, QAT", []).append(select(rows, label, grid_name(trunks, "q4_0")))
    return found
