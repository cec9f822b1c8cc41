"""The run's directory: one configuration, one process at a time.

WORKDIR/config.json     what the run is; another configuration is refused
WORKDIR/lock            held while a process trains here
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from qatmoe import distributed
from qatmoe.config import MeshConfig, default, leaves
from qatmoe.errors import UserError
from qatmoe.files import write_atomically

Json = dict[str, Any]

LOCK_TRIES = 10  # a tenth of a second apart

_FREE_KEYS = {
    *("data.cache_dir", "data.prefetch"),
    *("train.keep", "train.tensorboard", "train.profile_step", "train.profile_steps"),
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
}


def is_free(key: str) -> bool:
    """Whether a dotted key may differ when a run is continued: no number depends on it, or, on the mesh, only up to
    rounding."""
    return key in _FREE_KEYS or re.fullmatch(r"train\.phases\.[^.]*\.save_at", key) is not None


def differences(there: Json, here: Json) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (there, here)} where two configurations are not of one run; "absent" for a key that one lacks.

    A key that came to the configuration since then has its default there.
    """
    a, b = leaves(there), leaves(here)
    pairs = {key: (a.get(key, "absent"), b.get(key, "absent")) for key in a | b if not is_free(key)}
    new = {key for key, (before, now) in pairs.items() if before == "absent" and now == default(key)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in new}


def check_path(path: str | Path, what: str) -> None:
    """Raises UserError where no checkpoints can be written below a path: weights would be missing in them.

    Of the whole path orbax makes a pattern, tensorstore takes "\\" for "/", and both want UTF-8.
    """
    whole = str(Path(path).absolute())
    bad = next((c for c in whole if c in "*?[\\" or "\ud800" <= c <= "\udfff"), "")
    if bad:
        raise UserError(
            f"{what} {whole!r}: checkpoints cannot be written below a folder with {bad!r} in its name: choose another, "
            "or rename that one"
        )


class RunLock:
    """Holds a run's directory until `close`, the end of a `with`, or the process's death."""

    def __init__(self, fd: int | None):
        self._fd = fd

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process take the directory."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def open_workdir(workdir: str | Path, config_json: str) -> RunLock:
    """Makes the run's directory, or enters it again, and locks it. Keep the lock for as long as the run writes.

    Args:
      config_json: the resolved config. Written to WORKDIR/config.json the first time and compared afterwards.

    Raises:
      UserError: the directory holds another configuration's run or something else, cannot be written (`check_path`
        too), or is in use by another process. Nothing in it was changed.
    """
    check_path(workdir, "workdir")
    workdir = Path(workdir)
    if not distributed.first():
        return RunLock(None)
    try:
        names = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
        if names - {"lock", ".config.json.tmp"} and "config.json" not in names:
            raise UserError(f"workdir {workdir} is not empty and holds no qatmoe run: choose a new or empty directory")
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _lock(workdir)
    except OSError as e:
        raise UserError(f"workdir {workdir}: {e.strerror}; choose a directory that can be written") from e
    try:
        _check_config(workdir / "config.json", config_json)
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(workdir: Path) -> RunLock:
    fd = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(LOCK_TRIES):  # a program that only looks at a run's state holds its lock for an instant
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(0.1)
    else:
        pid = os.read(fd, 100).decode(errors="replace").strip()
        os.close(fd)
        raise UserError(
            f"workdir {workdir} is in use by process {pid or 'unknown'}: wait for it, stop it, or choose another "
            "workdir"
        )
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return RunLock(fd)


def _check_config(file: Path, config_json: str) -> None:
    if not file.exists():
        write_atomically(file, config_json)
        return
    try:
        there = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file} is not JSON: restore it, or choose another workdir") from e
    differ = differences(there, json.loads(config_json))
    if differ:
        shown = "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in list(differ.items())[:8])
        more = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise UserError(
            f"workdir {file.parent} holds a run with another config ({shown}{more}): give this one another --workdir, "
            "or set those keys as they were"
        )
