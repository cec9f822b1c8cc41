"""Which recipe of late 2-bit QAT is best, by how much, and how late is too late?

    python -m launch.study experiments/late_qat_2bit/study.py --slots 2

Recipes branch from whole trunks, shares from earlier steps of the same trunks. Rates are searched at the first seed;
the best ones, and one beyond, run on all, with and without a teacher. What the teacher does without a grid: the same
branch in full precision.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import DISTILL, FULL, RATE, TEACHER, Scale, experts_on, taught_by, taught_name
from launch.algebra import Points, chain, product, values
from launch.study import Report, Results, Row, Study, branches
from launch.study_tables import (
    Group,
    above_control,
    by_seed,
    dots,
    judged,
    mean_se,
    recovered,
    roundings,
    select,
    table,
    with_se,
)
from qatmoe.text_table import markdown

PTQ = r"^control/(q2_0|ternary|q2_k|Q2_0|Q2_K|IQ2_XXS|IQ2_XS|IQ2_S)/"

CLIP, SIGNED = "quant.clip_gradient", "quant.signed"
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
    )


# ---- Tables and figure -----------------------------------------------------------------------------------------------


def report(results: Results) -> Report:
    """For each size: recipes, shares, rates; the figure shows recipes and shares of all sizes."""
    tables = {}
    figure = Figure(figsize=(12, 1.5 + 5.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (scale, rows), (left, right) in zip(results.items(), panels, strict=True):
        s = scales.get(scale)
        trunks = f"{scale}_trunks"
        controls = [select(rows, name, trunks, row=name) for name in ("trunk", "control")]
        rounded = roundings(rows, trunks, PTQ)
        best = select(rows, "**q2_0, learned scales** (the config)", trunks)
        made = {name: select(rows, name, f"{scale}_recipes", **p) for name, (p,) in recipes_of(s).items()}
        ptq = [g for g in rounded if g.rows[0]["bits_per_weight"] <= 2.7]
        tables[f"{scale}_recipes"] = table([*controls, *rounded, best, *made.values()], ptq, rows)
        tables[f"{scale}_domains"] = domains_table([controls[1], *rounded, best, *made.values()])
        tables[f"{scale}_shares"] = shares_table(shares_of(s, rows), rows)
        tables[f"{scale}_rates"] = table(rates_of(s, rows, best, controls[1]), [], rows)
        followed = followed_of(s, rows)
        in_full = [
            select(
                rows, kind.replace("taught", "full precision, half KL to the control"), taught_name(trunks, FULL), **at
            )
            for kind, at in s.taught_kinds(FULL).items()
        ]
        if followed or in_full:
            tables[f"{scale}_followed"] = table([best, made[HALF], made[ALL], *followed, *in_full], ptq, rows)
        tables[f"{scale}_goals"] = goals([best, made[HALF], made[ALL], *followed], ptq, rows)
        drawn = [*((g, "black") for g in rounded), (best, "tab:red"), *((g, "tab:orange") for g in made.values())]
        drawn += [*((g, "tab:purple") for g in followed), *((g, "tab:blue") for g in in_full)]
        dots(left, drawn, rows)
        left.set_xscale("symlog", linthresh=0.1)  # recipes differ by hundredths, roundings by tenths
        left.set_xlim(left=-0.02)
        ticks = [0, 0.02, 0.05, 0.1, 0.3, 1]
        left.set_xticks(ticks, [f"{x:g}" for x in ticks])
        colors = "rounding (black), QAT, other rates (purple), no grid (blue)"
        left.set_title(f"{scale}: {colors}; {len(best.rows)} seeds", fontsize=10)
        draw_shares(right, shares_of(s, rows), rows)
        right.set_title(f"{scale}: QAT in the last steps of equal training", fontsize=10)
    return Report(tables, figure)


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
