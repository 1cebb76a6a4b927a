"""
Checkpoints: all that a run needs to go on as if it had never stopped.

    save("runs/demo/checkpoints", tensors, {"step": 120, ...}, keep=2)
    tensors, state = load(newest("runs/demo/checkpoints"))
    runs/demo/checkpoints/000120-5f0c2b7d9a1e4c36.safetensors      step, SHA-256 of the bytes

One is made between two steps: the accumulation window is empty there, and a step that was cut short
is done again whole. No state of a random generator outlives a step either: order, adapters and
dropout are drawn from seed and step. So tensors are adapter, moments and best adapter,
and state, plain JSON, is the rest. The step gives the position in the data.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch

from . import files


def save(folder, tensors, state, keep):
    """Write one, then delete all but the newest keep. A kill leaves the old ones or one more."""
    folder = Path(folder)
    with files.saving(folder):
        folder.mkdir(exist_ok=True)
    data = safetensors.torch.save(tensors, {"state": json.dumps(state)})
    file = folder / f"{state['step']:06d}-{_digest(data)}.safetensors"
    files.write(file, data)
    with files.saving(folder):
        for old in sorted(folder.glob("*.safetensors"), key=lambda f: (f.name[:6], f == file))[
                :-keep]:
            old.unlink()


def newest(folder):
    """The newest checkpoint that is whole, or None. One that is not is said and put aside."""
    for file in sorted(Path(folder).glob("*.safetensors"), reverse=True):
        with files.saving(file):
            if file.stem.partition("-")[2] == _digest(file.read_bytes()):
                return file
            print(f"resume: {file} is damaged (its checksum differs); trying the one before it")
            file.rename(file.with_suffix(".damaged"))
    return None


def load(file):
    """(tensors, state) of a checkpoint, on the CPU."""
    data = Path(file).read_bytes()
    head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), json.loads(head["__metadata__"]["state"])


def differences(saved, now):
    """What is not the same in two flat dictionaries, a line each."""
    return [f"{key}: {json.dumps(saved.get(key))} in the checkpoint, {json.dumps(now.get(key))} now"
            for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:16]
