"""
How much memory a step will need, measured on a small one before training begins.

    memory: about 1.6 GiB: weights 0.50, gradients and moments 0.05, activations 0.98 (0.84 MiB a
    token, 1,193 tokens), logits 0.06
"""

import torch

from .loss import CHUNK, ce_sum


def estimate(model, probe, batch, lean=True):
    """Bytes by purpose of a step on batch. probe, a small batch of the same kind, is run once to
    count what its graph keeps for the backward pass; that grows with the number of tokens."""
    head = model.get_output_embeddings().weight
    tokens, n = batch.inputs["input_ids"].numel(), len(batch.targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    per_token = _kept(model, probe, lean) / probe.inputs["input_ids"].numel()
    if getattr(model, "is_gradient_checkpointing", False):    # kept: the inputs of blocks
        per_token = model.config.get_text_config().num_hidden_layers * head.shape[1] * head.itemsize
    logits = 4 * n * len(head) * (1 if lean else 3)
    return {"weights": sum(p.numel() * p.itemsize for p in model.parameters()),
            "gradients and moments": sum(3 * p.numel() * p.itemsize for p in trained),
            "activations": per_token * tokens, "logits": min(logits, CHUNK) if lean else logits}


def report(model, probe, batch, lean=True):
    """The estimate as a sentence."""
    parts, tokens = estimate(model, probe, batch, lean), batch.inputs["input_ids"].numel()
    words = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return (f"memory: a step of {tokens:,} tokens needs about {sum(parts.values()) / 2**30:.1f} "
            f"GiB: {words}; {parts['activations'] / tokens / 2**20:.2f} MiB of activations a token")


def _kept(model, batch, lean):
    """Bytes that autograd keeps after the forward pass of batch, the parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    was = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ce, _ = ce_sum(model, batch, lean)                    # alive: no storage is reused
    model.train(was)
    return sum(kept.values())
