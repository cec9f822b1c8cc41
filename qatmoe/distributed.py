"""Several processes that train one run: how they find each other, agree, and end together.

By hand, on any machines that reach each other, the same command in each and only the last number differs:

    python -m qatmoe.train --config FILE --workdir DIR --coordinator HOST:PORT --processes 2 --process 0

HOST is the machine of process 0, PORT any free one there. Under Slurm (srun), on Cloud TPU pods, in GKE jobs and under
Open MPI no flag is needed: JAX finds all three numbers itself. `--processes 1` alone switches that off.

Devices work in lockstep, so whatever one process decides differently hangs all of them. Three rules keep them together:
input that one process finds unusable is refused by all (`together`); what depends on files is decided by process 0
(`from_first`); a process that dies takes the others with it, each of which says so in its last line (`joined`).
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from qatmoe.errors import RunError, UserError

# Seconds. A process is given up when nothing was heard of it for so long; JAX's own default is 100.
HEARTBEAT_S = 40
# All processes must have started within this time; JAX's own default is 300.
START_S = 60
# What processes that end together wait for each other.
END_S = 20

CONTINUE = (
    "the same command in every process, with this or another number of processes, goes on from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, as the command line says; None where it does not."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def flags(argv: Sequence[str]) -> tuple[list[str], Place]:
    """Takes --coordinator, --processes and --process out of a command line.

    Raises:
      UserError: only some of them; an address that is not HOST:PORT; numbers that cannot be.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as e:
        raise UserError(f"{e.argument_name}: {e.message}") from e
    place = Place(found.coordinator, found.processes, found.process)
    _check(place)
    return rest, place


def _check(place: Place) -> None:
    if place in (Place(), Place(processes=1)):
        return
    given = {"--coordinator": place.coordinator, "--processes": place.processes, "--process": place.process}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: give --coordinator HOST:PORT --processes N --process I, or none of them "
            "where Slurm, a TPU pod or Kubernetes starts the processes"
        )
    count, index, address = place.processes or 0, place.process or 0, place.coordinator or ""
    if count < 1:
        raise UserError(f"--processes {count}: must be at least 1")
    if not 0 <= index < count:
        raise UserError(f"--process {index}: must be from 0 to {count - 1}, one less than --processes {count}")
    host, _, port = address.rpartition(":")
    try:
        host.encode("idna")  # as connecting does; it refuses a..b
    except UnicodeError:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {address!r}: must be HOST:PORT of process 0, e.g. 10.0.0.1:1234")


# ---- From the first to the last moment ----------------------------------------------------------------------------


@contextlib.contextmanager
def joined(place: Place, *, detect: bool) -> Iterator[None]:
    """Makes this process one of a run's, before devices are used; at the end waits for the others and leaves them.

    An exception that all processes raise together (its attribute `together` is true) passes through. Any other one is
    this process's alone: it is printed and ends the process at once, which ends the others.

    Args:
      detect: where no flags were given, ask Slurm, the TPU pod, Kubernetes or Open MPI.

    Raises:
      UserError: the others were not found within `START_S`, or do not have as many devices each.
    """
    _start(place, detect)
    if not jax.distributed.is_initialized():
        yield
        return
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  process 0 speaks for all; errors go to stderr
    me = f"process {jax.process_index()} of {jax.process_count()}"
    words = _last_words(
        f"error: {me} was ended from outside: it was killed, or another process of the run has died (see what the "
        f"others printed); {CONTINUE}"
    )
    try:
        with words:
            try:
                _check_devices()
                barrier("begin")  # CPUs connect in their first collective, which waits 30 s only
                yield
                barrier("end")  # process 0 writes the report; leaving has a time limit
            except BaseException as e:
                if getattr(e, "together", isinstance(e, SystemExit)):
                    jax.distributed.shutdown()
                raise
            jax.distributed.shutdown()
    except BaseException as e:
        if getattr(e, "together", isinstance(e, SystemExit)):
            raise
        _leave(e, me)


