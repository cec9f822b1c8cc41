"""In the same memory: a 2-bit model of 2N routed parameters, or a 4-bit one of N?

    python -m launch.study experiments/iso_memory/study.py --slots 2

The models of a pair differ in the number of experts alone, so both train the same number of weights for a token: equal
training tokens are equal training FLOPs too, but for the router and the optimizer. They have no MTP module.

"Taught": half of late QAT's loss is the KL to the finished control of the same size.
"""

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import Scale, experts_on, grid_name, taught_name
from launch.study import Report, Results, Row, Stage, Study, beside
from launch.study_tables import Group, by_seed, mean_se, select, with_se
from qatmoe.text_table import markdown

FIRST = "from the first step"
PAIRS = [
    ("Q4_0", "Q2_0"),
    ("Q4_0", f"Q2_0 {FIRST}"),
    ("Q4_0", f"ternary {FIRST}"),
    (f"Q4_0 {FIRST}", f"Q2_0 {FIRST}"),
    (f"Q4_0 {FIRST}", f"ternary {FIRST}"),
    (f"Q4_0 dynamic {FIRST}", f"Q2_0 {FIRST}"),
    (f"Q4_0 dynamic {FIRST}", f"ternary {FIRST}"),
]
FROM_FIRST_STEP = {  # of models that are on a grid from the first step: the grid, and what else is set
    "Q4_0": ("q4_0", {}),
    "Q4_0 dynamic": ("q4_0", {"quant.scale": "dynamic"}),
    "Q2_0": ("q2_0", {}),
    "ternary": ("ternary", {}),
}
COLORS = {"bf16": "black", "Q4_0": "tab:blue", "Q2_0": "tab:red", "ternary": "tab:green"}


def get_study(scale: str, corpus: str) -> Study:
    """Trunks of N, 2N and 4N; Q4_0 of N and 2N, late and from the first step, there with learned and with dynamic
    scales; Q2_0 and ternary from the first step of 2N and 4N. The trunks make late Q2_0. Both late grids with a teacher
    too."""
    s = scales.on(scale, corpus)
    n, middle, large = s.experts[1:]
    trunks = {size: s.size(size, "^(control|qat)$") for size in (n, middle, large)}
    first = [(size, "ternary") for size in (middle, large)]
    first += [(size, "Q4_0") for size in (n, middle)] + [(size, "Q2_0") for size in (middle, large)]
    first += [(size, "Q4_0 dynamic") for size in (n, middle)]
    return s.study(
        *trunks.values(),
        *(s.on_grid(trunks[size], "q4_0") for size in (n, middle)),
        *(stage for size in (n, middle) for stage in s.with_teacher(trunks[size], "q4_0")),
        *(stage for size in (middle, large) for stage in s.with_teacher(trunks[size], "q2_0")),
        *(scratch(s, trunks[size], size, kind) for size, kind in first),
        needs_llama=False,
    )


def scratch(s: Scale, trunks: Stage, size: int, kind: str) -> Stage:
    """Models that are on a grid from the first step, beside trunks of their size."""
    grid, more = FROM_FIRST_STEP[kind]
    return beside(trunks, scratch_name(s, size, kind), s.scratch, experts_on(grid, **more))


def scratch_name(s: Scale, size: int, kind: str) -> str:
    """The sweep of models that are on a grid from the first step."""
    return f"{s.size_name(size)}_scratch_{kind.lower().replace(' ', '_')}"


def pairs_of(s: Scale) -> list[tuple[str, str]]:
    """What is compared: in fewer bits with twice the experts, the second."""
    four, two = ([f"{grid.upper()} {kind}" for kind in s.taught_kinds(grid)] for grid in ("q4_0", "q2_0"))
    return [*PAIRS, *itertools.product(four, [*two, f"Q2_0 {FIRST}", f"ternary {FIRST}"])]


