"""Gaps between few bits and full precision, and power laws through them, with the uncertainty that seeds give."""

import math
from collections.abc import Sequence, Set

import numpy as np
from matplotlib.axes import Axes

from launch.study_results import Row
from launch.study_tables import Group, above_control, by_seed, mean_se, student, with_se
from qatmoe.text_table import markdown

PTQ = {"2 bits, PTQ": "q2_0/search", "3 bits, PTQ": "IQ3_S/imatrix", "4 bits, PTQ": "q4_0/search"}
CONTROL = "the control's loss"
FULL_TAUGHT = "full precision, taught"
JUDGED = "^(control|qat)$|^control/(" + "|".join(PTQ.values()) + ")$"  # rows that trunks are judged by
NO_LAW = "no law: too few sizes, or a gap that is not above 0"
COLORS = {"2": "tab:red", "3": "tab:green", "4": "tab:blue"}

Found = dict[str, list[Group]]  # {CONTROL, FULL_TAUGHT or what few bits lose: a group for each size}


def gaps_of(found: Found) -> Found:
    """What few bits lose."""
    return {name: groups for name, groups in found.items() if name not in (CONTROL, FULL_TAUGHT)}


def exponents(groups: Sequence[Group], rows: Sequence[Row], *sizes: str) -> list[np.ndarray]:
    """The exponents of gap = a * size^b, or of more sizes: a * N^b * D^c, by least squares of logarithms: once a seed.

    A seed's models see the same batches, so what a seed shifts, it may shift at all sizes: fits are made seed by seed.

    Args:
      sizes: keys of rows, such as "quantized" (parameters on the grid) and "tokens".

    Returns:
      For each seed an array with the exponent of each size. Empty where there are too few groups for them, or a gap is
      not above 0: a power law cannot hold it.
    """
    found = by_seed(*groups) if groups else []
    gaps = np.asarray([above_control(Group("", seed), rows) for seed in found])
    if not gaps.size or gaps.min() <= 0:
        return []
    logs = np.log([[row[size] for size in sizes] for row in found[0]])
    x = np.column_stack([logs - logs.mean(axis=0), np.ones(len(logs))])
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return []
    return [np.linalg.lstsq(x, np.log(gap), rcond=None)[0][:-1] for gap in gaps]


def interval(values: Sequence[float]) -> tuple[str, str]:
    """Mean over seeds and Student's 95 % interval, as two cells of a table."""
    mean, half = student([float(v) for v in values])
    return f"{mean:+.2f}", "-" if math.isnan(half) else f"{mean - half:+.2f} .. {mean + half:+.2f}"


def gaps_table(found: Found, rows: Sequence[Row]) -> str:
    """Loss above control: a column for each size."""
    sizes = found[CONTROL]
    lines = [["", *(f"{g.label}: {g.rows[0]['quantized']:,} quantized" for g in sizes)]]
    lines.append(["config", *(g.config for g in sizes)])
    lines.append(["seeds", *(g.seeds for g in sizes)])
    lines.append(["tokens of a branch, its trunk's included", *(f"{g.rows[0]['tokens']:,}" for g in sizes)])
    lines += [[name, *(cell(name, g, rows) for g in groups)] for name, groups in found.items()]
    return markdown(lines)


def left_out(labels: Sequence[str]) -> str:
    """What is said below a table of the sizes that it lacks."""
    return f"\n\nLeft out, as runs failed or were not run: {'; '.join(labels)}." if labels else ""


def cell(name: str, group: Group, rows: Sequence[Row]) -> str:
    """The control's loss or a gap, with its error."""
    return with_se([r["loss"] for r in group.rows] if name == CONTROL else above_control(group, rows))


def laws_table(found: Found, rows: Sequence[Row]) -> str:
    """Laws in the number of quantized parameters."""
    lines = [["", "gap of the smallest", "exponent b", "95 % interval"]]
    for name, groups in gaps_of(found).items():
        fits = exponents(groups, rows, "quantized")
        found_or_not = interval([b for (b,) in fits]) if fits else (NO_LAW, "")
        lines.append([name, with_se(above_control(groups[0], rows)), *found_or_not])
    return markdown(lines)


def draw(axes: Axes, found: Found, rows: Sequence[Row]) -> None:
    """Gaps by size, and their laws as lines."""
    lowest, sizes = math.inf, set[int]()
    for name, groups in gaps_of(found).items():
        style = line_style(name) | {"color": COLORS[name[0]]}
        x, y = points(axes, groups, rows, "quantized", label=name, **style | {"ls": "none"})
        lowest, sizes = min([lowest, *y]), sizes | set(x.tolist())
        if fits := exponents(groups, rows, "quantized"):
            b = float(np.mean(fits))
            middle = np.exp(np.mean(np.log(y)) - b * np.mean(np.log(x)))
            axes.plot(x, middle * x**b, lw=1, **style | {"marker": ""})
    axes.set_xlabel("quantized parameters")
    finish(axes, lowest, sizes)


def line_style(name: str) -> dict[str, str]:
    """Squares for rounding, diamonds for GPTQ, circles for QAT, triangles for QAT with a teacher, open where full
    precision had one too."""
    if "GPTQ" in name:
        return {"marker": "D", "ls": "-."}
    if "PTQ" in name:
        return {"marker": "s", "ls": "--"}
    if "taught" not in name:
        return {"marker": "o", "ls": "-"}
    return {"marker": "^", "ls": ":", "fillstyle": "none" if "full precision" in name else "full"}


def points(
    axes: Axes, groups: Sequence[Group], rows: Sequence[Row], size: str, **style: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the gaps of groups by a size with their errors, where they have any. Returns sizes and gaps."""
    groups = [g for g in groups if g.rows]
    if not groups:
        return np.array([]), np.array([])
    x = np.asarray([g.rows[0][size] for g in groups])
    y, se = zip(*(mean_se(above_control(g, rows)) for g in groups), strict=True)
    axes.errorbar(x, y, se, capsize=3, **style)
    return x, np.asarray(y)


def finish(axes: Axes, lowest: float, sizes: Set[int]) -> None:
    """Scales and legend, once everything is drawn; `lowest` is the lowest gap, and `sizes` get the ticks."""
    axes.set_ylabel("loss above control (nats per token)")
    axes.set_xscale("log")
    axes.set_xticks(sorted(sizes), [f"{size / 1e6:.3g}M" for size in sorted(sizes)])
    axes.set_xticks([], minor=True)
    if lowest > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=0.003)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
