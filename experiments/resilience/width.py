"""What few bits cost by width and by the text that a model is trained on: tables and panels of the study."""

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.resilience.laws import (
    CONTROL,
    FULL_TAUGHT,
    NO_LAW,
    PTQ,
    Found,
    cell,
    draw,
    exponents,
    finish,
    gaps_of,
    gaps_table,
    interval,
    laws_table,
    left_out,
    line_style,
    points,
)
from experiments.resilience.pairs import growth_table, shares_table, taught_table
from experiments.scales import FULL, RATE_ALL, Scale, taught_name
from launch.algebra import Point, product
from launch.study_results import Row
from launch.study_tables import Group, by_seed, judged, select
from qatmoe.text_table import markdown

GPTQ, QAT = "2 bits, GPTQ", "2 bits, QAT"
ROUNDINGS = PTQ | {GPTQ: "q2_0/gptq"}
JUDGED = "^(control|qat)$|^control/(" + "|".join(ROUNDINGS.values()) + ")$"  # rows that trunks are judged by
ROWS = {CONTROL: "control"} | {name: f"control/{row}" for name, row in ROUNDINGS.items()} | {QAT: "qat"}
TAUGHT = f"{QAT}, taught"
ALIKE = f"{TAUGHT}: above full precision, taught"
WIDTH_COLORS = ("tab:purple", "tab:orange", "tab:cyan", "tab:pink")


def tables(s: Scale, rows: Sequence[Row], by_width: Axes, by_text: Axes) -> dict[str, str]:
    """The search of rates; gaps at every width's best one, with all of the text and with less; laws through them."""
    stage = f"{s.name}_width"
    whole, in_depth = s.best_widths(), s.widths_in_depth()
    less = product(s.less_text, in_depth)
    found, found_in_depth = groups_at(rows, stage, whole), groups_at(rows, stage, in_depth)
    if not found_in_depth:
        by_width.set_visible(False)
        by_text.set_visible(False)
        names = ("rates", "text", "laws", "planes", "shares", "growth", "taught", "taught_laws", "taught_gains")
        return {f"{stage}_{table}": "No width is complete." for table in names}
    shorter = groups_at(rows, f"{stage}_text", less)
    cells = {name: [*groups, *shorter.get(name, [])] for name, groups in found.items()}
    controls = {CONTROL: found_in_depth[CONTROL]}
    taught = taught_at(rows, stage, [point for point in in_depth if is_judged(rows, stage, point)])
    draw(by_width, found | taught, rows)
    by_width.set_title(f"{s.name}: what few bits cost, by width", fontsize=10)
    draw_text(by_text, cells, rows)
    by_text.set_title(f"{s.name}: what 2 bits cost, by width and text", fontsize=10)
    searched = product(s.searched_widths(), [{"train.seed": s.seeds[0]}])
    lost = lacking(rows, stage, whole) + lacking(rows, f"{stage}_text", less)
    return {
        f"{stage}_rates": list_table(groups_at(rows, stage, searched), rows) + left_out(lacking(rows, stage, searched)),
        f"{stage}_text": list_table(cells, rows) + left_out(lost),
        f"{stage}_laws": exponents_table(cells, rows),
        f"{stage}_planes": planes_table(cells, rows),
        f"{stage}_shares": shares_table(cells, rows, (GPTQ, "2 bits, PTQ"), (QAT, "2 bits, PTQ"), (QAT, GPTQ)),
        f"{stage}_growth": growth_table(cells, rows),
        f"{stage}_taught": gaps_table(controls | taught, rows) + left_out(of_fewer_seeds(taught)),
        f"{stage}_taught_laws": laws_table(controls | taught, rows),
        f"{stage}_taught_gains": taught_table(taught, found_in_depth[QAT], rows),
    }


def groups_at(rows: Sequence[Row], stage: str, of: Sequence[Point]) -> Found:
    """{name: a group for each of the points that has rows}."""
    found: Found = {}
    for point in of:
        if is_judged(rows, stage, point):
            for name, row in ROWS.items():
                found.setdefault(name, []).append(select(rows, label(point), stage, row=row, **point))
    return found


def taught_at(rows: Sequence[Row], stage: str, of: Sequence[Point]) -> Found:
    """What is trained with a teacher at each point: in full precision, on the grid, and that above the former."""
    found: Found = {FULL_TAUGHT: [], TAUGHT: [], ALIKE: []}
    for point in of:
        full, two = (select(rows, label(point), taught_name(stage, grid), **point) for grid in (FULL, "q2_0"))
        alike = [q | {"reference": f"{f['run']}:{f['row']}"} for q, f in by_seed(two, full)]
        for name, group in zip(found, (full, two, Group(label(point), alike)), strict=True):
            found[name].append(group)
    return found


