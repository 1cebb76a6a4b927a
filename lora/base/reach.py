"""
Say which linear layers of a model's blocks an adapter can sit on, which are left out, and why.

    usable, why = candidates(model)     # {path: module}, {path: why all-linear leaves it out}
    print(describe(model))              # after inject: adapters on 51% of the blocks' weights, ...

A linear layer is left out where an adapter around it would be silent or wrong: the model reads its
weight instead of calling it, several modules share its weight, or it returns something else than
W x. "all-linear" also leaves out small layers that PEFT or the servers do not adapt: routers, gates
of a few outputs, Gemma 3n's projections beside the blocks' own.
"""

import functools
import inspect
import re

import torch
from torch import nn

from ..layer import LoRALinear, linear_size
from ..surgery import find_blocks, lora_layers, split_path, text_ids

# parts of a path. in_proj_a/b: vLLM and SGLang refuse adapters there (sgl-project/sglang 30499)
BY_DEFAULT = re.compile(r"(^|\.)(in_proj_(a|b|ba)|altup|laurel|per_layer_\w+|router|gate"
                        r"|shared_expert_gate|indexer)(\.|$)")
NUMBER = re.compile(r"\.\d+(?=\.|$)")
SERVERS, READ = "left out by default", "left out by default: the model reads the weight itself"
SILENT, OTHER, SHARED = "never called", "returns no W x", "a weight of several modules"
UNFED = "no gradient reaches it"


def candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the linear modules of the blocks that an adapter can wrap, {path: module}, and why
    all-linear leaves some of the blocks' linear modules out, {path: reason}."""
    linear = _linear(model)
    why = _reasons(model, linear)
    return {p: m for p, m in linear.items() if why.get(p) in (None, SERVERS, READ)}, why


def _linear(model):
    """The linear modules of the blocks that have no adapter, {path: module}."""
    where, blocks = find_blocks(model)
    wrapped = {id(layer.base_layer) for layer in lora_layers(blocks).values()}
    return {f"{where}.{path}": m for path, m in blocks.named_modules()
            if linear_size(m) and not isinstance(m, LoRALinear) and id(m) not in wrapped}


def _reasons(model, linear):
    """Why linear modules, {path: module}, are left out: {path: reason}."""
    if not linear:
        return {}
    owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if linear_size(module):
            owners.setdefault(id(getattr(module, "weight", module)), []).append(path)
    why = {path: SHARED for path, module in linear.items()
           if len(owners[id(getattr(module, "weight", module))]) > 1}
    why |= _try(model, {path: m for path, m in linear.items() if path not in why})
    for path in linear:
        if path not in why and BY_DEFAULT.search(split_path(path)[1]):
            why[path] = SERVERS
        elif path not in why and _is_read(model, path):
            why[path] = READ
    return why


def _try(model, linear):
    """{path: reason} of the modules that do not take (..., d_in) to (..., d_out), or get no
    gradient, when a few tokens run through the model. In a list, as of experts, one that does
    speaks for the others. Raises ValueError if a token's logits depend on later tokens."""
    fits, fed, was = {}, set(), model.training
    kinds = {path: f"{split_path(path)[0]} {inside(path)}" for path in linear}

    def note(kind, d_in, d_out):
        def hook(_, given, result):
            if (given and isinstance(result, torch.Tensor) and given[0].shape[-1] == d_in
                    and result.shape == (*given[0].shape[:-1], d_out)):
                fits[kind] = True
                if result.requires_grad:
                    result.register_hook(lambda g: fed.add(kind) if g.any() else None)
            fits.setdefault(kind, False)
        return hook

    def watch(_, given, hidden):
        hidden = hidden.detach().requires_grad_()
        inputs.append(hidden)
        return hidden.clone()
    if model.get_output_embeddings() is None:
        raise ValueError(f"inject: {type(model).__name__} does not say which module is its head "
                         "(get_output_embeddings() is None); the loss needs it")
    ids, inputs = text_ids(model, 12)[None], []
    try:
        model.eval()                                      # no dropout: nothing random is drawn
        hooks = [module.register_forward_hook(note(kinds[path], *linear_size(module)))
                 for path, module in linear.items()]
        hooks.append(model.get_input_embeddings().register_forward_hook(watch))
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            torch.autograd.grad(logits.float().square().mean(), inputs[0])
        with torch.no_grad():
            other = model(input_ids=torch.cat([ids[:, :-1], ids[:, :1]], 1)).logits
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    if (logits - other)[:, :-1].abs().mean() > 0.1 * logits.std():
        raise ValueError(f"inject: {type(model).__name__} sees later tokens when it predicts one: "
                         "its attention is not causal on text alone, so it cannot be trained here")
    return {path: SILENT if kind not in fits else UNFED if fits[kind] else OTHER
            for path, kind in kinds.items() if kind not in fed}


def _is_read(model, path):
    """Whether the source of the module's owner reads its weight, not just the weight's dtype."""
    parent, _, name = path.rpartition(".")
    return bool(re.search(rf"self\.{name}\.weight(?!\w|\.(dtype|device|shape))",
                          _source(type(model.get_submodule(parent)))))


@functools.cache
def _source(kind):
    """The source of a class, "" where there is none."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def inside(path: str) -> str:
    """Name a module or weight inside its block, numbers as *: mlp.experts.*.up_proj."""
    return re.sub(NUMBER, ".*", split_path(path)[1])


def reached(model: nn.Module) -> tuple[float, dict[str, str]]:
    """Return (share of the blocks' matrices that have an adapter, {name: why others have none}).
    Vectors, norms and biases, are not counted; a reason is "" where target_modules or layers left
    it out."""
    where, blocks = find_blocks(model)
    adapted = {id(layer.weight) for layer in lora_layers(blocks).values()}
    linear, have, total, missing = _linear(model), 0, 0, {}
    names = {inside(f"{where}.{path}") for path in lora_layers(blocks)}
    why = _reasons(model, linear)
    for path, weight in blocks.named_parameters():
        shape = getattr(weight, "quant_state", weight).shape
        owner = f"{where}.{path}".rpartition(".")
        if len(shape) < 2 or path.endswith(("lora_A", "lora_B", "bias")):
            continue
        total += shape.numel()
        if id(weight) in adapted:
            have += shape.numel()
        elif owner[0] in linear:
            name = inside(owner[0])
            missing[f"{name} of other blocks" if name in names else name] = why.get(owner[0], "")
        else:
            kind = type(model.get_submodule(owner[0])).__name__.lower()
            missing[inside(f"{where}.{path}").removesuffix(".weight")] = (
                "convolutions" if "conv" in kind else
                "routed experts" if len(shape) == 3 and "expert" in path else "no linear layers")
    return have / max(1, total), missing


def describe(model: nn.Module) -> str:
    """Say the share that reached() counts, and what has no adapter, by the reason."""
    share, missing = reached(model)
    reasons = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    parts = [", ".join(names) + (f" ({reason})" if reason else "")
             for reason, names in reasons.items()]
    hint = "; lora.target_modules may name what is left out by default"
    return (f"adapters on {share:.0%} of the blocks' weights"
            + (f", none on {'; '.join(parts)}" if parts else "")
            + (hint if {SERVERS, READ} & {*reasons} else ""))
