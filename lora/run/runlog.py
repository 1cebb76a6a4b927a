"""
Open a run's folder, write run.json and metrics.jsonl there, and read a run: read_run("runs/demo").
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from .. import config, files
from .lock import locked

try:
    import resource
except ImportError:                                            # Windows has none
    resource = None

ROOT = Path(__file__).parents[2]
ANSWERING = "model", "dataset", "keep", "base_weights", "dtype", "format", "template"


@contextlib.contextmanager
def opened(run: str, resume: Path | None = None, rank: int = 0) -> Iterator[Path]:
    """Lock a run's folder: a new one under runs/, or that of the run to resume. An earlier folder
    of the same name is renamed after its time, so nothing is lost. Ranks above 0 write to a
    temporary folder that is deleted. ValueError if run is not a folder name."""
    if rank:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    if not run or Path(run).name != run or run.startswith("."):
        raise ValueError(f"run: train.run is {run!r}; expected a folder name, not a path")
    folder = Path(resume or Path("runs") / run)
    with locked(folder):
        with files.saving(folder):
            if folder.exists() and not resume:
                name = f"{run}-{datetime.fromtimestamp(folder.stat().st_mtime):%Y%m%d-%H%M%S}"
                kept, n = folder.with_name(name), 1
                while kept.exists():
                    n += 1
                    kept = folder.with_name(f"{name}-{n}")
                folder.rename(kept)
                print(f"run: kept the earlier {folder} as {kept}")
            folder.mkdir(parents=True, exist_ok=True)
        if isinstance(sys.stdout, Notes):
            sys.stdout.keep_in(folder / "messages.txt")
        with _ending(folder):
            yield folder


@contextlib.contextmanager
def _ending(folder):
    """Write into status.json how the block ended."""
    state, message = "failed", ""
    try:
        yield
        state = "finished"
    except (SystemExit, KeyboardInterrupt):
        state = "stopped"
        raise
    except BaseException as error:
        message = str(error) or repr(error)
        raise
    finally:
        write_status(folder, state, message)


def write_status(folder: Path, state: str, message: str = "", steps: int | None = None) -> None:
    """Write status.json, for those who watch a run: "training", "finished", "stopped" or "failed".
    steps is how many the run has in all; None leaves the number that is there. A full disk does not
    matter, and nothing waits for the disk: an error is about to be shown."""
    file = folder / "status.json"
    with contextlib.suppress(OSError, ValueError):
        steps = steps or files.read_json(file)["steps"]
    with contextlib.suppress(OSError):
        file.write_text(json.dumps({"state": state, "message": message, "steps": steps}))


class Notes:
    """Standard output that is kept too: in memory, and from keep_in() on in a file."""

    def __init__(self, stream: TextIO):
        self.stream, self.kept, self.file = stream, io.StringIO(), None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with files.saving(self.file or "the messages"):
            self.kept.write(text)
        return self.stream.write(text)

    def keep_in(self, file: Path) -> None:
        """Write what was printed so far to the end of a file, and from now on each line."""
        with files.saving(file):
            out = open(file, "a", encoding="utf-8", errors="replace", buffering=1)
            out.write(self.kept.getvalue())
        self.kept, self.file = out, file


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Keep what is printed in the block, or in a function it decorates, for messages.txt."""
    notes = Notes(sys.stdout)
    with contextlib.redirect_stdout(notes):
        try:
            yield
        finally:
            notes.kept.close()


def resumable(run: str | Path) -> Path:
    """Return the folder of a run that was begun, by its path or its name under runs/."""
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"resume: {run} has no config.json: nothing was begun there. Start a new run. "
                     f"Runs here: {_runs_here()}.")


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """Yield a list that receives a number when Ctrl-C or SIGTERM asks to stop; the caller stops
    where nothing is lost. A second signal raises KeyboardInterrupt at once."""
    stops = []

    def handle(number, frame):
        if stops:
            raise KeyboardInterrupt
        stops.append(number)
        os.write(2, b"\nstopping after this step; once more: at once, from the last checkpoint\n")
    before = {}
    if threading.current_thread() is threading.main_thread():     # only it may set handlers
        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run(NamedTuple):
    """A finished run, read from its folder."""

    name: str                     # demo, or demo/last for another adapter than the best
    adapter: Path                 # runs/demo/adapter
    settings: config.Config       # config.json
    info: dict                    # run.json: base_model, base_weights, format, template, system ...


