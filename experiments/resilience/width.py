"""What few bits cost by width and by the text that a model is trained on: tables and panels of the study."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from experiments.resilience.laws import (
    CONTROL,
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
    marker,
    points,
)
from experiments.scales import RATE_ALL, Scale
from launch.algebra import Point, product
from launch.study import Row
from launch.study_tables import judged, select
from qatmoe.text_table import markdown

ROWS = {CONTROL: "control"} | {name: f"control/{row}" for name, row in PTQ.items()} | {"2 bits, QAT": "qat"}
WIDTH_COLORS = ("tab:purple", "tab:orange", "tab:cyan")


def tables(s: Scale, rows: Sequence[Row], by_width: Axes, by_text: Axes) -> dict[str, str]:
    """The search of rates; gaps at every width's best one, and with less text; laws through both, which are drawn."""
    stage = f"{s.name}_width"
    found = groups_at(rows, stage, s.best_widths())
    if not found:
        by_width.set_visible(False)
        by_text.set_visible(False)
        return {f"{stage}_{table}": "No width is complete." for table in ("rates", "gaps", "laws", "text", "planes")}
    draw(by_width, found, rows)
    by_width.set_title(f"{s.name}: what few bits cost, by width", fontsize=10)
    first_seed = {"train.seed": s.seeds[0]}
    searched = product(s.searched_widths(), [first_seed])
    less = product(s.best_widths(), s.less_text)
    shorter = groups_at(rows, f"{stage}_text", less)
    cells = {name: [*groups, *shorter.get(name, [])] for name, groups in found.items()}
    draw_text(by_text, cells, rows)
    by_text.set_title(f"{s.name}: what 2 bits cost, by width and text", fontsize=10)
    return {
        f"{stage}_rates": list_table(groups_at(rows, stage, searched), rows) + left_out(lacking(rows, stage, searched)),
        f"{stage}_gaps": gaps_table(found, rows) + left_out(lacking(rows, stage, s.best_widths())),
        f"{stage}_laws": laws_table(found, rows),
        f"{stage}_text": list_table(cells, rows) + left_out(lacking(rows, f"{stage}_text", less)),
        f"{stage}_planes": planes_table(cells, rows),
    }


def groups_at(rows: Sequence[Row], stage: str, of: Sequence[Point]) -> Found:
    """{name: a group for each of the points that has rows}."""
    found: Found = {}
    for point in of:
        if is_judged(rows, stage, point):
            for name, row in ROWS.items():
                found.setdefault(name, []).append(select(rows, label(point), stage, row=row, **point))
    return found


def is_judged(rows: Sequence[Row], stage: str, point: Point) -> bool:
    """Whether some seed of a point has rows."""
    there = [r for r in judged(rows) if r["stage"] == stage and point.items() <= r["overrides"].items()]
    return {r["row"] for r in there} >= {"control", "qat"}


def lacking(rows: Sequence[Row], stage: str, of: Sequence[Point]) -> list[str]:
    """The points of which no seed has rows."""
    return [label(point) for point in of if not is_judged(rows, stage, point)]


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
    of_2_bits = {name: groups for name, groups in gaps_of(cells).items() if name.startswith("2")}
    of_2_bits = {name: [g for g in groups if g.rows] for name, groups in of_2_bits.items()}
    widths = sorted({g.rows[0]["quantized"] for groups in of_2_bits.values() for g in groups})
    lowest = math.inf
    for name, groups in of_2_bits.items():
        for width, color in zip(widths, WIDTH_COLORS, strict=False):
            own = sorted((g for g in groups if g.rows[0]["quantized"] == width), key=lambda g: g.rows[0]["tokens"])
            if not own:
                continue
            style = {"marker": marker(name), "ls": "--" if "PTQ" in name else "-", "color": color}
            _, gaps = points(axes, own, rows, "tokens", label=f"{own[-1].label}: {name}", **style)
            lowest = min(lowest, *gaps)
    axes.set_xlabel("tokens trained on")
    finish(axes, lowest)
