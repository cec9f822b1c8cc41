"""Writing small files so that a reader, or a crash, never sees half of one."""

import contextlib
import os
from pathlib import Path

from qatmoe.errors import UserError


def write_atomically(path: str | Path, text: str) -> None:
    """Writes `text` to a temporary file beside `path`, forces it to disk and renames it over `path`.

    Raises:
      UserError: the file cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {e.strerror}; free space there or choose another directory") from e
