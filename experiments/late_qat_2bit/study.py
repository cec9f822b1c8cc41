"""Which recipe of late 2-bit QAT is best, by how much, and how late is too late?

    python -m launch.study experiments/late_qat_2bit/study.py --slots 2

Recipes branch from whole trunks, shares from earlier steps of the same trunks. Rates are searched at the first seed;
the best ones, and one beyond, run on all, with and without a teacher. What the teacher does without a grid: the same
branch in full precision. What is in the way of less: the best recipe with an average of the weights, and for twice and
four times as long (there on more seeds, and on the first ones with nothing but the KL and without a teacher too); and
how far two controls of one trunk are apart, that of other batches and that of another rate.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import scales
from experiments.late_qat_2bit import recipes
from experiments.late_qat_2bit.machines import machines_tables
from experiments.late_qat_2bit.tables import Groups, groups_of, shares_of, tables_of
from launch.study import Report, Results, Study
from launch.study_results import Row
from launch.study_tables import Group, dots, judged, mean_se

COLORS = "rounding (black), QAT, other rates (purple), no grid (blue)"


def get_study(scale: str, corpus: str) -> Study:
    """Trunks; recipes; shares of the tokens; rates; what is in the way."""
    s = scales.on(scale, corpus)
    return s.study(*recipes.stages(s))


def report(results: Results) -> Report:
    """For each size: recipes, shares, rates; the figure shows recipes and shares of all sizes."""
    tables = {}
    figure = Figure(figsize=(12, 1.5 + 5.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (scale, rows), (left, right) in zip(results.items(), panels, strict=True):
        s = scales.get(scale)
        added = [row for row in rows if row["seed"] in s.more_seeds.get("late_qat_2bit", ())]
        rows = [row for row in rows if row not in added]
        found, shares = groups_of(s, rows), shares_of(s, rows)
        made = tables_of(s, found, shares, rows, added)
        if s is scales.SMALL:
            made |= machines_tables(s, found, rows, added)
        tables |= {f"{scale}_{name}": text for name, text in made.items()}
        draw_recipes(left, found, rows)
        left.set_title(f"{scale}: {COLORS}; {len(found.config.rows)} seeds", fontsize=10)
        draw_shares(right, shares, rows)
        right.set_title(f"{scale}: QAT in the last steps of equal training", fontsize=10)
    return Report(tables, figure)


def draw_recipes(axes: Axes, found: Groups, rows: Sequence[Row]) -> None:
    """What every branch loses: hundredths for recipes, tenths for roundings."""
    colored = {"black": found.rounded, "tab:red": [found.config], "tab:orange": found.recipes.values()}
    colored |= {"tab:purple": found.followed, "tab:blue": found.in_full}
    dots(axes, [(group, color) for color, groups in colored.items() for group in groups], rows)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.02)
    ticks = [0, 0.02, 0.05, 0.1, 0.3, 1]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])


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
