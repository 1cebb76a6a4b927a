"""
Replace linear layers by LoRALinear; list, freeze and count them; find a model's blocks.

inject.py decides which layers, or an adapter file does.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .layer import LoRALinear

# where the blocks are: Llama, Qwen, Mistral, Gemma, ...; GPT-2; GPT-NeoX, Pythia; OPT; most
# models that also see or hear
BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers",
          "model.language_model.layers")
TOWERS = re.compile(r"vision|visual|image|video|audio|speech")     # their blocks stay as they are


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return (path, blocks) of the text's blocks: the first layout in BLOCKS that the model has,
    else the one list inside its decoder that has an entry for each hidden layer."""
    for path in BLOCKS:
        with contextlib.suppress(AttributeError):
            return path, model.get_submodule(path)
    found = []
    if hasattr(model, "get_decoder"):
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        decoder = {*model.get_decoder().modules()}
        found = [(path, m) for path, m in model.named_modules()
                 if isinstance(m, nn.ModuleList) and len(m) == depth and m in decoder
                 and not TOWERS.search(path) and split_path(f"{path}.")[0] is None]
    if len(found) == 1:
        return found[0]
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(f"inject: {type(model).__name__} has none of {', '.join(BLOCKS)}. Its "
                     f"children: {children}. Add the path of its blocks to lora.surgery.BLOCKS.")


def text_ids(model: nn.Module, n: int) -> Tensor:
    """Draw n different token ids, always the same, none of them special: what to try a model on."""
    configs = [model.config, model.config.get_text_config()]
    special = {x for c in configs for key, x in vars(c).items() if "token" in key
               and isinstance(x, int)}
    order = torch.randperm(configs[1].vocab_size * 3 // 4,    # special tokens are often the last
                           generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([i for i in order if i > 2 and i not in special][:n], device=model.device)


def split_path(path: str) -> tuple[int | None, str]:
    """Split a module path into the number of its block and the path inside the block.

    >>> split_path("model.layers.3.mlp.up_proj"), split_path("lm_head")
    ((3, 'mlp.up_proj'), (None, 'lm_head'))
    """
    match = re.match(r".*?\.(\d+)\.(.+)", path)
    return (int(match[1]), match[2]) if match else (None, path)


def block_numbers(paths: Iterable[str]) -> list[int]:
    """List the blocks that module paths lie in, sorted, each once."""
    return sorted({split_path(path)[0] for path in paths} - {None})


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return {module path: LoRALinear} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def install(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put each module at its path: {module path: module}."""
    for name, module in modules.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, module)


def wrap(model: nn.Module, names: Iterable[str], **lora: float) -> None:
    """Replace each named module by a LoRALinear around it; lora holds LoRALinear's arguments."""
    install(model, {name: LoRALinear(model.get_submodule(name), **lora) for name in names})


def unwrap(model: nn.Module) -> dict[str, LoRALinear]:
    """Undo wrap; return the LoRALinear layers by path, which install() puts back."""
    layers = lora_layers(model)
    install(model, {name: layer.base_layer for name, layer in layers.items()})
    return layers


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside the block: the model computes the plain base."""
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


def freeze_base(model: nn.Module) -> None:
    """Freeze everything but lora_A and lora_B, norms and embeddings too."""
    model.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List [A, B, A, B, ...] of every LoRA layer, in the model's order."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def count(model: nn.Module) -> tuple[int, int]:
    """Count (trainable, all) parameters. A 4-bit weight is packed: quant_state has its shape."""
    sizes = [(getattr(p, "quant_state", p).shape.numel(), p.requires_grad)
             for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
