"""
Who reads an adapter, and with what strength; and its portable form, which all readers read alike.

    PEFT, transformers, vLLM   scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    llama.cpp                  scaling = lora_alpha / r, whatever the file says of rsLoRA or modules
    portable(model)            the same updates, written as one whole lora_alpha / one r
    fit(folder, base)          the names that the published class has for the adapted modules

The rules were read in the readers' code. PEFT, transformers and llama.cpp are also run, in tests/;
mlx-lm 0.32.2 was run by hand.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .. import adapter, files
from ..surgery import block_numbers, find_blocks, lora_layers, split_path
from .gguf import ARCHITECTURES

LOADS, OTHER, REFUSED = "loads", "loads with another strength", "refused"
IGNORED = "ignored"                                     # without an error
READERS = ("PEFT", "transformers", "vLLM", "llama.cpp", "Ollama", "mlx-lm")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)     # what vLLM's --max-lora-rank may be

# Of these checkpoints AutoModelForCausalLM gives a text-only class, whose text is at "model"; here
# is where the class that config.json names, which servers load, has it.
TEXT_AT = {f"{name}ForConditionalGeneration": place for name, place in {
    "Dots3Note": "model.language_model", "Emu3": "model.text_model",
    "Llama4": "language_model.model", "Mllama": "model.language_model",
    "Qwen3_5": "model.language_model", "Qwen3_5Moe": "model.language_model",
    "Qwen4Exp": "model.language_model"}.items()}
# Of these model types PEFT takes modules with the names in EXPERTS for parts of routed experts, and
# leaves those alone that are none (peft/utils/transformers_weight_conversion.py).
PEFT_MIXES = frozenset("""
afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo
glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum
olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open
""".split())
# Of these PEFT renames some tensors as if they were the base's, and finds no module for them.
PEFT_LOSES = frozenset(("deepseek_ocr2", "inkling2", "inkling2_text", "laguna", "mistral_large4",
                        "unlimited_ocr"))
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")


class Verdict(NamedTuple):
    reader: str
    verdict: str                                        # LOADS, OTHER, IGNORED or REFUSED
    because: str
    fix: str = ""


def judge(folder: Path | str, base: dict, run: str = "runs/NAME") -> list[Verdict]:
    """The verdicts() on the adapter in a folder."""
    config, tensors = adapter.read(Path(folder))
    return verdicts(config, {key: tuple(t.shape) for key, t in tensors.items()}, base, run)


def verdicts(config: dict, shapes: dict[str, tuple], base: dict, run: str = "runs/NAME"
             ) -> list[Verdict]:
    """A Verdict of each of READERS about an adapter in PEFT's layout: config is its
    adapter_config.json, shapes {key: shape} of its tensors, base the base model's config.json."""
    config = {k: v for k, v in config.items() if v not in (None, False, "none", [], {})}
    r = max((shape[0] for key, shape in shapes.items() if key.endswith("lora_A.weight")), default=0)
    more, start = _more(config, shapes), config.get("init_lora_weights", True)
    missing = _words({"r", "lora_alpha", "target_modules"} - config.keys())
    patterns = _words(config.keys() & {"rank_pattern", "alpha_pattern"})
    ignored = _words(config.keys() & {"use_rslora", "alpha_pattern"})
    weak = f" ({math.sqrt(r or 1):.3g} times too weak)" if "use_rslora" in config else ""
    tied = base.get("tie_word_embeddings") and any(".lm_head." in key for key in shapes)
    kind, export = base.get("model_type"), f"python -m scripts.export {run} --to"
    text_only = any(key != published(key, base) for key in shapes)
    others = f"names of the text-only class; {class_of(base)} has others"
    mixed = any(f"{path}.weight" not in config.get("target_parameters", ()) for path in
                _paths(shapes) if _mixed(path, base))
    add = "write what training used into adapter_config.json"
    rules = [  # readers, whether it holds, verdict, because, fix
        (READERS, not r, REFUSED, "it holds no lora_A", "train again: nothing was adapted"),
        (("PEFT", "transformers"), "peft_type" not in config, REFUSED, "no peft_type", add),
        (("PEFT", "transformers"), missing, OTHER, f"no {missing}: PEFT takes its defaults", add),
        (READERS[:2], text_only, IGNORED, f"{others}; AutoModelForCausalLM reads it",
         f"{export} peft"),
        (("vLLM",), text_only, IGNORED, others, f"{export} vllm"),
        (READERS[:2], mixed, OTHER, f"of {kind} PEFT takes gate_proj, up_proj and down_proj for "
         "routed experts, and leaves out those that are none", f"{export} peft"),
        (READERS[:2], kind in PEFT_LOSES, OTHER, f"of {kind} PEFT ignores some layers",
         "serve the merged model"),
        (("vLLM",), missing, REFUSED, f"no {missing}", add),
        (("llama.cpp",), "lora_alpha" not in config, REFUSED, "no lora_alpha", add),
        (("vLLM", "llama.cpp"), more, REFUSED, f"it holds {more}",
         "train without, or merge it with PEFT and serve the merged model"),
        (READERS[:4], start not in (True, "gaussian", "orthogonal"), OTHER,
         f"its start, {start}, changed the base model too",
         "save it with PEFT's path_initial_model_for_weight_conversion"),
        (("vLLM",), r > VLLM_RANKS[-1], REFUSED, f"rank {r} is above {VLLM_RANKS[-1]}",
         "train a smaller rank, or serve the merged model"),
        (("vLLM",), patterns, OTHER, f"older versions ignore {patterns}", f"{export} vllm"),
        (("llama.cpp",), ignored, OTHER, f"it ignores {ignored}{weak}", f"{export} llama.cpp"),
        (("llama.cpp",), tied, REFUSED, "lm_head is adapted, and tied to the embedding",
         "train without lm_head, or serve the merged model"),
        (("Ollama",), True, REFUSED, "it makes no adapter models since v0.34.1",
         f"{export} ollama (a merged model)"),
        (("Ollama",), kind not in ("llama", "gemma2"), REFUSED, "before, of llama and gemma2 only",
         f"{export} ollama (a merged model)"),
        (("Ollama",), not isinstance(config.get("lora_alpha", 1), int), REFUSED,
         "lora_alpha is not a whole number", f"{export} ollama (a merged model)"),
        (("mlx-lm",), True, REFUSED, "it has a layout of its own", f"{export} mlx")]
    notes = {"transformers": "by load_adapter, with PEFT 0.18 or newer installed",
             "vLLM": f"rank {r}: --max-lora-rank {vllm_rank(r)}",
             "llama.cpp": f"as a GGUF LoRA: {export} llama.cpp" if kind in ARCHITECTURES else
             f"if its convert_lora_to_gguf.py knows {kind}; this project does not"}
    return [_verdict(reader, rules, notes.get(reader, "")) for reader in READERS]


