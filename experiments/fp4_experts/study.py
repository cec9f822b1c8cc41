"""What does FP4 QAT of the experts cost against full precision, rounding and Q4_0?

    python -m launch.study experiments/fp4_experts/study.py --slots 2

The trunks are those of late_qat_2bit.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import experts_on
from launch.study import Report, Results, Row, Study, branches
from launch.study_tables import Group, above_control, dots, mean_se, roundings, select, table, with_se
from qatmoe.text_table import markdown

PTQ = r"^control/(mxfp4|nvfp4|q4_0|iq4_nl|MXFP4|NVFP4|Q4_0|IQ4_NL|IQ4_XS|Q4_K)/"
GRIDS = ("mxfp4", "nvfp4", "q4_0")
MIXED = experts_on("mxfp4", **{"quant.down": "q8_0"})
CLAMPED = experts_on("mxfp4", **{"model.swiglu_limit": 10.0})


def get_study(scale: str, corpus: str) -> Study:
    """Trunks; each grid; the down projection one step higher; DeepSeek-V4's clamp."""
    s = scales.on(scale, corpus)
    trunks = s.trunks(f"^control$|{PTQ}")
    return s.study(
        trunks,
        *(s.on_grid(trunks, grid) for grid in GRIDS),
        branches(trunks, f"{s.name}_mxfp4_down", s.branch, MIXED),
        branches(trunks, f"{s.name}_mxfp4_clamped", s.config, CLAMPED, judged="^(control|qat)$"),
    )


def report(results: Results) -> Report:
    """For each size: QAT and rounding beside the control."""
    tables = {}
    figure = Figure(figsize=(8, 0.8 + 5 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        control = select(rows, "control", f"{scale}_trunks", row="control")
        rounded = roundings(rows, f"{scale}_trunks", PTQ)
        grids = [select(rows, f"{grid}, learned scales", f"{scale}_{grid}") for grid in GRIDS]
        clamped = f"{scale}_mxfp4_clamped"
        more = [
            select(rows, "mxfp4, learned scales, routed down projection on q8_0", f"{scale}_mxfp4_down"),
            select(rows, "mxfp4, learned scales, SwiGLU clamped at 10", clamped),
        ]
        controls = [control, select(rows, "control, SwiGLU clamped at 10", clamped, row="control")]
        tables[f"{scale}_fp4"] = table([*controls, *rounded, *grids, *more], [], rows)
        tables[f"{scale}_goals"] = goals(grids, rows)
        dots(axes, [*((g, "black") for g in rounded), *((g, "tab:red") for g in (*grids, *more))], rows)
        axes.set_title(f"{scale}: rounding (black) and QAT (red), {len(control.rows)} seeds", fontsize=10)
    return Report(tables, figure)


def goals(grids: Sequence[Group], rows: Sequence[Row]) -> str:
    """How far FP4 QAT's loss is from the control's, in percent of it; asked were 0.3."""
    lines = [["goal: within 0.3 % of the control's loss", "found"]]
    for group in grids:
        if not group.rows:
            lines.append([group.label, ""])
            continue
        above = above_control(group, rows)
        percent = [100 * a / (r["loss"] - a) for a, r in zip(above, group.rows, strict=True)]
        lines.append(
            [group.label, with_se(percent, ".2f") + (" %: met" if mean_se(percent)[0] <= 0.3 else " %: not met")]
        )
    return markdown(lines)
