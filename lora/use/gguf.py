"""
GGUF, the file of llama.cpp: an adapter as a GGUF LoRA, a model with its tokenizer as one file.

    write_lora(file, layers, config)               lora_layers() of a model made portable()
    write_model(file, tensors, config, tokenizer)  f16 or f32

    adapter.lora.alpha   lora_alpha                NAME.lora_a (r, d_in)      NAME.lora_b (d_out, r)
    llama.cpp computes   y = W x + lora_alpha / r * lora_b lora_a x

config is the model's config.json as a dictionary. The package gguf is imported inside functions:
only an export needs it.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "gemma3_text": "gemma3",          # model_type: llama.cpp's name, for an adapter
                 "gemma3": "gemma3"}               # sees too; its text is written
WHOLE = ("llama", "qwen2", "qwen3")                # those of which a whole model is written
CONVERTER = ("Merge into a folder (python -m scripts.merge RUN --out FOLDER) and convert that with "
             "llama.cpp: python convert_hf_to_gguf.py FOLDER --outtype f16")

# How llama.cpp splits text before it merges bytes, by the name that a GGUF file gives it.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITTERS = {
    "smollm": (r"\p{N}", WORDS),
    "qwen2": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)}
PROBE = ("In 2024, I'm told (WE'LL see) that 12345.678 isn't\n\n  `x_1 = y/2;`\tfür Ærø…  "
         "東京タワー 3333 Привет!?\n    return {\"a\": [1, 22]}\n\n\n<b>d'être</b> 😀👍🏽 ok\n")


def write_lora(file: Path | str, layers: dict, config: dict) -> None:
    """Write the adapter {module path: LoRALinear} as a GGUF LoRA in float32."""
    alpha, = {layer.lora_alpha for layer in layers.values()}   # portable() makes it one
    matrices = {}
    for name, place in _names(config, layers).items():
        matrices[f"{place}.lora_a"] = layers[name].lora_A
        matrices[f"{place}.lora_b"] = permute(name, layers[name].lora_B, config)
    writer = _writer(file, config)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    _finish(writer, matrices)


def write_model(file: Path | str, tensors: dict[str, torch.Tensor], config: dict, tokenizer,
                chat_template: str | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Write a whole model, {name: tensor} as in its state_dict. Matrices in dtype, vectors in
    float32. Raises ValueError for a model or a tokenizer that is not written here faithfully."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    kind = config.get("model_type")
    odd = [f"{key} {value!r}" for key, value, plain in (
        ("model_type", kind, WHOLE), ("hidden_act", config.get("hidden_act"), ("silu",)),
        ("rope_type", rope.get("rope_type", "default"), ("default",)),
        ("sliding_window", config.get("use_sliding_window"), (None, False))) if value not in plain]
    if odd:
        raise ValueError(f"gguf: no whole model is written here for {odd[0]}; expected "
                         f"model_type {', '.join(WHOLE)}. {CONVERTER}")
    if config.get("tie_word_embeddings"):
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    names = _names(config, tensors)
    writer = _writer(file, config)
    writer.add_type("model")
    writer.add_file_type(1 if dtype == torch.float16 else 0)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _tokenizer(writer, tokenizer, config["vocab_size"], chat_template)
    stored = {}
    for name, tensor in tensors.items():
        wide = tensor.ndim > 1
        if dtype == torch.float16 and wide and tensor.abs().max() > 65504:
            raise ValueError(f"gguf: {name} does not fit into float16; write float32")
        stored[names[name]] = permute(name, tensor, config).to(dtype if wide else torch.float32)
    _finish(writer, stored)


def read(file: Path | str, config: dict, modules: Iterable[str]
         ) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read (fields, {the model's name: tensor}). modules: the names passed to write_lora or
    write_model."""
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()
              if not name.startswith(("GGUF.", "tokenizer.ggml.token", "tokenizer.ggml.merges"))}
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    tensors = {}
    for name, written in _names(config, modules).items():
        for end in ("", ".lora_a", ".lora_b"):
            if written + end in stored:
                tensor = stored[written + end]
                tensors[name + end] = tensor if end == ".lora_a" else permute(
                    name, tensor, config, back=True)
    return fields, tensors


def permute(name: str, rows: torch.Tensor, config: dict, back: bool = False) -> torch.Tensor:
    """The rows of Llama's q and k in llama.cpp's order; others as they are. Rotary embedding turns
    pairs of a head's dimensions: (i, i + d/2) in transformers, (2i, 2i + 1) in llama.cpp."""
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if ARCHITECTURES[config["model_type"]] != "llama" or leaf not in ("q_proj", "k_proj"):
        return rows
    heads = config["num_attention_heads"]
    heads = heads if leaf == "q_proj" else config.get("num_key_value_heads") or heads
    half = len(rows) // heads // 2
    shape = (heads, half, 2) if back else (heads, 2, half)
    return rows.reshape(*shape, -1).transpose(1, 2).reshape(rows.shape)


def _names(config, modules):
    """{name: llama.cpp's name}. A LoRA layer gets the name of its weight."""
    import gguf

    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"gguf: model_type {kind!r} is not written here; expected "
                         f"{', '.join(ARCHITECTURES)}. llama.cpp has its own converter: export "
                         "--to peft, then python convert_lora_to_gguf.py FOLDER --base MODEL")
    arch, = (a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES[kind])
    text = config.get("text_config") or config
    table = gguf.get_tensor_name_map(arch, text["num_hidden_layers"])
    names = {}
    for name in modules:
        full = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        full = full.replace("model.language_model.", "model.")
        names[name] = table.get_name(full, try_suffixes=(".weight", ".bias"))
        if names[name] is None or name == "lm_head" and config.get("tie_word_embeddings"):
            raise ValueError(f"gguf: {name} has no place in a {kind} file of llama.cpp")
    return names


def _tokenizer(writer, tokenizer, size, chat_template):
    """Add a byte-level BPE tokenizer: tokens, merges and the name of the splitter."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    added = tokenizer.added_tokens_decoder
    text = {i: token for token, i in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(tokenizer))
    writer.add_token_list([text.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([5 if i not in text else 1 if i not in added else
                            3 if added[i].special else 4 for i in range(size)])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and bos in tokenizer("a").input_ids[:1])
    if chat_template:
        writer.add_chat_template(chat_template)


def splitter(tokenizer) -> str:
    """The first of SPLITTERS with which PROBE gets the same ids as with the tokenizer's own."""
    core = tokenizer.backend_tokenizer
    spec = json.loads(core.to_str())
    model, first = spec["model"], {"type": "ByteLevel", "add_prefix_space": False,
                                   "trim_offsets": True, "use_regex": False}
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        ids = core.encode(PROBE, add_special_tokens=False).ids
        for name, patterns in SPLITTERS.items():
            split = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                      "invert": False} for pattern in patterns]
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*split, first]}
            other = type(core).from_str(json.dumps(spec))
            if other.encode(PROBE, add_special_tokens=False).ids == ids:
                return name
    raise ValueError(f"gguf: this tokenizer ({model['type']}) splits text unlike "
                     f"{' and '.join(SPLITTERS)}, the ones written here. {CONVERTER}")


def _writer(file, config):
    import gguf

    return gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])


def _finish(writer, tensors):
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
