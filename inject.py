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

from lora.base import fetch, load, reach
from lora.run import cli
from lora.surgery import count, find_blocks, freeze_base, lora_layers, split_path, wrap
from lora.use import show


def inject(model: nn.Module, *, target_modules: str | Sequence[str] = "all-linear",
           layers: str | int | Sequence[int] = "all", **lora: float) -> list[str]:
    """Wrap the chosen projections of the chosen blocks in LoRALinear, freeze everything else, and
    return the adapted module paths in order.

    target_modules  "all-linear" (lora/base/reach.py has what it leaves out), or whole names of
                    projections: ("q_proj", "v_proj")
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
    usable, left_out = reach.candidates(model)

    adapted, seen = [], {}
    for path in usable:
        name = path.rpartition(".")[2]                     # self_attn.q_proj -> q_proj
        if split_path(path)[0] not in chosen:
            continue
        seen[name] = None
        if path not in left_out if target_modules == "all-linear" else name in target_modules:
            adapted.append(path)

    missing = [] if target_modules == "all-linear" else [t for t in target_modules if t not in seen]
    if missing or not adapted:
        useless = {p.rpartition(".")[2]: why for p, why in left_out.items() if p not in usable}
        why = "".join(f" {name}: {useless[name]}." for name in missing if name in useless)
        raise ValueError(f"inject: target_modules {missing or list(target_modules)} matched "
                         f"nothing.{why} Linear layers here: {' '.join(seen)}.")
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
    """Say how many modules are adapted, in how many blocks, their names, what share of all
    parameters trains, what share of the blocks' weights has an adapter and what has none."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in adapted)
    experts = " ".join(load.taken_for_experts(model, names))
    note = f"; PEFT takes {experts} for routed experts (docs/models.md)" if experts else ""
    blocks = find_blocks(model)[1]
    used = sum(bool(lora_layers(block)) for block in blocks)
    trainable, everything = count(model)
    return (f"inject: {len(adapted)} modules in {used} of {len(blocks)} blocks: {' '.join(names)}\n"
            f"        {trainable:,} of {everything:,} parameters train "
            f"({trainable / everything:.2%}); {reach.describe(model)}{note}")


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
