"""
The loss: cross-entropy summed over supervised tokens, and how many there are.

A step's loss is (sum over all its micro-batches) / (count over all its micro-batches). A mean of
micro-batch means would weigh a token by the company it keeps; docs/maths.md section 3 has the sum.

Shapes: b rows, t positions, d width, v vocabulary, n supervised tokens.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def count(labels):
    """Supervised tokens in labels (b, t). Nothing predicts the first column."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def ce_sum(model, batch):
    """(sum of cross-entropy in nats, number of supervised tokens the model ranked first).

    batch has input_ids, attention_mask and labels, each (b, t). The vocabulary is computed at the
    n positions with a label to predict and nowhere else: a hook picks them out before the head.
    """
    targets = batch["labels"][:, 1:]                            # (b, t-1), from position i
    supervised = targets != IGNORE_INDEX
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: (inputs[0][:, :-1][supervised],))  # (b, t, d) -> (n, d)
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       use_cache=False).logits.float()          # (n, v)
    finally:
        hook.remove()
    targets = targets[supervised]                               # (n,)
    hits = (logits.detach().argmax(-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), int(hits)


@torch.no_grad()
def evaluate(model, batches):
    """(nats per supervised token, share of them ranked first) over all batches, weighted by
    token like the training loss."""
    model.eval()
    total, hits, n_tokens = 0.0, 0, 0
    for batch in batches:
        ce, right = ce_sum(model, batch)
        total, hits, n_tokens = total + ce.item(), hits + right, n_tokens + count(batch["labels"])
    return total / n_tokens, hits / n_tokens
