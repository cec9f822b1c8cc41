"""Runs of a sweep as one Slurm array, through submitit.

Before its time is over, and when it is preempted, a job lets training save, puts itself into the queue again, and
goes on there. The sweep's folder and the checkout must lie where every node sees them.
"""

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.options import at_least
from launch.points import Run
from qatmoe.errors import UserError
from qatmoe.files import write_atomically
from qatmoe.run import STOPPED

REQUEUES = 1000  # after a time limit; preemptions are not counted


ENDED = (*STOPPED, -signal.SIGINT, -signal.SIGTERM)  # by a signal of Slurm's own: it saved, or had not begun to listen


@dataclasses.dataclass(frozen=True)
class Options:
    """`--option` of the slurm backend. Several tasks train one run together: qatmoe.train starts jax.distributed."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    nodes: int = at_least(1, default=1)
    tasks_per_node: int = at_least(1, default=1)  # processes of one run; with several GPUs, one for all or one for each
    gpus_per_node: int = at_least(0, default=0)
    cpus_per_task: int = at_least(1, default=8)
    mem_gb: int = at_least(0, default=0)  # of a node; 0 = the cluster's default
    minutes: int = at_least(1, default=24 * 60)  # until a job is put into the queue again
    save_s: int = at_least(1, default=180)  # seconds before the end of its time at which it begins to save
    parallel: int = at_least(1, default=256)  # runs at a time
    setup: str = ""  # a shell line before the job, as "source env.sh"
    cluster: str = "slurm"  # "local" runs the same jobs on this machine, to try them

    def __post_init__(self) -> None:
        """Raises UserError where a job would be told to save as soon as it starts."""
        if self.save_s >= 60 * self.minutes:
            raise UserError(
                f"--option save_s={self.save_s}: must be less than the {60 * self.minutes} s of "
                f"minutes={self.minutes}, or nothing is trained between a job's start and its end"
            )


class Train:
    """The job: training in a process of its own, and what submitit asks for when the job must end."""

    def __init__(self, command: Sequence[str], root: str):
        self._arguments = (list(command), root)
        self.command, self.root = self._arguments
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Trains until the run is finished; raises RuntimeError where training fails."""
        from submitit import JobEnvironment

        requeue = JobEnvironment._usr_sig()
        # Slurm sends its signals to all processes of a step. This one is submitit's, and would end training unsaved.
        ignoring = f"trap '' {requeue.name.removeprefix('SIG')}; exec \"$@\""
        child = subprocess.Popen(["sh", "-c", ignoring, "sh", *self.command], cwd=self.root)
        self._child = child
        while child.poll() is None:
            time.sleep(0.2)  # and not wait(): its lock would still be held in checkpoint(), which a signal calls
        if child.returncode == 0:
            return "done"
        if child.returncode in ENDED:
            signal.raise_signal(requeue)
            return "stopped"  # in the tasks that do not put the job into the queue
        raise RuntimeError(f"qatmoe.train ended with {child.returncode}; what it said stands above")

    def checkpoint(self) -> Any:
        """Called on a signal: lets training save; what is put into the queue is the same command."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None and self._child.poll() is None:
            # Slurm may have sent SIGTERM already, and training ends at once on the second signal of a kind.
            self._child.send_signal(signal.SIGINT)
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Train(*self._arguments))


def executor(folder: Path, options: Options, name: str) -> Any:
    """A submitit executor with these options.

    Raises:
      UserError: submitit is not installed, or there is no Slurm here.
    """
    try:
        import submitit
    except ImportError as e:
        raise UserError("the slurm backend needs submitit: pip install -e '.[slurm]'") from e
    try:
        found = submitit.AutoExecutor(folder / "slurm", cluster=options.cluster, slurm_max_num_timeout=REQUEUES)
    except (RuntimeError, ValueError) as e:  # no srun; no such cluster
        raise UserError(f"--option cluster={options.cluster}: {' '.join(str(e).split())}") from e
    given = {
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "gpus_per_node": options.gpus_per_node,
        "mem_gb": options.mem_gb,
        "slurm_setup": [options.setup] if options.setup else [],
    }
    found.update_parameters(
        name=name,
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node,
        cpus_per_task=options.cpus_per_task,
        timeout_min=options.minutes,
        stderr_to_stdout=True,
        slurm_signal_delay_s=options.save_s,
        slurm_array_parallelism=options.parallel,
        **{k: v for k, v in given.items() if v},
    )
    return found


def check(options: Options, name: str) -> None:
    """Raises UserError as `executor`, and leaves no folder: submitit's local executor makes its own."""
    with tempfile.TemporaryDirectory() as place:
        executor(Path(place), options, name)


def submit(runs: Sequence[Run], folder: Path, options: Options, name: str) -> dict[str, str]:
    """Submits those of `runs` that have no job in the queue; returns {run: job}, also kept in FOLDER/slurm/jobs.json.

    Raises:
      UserError: as `executor`; or jobs.json is damaged.
    """
    found = executor(folder, options, name)
    file = folder / "slurm" / "jobs.json"
    jobs = _jobs(file)
    job_class = type(found._executor).job_class
    queued = {
        r.name for r in runs if r.name in jobs and not job_class(folder / "slurm", jobs[r.name]).done(force_check=True)
    }
    for run_name in sorted(queued):
        print(f"queued   {run_name}  (job {jobs[run_name]})")
    wanted = [r for r in runs if r.name not in queued]
    if not wanted:
        return {}
    with found.batch():
        new = [found.submit(Train(r.command, os.getcwd())) for r in wanted]
    submitted = {r.name: job.job_id for r, job in zip(wanted, new, strict=True)}
    write_atomically(file, json.dumps(jobs | submitted, indent=1) + "\n")
    return submitted


def _jobs(file: Path) -> dict[str, str]:
    try:
        jobs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        jobs = None
    if not isinstance(jobs, dict) or not all(isinstance(job, str) for job in jobs.values()):
        raise UserError(f"{file} is damaged: see to it that none of its jobs is in the queue (squeue), then remove it")
    return jobs
