"""Gaps of the same seeds held against each other: differences and shares between them, with Student's intervals."""

import itertools
from collections.abc import Sequence

from experiments.resilience.laws import CONTROL, FULL_TAUGHT, Found, gaps_of
from launch.study_results import Row
from launch.study_tables import Group, above_control, compared, with_interval
from qatmoe.text_table import markdown

ALIKE_GROWTH = (0.8, 1.25)  # text grows as the parameters do: the one factor over the other is within these


def shares_table(cells: Found, rows: Sequence[Row], *pairs: tuple[str, str]) -> str:
    """For each pair of names how much less, in percent, the first loses than the second: a line for each size."""
    lines = [["less than", *(f"{few}, beside {more}" for few, more in pairs)]]
    for i, control in enumerate(cells[CONTROL]):
        found = [compared(cells[few][i], cells[more][i], rows, lambda a, b: 100 * (1 - a / b)) for few, more in pairs]
        lines.append([control.label, *(with_interval(values, "+.0f", " %") for values in found)])
    return markdown(lines)


def growth_table(cells: Found, rows: Sequence[Row]) -> str:
    """How much more a larger model with as much more text loses than a smaller one, in every such pair of sizes."""
    gaps = gaps_of(cells)
    lines = [["more (95 % interval)", "parameters", "tokens", *gaps]]
    sized = [(i, g.rows[0]["quantized"], g.rows[0]["tokens"]) for i, g in enumerate(cells[CONTROL]) if g.rows]
    sized.sort(key=lambda size: size[1:])
    for (i, n, d), (j, more_n, more_d) in itertools.combinations(sized, 2):
        if n < more_n and d < more_d and ALIKE_GROWTH[0] <= (more_d / d) / (more_n / n) <= ALIKE_GROWTH[1]:
            found = [compared(groups[j], groups[i], rows, lambda a, b: a - b) for groups in gaps.values()]
            label = f"{cells[CONTROL][j].label}, beside {cells[CONTROL][i].label}"
            growth = (f"x {more_n / n:.3g}", f"x {more_d / d:.3g}")
            lines.append([label, *growth, *(with_interval(values) for values in found)])
    return markdown(lines)


def taught_table(taught: Found, untaught: Sequence[Group], rows: Sequence[Row]) -> str:
    """What a teacher leaves of the gaps, and how much less that is than without one: a column for each size."""
    lines = [["(95 % interval)", *(g.label for g in untaught)]]
    for name, groups in taught.items():
        lines.append([name, *(with_interval(above_control(g, rows)) for g in groups)])
    for name, groups in taught.items():
        if name == FULL_TAUGHT:
            continue
        found = [compared(t, u, rows, lambda a, b: a - b) for t, u in zip(groups, untaught, strict=True)]
        lines.append([f"{name}, minus the gap without a teacher", *(with_interval(v) for v in found)])
    return markdown(lines)
