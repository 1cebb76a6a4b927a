"""
Keep the tokens of a large data set in its run's folder: a resumed run begins with them at once.

    save(folder, datasets, examples)                  # runs/demo/tokens/training.safetensors, ...
    found = load(folder, "training", examples, key)   # (items, examples, notes), or None

key says what the tokens depend on: examples, settings and tokenizer. With another key, or a file
that is damaged, there are none, and the run tokenises again.
"""

import json
from array import array
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from .. import files
from ..loss import IGNORE_INDEX

LEAST = 2000                      # examples; fewer take a few seconds
NOTES = "dropped", "cut", "split", "left_out", "in_pieces", "no_tools"      # of a QADataset


def save(folder: Path, datasets: tuple, examples: tuple[list[dict], list[dict]]) -> None:
    """Write the items and notes of the QADatasets, for training and validation, that have a key;
    examples are those that each was made of."""
    for name, dataset, part in zip(("training", "validation"), datasets, examples, strict=True):
        if dataset and dataset.key:
            _write(folder / "tokens" / f"{name}.safetensors", dataset, part)


def _write(file, dataset, examples):
    items = dataset.items
    at, ids, labels = {id(e): n for n, e in enumerate(examples)}, array("i"), array("i")
    for item in items:
        ids += item["input_ids"]
        labels += item["labels"]
    tensors = {"ids": torch.frombuffer(ids, dtype=torch.int32),
               "labelled": torch.frombuffer(labels, dtype=torch.int32) != IGNORE_INDEX,
               "lengths": torch.tensor([len(item["input_ids"]) for item in items]),
               "of": torch.tensor([at[id(item["example"])] for item in items]),
               "kept": torch.tensor([at[id(example)] for example in dataset.examples])}
    with files.saving(file):
        file.parent.mkdir(exist_ok=True)
    notes = {name: getattr(dataset, name) for name in NOTES}
    state = {"key": dataset.key, "notes": json.dumps(notes)}
    files.write(file, safetensors.torch.save(tensors, state))


def load(folder: Path | None, name: str, examples: list[dict], key: str) -> tuple | None:
    """Read (items, examples with an item, notes) that save() wrote for the same key, or None."""
    if folder is None:
        return None
    try:
        data = (folder / "tokens" / f"{name}.safetensors").read_bytes()
        head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = safetensors.torch.load(data)
    except (OSError, ValueError, LookupError, SafetensorError):
        return None
    if head["key"] != key:
        return None
    ids, items, start = tensors["ids"], [], 0
    labels = torch.where(tensors["labelled"], ids, IGNORE_INDEX).to(torch.int32)
    ids, labels = array("i", ids.numpy().tobytes()), array("i", labels.numpy().tobytes())
    for length, of in zip(tensors["lengths"].tolist(), tensors["of"].tolist(), strict=True):
        items.append({"input_ids": ids[start:start + length],
                      "labels": labels[start:start + length],
                      "source": examples[of]["source"], "example": examples[of]})
        start += length
    return items, [examples[n] for n in tensors["kept"].tolist()], json.loads(head["notes"])
