"""What does FP4 QAT of the experts cost against full precision, rounding and Q4_0?

    python -m launch.study experiments/fp4_experts/study.py --slots 2

The trunks are those of late_qat_2bit. "Taught": half of the loss is the KL to the finished control,
and beside it stands full precision that is taught alike.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import FULL, experts_on, grid_name, taught_name
from launch.study import Report, Results, Study, branches
from launch.study_tables import Group, by_seed, dots, mean_se, roundings, select, table, with_se
from qatmoe.text_table import markdown

PTQ = r"^control/(mxfp4|nvfp4|q4_0|iq4_nl|MXFP4|NVFP4|Q4_0|IQ4_NL|IQ4_XS|Q4_K)/"
GRIDS = ("mxfp4", "nvfp4", "q4_0")
NAMES = {FULL: "full precision"} | {grid: f"{grid}, learned scales" for grid in GRIDS}
MIXED = experts_on("mxfp4", **{"quant.down": "q8_0"})
CLAMPED = experts_on("mxfp4", **{"model.swiglu_limit": 10.0})


def get_study(scale: str, corpus: str) -> Study:
    """Trunks; each grid, with a teacher too; the down projection one step higher; DeepSeek-V4's clamp."""
    s = scales.on(scale, corpus)
    trunks = s.trunks(f"^control$|{PTQ}")
    return s.study(
        trunks,
        *(s.on_grid(trunks, grid) for grid in GRIDS),
        *(stage for grid in (*GRIDS, FULL) for stage in s.with_teacher(trunks, grid)),
        branches(trunks, f"{s.name}_mxfp4_down", s.branch, MIXED),
        branches(trunks, f"{s.name}_mxfp4_clamped", s.config, CLAMPED, judged="^(control|qat)$"),
    )


def report(results: Results) -> Report:
    """For each size: QAT and rounding beside the control."""
    tables = {}
    figure = Figure(figsize=(8, 0.8 + 5 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        trunks = f"{scale}_trunks"
        control = select(rows, "control", trunks, row="control")
        rounded = roundings(rows, trunks, PTQ)
        grids = [select(rows, NAMES[grid], grid_name(trunks, grid)) for grid in GRIDS]
        taught = {
            (grid, kind): select(rows, f"{NAMES[grid]}, {kind}", taught_name(trunks, grid), **at)
            for grid in (FULL, *GRIDS)
            for kind, at in scales.get(scale).taught_kinds(grid).items()
        }
        clamped = f"{scale}_mxfp4_clamped"
        more = [
            select(rows, "mxfp4, learned scales, routed down projection on q8_0", f"{scale}_mxfp4_down"),
            select(rows, "mxfp4, learned scales, SwiGLU clamped at 10", clamped),
        ]
        controls = [control, select(rows, "control, SwiGLU clamped at 10", clamped, row="control")]
        tables[f"{scale}_fp4"] = table([*controls, *rounded, *grids, *more, *taught.values()], [], rows)
        alike = [(g, taught[FULL, kind]) for (grid, kind), g in taught.items() if grid != FULL]
        tables[f"{scale}_goals"] = goals([*((g, control) for g in grids), *alike])
        colors = ["tab:blue" if grid == FULL else "tab:purple" for grid, _ in taught]
        drawn = [*((g, "black") for g in rounded), *((g, "tab:red") for g in (*grids, *more))]
        dots(axes, [*drawn, *zip(taught.values(), colors, strict=True)], rows)
        what = "rounding (black), QAT (red), taught (purple; full precision blue)"
        axes.set_title(f"{scale}: {what}; {len(control.rows)} seeds", fontsize=8)
    return Report(tables, figure)


def goals(pairs: Sequence[tuple[Group, Group]]) -> str:
    """How far the loss of each FP4 QAT is from that of full precision, in percent of it; asked were 0.3."""
    lines = [["goal: within 0.3 % of full precision's loss", "beside", "found"]]
    for group, full in pairs:
        percent = [100 * (qat["loss"] / control["loss"] - 1) for qat, control in by_seed(group, full)]
        met = " %: met" if mean_se(percent)[0] <= 0.3 else " %: not met"
        lines.append([group.label, full.label, with_se(percent, ".2f") + met if percent else ""])
    return markdown(lines)
