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
from launch.study import Report, Results, Stage, Study, beside
from launch.study_results import Row
from launch.study_tables import Group, by_seed, mean_se, numbers_of_seeds, select, with_interval, with_se
from qatmoe.text_table import markdown

FIRST = "from the first step"
PAIRS = [
    ("bf16", "bf16"),  # not of equal bytes: what twice the experts are worth in full precision
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
SAME_SIZE = [  # what is compared beside the same number of experts: the first minus the second
    ("Q4_0", "bf16"),
    ("Q2_0", "bf16"),
    ("Q2_0", "Q4_0"),
    *((f"{kind} {FIRST}", "bf16") for kind in FROM_FIRST_STEP),
    *((f"{kind} {FIRST}", kind) for kind in ("Q4_0", "Q2_0")),
    (f"Q4_0 dynamic {FIRST}", "Q4_0"),
    (f"Q4_0 dynamic {FIRST}", f"Q4_0 {FIRST}"),
    (f"ternary {FIRST}", f"Q2_0 {FIRST}"),
]
COLORS = {"bf16": "black", "Q4_0": "tab:blue", "Q2_0": "tab:red", "ternary": "tab:green"}


def get_study(scale: str, corpus: str) -> Study:
    """Trunks of N, 2N and 4N; Q4_0 of N and 2N, late and from the first step, there with learned and with dynamic
    scales; Q2_0 and ternary from the first step of 2N and 4N. The trunks make late Q2_0. Both late grids with a teacher
    too."""
    s = scales.on(scale, corpus).on_more_seeds("iso_memory")
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


def same_size_of(s: Scale) -> list[tuple[str, ...]]:
    """What is compared beside the same number of experts: two kinds, or two and from their difference that of two."""
    found: list[tuple[str, ...]] = [*SAME_SIZE]
    for grid in ("Q4_0", "Q2_0"):
        kinds = [f"{grid} {kind}" for kind in s.taught_kinds(grid.lower())]
        found += [(kind, other) for kind in kinds for other in ("bf16", grid)]
        found += [(later, kind) for kind, later in itertools.pairwise(kinds)]
    for kind in filter(s.taught_kinds("q4_0").__contains__, s.taught_kinds("q2_0")):
        two, four = f"Q2_0 {kind}", f"Q4_0 {kind}"
        found += [(two, four), (two, "Q2_0", four, "Q4_0")]
    return found


def report(results: Results) -> Report:
    """For each size: the models by bytes, each pair seed by seed, and models of the same size beside each other."""
    tables = {}
    figure = Figure(figsize=(9, 0.8 + 6 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        s = scales.get(scale)
        found = models(s, rows)
        tables[f"{scale}_models"] = models_table(found)
        tables[f"{scale}_pairs"] = pairs_table(s, found)
        if "iso_memory" in s.more_seeds:
            tables[f"{scale}_seeds"] = seeds_table(s, found)
        tables[f"{scale}_same_size"] = same_size_table(s, found)
        tables[f"{scale}_grids"] = grids_table(found)
        draw(axes, found)
        axes.set_title(f"{scale}: loss of models by bytes, {numbers_of_seeds(list(found.values()))}", fontsize=10)
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


def at_both_sizes(s: Scale, found: dict[tuple[int, str], Group]) -> dict[str, list[list[tuple[Row, Row]]]]:
    """{pair: for N of either size the rows of N and of 2N experts, for each seed that has both}."""
    _, n, middle, large = s.experts
    pairs = {}
    for first, second in pairs_of(s):
        groups = [(found.get((a, first)), found.get((b, second))) for a, b in ((n, middle), (middle, large))]
        pairs[f"{first}; {second}"] = [list(by_seed(a, b)) if a and b else [] for a, b in groups]
    return pairs


def above(rows: Sequence[tuple[Row, Row]]) -> dict[int, float]:
    """{seed: how much higher the loss of the larger model in fewer bits is}."""
    return {first["seed"]: second["loss"] - first["loss"] for first, second in rows}


def pairs_table(s: Scale, found: dict[tuple[int, str], Group]) -> str:
    """Each pair at both sizes: how much higher the second's loss is, and in how many seeds it is lower; and how much
    higher that is at the larger size."""
    loss = "loss of the second minus the first (95 % interval)"
    heads = [[f"{n} against {2 * n} experts: {loss}", "second lower in"] for n in s.experts[1:3]]
    lines = [["N experts; 2N experts", "bytes, second / first", *itertools.chain(*heads), "larger minus smaller N"]]
    for label, sizes in at_both_sizes(s, found).items():
        ratios = [f"{rows[0][1]['bytes'] / rows[0][0]['bytes']:.3f}" for rows in sizes if rows]
        cells, (smaller, larger) = [], map(above, sizes)
        for more in (smaller, larger):
            lower = f"{sum(m < 0 for m in more.values())} of {len(more)} seeds" if more else ""
            cells += [with_interval([*more.values()]), lower]
        moved = [larger[seed] - smaller[seed] for seed in larger if seed in smaller]
        lines.append([label, ", ".join(ratios), *cells, with_interval(moved)])
    return markdown(lines)


def seeds_table(s: Scale, found: dict[tuple[int, str], Group]) -> str:
    """Each pair's difference in the seeds that were run first and in those that were added, with standard errors."""
    heads = [f"{n} against {2 * n} experts, {which} seeds" for n in s.experts[1:3] for which in ("first", "added")]
    lines = [["N experts; 2N experts", *heads]]
    for label, sizes in at_both_sizes(s, found).items():
        parts = [
            [m for seed, m in above(rows).items() if (seed in s.seeds) == f] for rows in sizes for f in (True, False)
        ]
        lines.append([label, *map(with_se, parts)])
    return markdown(lines)


def same_size_table(s: Scale, found: dict[tuple[int, str], Group]) -> str:
    """How much higher one kind's loss is than another's of the same size, a column for each; kinds of no size not."""
    sizes = s.experts[1:]
    lines = [["loss (95 % interval)", *(f"{size} experts" for size in sizes)]]
    for kinds in same_size_of(s):
        here = [size for size in sizes if all((size, kind) in found for kind in kinds)]
        if here:
            of = {size: with_interval(between([found[size, kind] for kind in kinds])) for size in here}
            label = " minus ".join(kinds[:2]) if len(kinds) == 2 else "({} minus {}) minus ({} minus {})".format(*kinds)
            lines.append([label, *(of.get(size, "") for size in sizes)])
    return markdown(lines)


def between(groups: Sequence[Group]) -> list[float]:
    """Loss of the first minus the second, and from that the third's minus the fourth's: for each seed of all."""
    signs = (1, -1, -1, 1)
    return [sum(sign * row["loss"] for sign, row in zip(signs, rows, strict=False)) for rows in by_seed(*groups)]


def grids_table(found: dict[tuple[int, str], Group]) -> str:
    """How far a model is from the control of its size, its grid from its weights, its scales from where they began."""
    lines = [["model", "KLD to bf16 (95 % interval)", "weight error", "change of learned scales"]]
    for (_, kind), group in found.items():
        if kind != "bf16" and group.rows:
            health = [[r["health"].get(key) for r in group.rows] for key in ("weight_error", "scale_drift")]
            cells = [with_se([v for v in values if v is not None], ".3f") for values in health]
            lines.append([group.label, with_interval([r["kld"] for r in group.rows], ".4f"), *cells])
    return markdown(lines)
