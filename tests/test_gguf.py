"""lora/use/gguf.py: what we write, the gguf package reads back and llama.cpp computes with."""

import gguf as package
import numpy as np
import pytest
import torch
import zoo
from conftest import CHATML, make_model, make_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from inject import inject
from lora.surgery import lora_layers
from lora.use import gguf
from lora.use.readers import portable

IDS = torch.randint(5, 200, (1, 11), generator=torch.Generator().manual_seed(0))
SIZE = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.3}


def other(config, model, **more):
    def make():
        torch.manual_seed(0)
        return model(config(**SIZE, **more)).eval()
    return make


MODELS = {"llama": make_model, "tied": lambda: make_model(tie_word_embeddings=True),
          "biased": lambda: make_model(attention_bias=True, mlp_bias=True),
          "qwen2": other(Qwen2Config, Qwen2ForCausalLM),
          "qwen3": other(Qwen3Config, Qwen3ForCausalLM, head_dim=16)}


def adapted(model, **choice):
    torch.manual_seed(3)
    inject(model, **{"r": 4, "lora_alpha": 12, **choice})
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    portable(model)
    return model.eval()


def fill(model):
    """No parameter is zero or one: a bias or a norm that is lost would be seen."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_rows_of_a_head_are_interleaved_and_back():
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    rows = torch.arange(8.)[:, None] * torch.ones(8, 3)
    q = gguf.permute("model.layers.0.self_attn.q_proj", rows, config)
    assert q[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]           # two heads of four rows
    k = gguf.permute("model.layers.0.self_attn.k_proj.weight", rows, config)
    assert k[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]           # one head of eight
    for name, made in (("q_proj", q), ("k_proj", k)):
        assert torch.equal(gguf.permute(name, made, config, back=True), rows)
    for name, kind in (("v_proj", "llama"), ("q_proj", "qwen2")):
        assert gguf.permute(name, rows, {**config, "model_type": kind}) is rows


@pytest.mark.parametrize("kind", MODELS)
def test_a_lora_is_read_back(tmp_path, kind):
    model = adapted(MODELS[kind]())
    layers, config = lora_layers(model), model.config.to_dict()
    gguf.write_lora(tmp_path / "a.gguf", layers, config)
    reader = package.GGUFReader(tmp_path / "a.gguf")
    said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert said == {"general.architecture": kind if kind.startswith("qwen") else "llama",
                    "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 12.0}
    shapes = {t.name: tuple(t.shape) for t in reader.tensors}      # innermost first
    assert len(shapes) == 2 * 14 and {t.tensor_type.name for t in reader.tensors} == {"F32"}
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (48, 4)
    assert shapes["blk.1.ffn_down.weight.lora_b"] == (4, 32)
    fields, tensors = gguf.read(tmp_path / "a.gguf", config, layers)
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{name}.lora_a"], layer.lora_A)
        assert torch.equal(tensors[f"{name}.lora_b"], layer.lora_B)


def test_the_lora_of_a_model_that_sees_has_the_names_of_its_text(tmp_path):
    """Gemma 3 from 4B up nests num_hidden_layers in text_config, and its blocks too."""
    model = adapted(zoo.make("gemma3"))
    layers, config = lora_layers(model), model.config.to_dict()
    assert next(iter(layers)).startswith("model.language_model.layers.0.")
    gguf.write_lora(tmp_path / "a.gguf", layers, config)
    fields, tensors = gguf.read(tmp_path / "a.gguf", config, layers)
    assert fields["general.architecture"] == "gemma3"
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{name}.lora_b"], layer.lora_B)
    names = {tensor.name for tensor in package.GGUFReader(tmp_path / "a.gguf").tensors}
    assert "blk.1.attn_q.weight.lora_a" in names and len(names) == 2 * len(layers)
    with pytest.raises(ValueError, match="no whole model is written here for model_type 'gemma3'"):
        gguf.write_model(tmp_path / "m.gguf", model.state_dict(), config, make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_read_back(tmp_path, kind, dtype):
    model, tokenizer = fill(MODELS[kind]()), make_tokenizer()
    config, state = model.config.to_dict(), model.state_dict()
    gguf.write_model(tmp_path / "m.gguf", state, config, tokenizer, CHATML, dtype)
    fields, tensors = gguf.read(tmp_path / "m.gguf", config, state)
    assert state.keys() - tensors.keys() == ({"lm_head.weight"} if kind == "tied" else set())
    for name, tensor in tensors.items():
        assert tensor.dtype == (dtype if tensor.ndim > 1 else torch.float32), name
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert fields["tokenizer.chat_template"] == CHATML and fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    reader = package.GGUFReader(tmp_path / "m.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == 272
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and types[:3] == [3, 3, 3]
    assert tokens[-1] == "[PAD271]" and types[-1] == 5 and types[40] == 1
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["h e", "l l", "he ll"]


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gemma3_text"}, "model_type 'gemma3_text'; expected .* convert_hf_to_gguf.py"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type 'llama3'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"use_sliding_window": True}, "sliding_window True")])
def test_a_model_that_it_cannot_say_is_refused(tmp_path, change, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        gguf.write_model(tmp_path / "m.gguf", model.state_dict(),
                         {**model.config.to_dict(), **change}, make_tokenizer())
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_is_refused(tmp_path):
    model, config = make_model(), make_model().config.to_dict()
    with pytest.raises(ValueError, match="model.extra.weight has no place in a llama file"):
        gguf.write_model(tmp_path / "m.gguf", {**model.state_dict(), "model.extra.weight": IDS},
                         config, make_tokenizer())
    layers = lora_layers(adapted(model))
    with pytest.raises(ValueError, match="'gpt2' is not written here; .*convert_lora_to_gguf.py"):
        gguf.write_lora(tmp_path / "a.gguf", layers, {**config, "model_type": "gpt2"})
    head = {"lm_head": next(iter(layers.values()))}
    with pytest.raises(ValueError, match="lm_head has no place"):
        gguf.write_lora(tmp_path / "a.gguf", head, {**config, "tie_word_embeddings": True})


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    model = make_model()
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight does not fit into float16"):
        gguf.write_model(tmp_path / "m.gguf", state, model.config.to_dict(), make_tokenizer())


def split_by(patterns, merges):
    tokenizer = make_tokenizer(merges=merges)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def test_the_splitter_is_found_by_what_it_does():
    qwen = gguf.SPLITTERS["qwen2"]
    assert gguf.splitter(split_by(qwen, [("?", "Ċ")])) == "qwen2"   # "!?\n" is one piece there
    assert gguf.splitter(split_by(gguf.SPLITTERS["smollm"], [("?", "Ċ")])) == "smollm"
    with pytest.raises(ValueError, match=r"\(BPE\) splits text unlike smollm and qwen2"):
        gguf.splitter(make_tokenizer(merges=[("1", "2")]))          # numbers in one piece: GPT-2


# ----- llama.cpp itself --------------------------------------------------------------------------


# its threads wait for each other in a loop: two took 7 to 9 times as long as one on two busy cores
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def run(file, ids, lora=None):
    """llama.cpp's logits at every place (t, v), in float32 throughout."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -r requirements-serve.txt")
    llm = llama_cpp.Llama(str(file), n_ctx=64, verbose=False, logits_all=True, type_k=0, type_v=0,
                          lora_path=lora and str(lora), **ONE_THREAD)
    try:
        llm.eval(ids)
        return torch.tensor(np.array(llm.scores[:len(ids)])), llm.tokenize(
            PROMPT.encode(), add_bos=False, special=True)
    finally:
        llm.close()


