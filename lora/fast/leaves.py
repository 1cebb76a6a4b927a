"""
Norms and gated activations that keep less for the backward pass: the same numbers, computed again.

    fuse(model)               # 61 norms and 30 gates of SmolLM2; others are left as they are

Autograd keeps every intermediate result of x / rms(x) * w and act(gate) * up, although all of them
follow cheaply from x, gate and up. For a Llama block that is a quarter of what a step keeps.
Chen et al. 2016, arXiv:1604.06174, section 4: drop what is cheap to compute again.
"""

import inspect

import torch
from torch.nn import Parameter

from ..layer import linear_size


class RMSNorm(torch.autograd.Function):
    """y = w x / rms(x), rms(x)^2 = mean(x^2) + eps, over rows of d in float32. With r = 1 / rms(x)
    and g = w dy:  dx = r (g - x r^2 mean(g x)).   Zhang & Sennrich 2019, arXiv:1910.07467."""

    @staticmethod
    def forward(ctx, x, weight, eps, plus_one):
        rows = x.float()
        r = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)             # (..., 1)
        ctx.save_for_backward(x, weight, r)
        ctx.plus_one = plus_one
        if plus_one:                                          # Gemma: w = 1 + weight, one rounding
            return (rows * r * (1.0 + weight.float())).to(x.dtype)
        return weight * (rows * r).to(x.dtype)                # Llama: rounded twice

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        rows, g = x.float(), dy.float() * (weight.float() + ctx.plus_one)
        mean = (g * rows).mean(-1, keepdim=True)
        dx = g.addcmul_(rows, mean.mul_(r).mul_(r), value=-1).mul_(r)
        return dx.to(x.dtype), None, None, None


class Gate(torch.autograd.Function):
    """z = act(gate) * up: keeps gate and up, not act(gate)."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx, dz):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            a = ctx.act(leaf := gate.detach().requires_grad_())
        return torch.autograd.grad(a, leaf, dz * up)[0], dz * a.detach(), None


@torch.no_grad()
def fuse(model) -> int:
    """Give norms and gated MLPs with one of the formulas above a forward that uses it; return how
    many changed. Each is tried: a module keeps its forward unless both give the same bits. The
    norms' weights must be frozen: they get no gradient."""
    changed, dtype = 0, next(p.dtype for p in model.parameters())         # of hidden states
    for module in model.modules():
        for d, device, forward in _candidates(module):
            x = torch.randn(1, 4, d, device=device).to(dtype)
            if torch.equal(forward(x), module.forward(x)):
                module.forward = forward
                changed += 1
                break
    return changed


def _candidates(module):
    """Yield (width and device of x, forward) of the forwards that may compute what this does."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)                  # a norm may have none
    if (type(module).__name__.endswith("RMSNorm") and eps and isinstance(weight, Parameter)
            and weight.dim() == 1 and not weight.requires_grad and _takes_one(module)):
        for plus_one in (False, True):
            yield len(weight), weight.device, lambda x, plus_one=plus_one: RMSNorm.apply(
                x, module.weight, eps, plus_one)
    gate = getattr(module, "gate_proj", None)
    if (all(hasattr(module, name) for name in ("up_proj", "down_proj", "act_fn"))
            and linear_size(gate) and _takes_one(module)):
        yield linear_size(gate)[0], gate.weight.device, lambda x: module.down_proj(
            Gate.apply(module.gate_proj(x), module.up_proj(x), module.act_fn))


def _takes_one(module):
    """Whether a module's forward takes one argument: the replacement takes no more."""
    return len(inspect.signature(module.forward).parameters) == 1