def _verdict(reader, rules, note):
    """The worst verdict of the rules that hold for a reader, with all its reasons and fixes."""
    for worst in (REFUSED, IGNORED, OTHER):
        reasons = {because: fix for readers, holds, verdict, because, fix in rules
                   if reader in readers and holds and verdict == worst}
        if reasons:
            fixes = dict.fromkeys(reasons.values())                     # each once, in order
            return Verdict(reader, worst, "; ".join(reasons), "; ".join(fixes))
    return Verdict(reader, LOADS, note)


def vllm_rank(r: int) -> int:
    """The --max-lora-rank to serve rank r with: the smallest that fits, at least vLLM's 16."""
    return next((n for n in VLLM_RANKS if n >= max(r, 16)), VLLM_RANKS[-1])


def class_of(base: dict) -> str:
    """The class that a config.json names, "" if none."""
    return next(iter(base.get("architectures") or ()), "")


def published(name: str, base: dict) -> str:
    """The name that a module, or a tensor of an adapter, has in the class that the base's
    config.json names; another than ours if that one also sees or hears and ours is text alone."""
    place = TEXT_AT.get(class_of(base))
    prefix = adapter.PREFIX if name.startswith(adapter.PREFIX) else ""
    if place and name.startswith(f"{prefix}model.layers."):
        return f"{prefix}{place}{name.removeprefix(f'{prefix}model')}"
    return name


