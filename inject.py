"""
WHERE adapters go: walk a model's blocks, choose projections by name, wrap them, freeze the rest.

    python inject.py                              # the configured model, as a tree
    python inject.py --lora.target_modules='["q_proj", "v_proj"]' --lora.layers=4

    adapted = inject(model, r=8, lora_alpha=32)   # ["model.layers.0.self_attn.q_proj", ...]
"""

import dataclasses
import sys
from collections.abc import Sequence

from torch import nn

from lora.base import fetch, load
from lora.layer import linear_size
from lora.run import cli
from lora.surgery import count, find_blocks, freeze_base, lora_layers, wrap
from lora.use import show


def inject(model: nn.Module, *, target_modules: str | Sequence[str] = "all-linear",
           layers: str | int | Sequence[int] = "all", **lora: float) -> list[str]:
    """Wrap the chosen projections of the chosen blocks in LoRALinear, freeze everything else, and
    return the adapted module paths in order.

    target_modules  "all-linear", or whole names of projections: ("q_proj", "v_proj")
    layers          "all", N for the last N blocks, or indices of blocks
    lora            LoRALinear's arguments: r, lora_alpha, lora_dropout, use_rslora

    Raises ValueError that lists the names that exist if a target matches nothing.
    """
    present = lora_layers(model)
    if present:
        raise ValueError(f"inject: the model already has {len(present)} LoRA layers, the first at "
                         f"{next(iter(present))}. Load a fresh base model.")
    where, blocks = find_blocks(model)
    chosen = _choose(layers, len(blocks), where)

    adapted, seen = [], {}
    for i in chosen:
        for path, module in blocks[i].named_modules():
            if linear_size(module) is None:
                continue
            name = path.rpartition(".")[2]                 # self_attn.q_proj -> q_proj
            seen[name] = None
            if target_modules == "all-linear" or name in target_modules:
                adapted.append(f"{where}.{i}.{path}")

    missing = [] if target_modules == "all-linear" else [t for t in target_modules if t not in seen]
    if missing or not adapted:
        raise ValueError(f"inject: target_modules {missing or list(target_modules)} matched "
                         f"nothing. Linear layers here: {' '.join(seen)}.")
    wrap(model, adapted, **lora)
    freeze_base(model)
    return adapted


def _choose(layers, n, where):
    """The indices, in order, of the blocks that layers chooses among n."""
    if layers == "all":
        return range(n)
    if isinstance(layers, int):
        if not 1 <= layers <= n:
            raise ValueError(f"inject: layers is {layers}; expected 1 to {n}, the last of {where}")
        return range(n - layers, n)
    wrong = [i for i in layers if not 0 <= i < n]
    if wrong or not layers:
        problem = f"layers {wrong} do not exist" if wrong else "layers is empty"
        raise ValueError(f"inject: {problem}; valid indices are 0 to {n - 1} in {where}")
    return sorted(set(layers))


def report(model: nn.Module, adapted: list[str]) -> str:
    """Say how many modules are adapted, in how many blocks, their names, and what share of all
    parameters trains."""
    names = " ".join(dict.fromkeys(path.rpartition(".")[2] for path in adapted))
    blocks = find_blocks(model)[1]
    used = sum(bool(lora_layers(block)) for block in blocks)
    trainable, everything = count(model)
    return (f"inject: {len(adapted)} modules in {used} of {len(blocks)} blocks: {names}\n"
            f"        {trainable:,} of {everything:,} parameters train "
            f"({trainable / everything:.2%})")


def main(argv: list[str]) -> None:
    settings = cli.take_config(argv, __doc__)
    device = load.pick_device(settings.model.device)
    dtype = load.pick_dtype(settings.model.dtype, device)
    model = load.load_model(fetch.find(settings.model.name), device, dtype,
                            settings.model.trust_remote_code)
    adapted = inject(model, **dataclasses.asdict(settings.lora))
    print(show.tree(model))
    print(report(model, adapted))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
