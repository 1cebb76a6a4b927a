"""
A base in 4 or 8 bits (model.quant), and AdamW's moments in 8 (train.optimizer): bitsandbytes' work.

    weights = base.fingerprint(model)                 # of the dense base, so first
    quantise(model, "nf4", torch.device("cuda"))      # and the model is there
    inject(model, r=8, lora_alpha=32)                 # y = dequantised(W) x + scaling B A x

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, sections 2 and 3:

    nf4   64 weights in a row share a scale, their largest absolute value; a weight is the index of
          the nearest of 16 quantiles of a normal distribution. Scales are quantised again, to 8
          bits with a float32 for 256 of them: 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
    int8  a scale an output row; inputs are rounded to 8 bits as well, but for columns with a value
          above 6 (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). Training on a CPU does not
          round inputs, its evaluations do; checkpointing saves little there.

nf4's W is dequantised for each product, forward and backward, to the dtype it had. No W gets a
gradient; A and B are float32 as ever. Of the steps known as prepare_model_for_kbit_training:

    freeze everything            inject does, for a dense base too
    norms, head, embeddings      not to float32: float16 overflows in them, bfloat16 has float32's
                                 range, and RMSNorm computes in float32 whatever its weight is
    inputs require a gradient    for reentrant checkpointing alone; ours is not
    checkpointing                train.checkpointing, a choice like any other
"""

import logging
from types import SimpleNamespace

import torch
from torch import nn

from .optim import AdamW, copy_into
from .surgery import install


def quantise(model, kind, device):
    """Move a dense model from the CPU to device, its linear layers except the head as kind: nf4,
    int8, or none, which leaves them. A layer at a time is quantised where it arrives: the device
    never holds the dense model. Returns the module paths; ValueError if there are none."""
    head, names = model.get_output_embeddings(), []
    if kind != "none":
        bnb = _bitsandbytes(f'model.quant "{kind}"')
        names = [name for name, module in model.named_modules()
                 if type(module) is nn.Linear and module is not head]
        if not names:
            raise ValueError(f'quant: no nn.Linear but the head is here for "{kind}"; set '
                             'model.quant to "none"')
    for name in names:
        dense = model.get_submodule(name)
        made = (_nf4 if kind == "nf4" else _int8)(bnb, dense)
        made.bias = dense.bias
        install(model, {name: made.train(dense.training).to(device)})
    model.to(device)
    return names


def _nf4(bnb, dense):
    made = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, device="meta",
                             compute_dtype=dense.weight.dtype)
    made.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4",
                                    compress_statistics=True, module=made)
    # else an evaluation on a CPU with AVX512-BF16 packs the weight for a product without a gradient
    made.support_avx512bf16_for_cpu = False
    return made


def _int8(bnb, dense):
    made = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, bias=False, device="meta",
                               has_fp16_weights=False, threshold=6.0)
    made.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
    return made


def optimizer(kind, parameters, betas, eps, weight_decay):
    """lora/optim.AdamW, or bitsandbytes' AdamW with its face: adamw8bit keeps the moments of
    matrices from 4,096 elements on in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), and
    paged_adamw8bit lets CUDA move them to the host when memory is short."""
    parameters = list(parameters)
    if kind == "ours":
        return AdamW(parameters, betas, eps, weight_decay)
    device, paged = parameters[0].device.type, kind == "paged_adamw8bit"
    if device not in (("cuda",) if paged else ("cuda", "cpu")):
        raise ValueError(f'train.optimizer "{kind}" does not run on {device}; expected cuda'
                         + " or cpu" * (not paged) + '. Set it to "ours"')
    made = _bitsandbytes(f'train.optimizer "{kind}"').optim.AdamW8bit(
        parameters, betas=betas, eps=eps, weight_decay=weight_decay, is_paged=paged)

    def step(lr):
        made.param_groups[0]["lr"] = lr
        made.step()

    def tensors():
        moments = [(f"{key}.{i}", value) for i, p in enumerate(parameters)
                   for key, value in made.state[p].items() if torch.is_tensor(value)]
        return {name: tensor.detach().cpu() for name, tensor in
                [*((f"p.{i}", p) for i, p in enumerate(parameters)), *moments]}

    def restore(tensors, t=0):
        copy_into(parameters, tensors, "p")
        for name, tensor in tensors.items():
            key, _, i = name.rpartition(".")
            if key not in ("p", "best"):
                p = parameters[int(i)]
                made.state[p] |= {key: tensor.to(p.device, copy=True), "step": t}
    return SimpleNamespace(parameters=parameters, step=step, zero_grad=made.zero_grad,
                           tensors=tensors, restore=restore)


def _bitsandbytes(wish):
    """The package. Its log is for errors alone: int8 has a line for every call otherwise."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{wish} needs bitsandbytes, which cannot be imported ({error}); pip "
                         "install -r requirements-quant.txt") from error
    return bitsandbytes
