"""Scores of a run's branches on tasks of lm-evaluation-harness.

    python -m qatmoe.tasks --run runs/moe_2bit --branch control qat
    python -m qatmoe.tasks --run runs/qwen3_qat --tasks hellaswag,arc_easy --limit 500 --num_fewshot 5

Two tasks are made from the bundled held-out novel and need no download: cloze (which of four sentences comes next;
chance is 25 %) and novel (rolling perplexity). All others are the harness's own, which loads their data sets from the
Hugging Face hub. Weights are those that are deployed: on the grid if the phase quantizes. Needs the extra `eval`.
It takes all devices that it sees, in one process, and splits weights and texts over them.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from qatmoe import cli
from qatmoe.checkpoint import Checkpoints
from qatmoe.convert.weights import Branch
from qatmoe.data import cloze
from qatmoe.errors import UserError
from qatmoe.files import check_place, is_there, write_atomically
from qatmoe.mesh import local_mesh
from qatmoe.model import attention
from qatmoe.text_table import aligned

Row = dict[str, Any]

# Metrics that are functions of the log-likelihood of all documents over their words or bytes, a = -sum(l) / sum(n).
_RATIOS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {  # value, and its derivative
    "word_perplexity": (math.exp, math.exp),
    "byte_perplexity": (math.exp, math.exp),
    "bits_per_byte": (lambda a: a / math.log(2), lambda a: 1 / math.log(2)),
}
TRAINED_AGAIN = "trained again"  # for a digest, where a phase has earlier steps alone
_PAIR = ("against", "difference", "difference_stderr")  # what a row has of a pair of branches
NOTE = (
    "±: standard error over documents; difference: to the first branch, its error from pairs of the same document. "
    "Models of a million parameters score near chance on all but perplexity."
)


@contextlib.contextmanager
def opened(tasks: Sequence[str]) -> Iterator[Any]:
    """The harness's index of tasks (`lm_eval.tasks.TaskManager`), the bundled ones among them.

    Raises:
      UserError: lm-eval is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError(f"qatmoe.tasks needs lm-evaluation-harness ({e}): pip install -e '.[eval]'") from e
    with tempfile.TemporaryDirectory(prefix="qatmoe_tasks_") as folder:
        cloze.write(Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=not set(tasks) <= set(cloze.NAMES))
        _check_known(tasks, manager.all_tasks)
        yield manager


def evaluate(
    model: Any, tasks: Sequence[str], manager: Any, limit: int | None = None, num_fewshot: int | None = None
) -> list[Row]:
    """Runs tasks of an index on a `harness.Model`, on the first `limit` documents of each.

    Args:
      num_fewshot: solved examples before each question; None leaves it to the tasks. Those that fix it at 0 keep that.

    Returns:
      One row per task and metric: task, metric, value, stderr (None: unknown), documents, shots (None where it is not
      known, as of a group whose tasks differ), influence. The last is the part that each document has in the error of
      the value, (documents,) f64, so that stderr is the root of the sum of its squares; None for metrics that are no
      mean or ratio over documents.

    Raises:
      UserError: a data set that cannot be loaded, or a task with too few solved examples.
    """
    import lm_eval

    options = {"task_manager": manager, "limit": limit, "num_fewshot": num_fewshot, "bootstrap_iters": 0}
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), **options)
    except OSError as e:  # what data sets that cannot be reached raise
        raise UserError(f"--tasks {','.join(tasks)}: a data set cannot be loaded: {' '.join(str(e).split())}") from e
    except (AssertionError, ValueError) as e:  # what the harness's samplers of solved examples raise
        modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(e.__traceback__)]
        if "lm_eval.api.samplers" not in modules:
            raise
        number = "" if num_fewshot is None else f" {num_fewshot}"
        raise UserError(
            f"--num_fewshot{number}: of --tasks {','.join(tasks)} one has not so many solved examples beside the "
            f"question ({' '.join(str(e).split())}); give fewer"
        ) from e
    return [row for task in found["results"] for row in _rows(task, found)]


def _rows(task: str, found: dict[str, Any]) -> list[Row]:
    """The metrics of a task, or of a group of them."""
    rows = []
    samples = found["samples"].get(task, [])
    for key, value in found["results"][task].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        per_document = [s[metric] for s in samples if s.get("filter", filtered) == filtered and metric in s]
        influence = _influence(metric, value, per_document)
        stderr = found["results"][task].get(f"{metric}_stderr,{filtered}")
        if influence is not None:
            stderr = math.sqrt(np.sum(influence**2))
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        number = stderr if isinstance(stderr, int | float) else None
        documents = len(per_document) or found["n-samples"].get(task, {}).get("effective")
        rows.append(
            {"task": task, "metric": name, "value": float(value), "stderr": number, "documents": documents}
            | {"shots": found["n-shot"].get(task), "influence": influence}
        )
    return rows


