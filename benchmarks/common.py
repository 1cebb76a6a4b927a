"""
What an arm of train_speed.py reports, for every trainer the same: hashes of the samples that it
received and of the A it started from. It needs torch alone, so that other environments import it.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from lora.run import runlog

IGNORE = -100


def fill_a(matrices: Iterable[torch.Tensor], seed: int) -> str:
    """Fill every A from one seed, as nn.Linear starts; the matrices come in the model's order.

    Returns a hash of what was drawn: in float32, before an A of bfloat16 rounds it.
    """
    generator, sha = torch.Generator().manual_seed(seed), hashlib.sha256()
    for matrix in matrices:
        drawn = (2 * torch.rand(matrix.shape, generator=generator) - 1) / matrix.shape[1]**0.5
        matrix.copy_(drawn)
        assert torch.equal(matrix.cpu(), drawn.to(matrix.dtype))
        sha.update(drawn.numpy().tobytes())
    return sha.hexdigest()[:16]


def step_hash(rows: Iterable[tuple]) -> str:
    """Hash a step's (ids, labels) in any order."""
    return runlog.digest(sorted([list(ids), list(labels)] for ids, labels in rows))


def received(batches: list[dict]) -> list[tuple]:
    """List the (ids, labels) of the samples that a model got in a step: pads are removed, a
    padding-free row is split again."""
    rows = []
    for batch in batches:
        ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
        if batch.get("attention_mask") is None:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
            pairs = zip(ids[0].tensor_split(starts), labels[0].tensor_split(starts), strict=True)
        else:
            mask = batch["attention_mask"].cpu().bool()
            pairs = ((i[m], y[m]) for i, y, m in zip(ids, labels, mask, strict=True))
        rows += [(i.tolist(), y.tolist()) for i, y in pairs]
    return rows


def micro_size(arm: str, batch: int) -> int | None:
    """Return M of an arm named MxA, else None. ValueError if M A is not the batch."""
    match = re.search(r"-(\d+)x(\d+)", arm)
    if match and int(match[1]) * int(match[2]) != batch:
        raise ValueError(f"{arm}: {match[0][1:]} does not make the {batch} of --batch")
    return match and int(match[1])


def end_first() -> None:
    """Out of memory: end this process first."""
    oom_score = Path("/proc/self/oom_score_adj")
    if oom_score.exists():
        oom_score.write_text("1000")
