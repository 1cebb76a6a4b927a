"""
Lock a folder for one process.

    with locked("runs/demo"): ...           # a second process gets an error that names this one
    holder("runs/demo")                     # the number of the process that holds it, or None
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .. import files

try:
    import fcntl
except ImportError:                                            # not on Windows: no lock there
    fcntl = None


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock a folder, which need not exist, until the block or the process ends. Raises ValueError
    that names the process that holds it."""
    path = _file_of(folder)
    with files.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ValueError(f"run: {folder} is written by process {file.read().strip() or '?'}; "
                             "wait for it, or choose another name with --train.run") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


def holder(folder: str | Path) -> int | None:
    """The process that holds the lock of a folder; None if none does. Only the lock of a process
    that lives is tried, so a new one that wants it is not in the way of this look."""
    try:
        with open(_file_of(folder), encoding="utf-8") as file:
            process = int(file.read().strip() or 0)
            if not process or not fcntl:
                return None
            os.kill(process, 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return process
    except (OSError, ValueError):                              # no file, no such process
        return None
    return None


def _file_of(folder):
    path = Path(folder).resolve()
    return path.with_name(f".{path.name}.lock")
