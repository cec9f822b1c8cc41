"""Branches held against full precision, the untaught one, each other, and rounding: with Student's intervals."""

import itertools
import math
from collections.abc import Sequence

from experiments.scales import FULL
from launch.study_tables import Group, by_seed, mean_se, minus, seeds_of, student, with_interval
from qatmoe.text_table import markdown

UNTAUGHT = "untaught"
GOAL = 0.3  # percent of full precision's loss

Kinds = dict[str, dict[str, Group]]  # {grid or FULL: {UNTAUGHT, then kinds with a teacher, the config's rate first}}


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


def machines_table(here: Kinds, before: Kinds, first: Sequence[int]) -> str:
    """How far the loss of each untaught QAT is from the control's, in percent of it: on two machines, and over both.

    Args:
      first: the seeds that were run first, and on the other machine too; those that were added stand apart.
    """
    head = ["% of the control's loss (95 % interval)", "here, first seeds", "here, added seeds", "earlier"]
    lines = [[*head, "all seeds, two runs of one averaged", "by the mean", "settled"]]
    for grid in [grid for grid in here if grid != FULL]:
        now, then = (percent_above(of[grid][UNTAUGHT], of[FULL][UNTAUGHT]) for of in (here, before))
        parts = [[x for seed, x in now.items() if seed in first], [x for seed, x in now.items() if seed not in first]]
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
    """How much higher each branch's loss is than the control's and the plain branch's, and what twice the rate does.

    Args:
      others: branches that differ from a plain one in something else than a teacher, each with that one.
    """
    control = of[FULL][UNTAUGHT]
    plain: dict[str, Group] = {group.label: beside for group, beside in others}
    slower: dict[str, Group] = {}
    for kinds in of.values():
        first, *taught = kinds.values()
        plain |= {group.label: first for group in taught}
        slower |= {group.label: taught[0] for group in taught[1:]}
    head = ["(95 % interval)", "seeds", "loss minus the control's", "minus the plain one's"]
    lines = [[*head, "minus the config's rate's", "KLD minus the config's rate's"]]
    for group in (*(g for kinds in of.values() for g in kinds.values()), *(g for g, _ in others)):
        if group != control:
            beside, slow = plain.get(group.label, control), slower.get(group.label)
            own = "" if beside == control else with_interval(minus(group, beside))
            rate = [with_interval(minus(group, slow, key)) if slow else "" for key in ("loss", "kld")]
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
