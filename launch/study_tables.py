"""From a study's rows to tables and figures: one branch over seeds, its difference to the control, the spread of it."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from scipy import stats

from launch.study_results import OTHER_CONTROL, Row, control_loss, losses, other_loss
from qatmoe.errors import UserError
from qatmoe.text_table import markdown


class Group(NamedTuple):
    """One line of a table: the same branch of every seed's trunk."""

    label: str
    rows: Sequence[Row]

    @property
    def config(self) -> str:
        """The config file's name."""
        return Path(self.rows[0]["config"]).stem

    @property
    def seeds(self) -> str:
        """As a cell of a table."""
        return " ".join(str(r["seed"]) for r in self.rows)


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows that have figures: neither of failed runs, nor of a loss that is not finite."""
    return [r for r in rows if "failed" not in r]


def _of(rows: Sequence[Row], stage: str, overrides: dict[str, Any]) -> list[Row]:
    """The rows of a stage whose runs have these overrides; None: do not set it."""
    return [r for r in rows if r["stage"] == stage and all(r["overrides"].get(k) == v for k, v in overrides.items())]


def select(rows: Sequence[Row], label: str, stage: str, row: str = "qat", **overrides: Any) -> Group:
    """The rows of a stage whose runs have these overrides (None: do not set it), one for each seed.

    Runs without rows are named in the label, with the reason.

    Raises:
      UserError: there is none, or more than one for a seed.
    """
    runs = _of(rows, stage, overrides)
    found = [r for r in judged(runs) if r["row"] == row]
    failed = [r for r in runs if "failed" in r and r.get("row", row) == row]
    controls = losses(rows)
    faults = [(r, _control_fault(r, controls)) for r in found]
    failed += [r | {"failed": fault} for r, fault in faults if fault]
    found = [r for r, fault in faults if not fault]
    seeds = [r["seed"] for r in found]
    if not (found or failed) or len(set(seeds)) < len(seeds):
        which = "more than one row of a seed" if found else "no row"
        raise UserError(f"the results have {which} {row!r} of {stage} with {overrides}: run the study again")
    seeds_by_reason: dict[str, list[str]] = {}
    for r in failed:
        seeds_by_reason.setdefault(r["failed"], []).append(str(r["seed"]))
    if not found and list(seeds_by_reason) == ["not run"]:
        label += " (not run)"
    else:
        label += "".join(f" (seed {' '.join(of)}: {reason})" for reason, of in seeds_by_reason.items())
    return Group(label, sorted(found, key=lambda r: r["seed"]))


def _control_fault(row: Row, controls: dict[str, float]) -> str:
    """Why a row cannot be compared with its control; "" where it can."""
    control = controls.get(row["reference"])
    if control is None:
        return "its control has no figures"
    return OTHER_CONTROL if other_loss(control, control_loss(row)) else ""


def roundings(rows: Sequence[Row], stage: str, pattern: str, **overrides: Any) -> list[Group]:
    """A group for each rounding of the control whose name a pattern is found in, by bits, then by KLD.

    "†4": blocks of the format are longer than the rows; four were joined, which no file can hold.

    Args:
      overrides: as of `select`.
    """
    of_stage = _of(judged(rows), stage, overrides)
    found = {r["row"]: r["joined_rows"] for r in of_stage if re.search(pattern, r["row"])}
    labels = {n: "PTQ: " + n.removeprefix("control/").replace("/", ", ") for n in found}
    labels = {n: label + (f" †{found[n]}" if found[n] > 1 else "") for n, label in labels.items()}
    groups = [select(rows, label, stage, row=n, **overrides) for n, label in labels.items()]
    return sorted(groups, key=lambda g: (g.rows[0]["bits_per_weight"], mean_se([r["kld"] for r in g.rows])[0]))


def above_control(group: Group, rows: Sequence[Row]) -> list[float]:
    """Loss of each row minus that of the control it is compared with, which must be among `rows`."""
    controls = losses(rows)
    missing = [r["reference"] for r in group.rows if r["reference"] not in controls]
    if missing:
        raise UserError(f"the results have no row of {missing[0]}, the control of {group.label}: run the study again")
    return [row["loss"] - controls[row["reference"]] for row in group.rows]


def recovered(group: Group, ptq: Sequence[Group], rows: Sequence[Row]) -> list[float]:
    """Share of what the best rounding of the same control loses that each row does not lose, where there is one."""
    shares = []
    for row, above in zip(group.rows, above_control(group, rows), strict=True):
        lost = [
            a
            for p in ptq
            for r, a in zip(p.rows, above_control(p, rows), strict=True)
            if r["reference"] == row["reference"]
        ]
        shares += [(min(lost) - above) / min(lost)] if lost else []
    return shares


def by_seed(*groups: Group) -> list[tuple[Row, ...]]:
    """The rows of several groups side by side, for each seed that all of them have."""
    found = [{row["seed"]: row for row in group.rows} for group in groups]
    return [tuple(rows[seed] for rows in found) for seed in sorted(set.intersection(*map(set, found)))]


def seeds_of(*groups: Group) -> str:
    """As a cell of a table: the seeds that all of them have."""
    return " ".join(str(rows[0]["seed"]) for rows in by_seed(*groups))


def numbers_of_seeds(groups: Sequence[Group]) -> str:
    """How many seeds the groups have, as part of a title: "3 to 6 seeds". Those without any do not count."""
    found = sorted({len(group.rows) for group in groups} - {0})
    return f"{found[0]} to {found[-1]} seeds" if len(found) > 1 else f"{found[0] if found else 0} seeds"


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error from the spread between the values; nan for one value. Both nan for none."""
    if not values:
        return math.nan, math.nan
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def with_se(values: Sequence[float], form: str = ".4f") -> str:
    """ "mean ±standard error" over seeds; a single value alone; "" for none."""
    if not values:
        return ""
    mean, se = mean_se(values)
    return f"{mean:{form}}" if math.isnan(se) else f"{mean:{form}} ±{se:{form}}"


