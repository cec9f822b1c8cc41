"""Directories of files made from other files, kept by a hash of what they were made from.

An entry is written beside its place and renamed into it, so it is complete or absent; its manifest has
every file's hash, so a damaged entry is noticed and made again. Where the file system has locks, processes
that want the same entry wait for the one that makes it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qatmoe.errors import UserError
from qatmoe.files import expanded

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def root(cache_dir: str) -> Path:
    """The cache directory of `data.cache_dir`; "" is $XDG_CACHE_HOME/qatmoe, else ~/.cache/qatmoe.

    Raises:
      UserError: it is in a home directory that is not known.
    """
    if cache_dir:
        return expanded(cache_dir, "--config.data.cache_dir")
    base = os.environ.get("XDG_CACHE_HOME", "")
    return expanded(base or "~/.cache", "without --config.data.cache_dir and $XDG_CACHE_HOME the cache") / "qatmoe"


def entry(cache_dir: str, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The directory of `key`, made by `build` if it is absent or damaged.

    Args:
      cache_dir: `data.cache_dir`.
      key: the entry's name: a kind and a hash of everything the entry depends on.
      build: writes files (no subdirectories) into the directory it is given, returns what else is to be kept (JSON).

    Returns:
      The entry's directory, and what `build` returned.

    Raises:
      UserError: the cache cannot be written (no such place, no permission, disk full).
    """
    place = root(cache_dir) / key
    kept = _intact(place)
    if kept is not None:
        return place, kept
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place) as alone:
            if not place.exists():
                return place, _make(place, build, alone)
        kept = _intact(place)  # another process has made it; all that waited look through it at once
        if kept is None:
            with _locked(place) as alone:
                kept = _intact(place)
                kept = _make(place, build, alone) if kept is None else kept
    except OSError as e:
        raise UserError(
            f"cannot write the cache in {str(place.parent)!r} ({e.strerror or e}); "
            "set --config.data.cache_dir to a directory with room that you may write to"
        ) from e
    return place, kept


def _make(place: Path, build: Callable[[Path], dict[str, Any]], alone: bool) -> dict[str, Any]:
    # The machine's name: where locks do not reach other machines, what lies there may be theirs and in use.
    prefix = f".{place.name}@{socket.gethostname()}@"
    for leftover in place.parent.iterdir() if alone else ():
        if leftover.name.startswith(prefix):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    if place.exists():
        log.warning("the cache entry %s is damaged; making it again", place)
        shutil.rmtree(place)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        kept = build(temporary)
        files = {path.name: _hash(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps({"files": files, "kept": kept}), encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:
            # Another process made the same entry meanwhile; its content is the same.
            if _intact(place) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed
    return kept


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Waits until no other process makes the entry. Gives False where there are no locks: then another one may."""
    file = place.with_name(f".{place.name}.lock")
    lock = _lock(file)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            file.unlink(missing_ok=True)
            lock.close()


def _lock(file: Path) -> BinaryIO | None:
    """The file, made and locked; None where that cannot be, as on a network file system without locks."""
    waited = False
    while True:
        try:
            lock = open(file, "ab")  # noqa: SIM115  open as long as it is locked
        except PermissionError:  # another user's
            return None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    log.warning("waiting for another process that makes the same cache entry (%s)", file)
                waited = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                    return lock
            lock.close()  # whoever had it removed it
        except OSError:
            file.unlink(missing_ok=True)
            lock.close()
            return None


def _intact(place: Path) -> dict[str, Any] | None:
    """What was kept with the entry, or None if the entry is absent or not as it was written."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if all(_hash(place / name) == digest for name, digest in manifest["files"].items()):
            return manifest["kept"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # whatever is wrong with the entry, making it again is the answer
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
