"""Runs a study: trunks, branches from them, an audit of every branch, and one table of results.

    python -m launch.study experiments/late_qat_2bit/study.py --slots 2              trains and judges what is missing
    python -m launch.study experiments/late_qat_2bit/study.py --dry_run              its runs, how far they are
    python -m launch.study experiments/late_qat_2bit/study.py --report               tables and figure from the results
    python -m launch.study experiments/late_qat_2bit/study.py --only 'trunks/.*seed=0'     a part of the runs

Run it from the repository's root. `--scale NAME` chooses the size; what else is given (--slots, --backend, --option,
...) goes to launch.sweep. A study file is Python with two functions, get_study(scale, corpus) -> Study and
report(results) -> Report.

Runs lie under runs/SWEEP, and a study that shares a sweep with another one shares its runs. Results are written beside
the study file as SCALE.json, after every run that is judged, one line for every branch; README.md and figure.png are
made from all of them.
Where runs fail for good (a loss that is not finite), --partial judges the others; tables name those that failed.

On a machine that is lent for a while a study can be run in parts: `--only PATTERN` trains and judges the runs in whose
folders (runs/SWEEP/NAME) a regular expression is found, and keeps what SCALE.json has of the others, whose folders need
not be there; `--judge` trains nothing and judges what is finished.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch import local, points, sweep
from launch.algebra import Point, Points, chain, product
from launch.points import Run, Sweep
from launch.study_results import (
    NO_CHECKPOINT,
    NO_CONTROL,
    NOT_RUN,
    OTHER_TRUNK,
    UNFINISHED_CONTROL,
    Row,
    enter,
    has_figures,
    known,
    read_results,
)
from qatmoe import audit, cli, evaluate, metrics
from qatmoe.checkpoint import Checkpoints, DamagedCheckpoint
from qatmoe.convert import llama
from qatmoe.convert.weights import NotFinite
from qatmoe.errors import UserError
from qatmoe.initial import source_of
from qatmoe.mesh import local_mesh
from qatmoe.phases import finished as phase_finished
from qatmoe.report import fill_tables
from qatmoe.run import Interrupted, Stop

Results = dict[str, list[Row]]  # scale -> rows

FIGURES = ("loss", "bits_per_byte", "kld", "kld_p99", "same_top1", "expert_agreement")
HEALTH = ("flip_rate", "flipped", "weight_error", "scale_drift")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sweep, and what is judged of its runs.

    judged: a regular expression of rows of `qatmoe.evaluate`.
    references: RUN:PHASE for each point of the sweep, or () where each run is compared with its own control.
    """

    sweep: Sweep
    judged: str = "^qat$"
    references: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained, in this order, and the text that it is judged on."""

    stages: Sequence[Stage]
    tokens: int = evaluate.TOKENS  # of each domain
    texts: tuple[str, ...] = ()  # NAME=PATH: domains besides the run's own held-out text
    needs_llama: bool = False  # llama.cpp's own types are judged, which llama-cpp-python rounds to


@dataclasses.dataclass(frozen=True)
class Report:
    """What README.md gets between its markers, and the figure."""

    tables: dict[str, str]
    figure: Figure


def folder_of(asked: Sweep) -> Path:
    """Where a sweep's runs lie, from the repository's root."""
    return Path("runs") / asked.name


# ---- Stages ----------------------------------------------------------------------------------------------------------


def branches(
    trunks: Stage,
    name: str,
    config: str,
    variants: Points,
    *,
    judged: str = "^qat$",
    at: Point | None = None,
) -> Stage:
    """Every variant from every trunk. Compared with the trunk's own control, or the variant's where it trains one.

    Args:
      trunks: runs with a phase `trunk` and, unless the branches train one, `control`.
      config: of a branch; its first phase is `trunk`.
      variants: what is set in each branch. "init_from" in one is added to the trunk's folder, as ":trunk@720".
      at: settings of the trunks to branch from; all of them unless given.
    """
    runs = [run for run in _runs(trunks) if not at or at.items() <= run.overrides.items()]
    starts = [
        [_of_trunk(run) | variant | {"init_from": f"{run.folder}{variant.get('init_from', '')}"} for run in runs]
        for variant in variants
    ]
    found = Sweep(name, config, chain(*starts))
    own = "control" in _runs(Stage(found))[0].config.train.phases
    controls = tuple(f"{run.folder}:control" for run in runs) * len(variants)
    return Stage(found, judged, () if own else controls)


def beside(trunks: Stage, name: str, config: str, variants: Points, *, judged: str = "^qat$") -> Stage:
    """As `branches`, but from random weights, with each trunk's settings and compared with its control."""
    runs = _runs(trunks)
    found = Sweep(name, config, product(variants, [_of_trunk(run) for run in runs]))
    return Stage(found, judged, tuple(f"{run.folder}:control" for run in runs) * len(variants))


