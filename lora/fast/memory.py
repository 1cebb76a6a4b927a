"""
Estimate how much memory a run needs, from a small step before training begins; choose micro-batches
that fit into what is free.

    memory: a step of 464 tokens needs about 1.1 GiB, an evaluation 0.8, beside 0.5 of Python and
    PyTorch: weights 0.51, gradients and moments 0.03, activations 0.48, logits 0.04; 1.06 MiB of
    activations a token
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from ..generate import PREFILL
from ..loss import CHUNK, Batch, ce_sum
from ..surgery import text_ids

ROWS = 64                         # prompts that an evaluation answers at once
BUDGET = 8192                     # padded tokens a micro-batch has at most, if it has two samples
SPARE = 0.15                      # share of the free memory that stays free: what no estimate sees


def micro_batch_size(items: list[dict], s, model, probe: Batch, lean: bool = True) -> int:
    """Examples a micro-batch: what grad_accum leaves, or as many as train.token_budget takes. Its
    "auto" is BUDGET, or fewer tokens where the free memory does not hold what a step keeps of
    them; then a sentence says so. probe is a small batch, as for estimate()."""
    if s.grad_accum != "auto":
        return -(-s.batch_size // s.grad_accum)
    length, auto = longest(items), s.token_budget == "auto"
    wanted = min(s.batch_size, max(1, (BUDGET if auto else s.token_budget) // length))
    room = free(model.device) if auto else None
    if room is None or not (fits := tokens_that_fit(model, probe, room, lean)) < wanted * length:
        return wanted
    size = max(1, fits // length)
    print(f"memory: {room / 2**30:.1f} GiB are free, which hold {fits:,} tokens of a step: "
          f"micro-batches of {size}, not {wanted}")
    if fits < length:
        print(f"memory: the longest example has {length:,} tokens, more than that. Where it does "
              "not fit: train.checkpointing=true, model.quant=nf4, or a lower dataset.max_length")
    return size


def two_ends(items: list[dict], n: int = 64) -> list[dict]:
    """Return the last n tokens of two examples, with their labels: enough to probe a step with."""
    return [{key: item[key][-n:] for key in ("input_ids", "labels")} | {"example": item["example"]}
            for item in items[:2]]


def tokens_that_fit(model, probe: Batch, room: int, lean: bool = True) -> int:
    """Return how many tokens a step may have beside gradients and moments in room bytes."""
    parts, tokens = estimate(model, probe, probe, lean), probe.inputs["input_ids"].numel()
    word = 4 * len(model.get_output_embeddings().weight)       # float32 logits of a position
    a_token = parts["activations"] / tokens + (0 if lean else 3 * word)
    rest = room * (1 - SPARE) - parts["gradients and moments"] - (CHUNK if lean else 0)
    return max(0, int(rest / a_token))


def free(device: torch.device) -> int | None:
    """Return the bytes that a process may still take on a device: of the graphics card, of Metal's
    recommended size, of the machine and its container. None if the system does not tell."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cache = next(int(x.split()[1]) for x in lines if x.startswith("inactive_file"))
        found.append(limit - used + cache)
    return min(found, default=None)


def questions_at_once(items: list[dict], n_facts: int, n_retained: int, s) -> tuple[int, int]:
    """(prompts that an evaluation answers in one batch, tokens of the longest with its answer)."""
    return min(ROWS, max(8, n_facts, n_retained)), longest(items) + s.max_new_tokens


def longest(items: list[dict]) -> int:
    """The tokens of the longest example."""
    return max(len(item["input_ids"]) for item in items)


