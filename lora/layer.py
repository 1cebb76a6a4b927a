"""
LoRALinear: a frozen linear layer plus a trained low-rank update.

    layer = LoRALinear(nn.Linear(576, 192), r=8, lora_alpha=32)   # computes the same as the Linear
    layer.merge(); layer.unmerge()               # W becomes W + delta, then W again

Shapes: b rows, t positions, d_in and d_out the layer's sizes, r the rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear-like module, None for any other. Sizes are not read from
    weight.shape: a 4-bit weight is packed, and GPT-2's Conv1D (nx, nf) has W transposed."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return module.nx, module.nf
    return None


class LoRALinear(nn.Module):
    """y = W x + scaling B A x      Hu et al. 2021, arXiv:2106.09685, section 4.1

    W (d_out, d_in) is frozen; A (r, d_in) and B (d_out, r) are trained, in float32 whatever the
    dtype of W: small updates vanish in half precision. scaling is lora_alpha / r, or
    lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv:2312.03732).
    base_layer is dense, quantised or a Conv1D; any module that is not linear-like is a ValueError.
    B starts at zero, so a fresh layer computes exactly the same as its base layer:

    >>> base, x = nn.Linear(4, 3), torch.ones(1, 4)
    >>> layer = LoRALinear(base, r=2, lora_alpha=8)
    >>> layer.scaling, tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
    (4.0, (2, 4), (3, 2))
    >>> torch.equal(layer(x), base(x))
    True
    """

    def __init__(self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0,
                 use_rslora: bool = False) -> None:
        super().__init__()
        if linear_size(base_layer) is None:
            raise ValueError(f"layer: {type(base_layer).__name__} is not linear-like; "
                             "expected in_features and out_features")
        if r < 1:
            raise ValueError(f"layer: r is {r}; expected at least 1")
        self.in_features, self.out_features = linear_size(base_layer)
        self.base_layer = base_layer
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout)
        self.enabled = self.fused = True
        self._frozen = None                                    # the original W while merged

        at = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **at))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **at))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and PEFT do
        self.train(base_layer.training)                        # no dropout in a model in eval mode

    def forward(self, x: Tensor) -> Tensor:                    # (..., d_in)
        if self.merged or not self.enabled:
            return self.base_layer(x)
        if self.fused and self.dense and not (self.training and self.dropout.p):
            return LoRAFunction.apply(x, self.weight.T if self.transposed else self.weight,
                                      self.base_layer.bias, self.lora_A, self.lora_B, self.scaling)
        y = self.base_layer(x)                                 # (..., d_out)
        # cast the small matrices to the dtype of x, never x to float32
        h = F.linear(self.dropout(x), self.lora_A.to(x.dtype))            # (..., r)
        return y + F.linear(self.scaling * h, self.lora_B.to(x.dtype))    # (..., d_out)

    def delta_weight(self) -> Tensor:
        """Compute the update as one float32 matrix: scaling B A, (d_out, d_in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @property
    def merged(self) -> bool:
        return self._frozen is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Replace W by W + delta, rounded to W's dtype; keep W for unmerge."""
        if self.merged:
            return
        weight, delta = self.base_layer.weight, self.delta_weight()
        delta = delta.T if self.transposed else delta
        if not weight.is_floating_point() or weight.shape != delta.shape:
            raise ValueError("merge: the base weight is quantised; merging would round the update "
                             "away. Load the base in bfloat16 or float32 and merge again.")
        self._frozen = weight.data
        weight.data = (weight.float() + delta).to(weight.dtype)

    def unmerge(self) -> None:
        """Put the original W back. A second call changes nothing."""
        if self.merged:
            self.base_layer.weight.data, self._frozen = self._frozen, None

    @property
    def dense(self) -> bool:
        """Whether W is a plain matrix, not a packed one."""
        return type(self.base_layer) is nn.Linear or self.transposed

    @property
    def transposed(self) -> bool:
        """Whether the layer is a Conv1D, whose weight is (d_in, d_out)."""
        return hasattr(self.base_layer, "nf")

    @property
    def weight(self) -> Tensor:
        """The base weight: some models read a projection's weight.dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias: some models read a projection's bias."""
        return self.base_layer.bias


class LoRAFunction(torch.autograd.Function):
    """Compute y = W x + scaling B A x and its gradients by hand. For rows x (n, d_in):

        h = x A^T              y  = x W^T + scaling h B^T         in the memory of x W^T
        u = scaling dy B       dx = dy W + u A                    in the memory of dy W
                               dA = u^T x      dB = scaling dy^T h

    Each product with A or B has r columns or rows; dW and B A are never formed. Only h and a
    reference to x are kept: q, k and v share one x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor,
                lora_B: Tensor, scaling: float) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.flatten(0, -2)                                # (n, d_in)
        h, y = rows @ A.T, F.linear(rows, weight, bias)        # (n, r), (n, d_out)
        y.addmm_(h, B.T, alpha=scaling)
        ctx.save_for_backward(x, h, weight, lora_A, lora_B)
        ctx.scaling = scaling
        # no view to autograd: a model may add to it in place, as Llama 4 does
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, h, weight, lora_A, lora_B = ctx.saved_tensors
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows, dy = x.flatten(0, -2), dy.flatten(0, -2)         # (n, d_in), (n, d_out)
        u = ctx.scaling * (dy @ B)                             # (n, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(u, A).view_as(x)
        dA, dB = u.T @ rows, (h.T @ dy).T.mul_(ctx.scaling)    # h^T dy: 3x faster than dy^T h
        return dx, None, None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), None
