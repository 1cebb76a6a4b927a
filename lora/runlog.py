"""
What a run writes about itself: run.json once, metrics.jsonl a line at a time.
"""

import hashlib
import json
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

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
