"""The tables of late_qat_2bit, of one machine's results."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

from experiments.late_qat_2bit.recipes import (
    ALIKE,
    ALL,
    BEST,
    HALF,
    LONGEST,
    OTHER,
    OTHER_ORDER,
    PTQ,
    TAUGHT,
    UNTAUGHT,
    best_of,
    obstacles,
    recipes_of,
    without_control,
)
from experiments.scales import DISTILL, FULL, QUANTIZE, RATE, TEACHER, Scale, taught_name
from launch.study_results import Row
from launch.study_tables import (
    Group,
    above_control,
    by_seed,
    compared,
    differences,
    mean_se,
    minus,
    percent,
    recovered,
    roundings,
    select,
    table,
    with_interval,
    with_se,
)
from qatmoe.text_table import markdown

NONE = Group("", [])


class Groups(NamedTuple):
    """What a size's tables are made of."""

    control: Group
    trunk: Group
    rounded: list[Group]
    config: Group  # QAT as the config has it
    recipes: dict[str, Group]
    followed: list[Group]
    in_full: list[Group]  # no grid, taught


class Longer(NamedTuple):
    """Control and the best recipe of more steps."""

    control: Group
    rounded: list[Group]  # that control
    best: Group
    branched: dict[str, Group]  # what else stands beside that control


class Way(NamedTuple):
    """What shows where the best recipe's distance comes from."""

    other: Group  # full precision on other batches
    best: Group | None  # the best recipe, where there is one
    changed: list[Group]  # the same in one thing or another
    longer: dict[str, Longer]  # by how much


def groups_of(s: Scale, rows: Sequence[Row]) -> Groups:
    """The rows of a size by branch."""
    trunks = f"{s.name}_trunks"
    taught = (
        (kind.replace("taught", "full precision, half KL to the control"), at)
        for kind, at in s.taught_kinds(FULL).items()
    )
    return Groups(
        control=select(rows, "control", trunks, row="control"),
        trunk=select(rows, "trunk", trunks, row="trunk"),
        rounded=roundings(rows, trunks, PTQ),
        config=select(rows, "**q2_0, learned scales** (the config)", trunks),
        recipes={name: select(rows, name, f"{s.name}_recipes", **p) for name, (p,) in recipes_of(s).items()},
        followed=followed_of(s, rows),
        in_full=[select(rows, label, taught_name(trunks, FULL), **at) for label, at in taught],
    )


def tables_of(
    s: Scale,
    found: Groups,
    shares: Sequence[tuple[float, Group, Group]],
    rows: Sequence[Row],
    added: Sequence[Row],
) -> dict[str, str]:
    """A size's tables by name.

    Args:
      added: rows of other seeds: the config, the best recipe and what was trained the longest. They count where what
        is in the way is asked.
    """
    ptq = tight(found.rounded)
    made = found.recipes
    recipes = [*found.rounded, found.config, *made.values()]
    way = in_the_way_of(s, rows)
    beside = {"minus the config's": found.config} | ({f"minus {BEST}'s": way.best} if way.best else {})
    # The best recipe is among those that followed; what is longer has another control.
    branched = [found.config, *made.values(), *found.followed, *found.in_full, way.other, *way.changed]
    tables = {
        "recipes": table([found.trunk, found.control, *recipes], ptq, rows),
        "domains": domains_table([found.control, *recipes]),
        "shares": shares_table(shares, rows),
        "rates": table(rates_of(s, rows, found.config, found.control), [], rows),
        "differences": differences(branched, beside, rows),
        "goals": goals_of(found, rows),
    }
    if s.followed:
        followed = [found.config, made[HALF], made[ALL], *found.followed, *found.in_full]
        tables["followed"] = table(followed, ptq, rows)
    every = [*rows, *added]
    whole, of_every = in_the_way_of(s, every), groups_of(s, every)
    tables["in_the_way"] = in_the_way_table(of_every, whole, every)
    if whole.best:
        tables["alike"] = alike_table(of_every, whole, whole.best)
        tables["longer"] = longer_table(of_every, whole, whole.best, every)
        tables["goals_longer"] = goals(
            [
                (group, tight(of.rounded))
                for of in whole.longer.values()
                for group in (of.best, *(g for name, g in of.branched.items() if name != ALIKE))
            ],
            every,
        )
    return tables


def domains_table(groups: Sequence[Group]) -> str:
    """Bits per byte on each domain."""
    names = list(next((r["domains"] for group in groups for r in group.rows), []))
    lines = [["bits per byte", *names]]
    for group in groups:
        cells = [with_se([r["domains"][name]["bits_per_byte"] for r in group.rows]) for name in names]
        lines.append([group.label, *cells])
    return markdown(lines)