def _of_trunk(run: Run) -> Point:
    """What is set in a trunk's branches too: they keep their last checkpoint alone."""
    return _without_saving(run.overrides) | {"train.keep": 1}


def _without_saving(settings: Point) -> Point:
    """Without those that say which checkpoints stay, and nothing about what is computed."""
    return {key: value for key, value in settings.items() if key != "train.keep" and not key.endswith(".save_at")}


def joined(*stages: Stage) -> Stage:
    """Stages of one name as one stage."""
    first = stages[0]
    points = chain(*(stage.sweep.points for stage in stages))
    references = tuple(reference for stage in stages for reference in stage.references)
    return dataclasses.replace(first, sweep=dataclasses.replace(first.sweep, points=points), references=references)


# ---- Training --------------------------------------------------------------------------------------------------------


def train(study: Study, options: argparse.Namespace, only: str = "", partial: bool = False) -> int:
    """Trains what is not finished: first what needs no other run, then what starts or learns from that, ...

    On this machine the runs of each round stand in one queue. Another backend is given sweep after sweep, and what
    starts from runs that are not finished yet is left for the next time.

    Args:
      options: of launch.sweep.
      only: a regular expression that is found in the folders of the runs that are wanted; another backend takes "".
      partial: where runs fail, what starts from the others is trained all the same.

    Returns:
      The exit code: 0 all done, 1 some runs failed or are not finished, 130 or 143 stopped by SIGINT or SIGTERM.
    """
    rounds = _rounds(study.stages)
    if options.dry_run:
        every = [(stage.sweep, _runs(stage)) for stage in itertools.chain(*rounds)]
        for asked, runs in every:
            sweep.check(options, asked, runs)
        wanted = [(asked.name, [run for run in runs if _matches(run, only)]) for asked, runs in every]
        for name, runs in wanted:
            print(f"{name}\n{sweep.describe(runs)}")
        runs = [run for _, some in wanted for run in some]
        print(f"{len(runs)} runs, {sum(map(_tokens, runs)):,} tokens")
        return 0
    worst = 0
    own = {run.folder for stage in study.stages for run in _runs(stage)}
    for stages in rounds:
        code = _train_stages(stages, options, only, own)
        unfinished = [run for stage in stages for run in _runs(stage, only) if not points.finished(run.folder)]
        if code or unfinished:
            print(f"{len(unfinished)} runs are not finished. The same command continues.", file=sys.stderr)
            _name_missing(unfinished, own, only)
            worst = max(worst, code or 1)
            if worst > 1 or not partial:
                break
    return worst


def _tokens(run: Run) -> int:
    """Tokens that a run trains on; the phase that it starts from is not trained again."""
    phases = list(run.config.train.phases.values())[1 if run.config.init_from else 0 :]
    return sum(phase.steps for phase in phases) * run.config.train.batch_size * run.config.data.seq_len


def _train_stages(stages: Sequence[Stage], options: argparse.Namespace, only: str, own: set[Path]) -> int:
    if options.backend != "local":
        can_start = functools.partial(_can_start, own=own)
        return max((sweep.launch(options, s.sweep, folder_of(s.sweep), can_start) for s in stages), default=0)
    places = local.slots(1 if options.slots is None else options.slots)
    for stage in stages:
        points.check_folder(stage.sweep, folder_of(stage.sweep))
    todo = []
    for stage in stages:
        runs = _runs(stage)
        if wanted := [run for run in runs if _matches(run, only)]:
            entered = sweep.enter(stage.sweep, runs, folder_of(stage.sweep), wanted)
            todo += [run for run in entered if _can_start(run, own)]
    restarts = sweep.RESTARTS if options.restarts is None else options.restarts
    return sweep.run_locally(todo, places, restarts) if todo else 0