def read_run(path: str | Path) -> Run:
    """Read the Run of a run's folder, of its name, or of an adapter in it (runs/demo/last). Raises
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
        files.stay_inside(folder)
        info = files.read_json(needed[0])
        if not isinstance(info, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"run: {needed[0]} cannot be read: {error}") from error
    name = folder.resolve().name
    return Run(name if path == folder else f"{name}/{path.name}", adapter,
               config.load(needed[1]), info)


def _runs_here():
    names = sorted(p.parent.name for p in Path("runs").glob("*/run.json"))
    return ", ".join(names) or "none, python train.py makes one"


def run_info(**facts) -> dict:
    """Return the content of run.json: versions, machine, commit, and the caller's facts."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", *(Path(arg).name if Path(arg).is_absolute() else arg
                                for arg in sys.argv)],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "transformers", "safetensors", "numpy")},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        **facts}


def data_identity(examples: tuple[list[dict], list[dict]], tokenizer, format: str) -> dict:
    """Return what tells one run's data, (training, validation) examples, from another's. system is
    the system prompt that most training examples have, or None; systems counts the different."""
    firsts = [example["messages"][0] for example in examples[0]]
    systems = Counter(m["content"] if m["role"] == "system" else None for m in firsts
                      if m["role"] != "text") or Counter([None])
    return {"system": systems.most_common(1)[0][0], "systems": len(systems), "format": format,
            "template": digest(tokenizer.chat_template or ""),
            "data": digest([e["messages"] for part in examples for e in part])}


def start(folder: Path, settings: dict, **facts) -> None:
    """Write config.json and run.json of a new run."""
    (folder / "replay.jsonl").unlink(missing_ok=True)
    write_json(folder / "config.json", settings)
    write_json(folder / "run.json", run_info(**facts))


@contextlib.contextmanager
def reused(file: Path, identity: dict, rank: int = 0) -> Iterator[None]:
    """Take over a file that depends on ANSWERING alone, the base's answers to replay prompts, from
    an earlier run in this folder of runs, if the block would write it anew; keep it for later runs.
    Other code, versions, threads, base or prompts make another file, in runs/.answers."""
    code = [digest_file(f) for f in sorted([*ROOT.glob("*.py"), *(ROOT / "lora").rglob("*.py")])]
    info, facts = run_info(), {k: v for k, v in identity.items() if k.split(".")[0] in ANSWERING}
    kept = file.parent.with_name(".answers") / (
        digest([code, info["versions"], info["machine"], facts]) + file.suffix)
    if kept.exists() and not file.exists() and not rank:
        files.write(file, kept.read_bytes())
        print(f"keep: the base's answers to the replay prompts are an earlier run's ({kept})")
    yield
    if file.exists() and not kept.exists() and not rank:
        kept.parent.mkdir(exist_ok=True)
        files.write(kept, file.read_bytes())


def write_json(file: Path | str, value) -> None:
    """Write a value as JSON, whole or not at all."""
    files.write(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append(file: Path | str, line: dict) -> None:
    """Add a JSON line to a file; readers see it when this returns."""
    with files.saving(file), open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


def show(line: dict) -> str:
    """A line of metrics in words: val_loss 0.1234, recall 98%."""
    shares = "recall", "accuracy", "retention"
    return ", ".join(f"{k} {v:.0%}" if k.endswith(shares) else f"{k} {v:.4f}"
                     for k, v in line.items() if k not in ("step", "epoch"))


def digest(value) -> str:
    """Return the first 16 hex digits of the SHA-256 of bytes, a text, or a value's JSON."""
    if not isinstance(value, bytes | str):
        value = json.dumps(value, sort_keys=True)
    data = value if isinstance(value, bytes) else value.encode()
    return hashlib.sha256(data).hexdigest()[:16]


def digest_file(file: Path | str) -> str:
    """Return the same of a file's bytes."""
    return digest(Path(file).read_bytes())


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory this process has used at once, in GiB: on CUDA the device's. None if
    the system does not tell."""
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
