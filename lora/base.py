"""
The base model: pick a device and a dtype, load a model and its tokenizer, read a GGUF file.

The only file that imports transformers. trust_remote_code stays off and no pickle is ever read.
"""

import contextlib
import hashlib

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pick_device(wanted="auto"):
    """The torch.device to compute on: cuda, then mps, then cpu."""
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(wanted, device):
    """The base model's dtype. auto is bfloat16 where the device multiplies it fast, else float32:
    a CPU without AMX or AVX512-BF16 emulates bfloat16 several times slower than float32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, probe, lambda: False)()
            for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if fast else torch.float32


def load_tokenizer(name):
    """The tokenizer of a model folder or hub id. Raises ValueError if neither has one."""
    with _readable_errors(name):
        return AutoTokenizer.from_pretrained(name)


def load_model(name, device, dtype):
    """The causal language model of a folder or hub id, in eval mode."""
    with _readable_errors(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    return model.to(device).eval()


def tiny_model(device, dtype):
    """A random Llama of 0.3 M parameters, the same on every device; for scripts/selftest.py. Its
    heads have real models' size, on which the choice of an attention kernel depends."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        initializer_range=0.1))
    return model.to(device, dtype).eval()


def fingerprint(model):
    """16 hex digits that tell one base from another, whatever dtype it is loaded in: of the first
    values of every weight, rounded to bfloat16. Call it before adapters are there."""
    sha = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            start = weight.detach().flatten()[:64].to(torch.bfloat16).cpu()
            sha.update(name.encode() + start.view(torch.int16).numpy().tobytes())
    return sha.hexdigest()[:16]


def save_model(model, tokenizer, folder):
    """Write a model and its tokenizer as a plain Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def use_attention(model, attend):
    """Where model's forward is given a plan, attend computes the attention, with transformers'
    arguments plus plan; else sdpa does, as before."""
    sdpa = AttentionInterface()["sdpa"]

    def choose(*args, plan=None, **kwargs):
        return attend(*args, plan=plan, **kwargs) if plan else sdpa(*args, **kwargs)
    AttentionInterface.register("flat", choose)
    AttentionMaskInterface.register("flat", sdpa_mask)
    model.set_attn_implementation("flat")


def convert_gguf(file, folder):
    """Write the model of a GGUF file into folder as a plain Hugging Face model: float32
    safetensors (the dequantised weights exactly), tokenizer and chat template."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):                                # no random weights: shapes only
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, extra = model.load_state_dict(tensors, strict=False, assign=True)
    if extra or set(missing) - {"lm_head.weight"}:            # the head is tied to the embedding
        raise ValueError(f"fetch: {file.name} does not fit its config: {missing} {extra}")
    model.tie_weights()
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@contextlib.contextmanager
def _readable_errors(name):
    """transformers' loading errors as one line for the user, with the cause behind it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model: could not load {str(name)!r}: {reason}\n  Expected a model folder, a model "
            "that `python -m scripts.fetch_model` lists, or a hub id (which needs the hub)."
        ) from error
