"""
Several processes, one step: each computes its share of the samples, then the gradients are summed.

    torchrun --standalone --nproc_per_node=2 train.py

A step's loss is a sum over supervised tokens divided by their count in the whole window, which
every process knows; so the sum of the processes' gradients is the gradient of one process
(docs/maths.md, section 3). Every process then takes the same AdamW step. With one process all of
this does nothing.
"""

import contextlib
import json
import os
import sys

import torch
import torch.distributed as dist

from . import surgery


def start(device):
    """Join the processes that torchrun started; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")                     # the first one speaks for all
    return device


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items):
    """The share of a list that this process computes; the first process has the longest."""
    return items[rank()::world()]


def add_up(numbers, parameters=()):
    """Sum some numbers, and the gradients of parameters, over all processes in one all-reduce.
    Returns the numbers. A process without a sample has no gradients: they count as zeros."""
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


def from_first(value):
    """The first process's value, for all: plain JSON, no pickle."""
    if world() == 1:
        return value
    data = json.dumps(value).encode()
    size = int(add_up([len(data) * (rank() == 0)])[0])
    mail = torch.zeros(size, dtype=torch.uint8)
    if rank() == 0:
        mail = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mail = mail.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    with all_alive():
        dist.broadcast(mail, 0)
    return json.loads(bytes(mail.cpu().tolist()))


@contextlib.contextmanager
def all_alive():
    """A process that died, as one line for the user of those that wait for it."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError("parallel: another process of this job is gone; what was saved is whole, "
                         "go on with --resume, with as many processes as you like") from error


def shard(model, blocks):
    """Split the frozen weights of each block over the processes (FSDP2, fully_shard); a block is
    whole only while it computes. Adapters stay whole on every process: add_up() sums them. Returns
    the blocks' bytes before and here. Zhao et al. 2023, arXiv:2304.11277, section 3."""
    from torch.distributed.fsdp import fully_shard
    whole = sum(p.nbytes for block in blocks for p in block.parameters())
    if any(not p.is_floating_point() for block in blocks for p in block.parameters()):
        raise ValueError("parallel: model.shard splits dense weights; set model.quant to none")
    for block in blocks:
        fully_shard(block, ignored_params=set(surgery.adapter_parameters(block)))
    return whole, sum(getattr(p, "to_local", lambda p=p: p)().nbytes
                      for block in blocks for p in block.parameters())
