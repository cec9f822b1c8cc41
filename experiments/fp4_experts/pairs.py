"""Branches held against full precision, the untaught one, each other, and rounding: with Student's intervals."""

import itertools
import math
from collections.abc import Collection, Sequence

from experiments.scales import FULL
from launch.study_tables import Group, by_seed, mean_se, minus, seeds_of, student, with_interval
from qatmoe.text_table import markdown

UNTAUGHT = "untaught"
GOAL = 0.3  # percent of full precision's loss

# {grid or FULL: {UNTAUGHT, then that at other rates ("untaught, rate R"), then the same with a teacher}}
Kinds = dict[str, dict[str, Group]]


def at_config_rate(kind: str) -> str:
    """The kind that differs in the rate alone, and has the config's."""
    return kind.partition(",")[0]


def goals_table(of: Kinds) -> str:
    """How far the loss of each FP4 QAT is from that of full precision trained alike, in percent of it."""
    head = [f"goal: within {GOAL} %", "of the loss of", "seeds", "found, % (95 % interval)", "by the mean", "settled"]
    lines = [head]
    for grid, kinds in of.items():
        for kind, group in kinds.items() if grid != FULL else ():
            full = of[FULL][kind]
            lines.append(
                [group.label, full.label, seeds_of(group, full), *reached(list(percent_above(group, full).values()))]
            )
    return markdown(lines)


def searched_table(of: Kinds) -> str:
    """Untaught QAT at the best of its rates beside full precision at the best of its own, in percent of its loss.

    The best by the mean loss over the seeds that have any other rate than the config's. A rate that lacks one of them,
    where its run failed, is not chosen and is named.
    """
    rates = {grid: [g for kind, g in kinds.items() if at_config_rate(kind) == UNTAUGHT] for grid, kinds in of.items()}
    head = ["untaught, at the best of its rates", "beside", "seeds", "found, % (95 % interval)"]
    lines = [[*head, "by the mean", "settled", "not chosen from"]]
    for grid in [grid for grid in of if grid != FULL]:
        seeds = {row["seed"] for group in (*rates[grid][1:], *rates[FULL][1:]) for row in group.rows}
        one, full = (lowest(rates[which], seeds) for which in (grid, FULL))
        percent = list(percent_above(one, full).values())
        lacking = [g.label for g in (*rates[grid], *rates[FULL]) if not seeds <= {row["seed"] for row in g.rows}]
        lines.append([one.label, full.label, seeds_of(one, full), *reached(percent), ", ".join(lacking)])
    return markdown(lines)


def lowest(groups: Sequence[Group], seeds: Collection[int]) -> Group:
    """Of the groups that have these seeds the one of the lowest mean loss there, with their rows alone; or the first
    without rows."""
    cut = [Group(group.label, [row for row in group.rows if row["seed"] in seeds]) for group in groups]
    whole = [group for group in cut if seeds and len(group.rows) == len(seeds)]
    return min(whole or [Group(groups[0].label, [])], key=lambda group: mean_se([row["loss"] for row in group.rows])[0])


def machines_table(here: Kinds, before: Kinds, added: Sequence[Sequence[int]]) -> str:
    """How far the loss of each untaught QAT is from the control's, in percent of it: as seeds were added, and over all.

    Args:
      here: the results; before: those of another machine on the first seeds.
      added: the seeds, in the order in which they were run.
    """
    columns = ["seeds " + " ".join(map(str, seeds)) for seeds in added]
    head = ["% of the control's loss (95 % interval)", *columns, f"{columns[0]}, before"]
    lines = [[*head, "all seeds, two runs of one averaged", "by the mean", "settled"]]
    for grid in [grid for grid in here if grid != FULL]:
        now, then = (percent_above(of[grid][UNTAUGHT], of[FULL][UNTAUGHT]) for of in (here, before))
        parts = [[x for seed, x in now.items() if seed in seeds] for seeds in added]
        cells = [with_interval(part, "+.2f") for part in (*parts, list(then.values()))]
        runs = {seed: [of[seed] for of in (now, then) if seed in of] for seed in sorted(now.keys() | then.keys())}
        averages = [sum(of_seed) / len(of_seed) for of_seed in runs.values()]
        lines.append([here[grid][UNTAUGHT].label, *cells, *reached(averages)])
    return markdown(lines)


