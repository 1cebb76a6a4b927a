"""
Train with several processes: each computes its share of a step, then the gradients are summed.

    torchrun --standalone --nproc_per_node=2 train.py

A step's loss is a sum over supervised tokens divided by their count in the whole window, which
every process knows: the processes' gradients sum to the gradient of one process (docs/maths.md,
section 3). Every process then takes the same AdamW step. One process alone is not affected.
"""

import contextlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import surgery


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")                     # only the first one prints
    return device


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items: list) -> list:
    """Return this process's share of a list; the first process has the longest."""
    return items[rank()::world()]


def add_up(numbers: list, parameters: Sequence[torch.nn.Parameter] = ()) -> list:
    """Sum numbers, and the gradients of parameters, over all processes in one all-reduce. Returns
    the sums. A process without a sample has no gradients: they count as zeros."""
    if world() == 1:
        return numbers
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    device = grads[0].device if grads else torch.device("cuda" if dist.get_backend() == "nccl"
                                                        else "cpu")
    tail = torch.tensor(numbers, dtype=torch.float32 if grads else torch.float64, device=device)
    flat = torch.cat([*(g.flatten() for g in grads), tail])
    with all_alive():
        dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([*(g.numel() for g in grads), len(tail)]), strict=False):
        p.grad = g.view_as(p)
    return flat[len(flat) - len(tail):].tolist()


def from_first(value: Any) -> Any:
    """Send the first process's value to all as JSON, not as pickle; returns it."""
    if world() == 1:
        return value
    data = json.dumps(value).encode() if rank() == 0 else b""
    text = torch.zeros(int(add_up([len(data)])[0]), dtype=torch.uint8)
    if rank() == 0:
        text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    text = text.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    with all_alive():
        dist.broadcast(text, 0)
    return json.loads(bytes(text.cpu().tolist()))


@contextlib.contextmanager
def all_alive() -> Iterator[None]:
    """Turn the RuntimeError of a lost peer into a ValueError that says how to resume."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError("parallel: another process of this job is gone; what was saved is whole, "
                         "go on with --resume, with as many processes as you like") from error


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's dropout; it depends on seed, step and process alone."""
    return random.Random(f"{seed} {step} {rank()}").getrandbits(63)


def shard(model, blocks: Sequence[torch.nn.Module], device: torch.device) -> str:
    """Split the frozen weights of each block over the processes and move the model to the device
    (FSDP2: Zhao et al. 2023, arXiv:2304.11277, section 3). A block is whole only while it computes;
    adapters stay whole, and add_up() sums their gradients. Returns a sentence with the blocks' size
    before and here. ValueError if the weights are quantised."""
    from torch.distributed.fsdp import fully_shard
    whole = sum(p.nbytes for block in blocks for p in block.parameters())
    if any(not p.is_floating_point() for block in blocks for p in block.parameters()):
        raise ValueError("parallel: model.shard splits dense weights; set model.quant to none")
    for block in blocks:
        fully_shard(block, ignored_params=set(surgery.adapter_parameters(block)))
    model.to(device)
    here = sum(getattr(p, "to_local", lambda p=p: p)().nbytes
               for block in blocks for p in block.parameters())
    return (f"model: its blocks are split, {here / 2**30:.2f} GiB here instead of "
            f"{whole / 2**30:.2f}")
