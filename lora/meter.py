"""
The forgetting meter: how far a model has moved from itself, on texts that are its own.

    meter.drift(model, batches)         # (0.031, 0.84, 0.80): KL, loss now and before

The texts are what the base answered before training. There the base is at its surest, so a change
is a change of what it would have said.
"""

import torch
import torch.nn.functional as F

from . import surgery
from .loss import logits_at


@torch.no_grad()
def drift(model, batches, untouched=None):
    """(KL(base || tuned), cross-entropy of the tuned model, that of the base), in nats per
    supervised token over all batches; the KL is over the whole vocabulary, from both models'
    logits. The base is the same model with its adapter off, or another one, untouched."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        with surgery.disabled(model):
            base = F.log_softmax(logits_at(untouched or model, batch).float(), -1)   # (n, v)
        tuned = F.log_softmax(logits_at(model, batch).float(), -1)
        at = batch.targets[:, None]
        kl = F.kl_div(tuned, base, reduction="sum", log_target=True)
        sums += torch.stack([kl, -tuned.gather(1, at).sum(), -base.gather(1, at).sum()]).cpu()
    return tuple((sums / sum(len(batch.targets) for batch in batches)).tolist())
