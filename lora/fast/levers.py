"""
Switch on the speed levers of the train section where the model supports them. The loss stays.

    fuse(model, settings.train)                       # before shards: modules are tried whole
    layout, lean = choose_layout(model, settings.train, use_attention)
"""

from collections.abc import Callable

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
    return layout, s.lean_head and loss.head_is_linear(model)
