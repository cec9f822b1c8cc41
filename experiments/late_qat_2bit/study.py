"""Which recipe of late 2-bit QAT is best, by how much, and how late is too late?

    python -m launch.study experiments/late_qat_2bit/study.py --slots 2

Recipes branch from whole trunks, shares from earlier steps of the same trunks. Rates are searched at the first seed;
the best ones, and one beyond, run on all, with and without a teacher. What the teacher does without a grid: the same
branch in full precision. What is in the way of less: the best recipe with an average of the weights, and for twice as
long; and how far two controls of one trunk are apart, that of other batches and that of another rate.
"""

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import DISTILL, FULL, QUANTIZE, RATE, TEACHER, Scale, experts_on, taught_by, taught_name
from launch.algebra import Points, chain, product, values
from launch.study import Report, Results, Row, Stage, Study, branches, joined
from launch.study_tables import (
    Group,
    above_control,
    by_seed,
    compared,
    differences,
    dots,
    judged,
    mean_se,
    minus,
    recovered,
    roundings,
    select,
    table,
    with_interval,
    with_se,
)
from qatmoe.text_table import markdown

EARLIER = Path(__file__).parent / "earlier" / "small.json"  # results of the study on another machine
PTQ = r"^control/(q2_0|ternary|q2_k|Q2_0|Q2_K|IQ2_XXS|IQ2_XS|IQ2_S)/"

CLIP, SIGNED = "quant.clip_gradient", "quant.signed"
COLORS = "rounding (black), QAT, other rates (purple), no grid (blue)"
BEST = "the best recipe"
LONG = ", twice as long"
OTHER = "full precision, on other batches"
OTHER_ORDER = 10  # added to a seed where batches come in another order
TAUGHT: dict[str, Points] = {
    "no teacher": [{}],
    "half KL to the control": taught_by(":control", 0.5),
    "all KL to the control": taught_by(":control", 1.0),
}
HALF, ALL = (f"q2_0, learned, {teacher}" for teacher in list(TAUGHT)[1:])
RECIPES: dict[str, Points] = {
    "q2_0, dynamic scales": values("quant.scale", ["dynamic"]),
    "q2_0, learned scales without a sign": values(SIGNED, [False]),
    "q2_0, learned, LSQ's clipped gradient": values(CLIP, [True]),
    "q2_0, learned, half KL to the trunk": taught_by("trunk", 0.5),
    "q2_0, learned, all KL to the trunk": taught_by("trunk", 1.0),
    HALF: TAUGHT["half KL to the control"],
    ALL: TAUGHT["all KL to the control"],
    "ternary, learned": experts_on("ternary"),
    "q2_k (stretched), learned": experts_on("q2_k"),
}


def recipes_of(s: Scale) -> dict[str, Points]:
    """The recipes whose blocks fit the size's rows."""
    return {name: points for name, points in RECIPES.items() if s.k_quants or "q2_k" not in name}


def get_study(scale: str, corpus: str) -> Study:
    """Trunks; recipes; shares of the tokens; rates."""
    s = scales.on(scale, corpus)
    trunks = s.trunks(f"^(trunk|control|qat)$|{PTQ}")
    shares = [
        {
            "init_from": f":trunk@{s.trunk_steps - steps}",
            "train.phases.trunk.steps": s.trunk_steps - steps,
            **{f"train.phases.{phase}.{key}": steps for phase in ("control", "qat") for key in ("steps", "decay")},
        }
        for steps in s.share_steps
    ]
    rates = [{f"train.phases.{phase}.lr": rate for phase in ("control", "qat")} for rate in s.rates]
    scale_rates = values("optim.scale_lr", s.scale_rates)
    followed = product(chain(*TAUGHT.values()), s.followed)
    first_seed = {"train.seed": s.seeds[0]}
    return s.study(
        trunks,
        branches(trunks, f"{s.name}_recipes", s.branch, chain(*recipes_of(s).values())),
        branches(trunks, f"{s.name}_shares", s.config, shares, judged="^(control|qat)$|^control/q2_0/search$"),
        branches(trunks, f"{s.name}_rates", s.config, rates, judged="^(control|qat)$", at=first_seed),
        branches(trunks, f"{s.name}_scale_rates", s.branch, scale_rates, at=first_seed),
        *([branches(trunks, f"{s.name}_followed", s.branch, followed)] if followed else []),
        *s.with_teacher(trunks, FULL),
        *in_the_way(s, trunks),
    )


