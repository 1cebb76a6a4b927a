"""Tiny fakes, built here: a random Llama of two blocks and a byte-level ChatML tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
          "'<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(template=CHATML, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                   eos="<|im_end|>", merges=(("h", "e"), ("l", "l"), ("he", "ll"))):
    """Bytes plus a few merges, so that tokens are not characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet, *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed=0, **changes):
    """Llama with grouped-query attention; 0.05 M parameters."""
    torch.manual_seed(seed)
    size = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.3, **changes}
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def base_tokenizer():
    """Of a base model: no template, no ChatML tokens."""
    return make_tokenizer(None, ("<eos>",), "<eos>")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    """The tiny model as a folder that train.py can load by name."""
    folder = tmp_path / "tiny-llama"
    make_model(pad_token_id=2, eos_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