def shares_of(s: Scale, rows: Sequence[Row]) -> list[tuple[float, Group, Group]]:
    """For each share of the tokens: the share, QAT, and the control of the same tokens rounded."""
    found = []
    for steps in s.share_steps:
        at = {"train.phases.qat.steps": steps}
        stage, share = f"{s.name}_shares", steps / s.trunk_steps
        label = f"last {100 * share:g} % of the tokens"
        found.append(
            (
                share,
                select(rows, f"QAT in the {label}", stage, **at),
                select(rows, f"PTQ, decay in the {label}", stage, row="control/q2_0/search", **at),
            )
        )
    return found


def shares_table(shares: Sequence[tuple[float, Group, Group]], rows: Sequence[Row]) -> str:
    """QAT and rounding by share, each beside the control that decays in the same steps."""
    groups, ptq = [], []
    for _, qat, rounded in shares:
        if not qat.rows:
            groups.append(qat)
            continue
        stage, at = qat.rows[0]["stage"], {"train.phases.qat.steps": qat.rows[0]["steps"]}
        groups += [select(rows, rounded.label.replace("PTQ", "control"), stage, row="control", **at), rounded, qat]
        ptq.append(rounded)
    return table(groups, ptq, rows)


def rates_of(s: Scale, rows: Sequence[Row], qat: Group, control: Group) -> list[Group]:
    """The search of rates at the first seed: control and QAT alike, then the rate of scales."""
    first = lambda group, label: Group(label, group.rows[:1])  # noqa: E731
    groups = [first(control, "control, the config's rates"), first(qat, "QAT, the config's rates")]
    for rate in s.rates:
        for row in ("control", "qat"):
            at = {RATE: rate}
            groups.append(select(rows, f"{row}, rate {rate:g}", f"{s.name}_rates", row=row, **at))
    for rate in s.scale_rates:
        at = {"optim.scale_lr": rate}
        groups.append(select(rows, f"qat, rate of scales {rate:g}", f"{s.name}_scale_rates", **at))
    return groups


def followed_of(s: Scale, rows: Sequence[Row]) -> list[Group]:
    """The rates that the search led to, without a teacher and with one, on every seed."""
    groups = []
    for teacher, (given,) in TAUGHT.items():
        for point in s.followed:
            ((key, rate),) = point.items()
            label = f"{'rate of scales' if 'scale' in key else 'rate'} {rate:g}, {teacher}"
            chosen = {TEACHER: None, DISTILL: None} | given | point  # None: not set
            groups.append(select(rows, label, f"{s.name}_followed", **chosen))
    return groups


def in_the_way_of(s: Scale, rows: Sequence[Row]) -> Way:
    """The best recipe, and what is held against it."""
    found = select(rows, OTHER, f"{s.name}_other_batches")
    # They stand beside the control of the seed that their first weights come of.
    other = Group(found.label, [row | {"seed": row["seed"] - OTHER_ORDER} for row in found.rows])
    if not s.longer:  # nor a best recipe
        return Way(other, None, [], {})
    unset = dict.fromkeys((TEACHER, DISTILL, QUANTIZE))  # None: not set
    return Way(
        other,
        select(rows, BEST, f"{s.name}_followed", **unset | best_of(s)),
        [select(rows, name, f"{s.name}_in_the_way", **unset | at) for name, at in obstacles(s).items()],
        {much: longer_of(s, rows, much) for much in s.longer},
    )


def longer_of(s: Scale, rows: Sequence[Row], much: str) -> Longer:
    """What was trained for that much longer."""
    stage, at = f"{s.name}_longer", s.longer[much]
    branched = {}
    if much == list(s.longer)[-1]:
        plain = {key: value for key, value in best_of(s).items() if key != TEACHER} | {QUANTIZE: None}
        plain |= without_control(at)
        for name, changed in LONGEST.items():
            branched[name] = select(rows, f"{name}, {much}", f"{s.name}_longest", **plain | changed)
    return Longer(
        select(rows, f"control, {much}", stage, row="control", **at),
        [Group(f"{group.label}, {much}", group.rows) for group in roundings(rows, stage, PTQ, **at)],
        select(rows, f"{BEST}, {much}", stage, **at),
        branched,
    )


def in_the_way_table(found: Groups, way: Way, rows: Sequence[Row]) -> str:
    """What was tried, and of each control that is longer the roundings that are held against it."""
    shown = [found.config, *([way.best] if way.best else []), way.other, *way.changed]
    for of in way.longer.values():
        best = [lowest(tight(of.rounded), key) for key in ("loss", "kld")] if of.rounded else []
        rounded = [group for group in of.rounded if searched(group) or group in best]
        shown += [of.control, *rounded, of.best, *of.branched.values()]
    ptq = [*found.rounded, *(group for of in way.longer.values() for group in of.rounded)]
    return table(shown, tight(ptq), rows)


