"""Writing files so that a reader, or a crash, never sees half of one."""

import contextlib
import errno
import fcntl
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
      UserError: something is at `path` already and `force` is off, another process is writing `path`, or the file
        cannot be written.
    """
    path = Path(path)
    check_free(path, force=force)
    temporary = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        _make_folder(path.parent)
        fd = _claim(path, temporary, os.O_RDWR | os.O_CREAT)
        try:
            with open(fd, "wb") as f:
                f.truncate()  # what a process that was killed had written
                yield f
                f.flush()
                os.fsync(f.fileno())
                check_free(path, force=force)  # something may have come there meanwhile
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def alone(file: Path, message: str) -> Iterator[None]:
    """Keeps other processes out of what the block does, by a lock on a file.

    Raises:
      UserError: another process is in it; says `message`. The file cannot be made or locked.
    """
    with _explained(file):
        lock = open(file, "wb")  # noqa: SIM115  closed below
    with lock:
        with _explained(file):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UserError(message) from e
        yield


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:  # says less than what is the matter
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from e


def write_behind(f: BinaryIO) -> None:
    """Lets the disk begin with what was written, while the program computes what comes next."""
    if hasattr(os, "posix_fadvise"):  # on Linux, starts writing dirty pages and does not wait
        f.flush()
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _claim(path: Path, temporary: Path, flags: int) -> int:
    """Opens and locks a temporary file or folder: two processes must never fill the same one."""
    while True:
        fd = os.open(temporary, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise UserError(f"another process is writing {path}: wait for it, or choose another path") from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(temporary)):
                return fd
        os.close(fd)  # it got its final name between the opening and the locking
        if flags & os.O_DIRECTORY:
            temporary.mkdir(exist_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; free space there or choose another directory") from e


def check_free(path: Path, *, force: bool) -> None:
    """Raises UserError where `path` is no name, or is taken and `force` is off."""
    if path.name in ("", ".."):
        raise UserError(f"{str(path)!r} is no name for a file or folder: add one")
    if not force and os.path.lexists(path):
        raise UserError(f"{path} exists: choose another path, or give --force to replace it")


def check_place(path: str | Path, option: str) -> None:
    """Raises UserError where no file can be written to the `path` that an option gives; before anything is computed."""
    path = Path(path)
    check_free(path, force=True)
    if not os.path.isdir(path.parent):
        raise UserError(f"{option} {path}: there is no such folder to write into")
    if os.path.isdir(path):
        raise UserError(f"{option} {path}: is a folder; give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: its folder cannot be written into; choose another")


def expanded(path: str, option: str) -> Path:
    """A path whose "~" or "~user" is that home directory. Raises UserError where it is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{option}={path!r}: no such home directory is known; give a path without '~'") from e


def is_there(path: Path) -> bool:
    """Whether there is something at a path.

    Raises:
      UserError: that cannot be known (a disk that does not answer, no permission): it must not be taken for absent.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path at all
        return False
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            return False
        raise cannot_look(path, e) from e
    return True


def cannot_look(path: Path, e: OSError) -> UserError:
    """What is said where it cannot be known what is at a path."""
    return UserError(f"cannot look at {path}: {e.strerror}; see to it, then give the same command again")


def check_local(path: str, option: str) -> None:
    """Raises UserError where an option gives an address: it would become a folder of that name here."""
    if "://" in path:
        raise UserError(
            f"{option} {path}: is an address; give a path, of a mounted file system where all should see it"
        )


def check_apart(out: Path, source: Path) -> None:
    """Raises UserError where writing `out` would remove `source` or a part of it."""
    there, source = out.resolve(), source.resolve()
    if there == source or there in source.parents or (source in there.parents and os.path.lexists(out)):
        raise UserError(f"{out} belongs to what is read ({source}): choose another --out")


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Makes a temporary folder beside `path` to be filled; at the end renames it to `path`.

    When the block raises, the temporary folder is removed and what was at `path` is untouched. Killed between its two
    renames, what was at `path` lies beside it, and is put back by the next call.

    Raises:
      UserError: something is at `path` already and `force` is off, or it is not a folder that such a call made;
        another process is writing `path`; or the folder cannot be written.
    """
    path = Path(path)
    check_free(path, force=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with _explained(path):
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        _check_replaceable(path, force)
        _make_folder(temporary)
        fd = _claim(path, temporary, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for leftover in temporary.iterdir():  # of a process that was killed
                _remove(leftover)
            yield temporary
            _check_replaceable(path, force)
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
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(fd)


def _check_replaceable(path: Path, force: bool) -> None:
    """Raises UserError where `path` is taken, or by something that nobody meant with --force."""
    check_free(path, force=force)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"cannot write {path}: it is a file and a folder is to be written; choose another path")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a model nor a run (no config.json): remove it yourself, or choose another")
    if (path / "metrics.jsonl").is_file():
        raise UserError(f"{path} is a run that was trained (metrics.jsonl): remove it yourself, or choose another")


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