def in_the_way(s: Scale, trunks: Stage) -> list[Stage]:
    """How far full precision ends from itself, on the same text in another order; and what the best recipe's distance
    may come of, where there is one: noise of its last steps, its rate, and too few steps for it and its control."""
    of_seed = ({QUANTIZE: False, "train.seed": OTHER_ORDER + seed} for seed in s.seeds)
    at = ({"train.seed": seed} for seed in s.seeds)
    other = f"{s.name}_other_batches"
    found = [joined(*(branches(trunks, other, s.branch, [p], at=a) for p, a in zip(of_seed, at, strict=True)))]
    if s.longer:
        (best,) = s.taught["q2_0"]
        twice = product(s.longer, [best | {TEACHER: "control"}])
        found += [
            branches(trunks, f"{s.name}_in_the_way", s.branch, chain(*obstacles(s).values())),
            branches(trunks, f"{s.name}_longer", s.config, twice, judged="^(control|qat)$|^control/q2_0/search$"),
        ]
    return found


def obstacles(s: Scale) -> dict[str, Points]:
    """What is changed of the best recipe to see what its distance comes of, in as many steps."""
    (best,) = s.taught["q2_0"]
    return {
        f"{BEST}, average of the weights": product([best], values("optim.ema", [0.99])),
        f"full precision, rate {best[RATE]:g}, no teacher": [{QUANTIZE: False, RATE: best[RATE]}],
    }


# ---- Tables and figure -----------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """What a size's tables are made of."""

    control: Group
    trunk: Group
    rounded: list[Group]
    config: Group  # QAT as the config has it
    recipes: dict[str, Group]
    followed: list[Group]
    in_full: list[Group]  # no grid, taught


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


def report(results: Results) -> Report:
    """For each size: recipes, shares, rates; the figure shows recipes and shares of all sizes."""
    tables = {}
    figure = Figure(figsize=(12, 1.5 + 5.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (scale, rows), (left, right) in zip(results.items(), panels, strict=True):
        s = scales.get(scale)
        found, shares = groups_of(s, rows), shares_of(s, rows)
        made = tables_of(s, found, shares, rows)
        if s is scales.SMALL:
            made |= machines_tables(s, found, rows)
        tables |= {f"{scale}_{name}": text for name, text in made.items()}
        draw_recipes(left, found, rows)
        left.set_title(f"{scale}: {COLORS}; {len(found.config.rows)} seeds", fontsize=10)
        draw_shares(right, shares, rows)
        right.set_title(f"{scale}: QAT in the last steps of equal training", fontsize=10)
    return Report(tables, figure)


def tables_of(
    s: Scale, found: Groups, shares: Sequence[tuple[float, Group, Group]], rows: Sequence[Row]
) -> dict[str, str]:
    """A size's tables by name."""
    ptq = tight_roundings(found)
    made = found.recipes
    recipes = [*found.rounded, found.config, *made.values()]
    beside = {"minus the config's": found.config}
    way = in_the_way_of(s, rows)
    beside |= {f"minus {BEST}'s": way[BEST]} if s.longer else {}
    branched = [found.config, *made.values(), *found.followed, *found.in_full]
    # The best recipe is among those that followed; what is twice as long has another control.
    branched += [group for name, group in way.items() if name != BEST and not name.endswith(LONG)]
    tables = {
        "recipes": table([found.trunk, found.control, *recipes], ptq, rows),
        "domains": domains_table([found.control, *recipes]),
        "shares": shares_table(shares, rows),
        "rates": table(rates_of(s, rows, found.config, found.control), [], rows),
        "differences": differences(branched, beside, rows),
        "in_the_way": table([found.config, *way.values()], [*ptq, *(g for n, g in way.items() if "PTQ" in n)], rows),
        "goals": goals_of(found, rows),
    }
    if s.followed:
        followed = [found.config, made[HALF], made[ALL], *found.followed, *found.in_full]
        tables["followed"] = table(followed, ptq, rows)
    if s.longer:
        tables["alike"] = alike_table(found, way)
    return tables


def draw_recipes(axes: Axes, found: Groups, rows: Sequence[Row]) -> None:
    """What every branch loses: hundredths for recipes, tenths for roundings."""
    colored = {"black": found.rounded, "tab:red": [found.config], "tab:orange": found.recipes.values()}
    colored |= {"tab:purple": found.followed, "tab:blue": found.in_full}
    dots(axes, [(group, color) for color, groups in colored.items() for group in groups], rows)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.02)
    ticks = [0, 0.02, 0.05, 0.1, 0.3, 1]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])


