"""
What a run writes about itself, run.json once and metrics.jsonl a line at a time, and reading it
back: read_run("runs/demo").
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from . import config, files
from .fetch import stay_inside

try:
    import resource
except ImportError:                                            # Windows has none
    resource = None


@contextlib.contextmanager
def opened(run, resume=None, rank=0):
    """The folder of a run, held for this process: a new, empty one, or that of the run to resume. A
    folder of that name which is there already is renamed after the time it was made, so nothing
    saved is lost. Processes after the first get a scratch folder: what they save is what it saves.
    """
    if rank:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    if not run or Path(run).name != run or run.startswith("."):
        raise ValueError(f"run: train.run is {run!r}; expected a folder name, not a path")
    folder = Path(resume or Path("runs") / run)
    with files.locked(folder), contextlib.ExitStack() as saving:
        saving.enter_context(files.saving(folder))
        if folder.exists() and not resume:
            made = datetime.fromtimestamp(folder.stat().st_mtime)
            names = (f"{run}-{made:%Y%m%d-%H%M%S}" + f"-{n}" * (n > 1) for n in itertools.count(1))
            kept = folder.rename(next(k for k in map(folder.with_name, names) if not k.exists()))
            print(f"run: kept the earlier {folder} as {kept}")
        folder.mkdir(parents=True, exist_ok=True)
        saving.close()
        yield folder


def resumable(run):
    """The folder of a run that was begun, given as a path or as a name under runs/."""
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"resume: {run} has no config.json: nothing was begun there. Start it anew. "
                     f"Runs here: {_runs_here()}.")


@contextlib.contextmanager
def stoppable():
    """A list, empty until Ctrl-C or SIGTERM asks to stop: the caller does so where nothing is
    lost. A second one stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nstopping after this step; once more: at once, from the last checkpoint\n")
    before = {}
    if threading.current_thread() is threading.main_thread():     # handlers are its alone
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run(NamedTuple):
    """A finished run, read back from its folder."""

    name: str                     # demo, or demo/last for another adapter than the best
    adapter: Path                 # runs/demo/adapter
    settings: config.Config       # config.json
    info: dict                    # run.json: base_model, base_weights, format, template, system ...


def read_run(path):
    """The Run of a run's folder, of its name, or of an adapter in it (runs/demo/last). Raises
    ValueError that names what is missing."""
    path = next((p for p in (Path(path), Path("runs") / path) if (p / "run.json").exists()
                 or (p / "adapter_config.json").exists()), Path(path))
    folder = path.parent if (path / "adapter_config.json").exists() else path
    needed = [folder / "run.json", folder / "config.json"]
    adapter = folder / "adapter" if path == folder else path
    missing = [str(p) for p in [*needed, adapter / "adapter_config.json"] if not p.exists()]
    if missing:
        raise ValueError(f"run: {path} is no finished run: {', '.join(missing)} is missing. "
                         f"Runs here: {_runs_here()}.")
    try:
        stay_inside(folder)
        info = json.loads(needed[0].read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"run: {needed[0]} cannot be read: {error}") from error
    name = folder.resolve().name
    return Run(name if path == folder else f"{name}/{path.name}", adapter,
               config.load(needed[1]), info)


def _runs_here():
    there = sorted(p.parent.name for p in Path("runs").glob("*/run.json"))
    return ", ".join(there) or "none, python train.py makes one"


def run_info(**facts):
    """The content of run.json: versions, machine, commit, and the caller's facts."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", *map(str, sys.argv)],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "transformers", "safetensors", "numpy")},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        **facts}


def write_json(file, value):
    files.write(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append(file, line):
    """One JSON line; readers see it when this returns."""
    files.append(file, json.dumps(line, ensure_ascii=False))


def digest(value):
    """The first 16 hex digits of the SHA-256 of a text, or of a value's JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(file):
    """The same of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def peak_memory_gib(device):
    """The most memory this process has had at once, in GiB: on CUDA the device's. None if the
    system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024             # getrusage: bytes or KiB
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _commit():
    """The commit of the checkout, with + if files differ from it; None outside git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"],
                              capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
