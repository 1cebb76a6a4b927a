"""
What a run writes about itself, run.json once and metrics.jsonl a line at a time, and reading it
back: read_run("runs/demo").
"""

import hashlib
import json
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from . import config
from .fetch import stay_inside

try:
    import resource
except ImportError:                                            # Windows has none
    resource = None


def open_folder(run):
    """A new, empty folder. One that is already there is renamed after the time it was made, so
    nothing saved is lost."""
    if not run or Path(run).name != run or run.startswith("."):
        raise ValueError(f"run: train.run is {run!r}; expected a folder name, not a path")
    folder = Path("runs") / run
    if folder.exists():
        made = datetime.fromtimestamp(folder.stat().st_mtime)
        kept = folder.rename(folder.with_name(f"{run}-{made:%Y%m%d-%H%M%S}"))
        print(f"run: kept the earlier {folder} as {kept}")
    folder.mkdir(parents=True)
    return folder


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
        there = sorted(p.parent.name for p in Path("runs").glob("*/run.json"))
        raise ValueError(f"run: {path} is no finished run: {', '.join(missing)} is missing. "
                         f"Runs here: {', '.join(there) or 'none, python train.py makes one'}.")
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
    Path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def append(file, line):
    """One JSON line; readers see it when this returns."""
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


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