def estimate(model, probe: Batch, batch: Batch, lean: bool = True) -> dict[str, float]:
    """Return {purpose: bytes} of a step on batch. probe, a small batch of the same kind, runs once
    to count what its graph keeps for the backward pass; that grows with the number of tokens."""
    head = model.get_output_embeddings().weight
    tokens, n = batch.inputs["input_ids"].numel(), len(batch.targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    per_token = _kept_a_token(model, probe, lean)
    logits = 4 * n * len(head) * (1 if lean else 3)
    return {"weights": sum(p.numel() * p.itemsize for p in model.parameters()),
            "gradients and moments": sum(3 * p.numel() * p.itemsize for p in trained),
            "activations": per_token * tokens, "logits": min(logits, CHUNK) if lean else logits}


def evaluation(model, rows: int, length: int) -> int:
    """Return the bytes that an evaluation needs beside weights and moments when it answers rows
    prompts at once, length tokens each with the answer: keys and values of all, one block's
    activations of the tokens in one forward, float32 logits of the last position and a copy."""
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    widths = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = 4 * config.hidden_size + 3 * (max(widths) if isinstance(widths, list) else widths)
    return (_cached(model) * rows * length + wide * head.itemsize * min(rows * length, PREFILL)
            + 8 * rows * len(head))


@torch.no_grad()
def _cached(model):
    """Count the bytes of keys and values that the model keeps for a token, by trying a few."""
    ids, was = text_ids(model, 8)[None], model.training
    cache = getattr(model.eval()(input_ids=ids), "past_key_values", None)
    model.train(was)
    return sum(x.nbytes for layer in getattr(cache, "layers", [])
               for name in ("keys", "values")
               if torch.is_tensor(x := getattr(layer, name, None))) / ids.numel()


def report(model, probe: Batch, batch: Batch, lean: bool = True, rows: int = 0,
           length: int = 0) -> str:
    """Return the estimates as a sentence; rows and length are those of evaluation()."""
    parts, tokens = estimate(model, probe, batch, lean), batch.inputs["input_ids"].numel()
    words = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    steady = parts["weights"] + parts["gradients and moments"]
    beside = resident() - parts["weights"] if model.device.type == "cpu" else 0
    other = f"{beside / 2**30:.1f} of " if beside > 0 else ""
    return (f"memory: a step of {tokens:,} tokens needs about {sum(parts.values()) / 2**30:.1f} "
            f"GiB, an evaluation {(steady + evaluation(model, rows, length)) / 2**30:.1f}, beside "
            f"{other}Python and PyTorch: {words}; "
            f"{parts['activations'] / tokens / 2**20:.2f} MiB of activations a token")


def resident() -> int:
    """Return the bytes of this process in memory now; 0 where the system has no /proc."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.exists() else 0


def retry_smaller(attempt: Callable, batches, parameters: list[torch.Tensor], step: int) -> tuple:
    """Return attempt(); when memory does not suffice, halve batches.size and try again. Raises
    ValueError with the way out when single examples do not fit, or batches.can_halve is off."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not exhausted(error):
                raise
            if batches.size == 1 or not batches.can_halve:
                raise ValueError(
                    f"train: step {step}: out of memory in micro-batches of {batches.size}; lower "
                    "dataset.max_length, or set train.checkpointing=true or model.quant=nf4"
                ) from error
        for p in parameters:
            p.grad = None
        batches.size = math.ceil(batches.size / 2)
        tqdm.write(f"train: step {step}: out of memory; micro-batches of {batches.size} now")


def exhausted(error: Exception) -> bool:
    """Whether an error says that memory did not suffice, on the device or the machine."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


def _kept_a_token(model, probe, lean):
    """Count the bytes that a step holds of a token: what all blocks keep, or with checkpointing
    their inputs and what one keeps when it is computed again; and as much as one block keeps for
    the gradients inside it."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    kept = _kept(model, probe, lean) / probe.inputs["input_ids"].numel()
    for module in checkpointed:
        module.gradient_checkpointing = True
    blocks, head = model.config.get_text_config().num_hidden_layers, model.get_output_embeddings()
    inputs = blocks * head.weight.shape[1] * head.weight.itemsize
    return (inputs + kept / blocks if checkpointed else kept) + kept / blocks


def _kept(model, batch, lean):
    """Count the bytes that autograd keeps after the forward pass of batch, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    was = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ce, _ = ce_sum(model, batch, lean)                    # alive: no storage is reused
    model.train(was)
    return sum(kept.values())