def percent(values: Sequence[float], form: str) -> str:
    """As `with_se`, with the unit."""
    return f"{with_se(values, form)} %" if values else ""


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval of it; nan for one value. Both nan for none."""
    mean, se = mean_se(values)
    return mean, se * float(stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else math.nan


def with_interval(values: Sequence[float], form: str = "+.4f", unit: str = "") -> str:
    """ "mean (low .. high)" over seeds, the interval Student's 95 %; a single value alone; "" for none."""
    if not values:
        return ""
    mean, half = student(values)
    between = "" if math.isnan(half) else f" ({mean - half:{form}} .. {mean + half:{form}}{unit})"
    return f"{mean:{form}}{unit}{between}"


def minus(group: Group, other: Group, key: str = "loss") -> list[float]:
    """How much higher a figure of the first is, for each seed that both have."""
    return [row[key] - of_other[key] for row, of_other in by_seed(group, other)]


def compared(first: Group, second: Group, rows: Sequence[Row], how: Callable[[float, float], float]) -> list[float]:
    """`how` of what the two lose against their controls, for each seed that both have."""
    gaps = [
        dict(zip((row["seed"] for row in group.rows), above_control(group, rows), strict=True))
        for group in (first, second)
    ]
    return [how(*(of[seed] for of in gaps)) for seed in sorted(set.intersection(*map(set, gaps)))]


def table(groups: Sequence[Group], ptq: Sequence[Group], rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each group: means over seeds, with standard errors.

    Args:
      ptq: roundings of the control, of which the best one is what "recovered" counts from; without any, no such column.
      rows: all rows, the controls' among them.
    """
    head = ["branch", "config", "seeds", "bits", "loss", "above control", "recovered", "KLD", "same top-1 %"]
    lines = [[*head, "same experts %", "codes changed %", "tokens", "minutes"]]
    for group in groups:
        if not group.rows:
            lines.append([group.label, *[""] * (len(lines[0]) - 1)])
            continue
        first, above = group.rows[0], above_control(group, rows)
        is_control = first["reference"] == f"{first['run']}:{first['row']}"
        quantized = group not in ptq and not is_control and first["rule"] == "" and first["format"] != "f32"
        changed = [r["health"]["flipped"] for r in group.rows if r["health"].get("flipped") is not None]
        lines.append(
            [
                group.label,
                group.config,
                group.seeds,
                f"{first['bits_per_weight']:.5g}",
                with_se([r["loss"] for r in group.rows]),
                "" if is_control else with_se(above),
                percent([100 * s for s in recovered(group, ptq, rows)], ".0f") if quantized and ptq else "",
                "" if is_control else with_se([r["kld"] for r in group.rows]),
                "" if is_control else with_se([100 * r["same_top1"] for r in group.rows], ".1f"),
                "" if is_control else with_se([100 * r["expert_agreement"] for r in group.rows], ".1f"),
                with_se([100 * c for c in changed], ".1f") if changed else "",
                f"{first['tokens']:,}",
                "" if first["rule"] else f"{mean_se([r['seconds'] / 60 for r in group.rows])[0]:.1f}",
            ]
        )
    if not ptq:
        column = head.index("recovered")
        lines = [line[:column] + line[column + 1 :] for line in lines]
    return markdown(lines)


def differences(groups: Sequence[Group], beside: dict[str, Group], rows: Sequence[Row]) -> str:
    """A Markdown table: by how much each group's loss is above its control's and above some others', with intervals.

    Args:
      beside: {head of a column: the group whose losses are taken off}.
      rows: all rows, the controls' among them.
    """
    lines = [["loss (95 % interval)", "minus the control's", *beside]]
    for group in groups:
        cells = ["" if group.rows == other.rows else with_interval(minus(group, other)) for other in beside.values()]
        lines.append([group.label, with_interval(above_control(group, rows)), *cells])
    return markdown(lines)


def dots(axes: Axes, drawn: Sequence[tuple[Group, str]], rows: Sequence[Row]) -> None:
    """What each group loses against its control, with standard errors over seeds: a line each, in its color."""
    drawn = [(group, color) for group, color in drawn if group.rows]
    for y, (group, color) in enumerate(drawn):
        mean, se = mean_se(above_control(group, rows))
        axes.errorbar(mean, y, xerr=0 if math.isnan(se) else se, fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(drawn)), [group.label.replace("*", "") for group, _ in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("loss above control (nats per token)")
    axes.grid(alpha=0.25)
