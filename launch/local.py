"""Runs of a sweep on this machine: a queue over slots, each with its share of the GPUs, TPU chips or CPU cores.

A process that a signal stopped (it saved, and ended with 130 or 143) or killed, and not through this queue, is started
again and goes on from its checkpoint. One that ends otherwise before its run is finished (1: training cannot go on, 2:
unusable input) would end so again, and is not. Neither stops the other runs.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qatmoe.errors import UserError
from qatmoe.files import alone
from qatmoe.run import STOPPED

POLL_S = 0.1
LONGEST_WAIT_S = 60.0

# XLA on a CPU frees and takes the same buffers in every step: with small pages a quarter of its time are page faults.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Chips of one process -> their box, for the shapes that a TPU host's chips can be split into.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one process: what it finds in its environment, and the CPU cores that it may use (empty: all)."""

    name: str
    env: Mapping[str, str]
    cores: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Task:
    """A command that is done when `finished()` says so, whatever it exited with; its output is added to `log`."""

    name: str
    command: Sequence[str]
    log: Path
    finished: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended: "done", "failed" or "stopped" (by a signal to the queue), and why."""

    task: Task
    kind: str
    starts: int
    seconds: float
    why: str


@dataclasses.dataclass
class _Child:
    task: Task
    slot: Slot
    process: subprocess.Popen[bytes]
    began: float


def slots(n: int) -> list[Slot]:
    """Divides this machine in `n`: its GPUs, else its TPU chips, else its CPU cores.

    With more slots than GPUs as many share each, and its memory is divided among them.

    Raises:
      UserError: fewer than one, or accelerators that do not divide by `n` (GPUs: nor `n` by them).
    """
    if n < 1:
        raise UserError(f"--slots {n}: at least 1 run at a time")
    kinds = (("GPUs", _gpus(), _gpu_environment), ("TPU chips", _tpus(), _tpu_environment))
    accelerated = any(devices for _, devices, _ in kinds)
    pages = {} if accelerated or "GLIBC_TUNABLES" in os.environ else HUGE_PAGES
    if n == 1:
        return [Slot("slot 0", pages)]
    for what, devices, environment in kinds:
        if devices:
            if what == "GPUs" and n > len(devices) and n % len(devices) == 0:
                # Taken at once: memory that grows in pieces, which never become one, holds less.
                share = f"{0.9 * len(devices) / n:.3f}"
                own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
                shared = [devices[i % len(devices)] for i in range(n)]
                return [Slot(f"slot {i}, GPU {d}", _gpu_environment([d], n) | own) for i, d in enumerate(shared)]
            if len(devices) % n:
                raise UserError(
                    f"--slots {n}: does not divide the {len(devices)} {what} of this machine; choose a divisor"
                )
            each = len(devices) // n
            parts = [devices[i * each : (i + 1) * each] for i in range(n)]
            return [Slot(f"slot {i}, {what} {','.join(p)}", environment(p, n)) for i, p in enumerate(parts)]
    if not hasattr(os, "sched_getaffinity"):  # not on macOS: the processes share all cores
        return [Slot(f"slot {i}", pages) for i in range(n)]
    cores = sorted(os.sched_getaffinity(0))
    shares = [frozenset(cores[i::n] or [cores[i % len(cores)]]) for i in range(n)]
    return [Slot(f"slot {i}, cores {','.join(map(str, sorted(c)))}", pages, c) for i, c in enumerate(shares)]


def _gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if given is not None:
        listed = [d.strip() for d in given.split(",") if d.strip()]
        return list(itertools.takewhile(lambda d: not d.startswith("-"), listed))  # CUDA stops at a negative number
    return [str(i) for i in range(len(_numbers("/dev", r"nvidia(\d+)")))]  # CUDA counts those that it sees


def _tpus() -> list[str]:
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    chips = _numbers("/dev", r"accel(\d+)") or _numbers("/dev/vfio", r"(\d+)")
    return [str(i) for i in range(len(chips))]


def _numbers(folder: str, pattern: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((m[1] for name in names if (m := re.fullmatch(pattern, name))), key=int)


def _gpu_environment(devices: Sequence[str], _: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}


def _tpu_environment(chips: Sequence[str], n: int) -> dict[str, str]:
    if len(chips) not in TPU_BOUNDS:
        raise UserError(f"--slots {n}: {len(chips)} TPU chips a slot; choose so many that each has 1, 2 or 4")
    return {
        "TPU_VISIBLE_CHIPS": ",".join(chips),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other queues out of a sweep's folder, which must exist. Raises UserError where one is in it."""
    return alone(folder / "lock", f"{folder} is in use by another launch.sweep: wait for it, or stop it")


