"""
Convert a GGUF file to a Hugging Face folder: convert_gguf(Path("a.gguf"), "model/a").
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def convert_gguf(file: Path, folder: str | Path) -> None:
    """Write the model of a GGUF file into a folder: float32 safetensors that equal the dequantised
    weights, tokenizer and chat template."""
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
