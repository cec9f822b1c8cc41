"""In the same memory: a 2-bit model of 2N routed parameters, or a 4-bit one of N?

    python -m launch.study experiments/iso_memory/study.py --slots 2

The models of a pair differ in the number of experts alone, so both train the same number of weights for a token: equal
training tokens are equal training FLOPs too, but for the router and the optimizer. They have no MTP module.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import scales
from experiments.scales import Scale, experts_on, grid_name
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
    scales; Q2_0 and ternary from the first step of 2N and 4N. The trunks make late Q2_0."""
    s = scales.on(scale, corpus)
    n, middle, large = s.experts[1:]
    trunks = {size: s.size(size, "^(control|qat)$") for size in (n, middle, large)}
    first = [(size, "ternary") for size in (middle, large)]
    first += [(size, "Q4_0") for size in (n, middle)] + [(size, "Q2_0") for size in (middle, large)]
    first += [(size, "Q4_0 dynamic") for size in (n, middle)]
    return s.study(
        *trunks.values(),
        *(s.on_grid(trunks[size], "q4_0") for size in (n, middle)),
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


def report(results: Results) -> Report:
    """For each size: the models by bytes, and each pair seed by seed."""
    tables = {}
    figure = Figure(figsize=(7, 0.5 + 4 * len(results)), layout="constrained")
    for (scale, rows), axes in zip(results.items(), figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        s = scales.get(scale)
        found = models(s, rows)
        tables[f"{scale}_models"] = models_table(found)
        tables[f"{scale}_pairs"] = pairs_table(s, found)
        for kind in dict.fromkeys(kind for _, kind in found):
            drawn = [(size, g) for (size, k), g in found.items() if k == kind and g.rows]
            if not drawn:
                continue
            y, se = zip(*(mean_se([r["loss"] for r in g.rows]) for _, g in drawn), strict=True)
            x = [g.rows[0]["bytes"] / 1e6 for _, g in drawn]
            style = ":" if "dynamic" in kind else "--" if FIRST in kind else "-"
            axes.errorbar(x, y, se, marker="o", ls=style, capsize=3, color=COLORS[kind.split()[0]], label=kind)
            for (size, _), a, b in zip(drawn, x, y, strict=True):
                axes.annotate(f"{size} experts", (a, b), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlabel("whole model, MB (log scale)")
        axes.set_ylabel("validation loss (nats per token)")
        axes.set_title(f"{scale}: loss by bytes, {len(s.seeds)} seeds", fontsize=10)
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return Report(tables, figure)


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
        for first, second in PAIRS:
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
