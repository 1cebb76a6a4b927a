"""
Save and load adapters in PEFT's layout: PEFT computes the same from what save() writes, and load()
reads PEFT's files. (Other readers may ignore use_rslora and the patterns: llama.cpp does.)

    FOLDER/adapter_model.safetensors   base_model.model.<module path>.lora_A.weight  (r, d_in)
                                       base_model.model.<module path>.lora_B.weight  (d_out, r)
    FOLDER/adapter_config.json         r, lora_alpha (an integer: Ollama parses no other), ...

PEFT warns about a missing tensor and drops an unknown one. Here both are errors.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from . import files
from .layer import LoRALinear, linear_size
from .surgery import block_numbers, find_blocks, lora_layers, split_path, wrap

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
PATTERN = re.compile(r"\^?(\w|\\?\.|\.\*|\|)+\$?")         # names; .* and \. may be parts


def save(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Write the adapter of an injected model. base_name is the base model's public name, never a
    path. A crash leaves the old file or the new one, each whole."""
    layers = lora_layers(model)
    assert layers, "save() needs an injected model"
    tensors = {}
    for name, layer in layers.items():
        tensors[_key(name, "A")] = layer.lora_A.detach().cpu().contiguous()
        tensors[_key(name, "B")] = layer.lora_B.detach().cpu().contiguous()
    first, (targets, blocks) = next(iter(layers.values())), _targets(model, layers)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "r": first.r, "lora_alpha": first.lora_alpha, "lora_dropout": first.dropout.p,
        "use_rslora": first.use_rslora, "use_dora": False, "bias": "none",
        "target_modules": targets, "layers_to_transform": blocks, "layers_pattern": None,
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


def _targets(model, layers):
    """(target_modules, layers_to_transform): the adapted names, and blocks unless all; whole paths
    where PEFT would find other modules by these names: a vision tower's, a router's."""
    names, blocks = sorted({name.rpartition(".")[2] for name in layers}), block_numbers(layers)
    if len(blocks) == getattr(model.config.get_text_config(), "num_hidden_layers", None):
        blocks = None
    others = [path for path, _ in model.named_modules() if path not in layers
              and path.rpartition(".")[2] in names
              and (blocks is None or split_path(path)[0] in blocks)]
    return (sorted(layers), None) if others else (names, blocks)


def load(model: nn.Module, folder: str | Path) -> list[str]:
    """Load an adapter and return its module paths; a model without LoRA layers is wrapped first at
    the file's paths. Raises ValueError that lists everything that does not fit: missing, extra and
    misshapen tensors, another strength, settings of PEFT that we do not compute."""
    config, tensors = _named_as_here(model, *read(Path(folder)))
    layers = lora_layers(model)
    targets = layers or _linear_in_file(model, tensors)
    problems = _unsupported(config) or _other_strength(config, layers)
    problems += _misfits(tensors, _expected_shapes(targets, tensors))
    if problems:
        raise ValueError(f"adapter {Path(folder)} does not fit this model:\n  "
                         + "\n  ".join(sorted(problems)))
    if not layers:
        for name in targets:
            wrap(model, [name], r=len(tensors[_key(name, "A")]), lora_alpha=_alpha(config, name),
                 lora_dropout=config.get("lora_dropout", 0.0),
                 use_rslora=config.get("use_rslora", False))
        layers = lora_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(tensors[_key(name, "A")])
            layer.lora_B.copy_(tensors[_key(name, "B")])
    return list(layers)


def _named_as_here(model, config, tensors):
    """The file with this model's path of the blocks: it differs between the class of a checkpoint
    for text alone and the one that also sees or hears."""
    roots = {found[1] for key in tensors
             if (found := re.match(r"(.+?)\.\d+\.", key.removeprefix(PREFIX)))}
    root = roots.pop() if len(roots) == 1 else ""
    if not root or root in dict(model.named_modules()):
        return config, tensors
    here, patterns = find_blocks(model)[0], config.get("alpha_pattern")
    if isinstance(patterns, dict):
        config = config | {"alpha_pattern": {p.replace(root, here): a for p, a in patterns.items()}}
    return config, {key.replace(PREFIX + root, PREFIX + here): t for key, t in tensors.items()}


