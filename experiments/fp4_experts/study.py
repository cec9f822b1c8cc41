"""What does FP4 QAT of the experts cost against full precision, rounding and Q4_0?

    python -m launch.study experiments/fp4_experts/study.py --slots 2

The trunks are those of late_qat_2bit, and more: full precision and each grid without a teacher are on all seeds, other
rates on the last, the rest on the first. "Taught": half of the loss is the KL to the finished control, and beside it
stands full precision that is taught alike.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments import scales
from experiments.fp4_experts.pairs import (
    UNTAUGHT,
    Kinds,
    differences_table,
    formats_table,
    goals_table,
    machines_table,
    roundings_table,
    searched_table,
)
from experiments.scales import FULL, RATE, experts_on, grid_name, rate_kind, rates_name, taught_name
from launch.study import Report, Results, Study, branches
from launch.study_results import Row
from launch.study_tables import Group, dots, numbers_of_seeds, roundings, select, table

EARLIER = Path(__file__).parent / "earlier" / "small.json"  # results of the study on another machine
PTQ = r"^control/(mxfp4|nvfp4|q4_0|iq4_nl|MXFP4|NVFP4|Q4_0|IQ4_NL|IQ4_XS|Q4_K)/"
GRIDS = ("mxfp4", "nvfp4", "q4_0")
NAMES = {FULL: "full precision"} | {grid: f"{grid}, learned scales" for grid in GRIDS}
MIXED = experts_on("mxfp4", **{"quant.down": "q8_0"})
CLAMPED = experts_on("mxfp4", **{"model.swiglu_limit": 10.0})


def get_study(scale: str, corpus: str) -> Study:
    """Trunks; each grid, with a teacher too; the down projection one step higher; DeepSeek-V4's clamp."""
    s = scales.on(scale, corpus)
    trunks, more = (size.trunks(f"^control$|{PTQ}") for size in (s, s.on_more_seeds("fp4_experts")))
    return s.study(
        more,
        *(s.on_grid(more, grid) for grid in GRIDS),
        *(s.at_rates(more, grid, s.fp4_rate_seeds) for grid in (FULL, *GRIDS)),
        *(stage for grid in (*GRIDS, FULL) for stage in s.with_teacher(trunks, grid)),
        branches(trunks, f"{s.name}_mxfp4_down", s.branch, MIXED),
        branches(trunks, f"{s.name}_mxfp4_clamped", s.config, CLAMPED, judged="^(control|qat)$"),
    )


def report(results: Results) -> Report:
    """For each size: QAT and rounding beside the control, and what of it is told apart."""
    tables = {}
    figure = Figure(figsize=(8, 0.8 + 6.5 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        trunks, clamped = f"{scale}_trunks", f"{scale}_mxfp4_clamped"
        control = select(rows, "control", trunks, row="control")
        clamped_control = select(rows, "control, SwiGLU clamped at 10", clamped, row="control")
        rounded = roundings(rows, trunks, PTQ)
        plain = {grid: select(rows, NAMES[grid], grid_name(trunks, grid)) for grid in GRIDS}
        searched = {grid: searched_of(scale, rows, grid) for grid in (FULL, *GRIDS)}
        taught = {grid: taught_of(scale, rows, grid) for grid in (FULL, *GRIDS)}
        more = [
            select(rows, "mxfp4, learned scales, routed down projection on q8_0", f"{scale}_mxfp4_down"),
            select(rows, "mxfp4, learned scales, SwiGLU clamped at 10", clamped),
        ]
        made = [*plain.values(), *more]
        made += [g for kinds in (*searched.values(), *taught.values()) for g in kinds.values()]
        tables[f"{scale}_fp4"] = table([control, clamped_control, *rounded, *made], [], rows)
        untaught = {FULL: control, **plain}
        of = {grid: {UNTAUGHT: untaught[grid]} | searched[grid] | taught[grid] for grid in taught}
        tables[f"{scale}_goals"] = goals_table(of)
        tables[f"{scale}_searched"] = searched_table(of)
        if scale == "small":
            tables["small_machines"] = machines_table(of, untaught_before(), as_added(scales.SMALL))
        others = [*((g, plain["mxfp4"]) for g in more), (clamped_control, control)]
        tables[f"{scale}_differences"] = differences_table(of, others)
        tables[f"{scale}_formats"] = formats_table(of)
        tables[f"{scale}_roundings"] = roundings_table(of, rounded)
        colors = dict.fromkeys((g.label for of_full in (searched, taught) for g in of_full[FULL].values()), "tab:blue")
        colors |= {g.label: "tab:purple" for grid in GRIDS for g in taught[grid].values()}
        drawn = [*((g, "black") for g in rounded), *((g, colors.get(g.label, "tab:red")) for g in made)]
        dots(axes, drawn, rows)
        what = "rounding (black), QAT (red), taught (purple), full precision (blue)"
        axes.set_title(f"{scale}: {what}; {numbers_of_seeds(made)}", fontsize=8)
    return Report(tables, figure)


def as_added(s: scales.Scale) -> list[Sequence[int]]:
    """The study's seeds in the order in which they were run; the last ones are those of its search."""
    between = [seed for seed in s.more_seeds["fp4_experts"] if seed not in s.fp4_rate_seeds]
    return [s.seeds, between, s.fp4_rate_seeds]


def untaught_before() -> Kinds:
    """Full precision and untaught QAT on the machine that the study was run on before."""
    rows = json.loads(EARLIER.read_text())
    control = select(rows, "control", "small_trunks", row="control")
    grids = {grid: {UNTAUGHT: select(rows, NAMES[grid], grid_name("small_trunks", grid))} for grid in GRIDS}
    return {FULL: {UNTAUGHT: control}} | grids


def searched_of(scale: str, rows: Sequence[Row], grid: str) -> dict[str, Group]:
    """{what a branch at another rate is called: the branches}."""
    name = rates_name(f"{scale}_trunks", grid)
    return {
        f"{UNTAUGHT}, {rate_kind(rate)}": select(rows, f"{NAMES[grid]}, {rate_kind(rate)}", name, **{RATE: rate})
        for rate in scales.get(scale).rates
    }


def taught_of(scale: str, rows: Sequence[Row], grid: str) -> dict[str, Group]:
    """{what a recipe with a teacher is called: its branches}."""
    return {
        kind: select(rows, f"{NAMES[grid]}, {kind}", taught_name(f"{scale}_trunks", grid), **at)
        for kind, at in scales.get(scale).taught_kinds(grid).items()
    }