def fit(folder: Path | str, base: dict, for_peft: bool = False) -> None:
    """Give the tensors of an adapter the names that the published class has for them, and name the
    modules whole: a vision tower may have some of the same short name. for_peft: what PEFT would
    take for routed experts is named as parameters, which it leaves alone."""
    folder = Path(folder)
    config, tensors = adapter.read(folder)
    renamed = {published(key, base): tensor for key, tensor in tensors.items()}
    paths = _paths(renamed)
    mixed = {path for path in paths if for_peft and _mixed(path, base)}
    if renamed.keys() == tensors.keys() and not mixed:
        return
    config |= {"target_modules": sorted(paths - mixed), "layers_to_transform": None}
    if mixed:                                   # PEFT takes no dropout with parameters
        config |= {"target_parameters": sorted(f"{path}.weight" for path in mixed),
                   "lora_dropout": 0.0}
    save_file(renamed, folder / adapter.WEIGHTS, metadata={"format": "pt"})
    files.write(folder / adapter.CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _paths(keys):
    """The module paths of an adapter's tensors."""
    return {key.removeprefix(adapter.PREFIX).partition(".lora_")[0] for key in keys}


def _mixed(path, base):
    """Whether PEFT takes a module for a part of routed experts."""
    return base.get("model_type") in PEFT_MIXES and path.rpartition(".")[2] in EXPERTS


def portable(model: torch.nn.Module) -> None:
    """Change an injected model's adapter so that every reader scales it alike: one r for all layers
    (smaller ones get rows of zeros), one whole lora_alpha, no rsLoRA; B takes the rest of the
    scaling. Each layer computes the same as before. What is portable already stays as it is."""
    layers = list(lora_layers(model).values())
    r = max(layer.r for layer in layers)
    lora_alpha = max(1, round(layers[0].scaling * r))
    with torch.no_grad():
        for layer in layers:
            A, B, factor = layer.lora_A, layer.lora_B, layer.scaling * r / lora_alpha
            if not math.isclose(factor, 1, rel_tol=1e-12):
                B.mul_(factor)
            if layer.r < r:
                layer.lora_A = torch.nn.Parameter(F.pad(A, (0, 0, 0, r - layer.r)))
                layer.lora_B = torch.nn.Parameter(F.pad(B, (0, r - layer.r)))
            layer.r, layer.lora_alpha, layer.use_rslora = r, lora_alpha, False
            layer.scaling = lora_alpha / r


def save_mlx(model: torch.nn.Module, folder: Path, base_name: str) -> None:
    """Write a portable adapter as mlx-lm lays it out: y = W x + scale (x lora_a) lora_b, with
    lora_a (d_in, r) and lora_b (r, d_out), in the last num_layers blocks."""
    layers, tensors, depth = lora_layers(model), {}, len(find_blocks(model)[1])
    for name, layer in layers.items():
        tensors[f"{name}.lora_a"] = layer.lora_A.detach().cpu().T.contiguous()
        tensors[f"{name}.lora_b"] = layer.lora_B.detach().cpu().T.contiguous()
    config = {
        "fine_tune_type": "lora", "model": base_name,
        "num_layers": depth - min(block_numbers(layers), default=depth),
        "lora_parameters": {"rank": layer.r, "scale": layer.scaling, "dropout": layer.dropout.p,
                            "keys": sorted({split_path(name)[1] for name in layers})}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    files.write(folder / adapter.CONFIG, json.dumps(config, indent=2) + "\n")


def load_mlx(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read (config, tensors) that save_mlx wrote."""
    return files.read_json(folder / adapter.CONFIG), load_file(folder / "adapters.safetensors")


def _more(config, shapes):
    """The names of what an adapter holds besides plain A and B."""
    plain = r"\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)$"
    rest = [key for key in shapes if not re.search(plain, key)]
    kinds = {"DoRA magnitudes": ({"use_dora"}, "lora_magnitude_vector"),
             "biases": ({"bias", "lora_bias"}, ".bias"),
             "full weights": ({"modules_to_save"}, ".weight")}
    return _words({kind for kind, (keys, end) in kinds.items()
                   if config.keys() & keys or any(key.endswith(end) for key in rest)})


def _words(names):
    return ", ".join(sorted(names))
