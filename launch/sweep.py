"""Starts a sweep, or goes on with it: only the runs that are not finished are run.

    python -m launch.sweep launch/sweeps/toys.py [--dir runs/NAME] [--dry_run]
    python -m launch.sweep launch/sweeps/toys.py --slots 2 --restarts 3                   on this machine
    python -m launch.sweep launch/sweeps/grids.py --backend slurm --option partition=a100 --option gpus_per_node=1
    python -m launch.sweep launch/sweeps/grids.py --backend skypilot --option accelerators=tpu-v5e-16 \\
        --option bucket=gs://B
    python -m launch.sweep launch/sweeps/grids.py --backend jobset --option image=I --option claim=C

Run it from the repository's root. Every point is resolved before anything starts. docs/launch.md tells the rest;
results come from `python -m launch.collect runs/NAME`.
"""

import argparse
import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from launch import cloud, local, options, points, slurm
from launch.points import Run, Sweep
from qatmoe import cli
from qatmoe.errors import UserError
from qatmoe.files import check_local

BACKENDS = ("local", "slurm", "skypilot", "jobset")
RESTARTS = 3  # of a run that was stopped or killed
# What other backends have for options of the local one.
INSTEAD = {
    ("slots", "slurm"): "give --option parallel=N",
    ("restarts", "skypilot"): "give --option restarts=N",
    ("restarts", "jobset"): "give --option restarts=N",
}

Given = list[local.Slot] | slurm.Options | cloud.SkyOptions | cloud.JobSetOptions  # to a backend


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for an option that belongs to another backend."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the sweep: a Python file with get_sweep()")
    parser.add_argument("--dir", help="the sweep's folder; runs/NAME unless given")
    parser.add_argument("--backend", default="local", choices=BACKENDS)
    parser.add_argument("--dry_run", action="store_true", help="list the runs, check the options, write nothing")
    parser.add_argument("--slots", type=int, help="local: runs at a time (1)")
    parser.add_argument("--restarts", type=int, help="local: how often a run that was stopped or killed goes on (3)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the other backends")
    args = parser.parse_args(argv)
    if args.backend == "local" and args.option:
        raise UserError(f"--option {args.option[0]}: the local backend has none, but --slots and --restarts")
    for name in ("slots", "restarts"):
        if args.backend != "local" and getattr(args, name) is not None:
            fix = INSTEAD.get((name, args.backend), f"{args.backend} has nothing like it, leave it out")
            raise UserError(f"--{name} {getattr(args, name)}: belongs to the local backend; {fix}")
    if (args.restarts or 0) < 0:
        raise UserError(f"--restarts {args.restarts}: must be at least 0")
    return args


def describe(runs: Sequence[Run]) -> str:
    """Name, state, overrides and command of every run."""
    lines = []
    for run in runs:
        lines.append(f"{run.name}  {points.state(run).text}")
        lines.append("    " + "  ".join(f"{key}={value!r}" for key, value in run.overrides.items()))
        lines.append("    " + shlex.join(["python", *run.command[1:]]))
    return "\n".join(lines)


def run_locally(runs: Sequence[Run], places: Sequence[local.Slot], restarts: int) -> int:
    """Runs on this machine, of one sweep or several; returns the exit code: 0 all done, 1 some failed, 130 or 143
    stopped by SIGINT or SIGTERM."""
    tasks = [local.Task(r.name, r.command, r.log, functools.partial(points.finished, r.folder)) for r in runs]
    with contextlib.ExitStack() as locks:
        for folder in sorted({run.folder.parent for run in runs}):
            locks.enter_context(local.locked(folder))
        queue = local.Queue(tasks, places, restarts=restarts)
        outcomes = queue.run()
    failed = [o for o in outcomes if o.kind == "failed"]
    for o in failed:
        print(f"failed: {o.task.name}: {o.why}  ({o.task.log})", file=sys.stderr)
    if queue.signal:
        print("stopped. The same command continues.", file=sys.stderr)
        return 128 + queue.signal
    return 1 if failed else 0


def enter(sweep: Sweep, runs: Sequence[Run], folder: Path, wanted: Sequence[Run]) -> list[Run]:
    """Opens a sweep's folder, says which runs are done or running, and returns the others. Raises as `points.state`.

    Args:
      runs: all runs of the sweep.
      wanted: those that may be started.
    """
    states = {run.name: points.state(run) for run in runs}
    points.open_folder(sweep, runs, folder)
    todo = []
    for run in wanted:
        if states[run.name].kind in ("done", "running"):
            print(f"{states[run.name].text:8s} {run.name}")
        else:
            todo.append(run)
    return todo


def check(args: argparse.Namespace, sweep: Sweep, runs: Sequence[Run]) -> Given:
    """What the backend that was asked for is given, tried on the runs; nothing is written or started.

    Raises:
      UserError: an option is wrong, a run cannot be started with these, or this backend not from here.
    """
    if args.backend == "slurm":
        slurm_options = options.read(slurm.Options, args.option)
        if not args.dry_run:  # which may be on another machine than the cluster's
            slurm.check(slurm_options, sweep.name)
        return slurm_options
    if args.backend == "skypilot":
        sky_options = options.read(cloud.SkyOptions, args.option)
        _ = [cloud.sky_task(run, sweep, sky_options) for run in runs]
        return sky_options
    if args.backend == "jobset":
        jobset_options = options.read(cloud.JobSetOptions, args.option)
        _ = [cloud.jobset(run, sweep, jobset_options) for run in runs]
        return jobset_options
    return local.slots(1 if args.slots is None else args.slots)


def launch(
    args: argparse.Namespace, sweep: Sweep, folder: Path, can_start: Callable[[Run], bool] = lambda _: True
) -> int:
    """Starts what is not finished and can start, with the backend that was asked for."""
    # Input: everything that can be wrong is found before the folder is made.
    points.check_folder(sweep, folder)
    runs = points.runs_of(sweep, folder)
    given = check(args, sweep, runs)
    if args.dry_run:
        print(describe(runs))
        return 0
    # What there is to do.
    todo = [run for run in enter(sweep, runs, folder, runs) if can_start(run)]
    if not todo:
        print(f"nothing to start. Results: python -m launch.collect {folder}")
        return 0
    # Backends.
    if isinstance(given, slurm.Options):
        for name, job in slurm.submit(todo, folder, given, sweep.name).items():
            print(f"queued   {name}  (job {job})")
        return 0
    if isinstance(given, cloud.SkyOptions):
        print("\n".join(cloud.write_sky(todo, sweep, folder, given)))
        return 0
    if isinstance(given, cloud.JobSetOptions):
        print("\n".join(cloud.write_jobsets(todo, sweep, folder, given)))
        return 0
    code = run_locally(todo, given, RESTARTS if args.restarts is None else args.restarts)
    print(f"results: python -m launch.collect {folder}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 runs failed, 2 unusable input, 130 or 143 stopped by SIGINT or SIGTERM."""
    try:
        args = parse(argv)
        jax.config.update("jax_platforms", "cpu")  # only shapes are computed here; accelerators belong to the runs
        check_local(args.dir or "", "--dir")
        sweep = points.load(args.file)
        return launch(args, sweep, Path(args.dir or f"runs/{sweep.name}"))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