def is_judged(rows: Sequence[Row], stage: str, point: Point) -> bool:
    """Whether some seed of a point has rows."""
    there = [r for r in judged(rows) if r["stage"] == stage and point.items() <= r["overrides"].items()]
    return {r["row"] for r in there} >= {"control", "qat"}


def lacking(rows: Sequence[Row], stage: str, of: Sequence[Point]) -> list[str]:
    """The points of which no seed has rows."""
    return [label(point) for point in of if not is_judged(rows, stage, point)]


def of_fewer_seeds(cells: Found) -> list[str]:
    """The cells whose label names runs that are lacking, as `select` does in brackets."""
    return [f"{name} of {group.label}" for name, groups in cells.items() for group in groups if "(" in group.label]


def label(point: Point) -> str:
    """What tables call a point."""
    steps = point.get("train.phases.trunk.steps")
    return f"width {point['model.dim']}, rate {point[RATE_ALL]:g}" + (f", {steps:,} steps of trunk" if steps else "")


def list_table(found: Found, rows: Sequence[Row]) -> str:
    """The control's loss and the loss above it: a line for each point."""
    lines = [["", "quantized", "tokens", "seeds", *found]]
    for groups in zip(*found.values(), strict=True):
        first = groups[0].rows[0]
        cells = [cell(name, group, rows) for name, group in zip(found, groups, strict=True)]
        lines.append([groups[0].label, f"{first['quantized']:,}", f"{first['tokens']:,}", groups[0].seeds, *cells])
    return markdown(lines)


def exponents_table(cells: Found, rows: Sequence[Row]) -> str:
    """The exponent of the quantized parameters for each amount of text, and that of tokens at each width.

    A column where at least two sizes are.
    """
    at = [("tokens", tokens, "quantized") for tokens in classes(cells, "tokens")]
    at += [("quantized", n, "tokens") for n in classes(cells, "quantized")]
    sizes = {column: len(of_class(cells[CONTROL], *column[:2])) for column in at}
    columns = [column for column in at if sizes[column] > 1]
    heads = {"tokens": "parameters, {n} widths, {value:,} tokens", "quantized": "tokens, {value:,} quantized"}
    lines = [["exponent (95 % interval)", *(heads[c[0]].format(n=sizes[c], value=c[1]) for c in columns)]]
    for name, groups in gaps_of(cells).items():
        fits = [exponents(of_class(groups, key, value), rows, size) for key, value, size in columns]
        lines.append([name, *("{} ({})".format(*interval([b for (b,) in fit])) if fit else "no law" for fit in fits)])
    return markdown(lines)


def classes(cells: Found, key: str) -> list[int]:
    """What rows have under a key, from the most."""
    return sorted({group.rows[0][key] for group in cells[CONTROL]}, reverse=True)


def of_class(groups: Sequence[Group], key: str, value: int) -> list[Group]:
    """The groups whose rows have a value under a key, from the lowest tokens and parameters."""
    own = [g for g in groups if g.rows and g.rows[0][key] == value]
    return sorted(own, key=lambda g: (g.rows[0]["tokens"], g.rows[0]["quantized"]))


def planes_table(cells: Found, rows: Sequence[Row]) -> str:
    """Laws in quantized parameters and tokens at once; b + c is what holds where text grows as the parameters do."""
    lines = [["", "parameters: b", "95 % interval", "tokens: c", "95 % interval", "b + c", "95 % interval"]]
    for name, groups in gaps_of(cells).items():
        fits = exponents(groups, rows, "quantized", "tokens")
        if not fits:
            lines.append([name, NO_LAW, *[""] * 5])
            continue
        b, c = zip(*fits, strict=True)
        both = [x + y for x, y in fits]
        lines.append([name, *interval(b), *interval(c), *interval(both)])
    return markdown(lines)


def draw_text(axes: Axes, cells: Found, rows: Sequence[Row]) -> None:
    """Gaps of 2 bits by tokens, a line for each width."""
    lowest, sizes = math.inf, set[int]()
    of_2_bits = ((name, groups) for name, groups in gaps_of(cells).items() if name.startswith("2"))
    by_color = list(zip(sorted(classes(cells, "quantized")), WIDTH_COLORS, strict=False))
    for (name, groups), (width, color) in itertools.product(of_2_bits, by_color):
        if own := of_class(groups, "quantized", width):
            style = line_style(name) | {"color": color}
            tokens, gaps = points(axes, own, rows, "tokens", label=f"{own[-1].label}: {name}", **style)
            lowest, sizes = min([lowest, *gaps]), sizes | set(tokens.tolist())
    axes.set_xlabel("tokens trained on")
    finish(axes, lowest, sizes)