def _influence(metric: str, value: float, per_document: Sequence[Any]) -> np.ndarray | None:
    """Of each document on the value: for a mean (x - mean) / sqrt(n (n - 1)), for a ratio its linearization alike."""
    n = len(per_document)
    if n < 2:
        return None
    if metric in _RATIOS:
        nats, size = -np.array([p[0] for p in per_document]), np.array([p[1] for p in per_document], np.float64)
        ratio = nats.sum() / size.sum()
        return _RATIOS[metric][1](ratio) * (nats - ratio * size) / size.sum() * math.sqrt(n / (n - 1))
    if all(isinstance(p, bool | int | float) for p in per_document):
        values = np.array(per_document, np.float64)
        if math.isclose(values.mean(), value, abs_tol=1e-12):  # and not some other function of them
            return (values - values.mean()) / math.sqrt(n * (n - 1))
    return None


def compare(first: Row, other: Row) -> tuple[float, float | None]:
    """The difference of a metric between two models, and its standard error over pairs of the same document."""
    difference = other["value"] - first["value"]
    a, b = first["influence"], other["influence"]
    if a is None or b is None or len(a) != len(b):
        return difference, None
    return difference, math.sqrt(np.sum((b - a) ** 2))


def _check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them"
            raise UserError(f"--tasks {task!r}: the harness has no such task; {hint} Bundled: {', '.join(cloze.NAMES)}")


# ---- the command -----------------------------------------------------------------------------------------------------


def table(branches: dict[str, list[Row]]) -> str:
    """Tasks x branches with their standard errors, for the terminal."""
    first, *others = branches
    cells = [["task", "metric", "documents", *branches, *(f"{name} - {first}" for name in others)]]
    for i, row in enumerate(branches[first]):
        same = [rows[i] for rows in branches.values()]
        numbers = [_number(r["value"], r["stderr"]) for r in same]
        differences = [_number(*compare(row, r), sign="+") for r in same[1:]]
        cells.append([row["task"], row["metric"], str(row["documents"] or ""), *numbers, *differences])
    return "\n".join(aligned(cells, 2))


