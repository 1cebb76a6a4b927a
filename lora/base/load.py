"""
Pick a device and a dtype; load a base model and its tokenizer; turn a GGUF file into a folder.

Only lora/base imports transformers. No pickle is ever read; Python code that a model brings runs
only if model.trust_remote_code is true.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import conversion_mapping
from transformers.masking_utils import sdpa_mask

from .. import config
from ..files import stay_inside
from . import templates

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pick_device(name: str = "auto") -> torch.device:
    """Return the device to compute on; auto is cuda, then mps, then cpu."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the base model's dtype; auto is bfloat16 where the device multiplies it fast, else
    float32. A CPU without AMX or AVX512-BF16 emulates bfloat16 several times slower. A graphics
    card without it computes in float32, and a sentence says so: float16's gradients would need
    loss scaling, for its smallest numbers are too large."""
    if name != "auto":
        return getattr(torch, name)
    if fast_bfloat16(device):
        return torch.bfloat16
    if device.type == "cuda":
        print("model: this card has no bfloat16 (it came with Ampere, compute capability 8.0): "
              "float32, which takes twice the memory; model.quant=nf4 holds the weights in 4 bits")
    return torch.float32


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 at least as fast as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def load_tokenizer(name: str | Path, trust_remote_code: bool = False,
                   variables: dict | None = None, day: str | None = None
                   ) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id, and prepare its chat template (see
    templates.py for variables and day). Raises ValueError if there is none."""
    with _readable_errors(name, "tokenizer.json"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code)
    templates.prepare(tokenizer, variables, day)
    return tokenizer


def configured_tokenizer(name: str | Path, settings: config.Config
                         ) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer as a configuration says."""
    return load_tokenizer(name, settings.model.trust_remote_code, settings.dataset.template_vars,
                          settings.dataset.date)


def load_model(name: str | Path, device: torch.device | str, dtype: torch.dtype,
               trust_remote_code: bool = False) -> torch.nn.Module:
    """Load the language model of a folder or hub id, in eval mode: the causal class, else the one
    for images and text, whose text is then trained. Raises ValueError if weights are missing:
    transformers alone goes on with random numbers in their place."""
    with _readable_errors(name):
        for auto in _auto_classes(name, trust_remote_code):
            model, info = auto.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
                output_loading_info=True, ignore_mismatched_sizes=True)
            wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            if not wrong:
                break
        else:
            raise ValueError(f"{len(wrong)} weights of config.json are missing or of another "
                             f"shape: {', '.join(wrong[:3])}")
    return model.to(device).eval()


def _auto_classes(name, trust_remote_code):
    """The auto classes that have an entry for the model's config, in order."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    found = [auto for auto in (transformers.AutoModelForCausalLM,
                               transformers.AutoModelForImageTextToText)
             if type(config) in auto._model_mapping
             or auto.__name__ in (getattr(config, "auto_map", None) or {})]
    if not found:
        raise ValueError(f"{config.model_type!r} is no language model that transformers "
                         f"{transformers.__version__} knows, neither causal nor of images and text")
    return found


def taken_for_experts(model, names: Iterable[str]) -> list[str]:
    """List the names that PEFT, with transformers 5, takes for those of routed experts in this
    architecture: for it an MLP's gate_proj is the experts' gate_up_proj, of transformers 4."""
    kind = conversion_mapping._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    fused = {"qwen2_moe": {"gate_proj", "up_proj", "down_proj", "gate"},
             "mixtral": {"w1", "w2", "w3", "gate"}}
    return sorted(fused.get(kind, set()) & {*names})


def tiny_model(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Make a random Llama of 0.3 M parameters, the same on every device, for scripts/selftest.py.
    Its heads have a real model's size: the choice of an attention kernel depends on it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        initializer_range=0.1))
    return model.to(device, dtype).eval()


def fingerprint(model: torch.nn.Module) -> str:
    """Hash the first 64 values of every weight, rounded to bfloat16: 16 hex digits that tell one
    base from another in any dtype. Call it before adapters are injected."""
    sha = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            start = weight.detach().flatten()[:64].to(torch.bfloat16).cpu()
            sha.update(name.encode() + start.view(torch.int16).numpy().tobytes())
    return sha.hexdigest()[:16]


def save_model(model, tokenizer, folder: str | Path) -> None:
    """Write a model and its tokenizer as a plain Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_gguf(file: Path, folder: str | Path) -> None:
    """Write the model of a GGUF file into a folder: float32 safetensors that equal the dequantised
    weights, tokenizer and chat template."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):                                # no random weights: shapes only
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, extra = model.load_state_dict(tensors, strict=False, assign=True)
    if extra or set(missing) - {"lm_head.weight"}:            # the head is tied to the embedding
        raise ValueError(f"fetch: {file.name} does not fit its config: {missing} {extra}")
    model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    save_model(model.float(), tokenizer, folder)


def use_attention(model, attend: Callable | None) -> None:
    """Let attend compute the text's attention where the model's forward gets a plan; elsewhere
    sdpa does, and everywhere with None. attend receives transformers' arguments and the plan."""
    sdpa = transformers.AttentionInterface()["sdpa"]

    def choose(*args, plan=None, **kwargs):
        return attend(*args, plan=plan, **kwargs) if plan else sdpa(*args, **kwargs)
    transformers.AttentionInterface.register("flat", choose)
    transformers.AttentionMaskInterface.register("flat", sdpa_mask)
    name, text = "flat" if attend else "sdpa", model.config.get_text_config()
    part = next((key for key in model.config.sub_configs
                 if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation({part: name} if part else name)


@contextlib.contextmanager
def _readable_errors(name: str | Path, needed: str = "") -> Iterator[None]:
    """Turn the dozen kinds of errors of transformers into a ValueError with reason and fix. needed:
    the file that is read beside config.json, where it is not the weights."""
    folder = os.path.isdir(name) and Path(name)
    try:
        if folder:
            stay_inside(folder, _shards(folder))
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        fix = ("Expected a model folder, a model that `python -m scripts.fetch_model` lists, or a "
               "hub id (which needs the hub).")
        if "trust_remote_code" in str(error):
            fix = ("That code was not run. If you trust it: train.py, inject.py and dataset.py run "
                   "it with --model.trust_remote_code=true")
        elif folder and (damaged := _damaged(folder, needed)):
            fix = f"In this folder: {', '.join(damaged)}. Copy it again, whole."
        raise ValueError(f"model: could not load {str(name)!r}: {reason}\n  {fix}") from error


def _shards(folder):
    """List the files of weights that a model folder's index names."""
    index = folder / "model.safetensors.index.json"
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except FileNotFoundError:
        return ["model.safetensors"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is no index of weights") from error


def _damaged(folder, needed):
    """List the files that are missing from a model folder or damaged: a copy was cut short."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    expected = ["config.json"]
    with contextlib.suppress(ValueError):              # a damaged index is the reason already
        expected += [needed] if needed else _shards(folder)
    problems = [f"{n} is missing" for n in expected if files and not (folder / n).exists()]
    for file in files:
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            else:
                with safe_open(file, "pt"):
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            problems.append(f"{file.name} is damaged ({error})")
    return problems
