"""
Lock a folder for one process.

    with locked("runs/demo"): ...           # a second process gets an error that names this one
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
    path = Path(folder).resolve()
    with files.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "a+", encoding="utf-8")  # noqa: SIM115
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
