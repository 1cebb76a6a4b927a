"""
Write files whole or not at all, and read JSON with care.

    write("runs/demo/run.json", text)       # to a scratch file, to the disk, then into place
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write(file: str | Path, data: bytes | str) -> None:
    """Write a file so that a crash or a power cut leaves the old file or the new one: the bytes
    are on the disk before the name is."""
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


def sync(path: str | Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if os.name == "posix" or Path(path).is_file():             # Windows opens no folders
        number = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def saving(file: str | Path) -> Iterator[None]:
    """Re-raise OSError as a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"save: {file}: {error.strerror or error}. What was saved before is whole;"
                         " make room or allow writing, then go on with --resume") from error


def stay_inside(folder: str | Path, names: Iterable[str] = ()) -> None:
    """Raise ValueError if a link in a folder, or one of names, leads out of it: the folder's author
    would choose which file is read here. In the hub's cache links may lead two folders up, to the
    model's blobs."""
    home = Path(folder).resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    for file in [*Path(folder).iterdir(), *(Path(folder) / name for name in names)]:
        if not file.resolve().is_relative_to(home):
            raise ValueError(f"{file} leads out of the folder, to {file.resolve()}; put the file "
                             "itself there")


def read_json(file: str | Path) -> Any:
    """Read a JSON file, with a byte order mark or without. Raises OSError, or ValueError for text
    that is not JSON and for repeated keys."""
    return json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple]) -> dict:
    """Build a dict; raise ValueError for a repeated key, of which json keeps only the last. For
    json.loads(text, object_pairs_hook=unique_keys)."""
    keys = [key for key, _ in pairs]
    if len(keys) > len(set(keys)):
        raise ValueError(f"a key is there twice: {', '.join(keys):.60}")
    return dict(pairs)
