"""
The loss: cross-entropy summed over supervised tokens, and how many there are.

A step's loss is (sum over all its micro-batches) / (count over all its micro-batches). A mean of
micro-batch means would weigh a token by the company it keeps; docs/maths.md section 3 has the sum.

Shapes: b rows, t positions, d width, v vocabulary, n supervised tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import surgery

IGNORE_INDEX = -100
CHUNK = 2**26                     # bytes of logits that exist at once


class Batch(NamedTuple):
    """What a model computes in one forward, and where it is asked for the next token."""

    inputs: dict                  # arguments of the model's forward
    rows: torch.Tensor            # (n,) positions with a label to predict, of all b * t
    targets: torch.Tensor         # (n,) the labels


def ce_sum(model, batch, lean=True, teacher=False):
    """(sum of cross-entropy in nats, number of supervised tokens the model ranked first).

    The vocabulary is computed for the n rows with a label and for no other. lean: in chunks, and
    the gradient at once, so that logits never exist as a whole (LabelledCE); else plain autograd.
    teacher: towards what the base, the adapter off, thinks of the next token, not its label alone
    (Hinton et al. 2015, arXiv:1503.02531, section 2; the base teaches itself).
    """
    head, targets, taught = model.get_output_embeddings(), batch.targets, None
    if teacher:
        with torch.no_grad(), surgery.disabled(model):
            taught = _through_head(model, batch, lambda rows: rows[:0])[0]   # (n, d)
    if lean:
        hidden = _through_head(model, batch, lambda rows: rows[:0])[0]       # (n, d)
        return LabelledCE.apply(hidden, head.weight, head.bias, targets, torch.is_grad_enabled(),
                                taught)
    logits = logits_at(model, batch).float()                                 # (n, v)
    hits = (logits.detach().argmax(-1) == targets).sum()
    wanted = targets if taught is None else torch.softmax(head(taught).float(), -1)
    return F.cross_entropy(logits, wanted, reduction="sum"), int(hits)


class LabelledCE(torch.autograd.Function):
    """Cross-entropy of hidden (n, d) under a frozen head, gradient made in the forward pass:

        z = h W^T      p = softmax(z)      ce = sum(-q log p)      dh = (p - q) W

    where q is the target, one-hot, or a teacher's softmax(h' W^T) for the rows h' of taught (n, d).
    Two matmuls with W; autograd over a checkpointed head takes three, and keeps z or h W^T again.
    Liger's fused cross-entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2) for a W without
    gradient. A chunk of z has at most CHUNK bytes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, with_gradient, taught=None):
        size = max(1, CHUNK // (4 * len(weight)))
        total, hits, gradient = hidden.new_zeros((), dtype=torch.float32), 0, []
        teachers = [None] * len(targets) if taught is None else taught.split(size)
        for h, target, t in zip(hidden.split(size), targets.split(size), teachers, strict=False):
            z = F.linear(h, weight, bias).float()                            # (size, v)
            top, at = z.amax(1, keepdim=True), target[:, None]
            gold = z.gather(1, at)
            hits += int((gold == top).sum())
            if t is not None:
                q = torch.softmax(F.linear(t, weight, bias).float(), 1)
                gold = (q * z).sum(1, keepdim=True)
            p = z.sub_(top).exp_()                                           # in z's own memory
            norm = p.sum(1, keepdim=True)
            total += (norm.log() + top - gold).sum()
            if with_gradient:
                p.div_(norm)
                p = p.scatter_add_(1, at, -torch.ones_like(norm)) if t is None else p.sub_(q)
                gradient.append(p.to(h.dtype) @ weight)
        ctx.save_for_backward(*gradient)
        ctx.set_materialize_grads(False)
        return total, hits

    @staticmethod
    def backward(ctx, d_total, _):
        return torch.cat(ctx.saved_tensors) * d_total, None, None, None, None, None


def head_is_linear(model):
    """Whether logits are hidden W^T + bias and nothing else (no softcap, no scale), as LabelledCE
    assumes: a few tokens show it."""
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)
    batch = Batch({"input_ids": ids[None]}, ids, ids)
    with torch.no_grad():
        hidden, logits = _through_head(model, batch, lambda rows: rows)
        return isinstance(head, torch.nn.Linear) and torch.equal(head(hidden[None])[0], logits)


@torch.no_grad()
def evaluate(model, batches, lean=True):
    """[nats, supervised tokens ranked first, supervised tokens] summed over all batches, for a mean
    by token like the training loss."""
    model.eval()
    sums = [(*ce_sum(model, batch, lean), len(batch.targets)) for batch in batches]
    ce, hits, n_tokens = map(sum, zip(*sums, strict=True)) if sums else (0, 0, 0)
    return [float(ce), hits, n_tokens]


@torch.no_grad()
def ce_rows(model, batch):
    """The cross-entropy of each row of a padded batch, in nats: (b,)."""
    b, t = batch.inputs["input_ids"].shape
    ce = F.cross_entropy(logits_at(model, batch).float(), batch.targets, reduction="none")
    return ce.new_zeros(b).index_add_(0, batch.rows // t, ce)


def logits_at(model, batch):
    """Logits (n, v) at the batch's rows."""
    return _through_head(model, batch, lambda rows: rows)[1]


def _through_head(model, batch, pass_on):
    """(hidden states (n, d) at the batch's rows, logits of those that pass_on gives the head)."""
    seen = []

    def pick(head, inputs):
        seen.append(inputs[0].flatten(0, 1)[batch.rows])                     # (b, t, d) -> (n, d)
        return (pass_on(seen[0])[None],)
    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits = model(**batch.inputs, use_cache=False).logits[0]
        return seen[0], logits
    finally:
        hook.remove()
