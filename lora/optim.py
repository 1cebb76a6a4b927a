"""
AdamW and the learning-rate schedule, by hand.

    optimizer = AdamW(parameters, weight_decay=0.01)
    optimizer.step(lr_at(step, peak=1e-3, warmup=10, total=200))
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import TrainConfig


class AdamW:
    """m = b1 m + (1 - b1) g            the mean of recent gradients
    v = b2 v + (1 - b2) g^2             the mean of their squares
    p = p - lr wd p                     decoupled decay: not part of g, so not rescaled by v
    p = p - lr m' / (sqrt(v') + eps)    m' = m / (1 - b1^t), v' = v / (1 - b2^t): the means start
                                        at zero and would be too small in the first steps

    Kingma & Ba 2014, arXiv:1412.6980, algorithm 1; Loshchilov & Hutter 2017, arXiv:1711.05101,
    algorithm 2. Moments have the parameters' dtype (float32 for adapters).
    """

    def __init__(self, parameters: Iterable[Tensor], betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.t = 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters in place with the gradients in .grad; skip those without one."""
        self.t += 1
        b1, b2 = self.betas
        correct1, correct2 = 1 - b1**self.t, 1 - b2**self.t
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            if p.grad is None:
                continue
            m.mul_(b1).add_(p.grad, alpha=1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            p.mul_(1 - lr * self.weight_decay)
            p.addcdiv_(m, (v / correct2).sqrt_().add_(self.eps), value=-lr / correct1)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and moments on the CPU, p.0, p.1, ..., m.0, ..., for a checkpoint."""
        groups = {"p": self.parameters, "m": self.m, "v": self.v}
        return {f"{kind}.{i}": tensor.detach().cpu()
                for kind, group in groups.items() for i, tensor in enumerate(group)}

    def restore(self, tensors: dict[str, Tensor], t: int = 0) -> None:
        """Load what tensors() returned after t steps; without moments, the parameters alone.
        Raises ValueError if a shape differs."""
        self.t = t
        copy_into(self.parameters, tensors, "p")
        if "m.0" in tensors:
            copy_into(self.m, tensors, "m")
            copy_into(self.v, tensors, "v")


@torch.no_grad()
def copy_into(group: list[Tensor], tensors: dict[str, Tensor], kind: str) -> None:
    """Fill a list of tensors from those of a checkpoint, kind.0, kind.1, ..."""
    for i, tensor in enumerate(group):
        saved = tensors.get(f"{kind}.{i}")
        if saved is None or saved.shape != tensor.shape:
            raise ValueError(f"resume: the checkpoint has no {kind}.{i} of shape "
                             f"{tuple(tensor.shape)}: the lora section has changed")
        tensor.copy_(saved)


def epochs_of(s: TrainConfig, n: int) -> float:
    """Return the passes over n examples. auto: four, or as many as 24 steps take if that is more,
    since a fact needs about twenty repetitions (docs/knowledge.md)."""
    return max(4, 24 / math.ceil(n / s.batch_size)) if s.epochs == "auto" else s.epochs


def lr_at(step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine") -> float:
    """Return the learning rate of update number step (0 is the first).

    >>> [lr_at(s, peak=1.0, warmup=1, total=5, schedule="linear") for s in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    # 1) linear warm-up; step + 1, so that the first update is not wasted at lr = 0
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    # 2) past the end
    if step >= total:
        return 0.0
    # 3) from peak down to 0
    done = (step - warmup) / (total - warmup)                  # 0 .. 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