def _number(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ±{stderr:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, writes tasks.json. Exit codes: 0 done, 2 unusable input."""
    args = _parser().parse_args(argv)
    branches: dict[str, list[Row]] = {}
    checkpoints: dict[str, Row] = {}
    lost: set[tuple[str, str]] = set()
    out = _out(args)
    try:
        tasks = list(dict.fromkeys(task for task in args.tasks.split(",") if task))
        _check(args, tasks)
        mesh = local_mesh()
        with opened(tasks) as manager:
            settings = _settings(args, tasks)
            said = _say(out, _kept(out, settings, args.run).other, "")
            for name in args.branch or [""]:
                phase, checkpoints[phase], branches[phase] = _measured(args, name, tasks, manager, mesh)
                # After every branch: one may take hours. The file may have got other branches meanwhile.
                kept = _kept(out, settings, args.run)
                said = _say(out, kept.other, said)
                rows = _report(branches, checkpoints, kept.rows)
                lost = (lost | kept.pairs) - _pairs(rows)
                write_atomically(out, json.dumps(settings | {"rows": rows}, indent=1) + "\n")
        print(table(branches))
    except UserError as e:
        if branches:
            print(table(branches))
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(*([f"{out} has {', '.join(branches)}"] if branches else [])) from e
    finally:
        if lost:
            of = ", ".join(f"{name} to {base}" for name, base in sorted(lost))
            with contextlib.suppress(OSError):  # Ctrl-C may have ended its reader
                print(f"warning: {out} has lost differences of {of}: give these in one call", file=sys.stderr)
    print(f"\n{NOTE}\n{out}")
    return 0


def _measured(
    args: argparse.Namespace, name: str, tasks: Sequence[str], manager: Any, mesh: Mesh
) -> tuple[str, Row, list[Row]]:
    """The phase of a branch, what its rows say of its checkpoint, and its rows."""
    from qatmoe.harness import Model

    with Branch(args.run, name, rest="F32") as branch:
        # Rows are of other lengths than training's, which its attention kernel may not take.
        cfg = dataclasses.replace(attention.portable(branch.model), scan_layers=False)
        context, ends = args.context or branch.context, branch.origin.end_ids
        model = Model(branch.numbers(mesh), cfg, mesh, branch.tokenizer, context, end_ids=ends)
        checkpoint = {"step": branch.step, "checkpoint": _digest(args.run, branch.phase, branch.step)}
        return branch.phase, checkpoint, evaluate(model, tasks, manager, args.limit, args.num_fewshot)


def _digest(run: str, phase: str, step: int) -> str | None:
    """Of a checkpoint. "" where there is a later one of the phase, which may go on from it, None where there is none.

    Where all are earlier ones the phase was trained again: TRAINED_AGAIN, which is no checkpoint's digest.
    """
    with Checkpoints(run, phase) as checkpoints:
        with contextlib.suppress(OSError):
            return checkpoints.digest(step)
        steps = checkpoints.steps()
    if not steps:
        return None
    return "" if steps[-1] > step else TRAINED_AGAIN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qatmoe.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of a run (the training command's --workdir)")
    parser.add_argument(
        "--branch", nargs="+", action="extend", default=[], help="phases of the run, one or more; its last by default"
    )
    parser.add_argument("--tasks", default=",".join(cloze.NAMES), help="names, with commas between them")
    parser.add_argument("--limit", type=int, help="documents of each task; all by default")
    parser.add_argument("--num_fewshot", type=int, help="solved examples before each question; the task's by default")
    parser.add_argument("--context", type=int, default=0, help="tokens at most; the import's or training's by default")
    parser.add_argument("--json", default="", help="file to write; tasks.json in the run's folder by default")
    return parser


def _check(args: argparse.Namespace, tasks: Sequence[str]) -> None:
    if not tasks:
        raise UserError(f"--tasks {args.tasks!r}: names no task; give {','.join(cloze.NAMES)} or others")
    if args.json or Path(args.run).is_dir():  # where there is no run, Branch says so
        check_place(_out(args), "--json" if args.json else "--json, by default")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1; leave it out for all documents")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot}: must be at least 0; leave it out for the task's own")
    if args.context and args.context < 2:
        raise UserError(f"--context {args.context}: must be at least 2, or 0 for that of training")


def _out(args: argparse.Namespace) -> Path:
    return Path(args.json) if args.json else Path(args.run) / "tasks.json"


def _settings(args: argparse.Namespace, tasks: Sequence[str]) -> dict[str, Any]:
    """What scores in one file have in common."""
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "run": Path(args.run).resolve().name,
        "tasks": sorted(tasks),
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "context": args.context,
    }


class _Kept(NamedTuple):
    """What a file has: rows of the same settings and checkpoints, what else, and which branches' differences."""

    rows: list[Row]
    other: str
    pairs: set[tuple[str, str]]


def _say(out: Path, what: str, said: str) -> str:
    """Warns of what a file has that is not kept, unless that has been said; returns it."""
    if what and what != said:
        print(f"warning: {out} has {what}", file=sys.stderr)
    return what or said


def _pairs(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """The differences among them: (branch, which other one it is to)."""
    return {(row["branch"], row["against"]) for row in rows if "against" in row}


def _kept(out: Path, settings: dict[str, Any], run: str) -> _Kept:
    """What stays of a file: rows of the same settings whose checkpoints are those that there are.

    Where all checkpoints of a phase were deleted its rows stay, unless those of others are another run's.
    Differences to a branch that goes are taken out.
    """
    if not is_there(out):
        return _Kept([], "", set())
    no_scores = _Kept([], "no scores of tasks; it will be replaced", set())
    try:
        there = json.loads(out.read_text(encoding="utf-8"))
        rows = there["rows"]
        if not all(isinstance(name, str) for row in rows for name in (row["branch"], row.get("against", ""))):
            raise TypeError
        known = {(row["branch"], row.get("step")): row.get("checkpoint") for row in rows}
        found = {key: there.get(key, "unknown") for key in settings}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return no_scores
    other = [f"{key}={found[key]} (now {value})" for key, value in settings.items() if found[key] != value]
    if other:
        return _Kept([], f"{', '.join(other)}; it will be replaced", set())
    if not all(isinstance(step, int) for _, step in known):
        return no_scores
    states = [(branch, _digest(run, branch, step), digest) for (branch, step), digest in known.items()]
    gone = [branch for branch, now, then in states if now not in (None, then)]
    same = [now == then for _, now, then in states if now]
    if same and not any(same):
        gone += [branch for branch, now, _ in states if now is None]  # the file is of another run
    what = f"another checkpoint's scores of {', '.join(gone)}, which are left out" if gone else ""
    return _Kept(_others(rows, gone), what, _pairs(rows))


def _report(branches: dict[str, list[Row]], checkpoints: dict[str, Row], kept: Sequence[Row]) -> list[Row]:
    """Rows of branches, then what was kept of others; differences only where both sides are of the same call."""
    first_name, first = next(iter(branches.items()))
    rows = []
    for name, found in branches.items():
        for base, row in zip(first, found, strict=True):
            difference, error = compare(base, row)
            own = {key: value for key, value in row.items() if key != "influence"}
            pair = dict(zip(_PAIR, (first_name, difference, error), strict=True))
            rows.append({"branch": name, **checkpoints[name], **own, **({} if found is first else pair)})
    return rows + _others(kept, branches)  # which were measured again: their documents' scores of before are gone


def _others(rows: Sequence[Row], gone: Collection[str]) -> list[Row]:
    """The rows of other branches, without their differences to those that are gone."""
    kept = [row for row in rows if row["branch"] not in gone]
    return [{k: v for k, v in row.items() if not (row.get("against") in gone and k in _PAIR)} for row in kept]


if __name__ == "__main__":
    sys.exit(cli.run(main))
