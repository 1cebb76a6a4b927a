"""
The loss: cross-entropy summed over supervised tokens.

A step's loss is (sum over all its micro-batches) / (supervised tokens in all its micro-batches). In
a mean of micro-batch means, a token's weight would depend on its micro-batch (docs/maths.md).

Shapes: b rows, t positions, d width, v vocabulary, n supervised tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import surgery

IGNORE_INDEX = -100
CHUNK = 2**26                     # bytes of logits that exist at once
BLOCK = 2**21                     # bytes of them that a CPU's cache holds


class Batch(NamedTuple):
    """The inputs of one forward pass and the tokens to predict."""

    inputs: dict                  # arguments of the model's forward
    rows: Tensor                  # (n,) positions that have a label, of all b * t
    targets: Tensor               # (n,) the labels


def ce_sum(model: nn.Module, batch: Batch, lean: bool = True,
           teacher: bool = False) -> tuple[Tensor, int]:
    """Return (sum of cross-entropy in nats, supervised tokens that the model ranks first).

    lean     compute logits in chunks, with their gradient at once (LabelledCE); else use autograd
    teacher  learn the base's probabilities, the adapter off, instead of the labels
             (Hinton et al. 2015, arXiv:1503.02531, section 2; the base teaches itself)
    """
    head, targets, base = model.get_output_embeddings(), batch.targets, None
    outputs_at = hidden_at if lean else logits_at
    if teacher:
        with torch.no_grad(), surgery.disabled(model):
            base = outputs_at(model, batch)                                  # (n, d) or (n, v)
    outputs = outputs_at(model, batch)
    if lean:
        return LabelledCE.apply(outputs, head.weight, head.bias, targets, torch.is_grad_enabled(),
                                base)
    logits = outputs.float()
    hits = (logits.detach().argmax(-1) == targets).sum()
    goal = targets if base is None else torch.softmax(base.float(), -1)
    return F.cross_entropy(logits, goal, reduction="sum"), int(hits)


def hidden_at(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the hidden states (n, d) at the batch's rows: the model without its head."""
    hidden = model.base_model(**batch.inputs, use_cache=False)[0]            # (b, t, d)
    return hidden.flatten(0, 1)[batch.rows]


def logits_at(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the logits (n, v) at the batch's rows: the head sees these rows alone."""
    def keep_rows(head, inputs):
        return (inputs[0].flatten(0, 1)[batch.rows][None],)              # (b, t, d) -> (1, n, d)
    with model.get_output_embeddings().register_forward_pre_hook(keep_rows):
        return model(**batch.inputs, use_cache=False).logits[0]


class LabelledCE(torch.autograd.Function):
    """Compute cross-entropy of hidden (n, d) under a frozen head, and its gradient in forward:

        z = h W^T      p = softmax(z)      ce = sum(-q log p)      dh = (p - q) W

    q is the target, one-hot, or a teacher's softmax(h' W^T) for the rows h' of taught (n, d).
    This takes two matmuls with W; autograd over a checkpointed head takes three. It is Liger's
    fused cross-entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2) for a W without gradient.
    A chunk of z has at most CHUNK bytes.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                targets: Tensor, with_gradient: bool, taught: Tensor | None = None) -> tuple:
        size = max(1, CHUNK // (weight.itemsize * len(weight)))
        few = max(1, BLOCK // (4 * len(weight))) if hidden.device.type == "cpu" else size
        total, hits, gradient = hidden.new_zeros((), dtype=torch.float32), 0, []
        chunks = hidden.split(size)
        teachers = [None] * len(chunks) if taught is None else taught.split(size)
        for h, target, t in zip(chunks, targets.split(size), teachers, strict=True):
            logits = F.linear(h, weight, bias)                               # (size, v)
            qs = None if t is None else F.linear(t, weight, bias)
            for i in range(0, len(h), few):
                rows, at = logits[i:i + few], target[i:i + few, None]
                z = rows.float()                                             # (few, v)
                top, gold = z.amax(1, keepdim=True), z.gather(1, at)
                hits = hits + (gold == top).sum()
                if t is not None:
                    q = torch.softmax(qs[i:i + few].float(), 1)
                    gold = (q * z).sum(1, keepdim=True)
                p = z.sub_(top).exp_()                                       # in z's memory
                norm = p.sum(1, keepdim=True)
                total += (norm.log() + top - gold).sum()
                if with_gradient:
                    p.div_(norm)
                    p = p.scatter_add_(1, at, -torch.ones_like(norm)) if t is None else p.sub_(q)
                    rows.copy_(p)                                            # in the logits' memory
            if with_gradient:
                gradient.append(logits @ weight)
        ctx.save_for_backward(*gradient)
        ctx.set_materialize_grads(False)
        return total, int(hits)

    @staticmethod
    def backward(ctx, d_total: Tensor, _: None) -> tuple:
        return torch.cat(ctx.saved_tensors) * d_total, None, None, None, None, None


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], lean: bool = True) -> list:
    """Return [nats, supervised tokens ranked first, supervised tokens], summed over all batches:
    the mean is by token, as in training."""
    model.eval()
    nats, hits, n_tokens = 0.0, 0, 0
    for batch in batches:
        ce, n = ce_sum(model, batch, lean)
        nats, hits, n_tokens = nats + ce, hits + n, n_tokens + len(batch.targets)
    return [float(nats), hits, n_tokens]


@torch.no_grad()
def ce_rows(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross-entropy of each row of a padded batch, in nats: (b,)."""
    b, t = batch.inputs["input_ids"].shape
    ce = F.cross_entropy(logits_at(model, batch).float(), batch.targets, reduction="none")
    return ce.new_zeros(b).index_add_(0, batch.rows // t, ce)
