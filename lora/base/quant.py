"""
Quantise a base to 4 or 8 bits (model.quant); keep AdamW's moments in 8 bits (train.optimizer).

    weights = load.fingerprint(model)                 # first: it reads the dense base
    quantise(model, "nf4", torch.device("cuda"))      # moves the model to the device, too
    inject(model, r=8, lora_alpha=32)                 # y = dequantised(W) x + scaling B A x

bitsandbytes does the work. QLoRA, Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3:

    nf4   64 weights in a row share a scale, their largest absolute value; a weight is the index of
          the nearest of 16 quantiles of a normal distribution. Scales are quantised again, to 8
          bits with a float32 for 256 of them: 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
    int8  Each output row has a scale. Inputs are rounded to 8 bits too, except columns with a value
          above 6 (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). On a CPU training does not
          round inputs, evaluation does; checkpointing saves little there.

nf4's W is dequantised for each product, forward and backward, to the dtype it had. No W gets a
gradient; A and B are float32 as always. Norms, head and embeddings stay as they are; PEFT's
prepare_model_for_kbit_training makes them float32, for float16 overflows in them. bfloat16 has
float32's range, and RMSNorm computes in float32 in any dtype.
"""

import logging
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import nn

from ..optim import copy_into
from ..surgery import install
from . import reach


def quantise(model: nn.Module, kind: str, device: torch.device | str) -> list[str]:
    """Move a dense model from the CPU to a device and quantise the linear layers of its text's
    blocks: nf4, int8, or none, which only moves. Layers are quantised one by one on arrival, so
    the device never holds the dense model. Returns their paths; ValueError if there are none."""
    if kind == "none":
        model.to(device)
        return []
    bnb, (usable, why) = _bitsandbytes(f'model.quant "{kind}"'), reach.candidates(model)
    names = [name for name, module in usable.items()
             if type(module) is nn.Linear and why.get(name) != reach.READ]
    if not names:
        raise ValueError(f'quant: the blocks have no nn.Linear for "{kind}"; set model.quant to '
                         '"none"')
    for name in names:
        dense = model.get_submodule(name)
        layer = (_nf4 if kind == "nf4" else _int8)(bnb, dense)
        layer.bias = dense.bias
        install(model, {name: layer.train(dense.training).to(device)})
    model.to(device)
    return names


def _nf4(bnb, dense):
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, device="meta",
                              compute_dtype=dense.weight.dtype)
    layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4",
                                     compress_statistics=True, module=layer)
    # else an evaluation on a CPU with AVX512-BF16 packs the weight for a product without a gradient
    layer.support_avx512bf16_for_cpu = False
    return layer


def _int8(bnb, dense):
    layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, bias=False, device="meta",
                                has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
    return layer


def adamw_8bit(kind: str, parameters: Iterable[nn.Parameter], betas: tuple[float, float],
               eps: float, weight_decay: float) -> SimpleNamespace:
    """Make bitsandbytes' AdamW with the interface of lora/optim.AdamW. adamw8bit keeps the moments
    of matrices with 4,096 elements or more in 8 bits (Dettmers et al. 2021, arXiv:2110.02861);
    paged_adamw8bit also lets CUDA move them to the host when memory is short."""
    parameters = list(parameters)
    device, paged = parameters[0].device.type, kind == "paged_adamw8bit"
    if device != "cuda" and (paged or device != "cpu"):
        raise ValueError(f'train.optimizer "{kind}" does not run on {device}; expected '
                         f'{"cuda" if paged else "cuda or cpu"}. Set it to "ours"')
    adamw = _bitsandbytes(f'train.optimizer "{kind}"').optim.AdamW8bit(
        parameters, betas=betas, eps=eps, weight_decay=weight_decay, is_paged=paged)

    def step(lr):
        adamw.param_groups[0]["lr"] = lr
        adamw.step()

    def tensors():
        weights = {f"p.{i}": p for i, p in enumerate(parameters)}
        moments = {f"{key}.{i}": value for i, p in enumerate(parameters)
                   for key, value in adamw.state[p].items() if torch.is_tensor(value)}
        return {name: tensor.detach().cpu() for name, tensor in (weights | moments).items()}

    def restore(tensors, t=0):
        copy_into(parameters, tensors, "p")
        for name, tensor in tensors.items():
            key, _, i = name.rpartition(".")
            if key not in ("p", "best"):
                p = parameters[int(i)]
                adamw.state[p].update({key: tensor.to(p.device, copy=True), "step": t})
    return SimpleNamespace(parameters=parameters, step=step, zero_grad=adamw.zero_grad,
                           tensors=tensors, restore=restore)


def _bitsandbytes(setting):
    """Import the package. Its log shows errors alone: int8 would write a line for every call."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{setting} needs bitsandbytes, which cannot be imported ({error}); pip "
                         "install -r requirements-quant.txt") from error
    return bitsandbytes
