"""
LoRALinear: one linear layer with a trained low-rank update beside its frozen weight.

    layer = LoRALinear(nn.Linear(576, 192), r=8, lora_alpha=32)   # computes what the Linear did
    layer.merge(); layer.unmerge()               # W + delta in one matrix, and back to W itself

Shapes: b rows, t positions, d_in and d_out the layer's sizes, r the rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def linear_size(module):
    """(d_in, d_out) of a linear-like module, or None if it is not one.

    Sizes come from the attributes and never from weight.shape: a 4-bit weight is packed, and
    GPT-2's Conv1D (nx, nf) stores its weight transposed.
    """
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
    B starts at zero, so a fresh layer computes exactly what its base layer did.

    base_layer is a module with in_features/out_features, dense or quantised, or a Conv1D;
    ValueError for any other.
    """

    def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0, use_rslora=False):
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
        self.enabled = True
        self._frozen = None                                    # W itself, kept while merged

        at = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **at))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **at))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # nn.Linear's own start, as in PEFT
        self.train(base_layer.training)                        # no dropout in a model at rest

    def forward(self, x):                                      # (..., d_in)
        y = self.base_layer(x)                                 # (..., d_out)
        if self.merged or not self.enabled:
            return y
        # the one place that casts: the small matrices to the dtype of x, never x to float32
        h = F.linear(self.dropout(x), self.lora_A.to(x.dtype))            # (..., r)
        return y + F.linear(self.scaling * h, self.lora_B.to(x.dtype))    # (..., d_out)

    def delta_weight(self):
        """The update as one matrix in float32: scaling B A, (d_out, d_in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @property
    def merged(self):
        return self._frozen is not None

    @torch.no_grad()
    def merge(self):
        """W becomes W + delta, rounded to W's dtype. W itself is kept aside for unmerge."""
        if self.merged:
            return
        weight, delta = self.base_layer.weight, self.delta_weight()
        delta = delta.T if self.transposed else delta
        if not weight.is_floating_point() or weight.shape != delta.shape:
            raise ValueError("merge: the base weight is quantised; merging would round the update "
                             "away. Load the base in bfloat16 or float32 and merge again.")
        self._frozen = weight.data
        weight.data = (weight.float() + delta).to(weight.dtype)

    def unmerge(self):
        """Put the very same W back. A second call changes nothing."""
        if self.merged:
            self.base_layer.weight.data, self._frozen = self._frozen, None

    @property
    def transposed(self):
        """True for Conv1D, whose weight is (d_in, d_out)."""
        return hasattr(self.base_layer, "nf")

    @property
    def weight(self):
        """The base weight: some models look at a projection's weight.dtype."""
        return self.base_layer.weight
