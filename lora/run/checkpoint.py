"""
Save and load checkpoints: all that a run needs to go on as if it had never stopped.

    save("runs/demo/checkpoints", tensors, {"step": 120, ...}, keep=2)
    tensors, state = load(newest("runs/demo/checkpoints"))
    runs/demo/checkpoints/000120-5f0c2b7d9a1e4c36.safetensors      step, SHA-256 of the bytes

A checkpoint is written between two steps: a step that was cut short is repeated whole. No random
state outlives a step: order, adapters and dropout are drawn from seed and step. tensors hold
adapter, moments and best adapter; state holds the rest as JSON.
"""

import json
from pathlib import Path

import safetensors.torch
import torch

from .. import files
from . import parallel, runlog


def save(folder: Path | str, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> None:
    """Write a checkpoint, then delete all but the newest keep. A kill may leave one more."""
    folder = Path(folder)
    with files.saving(folder):
        folder.mkdir(exist_ok=True)
    data = safetensors.torch.save(tensors, {"state": json.dumps(state)})
    file = folder / f"{state['step']:06d}-{runlog.digest(data)}.safetensors"
    files.write(file, data)
    with files.saving(folder):
        ages = sorted(folder.glob("*.safetensors"), key=lambda f: (f.name[:6], f == file))
        for old in ages[:-keep]:
            old.unlink()


def newest(folder: Path | str) -> Path | None:
    """Return the newest whole checkpoint, or None. A damaged one is reported and renamed."""
    for file in sorted(Path(folder).glob("*.safetensors"), reverse=True):
        with files.saving(file):
            if file.stem.partition("-")[2] == runlog.digest(file.read_bytes()):
                return file
            print(f"resume: {file} is damaged (its checksum differs); trying the one before it")
            file.rename(file.with_suffix(".damaged"))
    return None


def load(file: Path | str) -> tuple[dict, dict]:
    """Read (tensors, state) of a checkpoint, on the CPU."""
    data = Path(file).read_bytes()
    head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), json.loads(head["__metadata__"]["state"])


def resume_from(folder: Path, identity: dict, force: bool) -> tuple | None:
    """Read (tensors, state) of a run's newest checkpoint on all processes; None if there is none.
    ValueError if settings, data or model have changed since; with force it prints the changes."""
    file = newest(folder / "checkpoints") if parallel.rank() == 0 else None
    file = parallel.from_first(str(file) if file else None)
    if not file:
        print(f"resume: {folder} has no checkpoint yet: from the beginning")
        return None
    tensors, state = load(file)
    changed = differences(state["identity"], json.loads(json.dumps(identity)))
    if changed and not force:
        raise ValueError("resume: the run there has other settings, data or model:\n  "
                         + "\n  ".join(changed) + "\nUndo that, start a new run, or go on all the "
                         "same with --force.")
    for line in changed:
        print(f"resume: {line}")
    print(f"resume: from step {state['step']}")
    return tensors, state


def differences(saved: dict, now: dict) -> list[str]:
    """Say what differs between two flat dictionaries, a line a key."""
    return [f"{key}: {json.dumps(saved.get(key))} in the checkpoint, {json.dumps(now.get(key))} now"
            for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
