"""
Files that are whole or not there, and folders that one run at a time writes to.

    write("runs/demo/run.json", text)       # beside, to the disk, then into place
    with locked("runs/demo"): ...           # a second process gets an error that names this one
"""

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:                                            # Windows has none: no lock there
    fcntl = None


def write(file, data):
    """Write bytes or a text so that a crash at any point leaves the old file or the new one, a
    power cut too: the bytes are on the disk before the name is."""
    file = Path(file)
    scratch = file.with_name(f".{file.name}.tmp")
    with saving(file):
        try:
            with open(scratch, "wb") as out:
                out.write(data.encode() if isinstance(data, str) else data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(scratch, file)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        sync(file.parent)


def append(file, text):
    """Add a line; readers see it when this returns, a disk may not have it yet: sync()."""
    with saving(file), open(file, "a", encoding="utf-8") as out:
        out.write(text + "\n")


def cut(file, size):
    """Leave the first size bytes of a file that was added to since."""
    file = Path(file)
    if file.exists() and file.stat().st_size > size:
        with saving(file):
            os.truncate(file, size)


def sync(path):
    """Wait until the disk has a file, or the names in a folder."""
    if os.name == "posix" or Path(path).is_file():             # Windows opens no folders
        number = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def saving(file):
    """What goes wrong while something is saved, as one line for the user."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"save: {file}: {error.strerror or error}. What was saved before is whole;"
                         " once there is room and leave to write, go on with --resume") from error


@contextlib.contextmanager
def locked(folder):
    """Hold a folder, whether it exists or not, until the block or the process ends, however it
    does. Raises ValueError that names the process that holds it."""
    path = Path(folder).resolve()
    with saving(path):
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
