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
    """Raises UserError where something is at `path` and it was not said that it may be replaced."""
    if not force and (path.exists() or path.is_symlink()):
        raise UserError(f"{path} exists: choose another path, or give --force to replace it")


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Makes a temporary folder beside `path` to be filled; at the end renames it to `path`.

    When the block raises, the temporary folder is removed and what was at `path` is untouched.

    Raises:
      UserError: something is at `path` already and `force` is off, or the folder cannot be written.
    """
    path = Path(path)
    check_free(path, force=force)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir() and not path.is_symlink():
            os.replace(path, old)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free space there or choose another directory") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