PROMPT = "<|im_start|>user\nhello, hell 1987 he'll\n\n  ünï <|im_end|>\n"


@pytest.mark.parametrize("kind", [*MODELS, "mistral"])
def test_llama_cpp_computes_what_we_do(tmp_path, kind):
    make = MODELS.get(kind, other(MistralConfig, MistralForCausalLM, sliding_window=None))
    model, tokenizer = fill(make()), make_tokenizer()
    config, ids = model.config.to_dict(), IDS[0].tolist()
    whole = {**config, "model_type": "llama"} if kind == "mistral" else config
    gguf.write_model(tmp_path / "m.gguf", model.state_dict(), whole, tokenizer,
                     dtype=torch.float32)
    with torch.no_grad():
        plain = model(IDS).logits[0]
        adapted(model, use_rslora=True)
        gguf.write_lora(tmp_path / "a.gguf", lora_layers(model), config)
        tuned = model(IDS).logits[0]
    assert (tuned - plain).abs().max() > 1
    got, tokens = run(tmp_path / "m.gguf", ids)
    torch.testing.assert_close(got, plain, atol=1e-3, rtol=1e-3)
    assert tokens == tokenizer.encode(PROMPT, add_special_tokens=False)
    got, _ = run(tmp_path / "m.gguf", ids, tmp_path / "a.gguf")
    torch.testing.assert_close(got, tuned, atol=1e-3, rtol=1e-3)