def report(results: Results) -> Report:
    """For each size: the models by bytes, and each pair seed by seed."""
    tables = {}
    figure = Figure(figsize=(9, 0.8 + 6 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        s = scales.get(scale)
        found = models(s, rows)
        tables[f"{scale}_models"] = models_table(found)
        tables[f"{scale}_pairs"] = pairs_table(s, found)
        draw(axes, found)
        axes.set_title(f"{scale}: loss of models by bytes, {len(s.seeds)} seeds", fontsize=10)
    return Report(tables, figure)


def draw(axes: Axes, found: dict[tuple[int, str], Group]) -> None:
    """A line for each model, those of equal bytes (to a twentieth) together, each such class by loss."""
    classes: list[list[tuple[float, float, str, str]]] = []
    size = lambda g: g.rows[0]["bytes"]  # noqa: E731
    smallest = 0
    for kind, g in sorted(((k, g) for (_, k), g in found.items() if g.rows), key=lambda model: size(model[1])):
        if size(g) > 1.05 * smallest:
            smallest = size(g)
            classes.append([])
        loss, se = mean_se([r["loss"] for r in g.rows])
        classes[-1].append((loss, se, COLORS[kind.split()[0]], f"{g.label}: {size(g) / 1e6:.2f} MB"))
    labels: list[str] = []
    for equal in classes:
        if labels:
            axes.axhline(len(labels) - 0.5, color="black", lw=0.8)
        for loss, se, color, label in sorted(equal):
            axes.errorbar(loss, len(labels), xerr=0 if math.isnan(se) else se, fmt="o", color=color, capsize=3)
            labels.append(label)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats per token)")
    axes.grid(alpha=0.25)


def models(s: Scale, rows: Sequence[Row]) -> dict[tuple[int, str], Group]:
    """{(experts, kind): its rows}."""
    found = {}
    for size in s.experts[1:]:
        name = s.size_name(size)
        for kind, stage, row in (
            ("bf16", name, "control"),
            ("Q4_0", grid_name(name, "q4_0"), "qat"),
            ("Q2_0", name, "qat"),
            *((f"{kind} {FIRST}", scratch_name(s, size, kind), "qat") for kind in FROM_FIRST_STEP),
        ):
            if any(r["stage"] == stage for r in rows):
                found[size, kind] = select(rows, f"{size} experts, {kind}", stage, row=row)
        for grid in ("q4_0", "q2_0"):
            stage = taught_name(name, grid)
            for kind, chosen in s.taught_kinds(grid).items() if any(r["stage"] == stage for r in rows) else ():
                full = f"{grid.upper()} {kind}"
                found[size, full] = select(rows, f"{size} experts, {full}", stage, **chosen)
    return found


def models_table(found: dict[tuple[int, str], Group]) -> str:
    """Every model with its size and loss."""
    lines = [["model", "config", "seeds", "parameters", "MB", "tokens", "loss", "minutes"]]
    for group in found.values():
        if not group.rows:
            lines.append([group.label, *[""] * (len(lines[0]) - 1)])
            continue
        first = group.rows[0]
        lines.append(
            [
                group.label,
                group.config,
                group.seeds,
                f"{first['parameters']:,}",
                f"{first['bytes'] / 1e6:.3f}",
                f"{first['tokens']:,}",
                with_se([r["loss"] for r in group.rows]),
                f"{mean_se([r['seconds'] / 60 for r in group.rows])[0]:.1f}",
            ]
        )
    return markdown(lines)


def pairs_table(s: Scale, found: dict[tuple[int, str], Group]) -> str:
    """Each pair: how much higher the loss of the larger model in fewer bits is, seed by seed."""
    lines = [["pair", "bytes of the second / first", "loss of the second minus the first", "wins of the second"]]
    _, n, middle, large = s.experts
    for small, big in ((n, middle), (middle, large)):
        for first, second in pairs_of(s):
            if not {(small, first), (big, second)} <= found.keys():
                continue
            a, b = found[small, first], found[big, second]
            pairs = by_seed(a, b)
            if not pairs:
                lines.append([f"{a.label}; {b.label}", "", "no seed has both", ""])
                continue
            gains = [y["loss"] - x["loss"] for x, y in pairs]
            lines.append(
                [
                    f"{a.label}; {b.label}",
                    f"{pairs[0][1]['bytes'] / pairs[0][0]['bytes']:.3f}",
                    with_se(gains),
                    f"{sum(g < 0 for g in gains)} of {len(gains)} seeds",
                ]
            )
    return markdown(lines)
