"""
Several adapters on one base, at most one of them in use.

    bank = Bank(model)
    bank.add("bram", "runs/bram/adapter")
    bank.use("bram", scale=0.6)                  # 0 is the base, 1 what was trained
    with bank.using(None): ...                   # the base, and bram again after it

Every adapter has LoRALinear layers of its own around the same base layers. use() puts them in
their places: no weight is copied or changed, and with none in use the model is the plain base.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import adapter, surgery
from ..layer import LoRALinear


class Bank:
    """adapters is {name: ({module path: LoRALinear}, {module path: its scaling})}; name and scale
    are those in use."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.adapters, self.name, self.scale = model, {}, None, 1.0

    def add(self, name: str, folder: Path | str) -> None:
        """Load an adapter under a name. ValueError if it does not fit the base, or the name is
        taken."""
        if name in self.adapters:
            raise ValueError(f"bank: there is an adapter {name!r} already")
        with self.using(None):
            adapter.load(self.model, folder)
            layers = surgery.unwrap(self.model)
            self.adapters[name] = layers, {path: layer.scaling for path, layer in layers.items()}

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there; where it is in use, the base takes over."""
        if self.name == name:
            self.use(None)
        self.adapters.pop(name, None)

    def use(self, name: str | None, scale: float = 1.0) -> None:
        """Switch to an adapter, or with None to the base. scale multiplies its update."""
        if name is not None and name not in self.adapters:
            raise ValueError(f"bank: no adapter {name!r}; there are {', '.join(self.adapters)}")
        surgery.unwrap(self.model)
        self.name, self.scale = name, scale
        if name is not None:
            layers, scaling = self.adapters[name]
            for path, layer in layers.items():
                layer.scaling = scale * scaling[path]
            surgery.install(self.model, layers)

    def mix(self, name: str, weights: dict[str, float]) -> None:
        """Add the exact weighted sum of adapters {name: weight} under a name. Ranks are
        concatenated: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 ...] [A_1; A_2; ...].
        Interpolation from a to b is {"a": 1 - t, "b": t}."""
        parts, mixed = {}, {}
        for other, weight in weights.items():
            layers, scaling = self.adapters[other]
            for path, layer in layers.items():
                parts.setdefault(path, []).append((layer, weight * scaling[path]))
        with torch.no_grad():
            for path, members in parts.items():
                r = sum(layer.r for layer, _ in members)
                mixed[path] = new = LoRALinear(members[0][0].base_layer, r, lora_alpha=r)
                new.lora_A.copy_(torch.cat([layer.lora_A for layer, _ in members]))
                new.lora_B.copy_(torch.cat([w * layer.lora_B for layer, w in members], 1))
        self.adapters[name] = mixed, {path: layer.scaling for path, layer in mixed.items()}

    @contextlib.contextmanager
    def using(self, name: str | None, scale: float = 1.0) -> Iterator[None]:
        """Use an adapter (None: the base) inside the block, and after it what was in use before."""
        current = self.name, self.scale
        self.use(name, scale)
        try:
            yield
        finally:
            self.use(*current)
