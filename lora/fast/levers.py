"""
Switch on the speed levers of the train section where the model supports them. The loss stays.

    fuse(model, settings.train)                       # before shards: modules are tried whole
    layout, lean = choose_layout(model, settings.train, use_attention)
"""

from collections.abc import Callable

import torch
from torch import nn

from .. import loss
from ..surgery import lora_layers
from . import flat, leaves


def fuse(model, s) -> None:
    """Set train.fused_lora, train.fused_leaves and train.checkpointing on the model."""
    for layer in lora_layers(model).values():
        layer.fused = s.fused_lora
    if s.fused_leaves:
        leaves.fuse(model)
    if s.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def choose_layout(model, s, use_attention: Callable) -> tuple[str, bool]:
    """Return (layout, lean): train.layout and train.lean_head as far as the model supports them.
    Prints what it does not support."""
    layout = s.layout
    try:
        if layout != "padded":
            flat.enable(model, use_attention)
    except flat.Unsupported as reason:
        print(f"train: batches are padded: {reason}")
        layout = "padded"
    if layout == "shared" and flat.drops(model):
        print("train: with dropout no prompt is shared: every sample needs a mask of its own")
        layout = "flat"
    return layout, s.lean_head and head_is_linear(model)


def shares(batches: Callable, items: list[dict]) -> str:
    """Say how many tokens of a step's items are computed: fewer where they begin alike."""
    laid_out = sum(batch.inputs["input_ids"].numel() for batch in batches(items))
    of = sum(len(item["input_ids"]) for item in items)
    return f"; step 1 computes {laid_out:,} tokens for the {of:,} of its examples"


def head_is_linear(model: nn.Module) -> bool:
    """Try on four tokens whether logits are hidden W^T + bias and nothing else (no softcap, no
    scale), as loss.LabelledCE needs."""
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)
    if model.base_model is model or not isinstance(head, nn.Linear):
        return False
    batch = loss.Batch({"input_ids": ids[None]}, ids, ids)
    with torch.no_grad():
        logits = head(loss.hidden_at(model, batch)[None])[0]
        return torch.equal(logits, loss.logits_at(model, batch))
