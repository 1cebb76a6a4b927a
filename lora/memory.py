"""
How much memory a step will need, measured on a small one before training begins.

    memory: a step of 464 tokens needs about 1.1 GiB beside Python and PyTorch: weights 0.51,
    gradients and moments 0.03, activations 0.48, logits 0.04; 1.06 MiB of activations a token
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
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        blocks = model.config.get_text_config().num_hidden_layers
        per_token = blocks * head.shape[1] * head.itemsize    # kept: the inputs of blocks
    logits = 4 * n * len(head) * (1 if lean else 3)
    return {"weights": sum(p.numel() * p.itemsize for p in model.parameters()),
            "gradients and moments": sum(3 * p.numel() * p.itemsize for p in trained),
            "activations": per_token * tokens, "logits": min(logits, CHUNK) if lean else logits}


def report(model, probe, batch, lean=True):
    """The estimate as a sentence."""
    parts, tokens = estimate(model, probe, batch, lean), batch.inputs["input_ids"].numel()
    words = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return (f"memory: a step of {tokens:,} tokens needs about {sum(parts.values()) / 2**30:.1f} "
            f"GiB beside Python and PyTorch: {words}; "
            f"{parts['activations'] / tokens / 2**20:.2f} MiB of activations a token")


def exhausted(error):
    """Whether an error says that memory did not suffice, of the device or of the machine."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


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