def percent_above(group: Group, full: Group) -> dict[int, float]:
    """{seed: how much higher a loss is than that of full precision, in percent of it}."""
    return {qat["seed"]: 100 * (qat["loss"] / own["loss"] - 1) for qat, own in by_seed(group, full)}


def reached(percent: Sequence[float]) -> list[str]:
    """Three cells: what was found, whether its mean meets the goal, whether its interval lies on one side of that."""
    if not percent:
        return [""] * 3
    mean, half = student(percent)
    settled = "" if math.isnan(half) else "yes" if abs(mean - GOAL) > half else f"no, holds {GOAL}"
    return [with_interval(percent, "+.2f"), "met" if mean <= GOAL else "not met", settled]


def differences_table(of: Kinds, others: Sequence[tuple[Group, Group]]) -> str:
    """How much higher each branch's loss is than the control's and the plain branch's, and what its rate does.

    Args:
      others: branches that differ from a plain one in something else than a teacher, each with that one.
    """
    control = of[FULL][UNTAUGHT]
    plain: dict[str, Group] = {group.label: beside for group, beside in others}
    at_config: dict[str, Group] = {}
    for kinds in of.values():
        for kind, group in kinds.items():
            base = at_config_rate(kind)
            plain |= {group.label: kinds[UNTAUGHT]} if base != UNTAUGHT else {}
            at_config |= {group.label: kinds[base]} if base != kind and base in kinds else {}
    head = ["(95 % interval)", "seeds", "loss minus the control's", "minus the plain one's"]
    lines = [[*head, "minus the config's rate's", "KLD minus the config's rate's"]]
    for group in (*(g for kinds in of.values() for g in kinds.values()), *(g for g, _ in others)):
        if group != control:
            beside, same = plain.get(group.label, control), at_config.get(group.label)
            own = "" if beside == control else with_interval(minus(group, beside))
            rate = [with_interval(minus(group, same, key)) if same else "" for key in ("loss", "kld")]
            lines.append([group.label, seeds_of(group, control), with_interval(minus(group, control)), own, *rate])
    return markdown(lines)


def formats_table(of: Kinds) -> str:
    """Grids against each other, trained alike: how much higher the loss of the first is."""
    grids = {grid: kinds for grid, kinds in of.items() if grid != FULL}
    pairs = list(itertools.combinations(grids, 2))
    lines = [["loss (95 % interval)", "seeds", *(f"{a} minus {b}" for a, b in pairs)]]
    for kind in of[FULL]:
        lines.append(
            [
                kind,
                seeds_of(*(of_grid[kind] for of_grid in grids.values())),
                *(with_interval(minus(grids[a][kind], grids[b][kind])) for a, b in pairs),
            ]
        )
    return markdown(lines)


def roundings_table(of: Kinds, rounded: Sequence[Group]) -> str:
    """Each QAT beside the best rounding onto its own grid, and beside the best of all in no more bits."""
    head = ["QAT", "seeds", "rounded", "lowest loss", "loss minus that (95 % interval)", "lowest KLD"]
    lines = [[*head, "KLD minus that (95 % interval)"]]
    for grid, kinds in of.items():
        onto = [g for g in rounded if g.rows[0]["row"].split("/")[1].lower() == grid]  # llama.cpp's own too
        for group in kinds.values() if grid != FULL else ():
            bits = group.rows[0]["bits_per_weight"] if group.rows else 0
            within = [g for g in rounded if g.rows[0]["bits_per_weight"] <= bits]
            for where, found in ((f"onto {grid}", onto), (f"in {bits:g} bits", within)):
                cells = [cell for key in ("loss", "kld") for cell in beside_best(group, found, key)]
                lines += [[group.label, group.seeds, where, *cells]] if any(cells) else []
    return markdown(lines)


def beside_best(group: Group, found: Sequence[Group], key: str) -> tuple[str, str]:
    """Which rounding's figure is the lowest over the group's seeds, and how much higher the group's is; or blanks."""
    above = [(g, values) for g in found if (values := minus(group, g, key)) and len(values) == len(group.rows)]
    if not above:
        return "", ""
    best, values = max(above, key=lambda one: mean_se(one[1])[0])
    return best.label.removeprefix("PTQ: "), with_interval(values)