def _rounds(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages in the order of training: those of a round start and learn from runs of earlier rounds alone.

    Raises:
      UserError: stages wait for each other, or one for itself.
    """
    folders = [{run.folder for run in _runs(stage)} for stage in stages]
    needed = [set().union(*(_needed(run) for run in _runs(stage))) for stage in stages]
    found: list[list[Stage]] = []
    left = list(range(len(stages)))
    while left:
        ahead = set().union(*(folders[i] for i in left))
        now = [i for i in left if not needed[i] & ahead]
        if not now:
            names = ", ".join(stages[i].sweep.name for i in left)
            raise UserError(f"{names}: each waits for runs of these; give a stage of its own to what others start from")
        found.append([stages[i] for i in now])
        left = [i for i in left if i not in now]
    return found


def _needed(run: Run) -> set[Path]:
    """The folders of the runs that it starts and learns from."""
    teachers = [phase.teacher.rpartition(":")[0] for phase in run.config.train.phases.values()]
    return {Path(folder) for folder in (source_of(run.config)[0], *teachers) if folder}


def _can_start(run: Run, own: set[Path]) -> bool:
    """Whether the runs that it starts and learns from are finished, those of the study's own, whose folders are given.

    What is not, such as an imported model, is there or is refused when the run is started.
    """
    return all(points.finished(folder) for folder in _needed(run) & own)


def _name_missing(unfinished: Sequence[Run], own: set[Path], only: str) -> None:
    """Says which runs of the study, not among those asked for, others start or learn from, and are not finished."""
    needed = set().union(*(_needed(run) for run in unfinished)) & own
    missing = sorted(str(f) for f in needed if not points.finished(f) and not re.search(only, str(f)))
    if missing:
        print(f"They start or learn from {', '.join(missing)}, which --only {only} leaves out.", file=sys.stderr)


def _runs(stage: Stage, only: str = "") -> list[Run]:
    return [run for run in points.runs_of(stage.sweep, folder_of(stage.sweep)) if _matches(run, only)]


def _matches(run: Run, only: str) -> bool:
    return bool(re.search(only, str(run.folder)))


# ---- Judging ---------------------------------------------------------------------------------------------------------


def judge(
    study: Study,
    stage: Stage,
    partial: bool = False,
    check: Callable[[str], None] = lambda _: None,
    only: str = "",
) -> Iterator[tuple[Run, list[Row], str]]:
    """Audits the runs of a stage, where that was not done before: yields each, and its rows or why it has none.

    Args:
      partial: that a run or its control is not finished is the reason that it has no rows, instead of an error.
      check: called between audits' rows; may raise to stop.
      only: a regular expression; runs in whose folders it is not found are left out.

    Raises:
      UserError: a run is not finished, or was trained on another number of tokens than its control.
    """
    runs = _runs(stage)
    for run, reference in zip(runs, stage.references or ("",) * len(runs), strict=True):
        if not _matches(run, only):
            continue
        reference = reference or f"{run.folder}:control"
        reason = _unfinished(run, reference)
        if reason in (NO_CONTROL, NO_CHECKPOINT) and not partial:
            which = f" ({reference})" if reason == NO_CONTROL else ""
            raise UserError(f"{run.folder}: {reason} here{which}: bring it back, or pass the run over with --judge")
        if reason == OTHER_TRUNK and not partial:
            raise UserError(
                f"{run.folder}: {reason}: delete its folder to train it again, or pass it over with --judge"
            )
        if reason and not partial:
            raise UserError(f"{run.folder} is not finished ({reason}): give the same command again")
        if reason:
            print(f"{run.folder}: passed over, {reason}")
        yield run, [] if reason else _judge_run(study, stage, run, reference, check), reason


def _unfinished(run: Run, reference: str) -> str:
    """Why a run cannot be judged against RUN:PHASE yet; "" where it can."""
    if not points.finished(run.folder):
        state = points.state_of(run.folder)
        return NOT_RUN if state.kind == "missing" else state.text
    control, _, phase = reference.rpartition(":")
    if not phase_finished(Path(control), phase):
        gone = points.state_of(Path(control)).kind in ("missing", "done")
        return NO_CONTROL if gone else UNFINISHED_CONTROL
    starts = {phase.start for phase in run.config.train.phases.values()}
    ends = [name for name in run.config.train.phases if name not in starts]
    if not all(phase_finished(run.folder, name) for name in ends):
        return NO_CHECKPOINT
    return OTHER_TRUNK if _other_trunk(run, Path(control)) else ""


def _other_trunk(run: Run, control: Path) -> bool:
    """Whether a run began with other weights than its control did, whose run has been trained again since.

    Each has a copy of what it began with; where one of them is gone or damaged, nothing is known.
    """
    folder, phase, step = source_of(run.config)
    first = next(iter(run.config.train.phases))
    if not folder or Path(folder) != control:
        return False
    with Checkpoints(run.folder, first) as own, Checkpoints(control, phase or first) as source:
        begun, there = own.latest(), int(step) if step else source.latest()
        if begun is None or there not in source.steps():
            return False
        try:
            ours, theirs = own.meta(begun), source.meta(there)
        except DamagedCheckpoint:
            return False
        names = [name for name in ours["tensors"] if name.startswith("params/model/")]
        if not theirs["tensors"].keys() >= set(names):  # another layout: an import
            return False
        pairs = ((own.read(ours, [name])[name], source.read(theirs, [name])[name]) for name in names)
        return any(one.tobytes() != other.tobytes() for one, other in pairs)


def _judge_run(study: Study, stage: Stage, run: Run, reference: str, check: Callable[[str], None]) -> list[Row]:
    found, notes = audit.open_run(run.folder, reference)
    wanted = audit.choose(found, stage.judged)
    ref = found.reference
    for phase in {row.branch for row in wanted} - {"trunk"}:
        if found.trained_tokens[phase] != ref.trained_tokens:
            raise UserError(
                f"{run.folder}: {phase} was trained on {found.trained_tokens[phase]:,} tokens and {reference} on "
                f"{ref.trained_tokens:,}: give both the same number of steps"
            )
    texts, calibration_ML = evaluate.load_domains(found, study.texts, study.tokens)
    print("\n".join([f"{run.folder} against {reference}", *notes]), flush=True)

    def rows_of(some: list[audit.Row]) -> list[Row]:
        done = evaluate.evaluate(found, local_mesh(), some, texts, calibration_ML, False, check)
        names = {row.name for row in some}
        return [_row(stage, run, reference, row) for row in done if row["row"] in names]

    def judged(some: list[audit.Row]) -> list[Row]:
        """Where a branch or its control diverged, all the same those of the others."""
        branches = dict.fromkeys(row.branch for row in some)
        try:
            return rows_of(some)
        except NotFinite as e:
            if len(branches) == 1:
                print(f"{run.folder}: {e}")
                return [_identity(stage, run) | {"row": row.name, "failed": e.fault} for row in some]
        return [row for name in branches for row in judged([r for r in some if r.branch == name])]

    return judged(wanted)


def _identity(stage: Stage, run: Run) -> Row:
    """What says which run a row is of. The folders that it starts from follow from the rest."""
    return {
        "stage": stage.sweep.name,
        "config": stage.sweep.config,
        "overrides": {key: value for key, value in _without_saving(run.overrides).items() if key != "init_from"},
        "seed": run.config.train.seed,
        "run": str(run.folder),
    }


def _row(stage: Stage, run: Run, reference: str, judged: Row) -> Row:
    """What is kept of a judged branch: what it is, its figures, what its quantizer did, what it took."""
    branch = judged["branch"]
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    totals = json.loads((run.folder / "plan.json").read_text(encoding="utf-8"))["totals"]
    records = [r for r in metrics.read(run.folder) if r["phase"] == branch]
    health = [r for r in records if r["split"] == "health"]
    trained = [r for r in records if r["split"] == "train"]
    if judged["loss"] is None:
        return _identity(stage, run) | {"row": judged["row"], "failed": "its loss is not finite"}
    deployed = totals["bytes_total"] if run.config.train.phases[branch].quantize else totals["bytes_bf16"]
    return _identity(stage, run) | {
        "row": judged["row"],
        "branch": branch,
        "reference": reference,
        "format": judged["format"],
        "rule": judged["rule"],
        "bits_per_weight": judged["bits_per_weight"],
        "joined_rows": judged["joined_rows"],
        "parameters": totals["params_total"],
        "quantized": totals["params_quantized"],
        "bytes": None if judged["rule"] else deployed,
        "tokens": judged["trained_tokens"],
        "steps": judged["step"],
        "loss_above": judged["loss_above"],
        **{key: judged[key] for name in FIGURES for key in (name, f"{name}_se")},
        "drafts": (judged["mtp_acceptance"] or [None])[0],
        "domains": {
            name: {figure: scope[figure] for figure in ("loss", "bits_per_byte", "kld")}
            for name, scope in judged["domains"].items()
        },
        "health": {name: _plain(health[-1].get(name)) for name in HEALTH} if health else {},
        "dropped": trained[-1]["moe/dropped"] if trained else None,
        "seconds": round(metrics.training_seconds(trained), 1),
        "device": summary["device"],
        "jax": summary["jax"],
    }


def _plain(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


# ---- The command -----------------------------------------------------------------------------------------------------


def load(file: str) -> dict[str, Any]:
    """The functions of a study file. Raises UserError where there is none, it fails, or one is missing."""
    return points.functions_of(f"study {file}", file, ["get_study", "report"], "experiments/late_qat_2bit/study.py")


def _check(args: argparse.Namespace, options: argparse.Namespace, study: Study) -> None:
    """Raises UserError for what cannot be done, before anything is started."""
    if study.needs_llama and not llama.installed():
        raise UserError(f"study {args.file}: judges llama.cpp's types: pip install -e '.[deploy]'")
    try:
        re.compile(args.only)
    except re.error as e:
        raise UserError(f"--only {args.only}: not a regular expression: {e}") from e
    if args.only and options.backend != "local":
        raise UserError(f"--only {args.only}: belongs to the local backend; {options.backend} is given whole sweeps")
    if args.only and not any(_runs(stage, args.only) for stage in study.stages):
        raise UserError(f"--only {args.only}: found in no run's folder; --dry_run without it lists them")


def judge_all(study: Study, file: Path, partial: bool, check: Callable[[str], None], only: str = "") -> None:
    """Judges every stage and writes SCALE.json, after each run too: an end before the last one loses no other's rows.

    Runs that are not asked for, or that are not there or have no control there, keep the rows that the file has of
    them. Arguments and errors as `judge` has them.
    """
    every = {(s.sweep.name, str(run.folder)): _identity(s, run) for s in study.stages for run in _runs(s)}
    lost = {run for (stage, run), rows in known(file, every).items() if (stage, run) not in every if has_figures(rows)}
    if lost:
        print(f"{file}: rows of {len(lost)} runs that the study no longer has are left out: {', '.join(sorted(lost))}")
    for stage in study.stages:
        for run, rows, reason in judge(study, stage, partial, check, only):
            own = (stage.sweep.name, str(run.folder))
            enter(file, every, own, rows or [every[own] | {"failed": reason}])
    enter(file, every)


def report(file: str, make: Callable[[Results], Report]) -> None:
    """README.md's tables and figure.png from every SCALE.json beside a study file.

    Raises:
      UserError: there are no results, they are damaged or lack a row, or README.md lacks a table's markers.
    """
    folder = Path(file).parent
    results = {found.stem: read_results(found) for found in sorted(folder.glob("*.json"))}
    if not results:
        raise UserError(f"{folder} has no results yet: run the study without --report")
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder}/README.md: no such file; it needs lines `<!-- NAME: command -->` and `<!-- end -->`")
    made = points.called(f"study {file}", lambda: make(results))
    fill_tables(folder / "README.md", made.tables)
    made.figure.savefig(folder / "figure.png", dpi=110)
    print(f"{folder}/README.md  {folder}/figure.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 runs failed or are not finished, 2 unusable input, 130 or 143 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the study: a Python file with get_study() and report()")
    parser.add_argument("--scale", default="small", help="size of the models (%(default)s)")
    parser.add_argument("--corpus", default="", help="folder of text, for a size that needs one")
    parser.add_argument("--report", action="store_true", help="only make tables and figure from the results")
    parser.add_argument("--partial", action="store_true", help="judge what is finished, also where runs failed")
    parser.add_argument("--judge", action="store_true", help="train nothing, and judge what is finished")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the runs, those whose folder it is found in")
    args, rest = parser.parse_known_args(argv)
    try:
        functions = load(args.file)
        options = sweep.parse([args.file, *rest])
        if options.dir:
            raise UserError(f"--dir {options.dir}: the runs of a study lie under runs/, where other studies find them")
        if not args.report:
            study: Study = points.called(f"study {args.file}", lambda: functions["get_study"](args.scale, args.corpus))
            _check(args, options, study)
            code = 0 if args.judge else train(study, options, args.only, args.partial)
            if options.dry_run or (code and not (args.partial and code == 1)):
                return code
            file = Path(args.file).parent / f"{args.scale}.json"
            # The audits take what they need; not so the runs, which have the GPU to themselves (launch/local.py).
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            with Stop() as stop:
                judge_all(study, file, args.partial or args.judge, stop.check, args.only)
        report(args.file, functions["report"])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except Interrupted as e:
        print(f"{e}. The same command continues.", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