def _start(place: Place, detect: bool) -> None:
    timeouts: dict[str, Any] = {
        "initialization_timeout": START_S,
        "heartbeat_timeout_seconds": HEARTBEAT_S,
        "shutdown_timeout_seconds": END_S,
    }
    if place.coordinator is not None and place.processes is not None and place.processes > 1:
        if place.process:
            _await_coordinator(place.coordinator)
        with _last_words(
            f"error: process {place.process} of {place.processes}: not all processes came to {place.coordinator} "
            f"within {START_S} s, or two have the same number: give each its own --process, from 0 to "
            f"{place.processes - 1}"
        ):
            try:
                jax.distributed.initialize(
                    place.coordinator, place.processes, place.process, cluster_detection_method="deactivate", **timeouts
                )
            except RuntimeError as e:  # process 0 cannot listen there
                raise UserError(f"--coordinator {place.coordinator}: {_line(e)}; choose another port") from e
    elif detect and place == Place() and os.environ.get("SLURM_NTASKS") != "1":
        try:
            with _last_words(f"error: not all processes of this job started within {START_S} s: start it again"):
                jax.distributed.initialize(**timeouts)
        except ValueError as e:
            if "coordinator_address" not in str(e):  # so JAX says that there is no cluster
                raise UserError(f"the environment names a coordinator and not the rest: {_line(e)}") from e
            return
        except Exception as e:  # of the cluster's own interface
            raise UserError(
                f"a cluster was found and cannot be joined: {_line(e)}; give --coordinator, --processes and --process, "
                "or --processes 1 for a run on this machine alone"
            ) from e


def _check_devices() -> None:
    """Raises UserError in all processes where one has more devices than another; each knows the devices of all."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        (most, count), *_, (least, fewer) = counts.most_common()
        raise _of_all(
            UserError(
                f"process {most} has {count} devices and process {least} {fewer}: give each process the same number"
            )
        )


def _await_coordinator(address: str) -> None:
    """Waits until process 0 listens: JAX would wait too, and abort where it does not come."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator {address} cannot be reached ({e.strerror or e}): start process 0 there, or correct "
                    f"the address (waited {START_S} s)"
                ) from e
        time.sleep(min(0.3, START_S))


@contextlib.contextmanager
def _last_words(text: str) -> Iterator[None]:
    """Prints `text` to stderr if the process ends inside, in whatever way.

    JAX ends a process whose peers are gone by abort(), where no code of ours runs: a shell that holds a pipe's other
    end notices.
    """
    script = 'read -r done || printf "%s\\n" "$1" >&2'
    shell = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            shell.communicate(b"done\n")


def _leave(error: BaseException, me: str) -> NoReturn:
    """Ends a process whose error is its own, without waiting for the others, which wait for it."""
    if isinstance(error, UserError):
        print(f"error: {me}: {error}", file=sys.stderr)
    elif "Gloo" in str(error):  # what collectives on CPUs raise; GPUs and TPUs wait for the missed heartbeat
        what = "did not come in time" if "DEADLINE" in str(error) else "has died"
        print(f"error: {me}: another process of the run {what} ({_line(error)}); {CONTINUE}", file=sys.stderr)
    elif waited := coordination_error(error):
        what = f"another process of the run was waited for in vain ({_line(waited)})"
        print(f"error: {me}: {what}; {CONTINUE}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else 1)


def coordination_error(error: BaseException) -> BaseException | None:
    """What JAX said of a process that was waited for in vain, if that is what an error comes from.

    orbax makes a TimeoutError of whatever goes wrong at its barriers, at times of that another; where its threads wait
    for another process's folder, it leaves JAX's error as it is.
    """
    cause = error
    while isinstance(cause, TimeoutError) and cause.__cause__:
        cause = cause.__cause__
    if not isinstance(cause, jax.errors.JaxRuntimeError):
        return None
    return cause if cause is not error or str(cause).startswith("DEADLINE_EXCEEDED") else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ---- Agreement -------------------------------------------------------------------------------------------------------
# All processes must come to each of these, in the same order. With one process they do nothing.


def first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
    """Broadcasts process 0's JSON-serializable value. Collective."""
    return json.loads(_gather(json.dumps(value) if first() else "")[0]) if jax.process_count() > 1 else value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A UserError that some processes raise inside is raised by all of them, at the end of the block.

    Raises:
      UserError: or RunError; with the number of the process where it was found, and `together` true.
    """
    if jax.process_count() == 1:
        yield
        return
    mine = ""
    try:
        yield
    except UserError as e:
        mine = json.dumps([str(e), e.exit_code])
    found = [(i, *json.loads(text)) for i, text in enumerate(_gather(mine)) if text]
    if found:
        index, text, code = found[0]
        raise _of_all((RunError if code == RunError.exit_code else UserError)(f"process {index}: {text}"))


def _of_all(error: UserError) -> UserError:
    """An error that every process raises, so that none is waited for."""
    error.together = True
    return error


def require_same(what: str, text: str) -> None:
    """Raises UserError in all processes where their texts differ, showing the first line that does."""
    if jax.process_count() == 1:
        return
    with together():
        theirs, mine = from_first(text).splitlines(), text.splitlines()
        for there, here in itertools.zip_longest(theirs, mine, fillvalue="nothing"):
            if there != here:
                raise UserError(
                    f"another {what} than process 0: {here.strip()} here, {there.strip()} there; start all processes "
                    "with the same command on the same data"
                )


def _gather(text: str) -> list[str]:
    """The text of each process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
