"""
Adapters on disk, in PEFT's layout: PEFT reads what save() writes with the same strength, and load()
takes PEFT's own files. (Other readers may ignore use_rslora and the patterns: llama.cpp does.)

    FOLDER/adapter_model.safetensors   base_model.model.<module path>.lora_A.weight  (r, d_in)
                                       base_model.model.<module path>.lora_B.weight  (d_out, r)
    FOLDER/adapter_config.json         r, lora_alpha (an integer: Ollama parses no other), ...

PEFT loads non-strictly: a missing tensor warns, an unknown one is dropped. Here both are errors.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from . import files
from .fetch import stay_inside
from .layer import linear_size
from .surgery import lora_layers, wrap

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
PATTERN = re.compile(r"\^?(\w|\\?\.|\.\*|\|)+\$?")         # names, parts of them perhaps .* or \.


def save(model, folder, base_name):
    """Write the adapter of an injected model. base_name is the base model's public name, never a
    path. Each file is replaced in one move: a crash leaves the old adapter or the new one."""
    layers = lora_layers(model)
    assert layers, "save() needs an injected model"
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "r": first.r, "lora_alpha": first.lora_alpha, "lora_dropout": first.dropout.p,
        "use_rslora": first.use_rslora, "use_dora": False, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "layers_to_transform": _partial_layers(layers, model), "layers_pattern": None,
        "rank_pattern": {n: x.r for n, x in layers.items() if x.r != first.r},
        "alpha_pattern": {n: x.lora_alpha for n, x in layers.items()
                          if x.lora_alpha != first.lora_alpha},
        "modules_to_save": None, "revision": None,
        "fan_in_fan_out": first.transposed, "init_lora_weights": True, "inference_mode": True}
    folder = Path(folder)
    with files.saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / WEIGHTS, serialise(tensors, {"format": "pt"}))
    files.write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(model, folder):
    """Load an adapter; a model that is not injected yet is first wrapped where the file says.
    Returns the module paths. Raises ValueError naming everything that does not fit: missing, extra
    and misshapen tensors, another strength, settings of PEFT that we do not compute."""
    folder = Path(folder)
    config, tensors = _read(folder)
    layers, modules = lora_layers(model), dict(model.named_modules())
    in_file = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key).removeprefix(PREFIX)
                            for key in tensors)
    names = list(layers) or [n for n in in_file if n in modules and linear_size(modules[n])]
    want, unsupported = {}, _unsupported(config)
    problems = unsupported[:]
    for name in names:
        d_in, d_out = linear_size(modules[name])
        a = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        r = layers[name].r if layers else len(a) if a is not None and a.ndim and len(a) else "r"
        want[f"{PREFIX}{name}.lora_A.weight"] = (r, d_in)
        want[f"{PREFIX}{name}.lora_B.weight"] = (d_out, r)
        if layers and not unsupported and (
                _alpha(config, name), config.get("use_rslora", False)) != (
                layers[name].lora_alpha, layers[name].use_rslora):
            problems.append(f"{name}: the file's lora_alpha or use_rslora differs from the model's")
    have = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems += [f"{k}: file has {have[k]}, model wants {want[k]}"
                 for k in have.keys() & want.keys() if have[k] != want[k]]
    problems += [f"{k}: in the file, not in the model" for k in have.keys() - want.keys()]
    problems += [f"{k}: in the model, not in the file" for k in want.keys() - have.keys()]
    problems += [f"{k}: holds what is no finite number" for k, tensor in tensors.items()
                 if tensor.dtype not in FLOATS or not tensor.isfinite().all()]
    problems += ["it holds no tensors"] * (not tensors)
    if problems:
        raise ValueError(f"adapter {folder} does not fit this model:\n  "
                         + "\n  ".join(sorted(problems)))
    for name in [] if layers else names:
        wrap(model, [name], r=len(tensors[f"{PREFIX}{name}.lora_A.weight"]),
             lora_alpha=_alpha(config, name), lora_dropout=config.get("lora_dropout", 0.0),
             use_rslora=config.get("use_rslora", False))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(tensors[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{PREFIX}{name}.lora_B.weight"])
    return list(lora_layers(model))


def _read(folder):
    try:
        if folder.is_dir():
            stay_inside(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no object")
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"adapter: {folder} has no {Path(error.filename or WEIGHTS).name}; "
                         f"expected a folder with {CONFIG} and {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"adapter: {folder} cannot be read: {error}") from error


def _unsupported(config):
    """Sentences about settings of an adapter_config.json that we do not compute."""
    def number(x, low, high=1e6):
        return isinstance(x, int | float) and not isinstance(x, bool) and low < x < high
    patterns = config.get("alpha_pattern") or {}
    fits = {"use_dora": not config.get("use_dora"), "lora_bias": not config.get("lora_bias"),
            "bias": config.get("bias") in (None, False, "none"),
            "modules_to_save": not config.get("modules_to_save"),
            "lora_alpha": number(config.get("lora_alpha", 8), 0),
            "lora_dropout": number(config.get("lora_dropout", 0.0), -1e-9, 1),
            "use_rslora": isinstance(config.get("use_rslora", False), bool),
            # a pattern with many repetitions, or one in another, would search for years
            "alpha_pattern": isinstance(patterns, dict) and all(
                number(a, 0) and PATTERN.fullmatch(p) and p.count("*") < 3
                for p, a in patterns.items())}
    return [f"{key} is {config[key]!r:.60}: not supported here" for key in fits if not fits[key]]


def _alpha(config, name):
    """lora_alpha of one module; PEFT's alpha_pattern may set it by a suffix of the name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config.get("lora_alpha", 8)                       # PEFT's default


def _partial_layers(layers, model):
    """The block indices if only some blocks are adapted, else None: the block number is the
    first number in a module path."""
    used = sorted({int(n) for name in layers for n in re.findall(r"\.(\d+)\.", name)[:1]})
    return None if len(used) == getattr(model.config, "num_hidden_layers", None) else used