def domains_table(groups: Sequence[Group]) -> str:
    """Bits per byte on each domain."""
    names = list(next(r["domains"] for group in groups for r in group.rows))
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


def draw_shares(axes: Axes, shares: Sequence[tuple[float, Group, Group]], rows: Sequence[Row]) -> None:
    """Loss by share: of QAT, of the control of the same steps, and of that control rounded."""
    x = [share for share, _, _ in shares]
    losses = {r["run"]: r["loss"] for r in judged(rows) if r["row"] == "control"}
    lines = (
        ("control, rounded", "black", [[r["loss"] for r in rounded.rows] for _, _, rounded in shares]),
        ("QAT", "tab:red", [[r["loss"] for r in qat.rows] for _, qat, _ in shares]),
        ("control", "tab:blue", [[losses[r["run"]] for r in qat.rows] for _, qat, _ in shares]),
    )
    for label, color, values_of in lines:
        y, se = zip(*map(mean_se, values_of), strict=True)
        axes.errorbar(x, y, se, marker="o", color=color, label=label, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{100 * share:g} %" for share in x])
    axes.minorticks_off()
    axes.set_xlabel("share of all tokens in which rates fall, and QAT is on its grid")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


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


def in_the_way_of(s: Scale, rows: Sequence[Row]) -> dict[str, Group]:
    """The best recipe, and what shows where its distance comes from."""
    other = select(rows, OTHER, f"{s.name}_other_batches")
    of_seed = [
        row | {"seed": row["seed"] - OTHER_ORDER} for row in other.rows
    ]  # as the control's that it stands beside
    found = {OTHER: Group(other.label, of_seed)}
    if not s.longer:
        return found
    unset = dict.fromkeys((TEACHER, DISTILL, QUANTIZE))  # None: not set
    best = select(rows, BEST, f"{s.name}_followed", **unset | s.taught["q2_0"][0])
    named = ((name, unset | point) for name, (point,) in obstacles(s).items())
    longer = (("control", "control"), ("PTQ: q2_0, search", "control/q2_0/search"), (BEST, "qat"))
    return (
        {BEST: best}
        | found
        | {name: select(rows, name, f"{s.name}_in_the_way", **at) for name, at in named}
        | {f"{name}{LONG}": select(rows, f"{name}{LONG}", f"{s.name}_longer", row=row) for name, row in longer}
    )


def alike_table(found: Groups, way: dict[str, Group]) -> str:
    """2 bits beside full precision that has the same teacher and rate, and untaught beside that of other batches."""
    lines = [["2 bits (95 % interval)", "minus", "loss", "KLD to the control", "same experts, points"]]
    half, rate = found.in_full
    for two, full in ((found.recipes[HALF], half), (way[BEST], rate), (found.config, way[OTHER])):
        cells = [with_interval(minus(two, full, key)) for key in ("loss", "kld")]
        points = [100 * share for share in minus(two, full, "expert_agreement")]
        lines.append([two.label, full.label, *cells, with_interval(points, "+.1f")])
    return markdown(lines)


def machines_tables(s: Scale, found: Groups, rows: Sequence[Row]) -> dict[str, str]:
    """What branches lose here and on the machine that the study was run on before, over both, and the goals there."""
    rows_before = json.loads(EARLIER.read_text())
    before = groups_of(s, rows_before)
    here, there = ([g.config, *g.recipes.values(), *g.followed, *g.in_full] for g in (found, before))
    labels = [group.label.partition(" (")[0] for group in here]
    best = labels.index(f"rate {s.taught['q2_0'][0][RATE]:g}, half KL to the control")
    head = ["loss minus the control's", "here", "earlier", "both (95 % interval)", "both, minus the config's"]
    lines = [[*head, f"both, minus {BEST}'s", "KLD here", "KLD earlier"]]
    for now, then in zip(here, there, strict=True):
        gaps, gaps_before = above_control(now, rows), above_control(then, rows_before)
        cells = [with_se(gaps), with_se(gaps_before), with_interval([*gaps, *gaps_before])]
        for i in (0, best):
            both = [*minus(now, here[i]), *minus(then, there[i])]
            cells.append("" if now is here[i] else with_interval(both))
        lines.append([now.label, *cells, *(with_se([r["kld"] for r in group.rows]) for group in (now, then))])
    return {
        "machines": markdown(lines),
        "goals_earlier": goals_of(before, rows_before),
        "rates_earlier": table(rates_of(s, rows_before, before.config, before.control), [], rows_before),
        "shares_machines": shares_of_both(s, rows, rows_before),
    }


def shares_of_both(s: Scale, rows: Sequence[Row], rows_before: Sequence[Row]) -> str:
    """QAT's distance to its own control by share, here and before, and beside that of the last share but one."""
    here, there = ([qat for _, qat, _ in shares_of(s, own)] for own in (rows, rows_before))
    shares = [share for share, _, _ in shares_of(s, rows)]
    head = ["QAT in the last", "loss minus its control's, here", "earlier", "both (95 % interval)"]
    lines = [[*head, f"both, minus that of {100 * shares[-2]:g} %"]]
    for share, now, then in zip(shares, here, there, strict=True):
        gaps, gaps_before = above_control(now, rows), above_control(then, rows_before)
        beside = compared(now, here[-2], rows, operator.sub) + compared(then, there[-2], rows_before, operator.sub)
        cells = [with_se(gaps), with_se(gaps_before), with_interval([*gaps, *gaps_before])]
        lines.append([f"{100 * share:g} %", *cells, "" if now is here[-2] else with_interval(beside)])
    return markdown(lines)


def goals_of(found: Groups, rows: Sequence[Row]) -> str:
    """What the recipes reach of what was asked."""
    recipes = [found.config, found.recipes[HALF], found.recipes[ALL], *found.followed]
    return goals(recipes, tight_roundings(found), rows)


def tight_roundings(found: Groups) -> list[Group]:
    """Those in at most 2.7 bits."""
    return [g for g in found.rounded if g.rows[0]["bits_per_weight"] <= 2.7]


def goals(recipes: Sequence[Group], ptq: Sequence[Group], rows: Sequence[Row]) -> str:
    """What was asked of 2.25 bits, and what recipes reach."""
    best = min(ptq, key=lambda g: mean_se([r["kld"] for r in g.rows])[0])
    lines = [
        [
            "goals at 2.25 bits",
            "recovers at least 95 % of what the best rounding in 2.7 bits loses",
            "within 2 % of the control's loss",
            f"KLD at most 1/5 of the best rounding's ({best.label})",
        ]
    ]
    for group in recipes:
        relative = [100 * a / (r["loss"] - a) for a, r in zip(above_control(group, rows), group.rows, strict=True)]
        lines.append(
            [
                group.label,
                with_se([100 * x for x in recovered(group, ptq, rows)], ".0f") + " %",
                with_se(relative, ".2f") + " %",
                with_se([qat["kld"] / rounded["kld"] for qat, rounded in by_seed(group, best)], ".2f"),
            ]
        )
    return markdown(lines)