class Queue:
    """Runs tasks in order, one in each slot at a time.

    A first SIGINT or SIGTERM is passed on to the running processes as SIGTERM, which saves and ends training, and is
    waited for; each further one is passed on again, and ends them at once.
    """

    def __init__(self, tasks: Sequence[Task], places: Sequence[Slot], *, restarts: int = 3, backoff_s: float = 1.0):
        """A task is started again up to `restarts` times, after backoff_s seconds, then twice as many, and so on."""
        self._waiting = collections.deque((task, 0.0) for task in tasks)  # and the time before which it must not start
        self._free = list(places)
        self._running: list[_Child] = []
        self._starts: collections.Counter[str] = collections.Counter()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._total, self._restarts, self._backoff_s = len(tasks), restarts, backoff_s
        self.signal = 0  # the first one that came, which ends it
        self._signals = self._passed_on = 0
        self._outcomes: list[Outcome] = []

    def run(self) -> list[Outcome]:
        """Runs everything. Tasks that a signal kept from starting have no outcome."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._running or (self._waiting and not self._signals):
                self._pass_on()
                self._start_what_can()
                time.sleep(POLL_S)
                for child in [c for c in self._running if c.process.poll() is not None]:
                    self._running.remove(child)
                    self._free.append(child.slot)
                    self._ended(child)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._outcomes

    def _note(self, number: int, _: object) -> None:
        self.signal = self.signal or number
        self._signals += 1
        with contextlib.suppress(OSError):  # the reader may be gone
            os.write(2, b"\nwaiting for the runs to save; once more to stop them at once\n")

    def _pass_on(self) -> None:
        while self._passed_on < self._signals:
            self._passed_on += 1
            for child in self._running:
                child.process.send_signal(signal.SIGTERM)

    def _start_what_can(self) -> None:
        now = time.monotonic()
        for task, ready in list(self._waiting):
            if self._signals or not self._free:
                return
            if ready <= now:
                self._waiting.remove((task, ready))
                self._start(task, self._free.pop(0))

    def _start(self, task: Task, slot: Slot) -> None:
        self._starts[task.name] += 1
        task.log.parent.mkdir(parents=True, exist_ok=True)
        mine = os.sched_getaffinity(0) if slot.cores else set()
        with open(task.log, "ab") as log:
            log.write(f"--- start {self._starts[task.name]}, {slot.name}: {shlex.join(task.command)}\n".encode())
            log.flush()
            if slot.cores:  # inherited: XLA and BLAS make as many threads as there are cores that they may use
                os.sched_setaffinity(0, slot.cores)
            try:  # in a session of its own, so that Ctrl-C reaches it once, from here
                process = subprocess.Popen(
                    task.command,
                    env=os.environ | slot.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            finally:
                if slot.cores:
                    os.sched_setaffinity(0, mine)
        self._running.append(_Child(task, slot, process, time.monotonic()))
        print(f"start    {task.name}  ({slot.name}; {task.log})", flush=True)

    def _ended(self, child: _Child) -> None:
        task, code = child.task, child.process.returncode
        self._seconds[task.name] += time.monotonic() - child.began
        starts = self._starts[task.name]
        if task.finished():
            self._close(task, "done", "")
        elif self._signals:
            self._close(task, "stopped", "")
        elif code >= 0 and code not in STOPPED:
            self._close(task, "failed", f"{_how(code)}: {last_line(task.log)}")
        elif starts > self._restarts:
            self._close(task, "failed", f"{_how(code)}, after {starts} starts: {last_line(task.log)}")
        else:
            wait = min(self._backoff_s * 2 ** (starts - 1), LONGEST_WAIT_S)
            self._waiting.append((task, time.monotonic() + wait))
            print(f"again    {task.name}  in {wait:g} s: {_how(code)} before its end", flush=True)

    def _close(self, task: Task, kind: str, why: str) -> None:
        seconds = self._seconds[task.name]
        self._outcomes.append(Outcome(task, kind, self._starts[task.name], seconds, why))
        count = f"{len(self._outcomes)}/{self._total}"
        print(f"{kind:8s} {task.name}  {count}  {seconds:.0f} s  {why}".rstrip(), flush=True)


def _how(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "stopped" if code in STOPPED else f"exit code {code}"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    return lines[-1].strip() if lines else ""