def alike_table(found: Groups, way: Way, best: Group) -> str:
    """2 bits beside full precision that has the same teacher and rate, and untaught beside that of other batches."""
    head = ["2 bits (95 % interval)", "minus", "loss", "KLD to the control"]
    lines = [[*head, "same top-1, points", "same experts, points"]]
    half, rate = found.in_full
    for two, full in ((found.recipes[HALF], half), (best, rate), (found.config, way.other)):
        cells = [with_interval(minus(two, full, key)) for key in ("loss", "kld")]
        shares = [[100 * share for share in minus(two, full, key)] for key in ("same_top1", "expert_agreement")]
        lines.append([two.label, full.label, *cells, *(with_interval(points, "+.1f") for points in shares)])
    return markdown(lines)


def longer_table(found: Groups, way: Way, best: Group, rows: Sequence[Row]) -> str:
    """What the best recipe, rounding, and full precision that is taught alike lose by the number of steps; differences
    on the seeds that both have."""
    branched = {ALIKE: found.in_full[1], UNTAUGHT: found.config}
    lengths = {"as long as the config's": Longer(found.control, found.rounded, best, branched)} | way.longer
    bests = [of.best for of in lengths.values()]
    rounded = [next(filter(searched, of.rounded), NONE) for of in lengths.values()]
    full, untaught = ([of.branched.get(name, NONE) for of in lengths.values()] for name in (ALIKE, UNTAUGHT))
    lines = [["mean (95 % interval), seeds", *lengths]]
    for name, groups in ((BEST, bests), ("PTQ: q2_0, search", rounded), (ALIKE, full), (UNTAUGHT, untaught)):
        first, *more = groups
        lines.append([f"{name}: loss minus the control's", *(counted(above_control(g, rows)) for g in groups)])
        change = [counted(compared(group, first, rows, operator.sub)) for group in more]
        lines.append([f"{name}: that, minus what it is at the config's", "", *change])
    lines.append([f"{BEST}: loss minus that of {ALIKE}", *map(counted, map(minus, bests, full))])
    pairs = list(zip(bests, full, strict=True))
    change = [counted(changes(pair, pairs[0])) for pair in pairs[1:]]
    lines.append([f"{BEST}: that, minus what it is at the config's", "", *change])
    lines.append([f"{BEST}: KLD to the control", *(counted([r["kld"] for r in g.rows], ".4f") for g in bests)])
    change = [counted(minus(group, best, "kld")) for group in bests[1:]]
    return markdown([*lines, [f"{BEST}: that, minus what it is at the config's", "", *change]])


def changes(pair: tuple[Group, Group], before: tuple[Group, Group]) -> list[float]:
    """By how much the first's distance to the second is more in one pair than in another, for each seed of all."""
    return [a["loss"] - b["loss"] - (c["loss"] - d["loss"]) for a, b, c, d in by_seed(*pair, *before)]


def counted(values: Sequence[float], form: str = "+.4f") -> str:
    """As `with_interval`, and of how many seeds."""
    return f"{with_interval(values, form)}, {len(values)}" if values else ""


def searched(rounded: Group) -> bool:
    """Whether it is the rounding to Q2_0 by search."""
    return rounded.rows[0]["row"] == "control/q2_0/search"


def goals_of(found: Groups, rows: Sequence[Row]) -> str:
    """What the recipes reach of what was asked."""
    recipes = [found.config, found.recipes[HALF], found.recipes[ALL], *found.followed]
    return goals([(group, tight(found.rounded)) for group in recipes], rows)


def tight(rounded: Sequence[Group]) -> list[Group]:
    """Those in at most 2.7 bits."""
    return [g for g in rounded if g.rows[0]["bits_per_weight"] <= 2.7]


def lowest(groups: Sequence[Group], key: str) -> Group:
    """The one whose mean of a figure is the lowest."""
    return min(groups, key=lambda g: mean_se([r[key] for r in g.rows])[0])


def goals(recipes: Sequence[tuple[Group, Sequence[Group]]], rows: Sequence[Row]) -> str:
    """What was asked of 2.25 bits, and what recipes reach, each beside roundings of its control."""
    lines = [
        [
            "goals at 2.25 bits",
            "seeds",
            "recovers at least 95 % of what the best rounding in 2.7 bits loses",
            "within 2 % of the control's loss",
            "KLD at most 1/5 of the best rounding's",
            "that rounding",
        ]
    ]
    for group, ptq in recipes:
        if not group.rows or not ptq:
            lines.append([group.label, *[""] * (len(lines[0]) - 1)])
            continue
        best = lowest(ptq, "kld")
        relative = [100 * a / (r["loss"] - a) for a, r in zip(above_control(group, rows), group.rows, strict=True)]
        lines.append(
            [
                group.label,
                group.seeds,
                percent([100 * x for x in recovered(group, ptq, rows)], ".0f"),
                percent(relative, ".2f"),
                with_se([qat["kld"] / rounded["kld"] for qat, rounded in by_seed(group, best)], ".2f"),
                best.label.removeprefix("PTQ: "),
            ]
        )
    return markdown(lines)
