"""The branches of late_qat_2bit: recipes, shares of the tokens, rates, and what may be in the way of less loss."""

from experiments import scales
from experiments.scales import DISTILL, FULL, QUANTIZE, RATE, TEACHER, Scale, experts_on, taught_by
from launch.algebra import Point, Points, chain, product, values
from launch.points import Sweep, runs_of
from launch.study import Stage, branches, folder_of, joined

PTQ = r"^control/(q2_0|ternary|q2_k|Q2_0|Q2_K|IQ2_XXS|IQ2_XS|IQ2_S)/"

CLIP, SIGNED = "quant.clip_gradient", "quant.signed"
BEST = "the best recipe"
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
ALIKE = "full precision, taught alike"
UNTAUGHT = "q2_0, learned scales, no teacher"
LONGEST: dict[str, Point] = {  # what else learns from the longest controls: what is changed of the best recipe
    f"{BEST}, all KL": {DISTILL: 1.0},
    ALIKE: {QUANTIZE: False},  # the one that is on the seeds that were added too
    UNTAUGHT: {DISTILL: None, TEACHER: None, RATE: None},  # None: not set
}


def recipes_of(s: Scale) -> dict[str, Points]:
    """The recipes whose blocks fit the size's rows."""
    return {name: points for name, points in RECIPES.items() if s.k_quants or "q2_k" not in name}


def stages(s: Scale) -> list[Stage]:
    """Trunks; recipes; shares of the tokens; rates; what is in the way.

    On more seeds are the config, the best recipe and, at the longest, the best recipe and full precision taught alike.
    """
    trunks, more = (size.trunks(f"^(trunk|control|qat)$|{PTQ}") for size in (s, s.on_more_seeds("late_qat_2bit")))
    shares = [
        {"init_from": f":trunk@{s.trunk_steps - steps}", "train.phases.trunk.steps": s.trunk_steps - steps}
        | scales.of_branch(steps)
        for steps in s.share_steps
    ]
    rates = [{f"train.phases.{phase}.lr": rate for phase in ("control", "qat")} for rate in s.rates]
    scale_rates = values("optim.scale_lr", s.scale_rates)
    first_seed = {"train.seed": s.seeds[0]}
    return [
        more,
        branches(trunks, f"{s.name}_recipes", s.branch, chain(*recipes_of(s).values())),
        branches(trunks, f"{s.name}_shares", s.config, shares, judged="^(control|qat)$|^control/q2_0/search$"),
        branches(trunks, f"{s.name}_rates", s.config, rates, judged="^(control|qat)$", at=first_seed),
        branches(trunks, f"{s.name}_scale_rates", s.branch, scale_rates, at=first_seed),
        *(followed_on(s, trunks, more) if s.followed else []),
        *s.with_teacher(trunks, FULL),
        *in_the_way(s, trunks, more),
    ]


def followed_on(s: Scale, trunks: Stage, more: Stage) -> list[Stage]:
    """The rates that the search led to, and on the seeds that were added the best recipe among them."""
    name, points = f"{s.name}_followed", product(chain(*TAUGHT.values()), s.followed)
    best = (branches(more, name, s.branch, [best_of(s)], at=seed) for seed in added_seeds(s))
    return [joined(branches(trunks, name, s.branch, points), *best)]


def added_seeds(s: Scale) -> Points:
    """What the trunks of the seeds are selected by that not all branches are on."""
    return [{"train.seed": seed} for seed in s.more_seeds.get("late_qat_2bit", ())]


def in_the_way(s: Scale, trunks: Stage, more: Stage) -> list[Stage]:
    """How far full precision ends from itself, on the same text in another order; and what the best recipe's distance
    may come of, where there is one: noise of its last steps, its rate, and too few steps for it and its control. The
    longest of that is on the seeds that were added too."""
    of_seed = ({QUANTIZE: False, "train.seed": OTHER_ORDER + seed} for seed in s.seeds)
    at = ({"train.seed": seed} for seed in s.seeds)
    other = f"{s.name}_other_batches"
    found = [joined(*(branches(trunks, other, s.branch, [p], at=a) for p, a in zip(of_seed, at, strict=True)))]
    if s.longer:
        name, points = f"{s.name}_longer", product(list(s.longer.values()), [best_of(s) | {TEACHER: "control"}])
        which = f"^(control|qat)$|{PTQ}"
        most = (branches(more, name, s.config, points[-1:], judged=which, at=seed) for seed in added_seeds(s))
        longer = joined(branches(trunks, name, s.config, points, judged=which), *most)
        changed = branches(trunks, f"{s.name}_in_the_way", s.branch, list(obstacles(s).values()))
        found += [changed, longer, longest(s, longer)]
    return found


def best_of(s: Scale) -> Point:
    """What the best recipe sets."""
    (best,) = s.taught["q2_0"]
    return best


def obstacles(s: Scale) -> dict[str, Point]:
    """What is changed of the best recipe to see what its distance comes of, in as many steps."""
    best = best_of(s)
    return {
        f"{BEST}, average of the weights": best | {"optim.ema": 0.99},
        f"full precision, rate {best[RATE]:g}, no teacher": {QUANTIZE: False, RATE: best[RATE]},
    }


def without_control(point: Point) -> Point:
    """The point without the settings of a control, which the branch does not train."""
    return {key: value for key, value in point.items() if "phases.control" not in key}


def longest(s: Scale, longer: Stage) -> Stage:
    """Branches as long as the longest, that learn from the controls of those."""
    *_, at = s.longer.values()
    runs = [run for run in runs_of(longer.sweep, folder_of(longer.sweep)) if at.items() <= run.overrides.items()]
    points, controls = [], []
    for name, changed in LONGEST.items():
        for run in runs:
            if name != ALIKE and run.overrides["train.seed"] not in s.seeds:
                continue
            controls.append(f"{run.folder}:control")
            point = without_control(run.overrides) | {TEACHER: controls[-1]} | changed
            points.append({key: value for key, value in point.items() if value is not None})
    return Stage(Sweep(f"{s.name}_longest", s.branch, points), references=tuple(controls))
