"""Writing files so that a reader, or a crash, never sees half of one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qatmoe.errors import UserError


def write_atomically(path: str | Path, text: str) -> None:
    """Writes `text` to a temporary file beside `path`, forces it to disk and renames it over `path`.

    Raises:
      UserError: the file cannot be written; what was at `path` is untouched.
    """
    with atomic_file(path, force=True) as f:
        f.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_file(path: str | Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for writing; at the end forces it to disk and renames it to `path`.

    When the block raises, the temporary file is removed and what was at `path` is untouched.

    Raises:
      UserError: something is at `path` already and `force` is off, or the file cannot be written.
    """
    path = Path(path)
    check_free(path, force=force)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free space there or choose another directory") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_free(path: Path, *, force: bool) -> None:
    """Raises UserError where `path` is no name, or is taken and `force` is off."""
    if path.name in ("", ".."):
        raise UserError(f"{str(path)!r} is no name for a file or folder: add one")
    if not force and os.path.lexists(path):
        raise UserError(f"{path} exists: choose another path, or give --force to replace it")


def check_apart(out: Path, source: Path) -> None:
    """Raises UserError where replacing `out` would remove `source`."""
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents:
        raise UserError(f"{out} holds what is read ({source}): choose another --out")


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Makes a temporary folder beside `path` to be filled; at the end renames it to `path`.

    When the block raises, the temporary folder is removed and what was at `path` is untouched. Killed between its two
    renames, what was at `path` lies beside it, and is put back by the next call.

    Raises:
      UserError: something is at `path` already and `force` is off, or the folder cannot be written.
    """
    path = Path(path)
    check_free(path, force=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        check_free(path, force=force)
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"cannot write {path}: it is a file and a folder is to be written; choose another path")
        _remove(temporary)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        _remove(old)
        if os.path.lexists(path):
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if os.path.lexists(old):
                os.replace(old, path)
            raise
        _remove(old)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free space there or choose another directory") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