def _linear_in_file(model, tensors):
    """The model's linear modules that the file has tensors for, by path, in the file's order."""
    modules = dict(model.named_modules())
    names = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key).removeprefix(PREFIX)
                          for key in tensors)
    return {n: modules[n] for n in names if n in modules and linear_size(modules[n])}


def _expected_shapes(modules, tensors):
    """{key: shape} that modules, by path, need. r is the layer's, else the file's, else "r"."""
    shapes = {}
    for name, module in modules.items():
        d_in, d_out = linear_size(module)
        a = tensors.get(_key(name, "A"))
        in_file = len(a) if a is not None and a.ndim and len(a) else "r"
        r = module.r if isinstance(module, LoRALinear) else in_file
        shapes[_key(name, "A")], shapes[_key(name, "B")] = (r, d_in), (d_out, r)
    return shapes


def _misfits(tensors, expected):
    """Sentences about tensors that are missing, extra, misshapen or not finite."""
    have = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = [f"{k}: file has {have[k]}, model wants {expected[k]}"
                for k in have.keys() & expected.keys() if have[k] != expected[k]]
    problems += [f"{k}: in the file, not in the model" for k in have.keys() - expected.keys()]
    problems += [f"{k}: in the model, not in the file" for k in expected.keys() - have.keys()]
    problems += [f"{k}: holds values that are not finite numbers" for k, tensor in tensors.items()
                 if tensor.dtype not in FLOATS or not tensor.isfinite().all()]
    return problems if tensors else [*problems, "the file holds no tensors"]


def _other_strength(config, layers):
    """Sentences about layers whose lora_alpha or use_rslora is not the file's."""
    rslora = config.get("use_rslora", False)
    return [f"{name}: the file's lora_alpha or use_rslora differs from the model's"
            for name, layer in layers.items()
            if (_alpha(config, name), rslora) != (layer.lora_alpha, layer.use_rslora)]


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read (config, tensors) of an adapter's folder. Raises ValueError that names the folder."""
    try:
        if folder.is_dir():
            files.stay_inside(folder)
        config = files.read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is not a JSON object")
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"adapter: {folder} has no {Path(error.filename or WEIGHTS).name}; "
                         f"expected a folder with {CONFIG} and {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"adapter: {folder} cannot be read: {error}") from error


def _unsupported(config):
    """Sentences about settings in adapter_config.json that we do not compute."""
    def number(x, low, high=1e6):
        return isinstance(x, int | float) and not isinstance(x, bool) and low < x < high
    patterns = config.get("alpha_pattern") or {}
    fits = {"use_dora": not config.get("use_dora"), "lora_bias": not config.get("lora_bias"),
            "bias": config.get("bias") in (None, False, "none"),
            "modules_to_save": not config.get("modules_to_save"),
            "lora_alpha": number(config.get("lora_alpha", 8), 0),
            "lora_dropout": number(config.get("lora_dropout", 0.0), -1e-9, 1),
            "use_rslora": isinstance(config.get("use_rslora", False), bool),
            # many or nested repetitions in a pattern would take years to match
            "alpha_pattern": isinstance(patterns, dict) and all(
                number(a, 0) and PATTERN.fullmatch(p) and p.count("*") < 3
                for p, a in patterns.items())}
    return [f"{key} is {config[key]!r:.60}: not supported here" for key in fits if not fits[key]]


def _alpha(config, name):
    """Return lora_alpha of one module; PEFT's alpha_pattern sets it by a suffix of the path."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config.get("lora_alpha", 8)                       # PEFT's default


def _key(name, matrix):
    """Name the tensor of a module's A or B in the file."""
    return f"{PREFIX}{name}.lora_{matrix}.weight"
