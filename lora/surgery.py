"""
Mechanism: replace linear layers by name with LoRALinear; list, freeze and count them.

Which layers to replace is policy and lives in inject.py, or in an adapter file's own keys.
"""

import contextlib

from .layer import LoRALinear


def lora_layers(model):
    """{module path: LoRALinear} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def install(model, modules):
    """Put each module at its path: {module path: module}."""
    for name, module in modules.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, module)


def wrap(model, names, **lora):
    """Replace each named module by a LoRALinear around it; lora holds LoRALinear's arguments."""
    install(model, {name: LoRALinear(model.get_submodule(name), **lora) for name in names})


def unwrap(model):
    """The inverse of wrap: every base layer is back in its place, the model is the plain base.
    Returns the LoRALinear layers by path; install() puts them back."""
    layers = lora_layers(model)
    install(model, {name: layer.base_layer for name, layer in layers.items()})
    return layers


@contextlib.contextmanager
def disabled(model):
    """The plain base inside the block, the adapter in its place."""
    before = {layer: layer.enabled for layer in lora_layers(model).values()}
    if any(layer.merged for layer in before):
        raise ValueError("surgery: a merged adapter cannot be switched off; unmerge it first")
    for layer in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def freeze_base(model):
    """Only lora_A and lora_B train. A policy of the whole model: norms and embeddings too."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)


def adapter_parameters(model):
    """[A, B, A, B, ...] of every LoRA layer, in the model's order."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def count(model):
    """(trainable, all) parameters; a 4-bit weight is packed, but its state knows its shape."""
    sizes = [(getattr(p, "quant_state", p).shape.numel(), p.requires_grad)
             for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
