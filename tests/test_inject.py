"""inject.py: which modules, which blocks, and what it says when nothing fits."""

import pytest
import torch
import zoo
from conftest import make_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
)

from inject import inject, report
from lora.base import reach
from lora.surgery import block_numbers, count, find_blocks, lora_layers, split_path
from lora.use import show

LORA = {"r": 4, "lora_alpha": 8}
SEVEN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_all_linear_is_every_projection_of_every_block(model):
    adapted = inject(model, **LORA)
    assert adapted == [f"model.layers.{i}.{name}" for i in range(2) for name in SEVEN]
    assert list(lora_layers(model)) == adapted               # lm_head and embeddings stay out


def test_whole_names_only(model):
    assert inject(model, target_modules=["q_proj", "v_proj"], **LORA) == [
        f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]


@pytest.mark.parametrize("layers, blocks", [("all", [0, 1, 2]), (1, [2]), (2, [1, 2]),
                                            ([0], [0]), ((2, 0), [0, 2])])
def test_layers(layers, blocks):
    model = make_model(num_hidden_layers=3)
    adapted = inject(model, target_modules=["q_proj"], layers=layers, **LORA)
    assert adapted == [f"model.layers.{i}.self_attn.q_proj" for i in blocks]


@pytest.mark.parametrize("config, first", [
    (GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1),
     "transformer.h.0.attn.c_attn"),
    (GPTNeoXConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2,
                   intermediate_size=32, vocab_size=64), "gpt_neox.layers.0.attention"),
    (OPTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, ffn_dim=32,
               vocab_size=64, word_embed_proj_dim=16), "model.decoder.layers.0.self_attn"),
])
def test_other_layouts(config, first):
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(8)[None]
    before = model(ids).logits
    adapted = inject(model, **LORA)
    assert adapted[0].startswith(first) and torch.equal(model(ids).logits, before)


def test_everything_else_is_frozen(model):
    inject(model, **LORA)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(("lora_A", "lora_B")) for n in trainable)
    assert count(model)[0] == sum(p.numel() for n, p in model.named_parameters() if n in trainable)


@pytest.mark.parametrize("choice, message", [
    ({"target_modules": ["q_prj"]}, r"target_modules \['q_prj'\] matched nothing. Linear layers "
     "here: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ({"target_modules": ["q_proj", "proj"]}, r"\['proj'\] matched nothing"),
    ({"target_modules": []}, r"\[\] matched nothing"),
    ({"layers": []}, "layers is empty; valid indices are 0 to 1 in model.layers"),
    ({"layers": [1, 7]}, r"layers \[7\] do not exist; valid indices are 0 to 1"),
    ({"layers": 3}, "layers is 3; expected 1 to 2"),
    ({"layers": 0}, "layers is 0; expected 1 to 2"),
])
def test_what_matches_nothing_is_an_error_that_lists_what_exists(model, choice, message):
    with pytest.raises(ValueError, match=message):
        inject(model, **choice, **LORA)
    assert not lora_layers(model)


def test_injected_twice_is_an_error(model):
    inject(model, **LORA)
    with pytest.raises(ValueError, match="already has 14 LoRA layers, the first at model.layers.0"):
        inject(model, **LORA)


def test_unknown_layout_names_its_children():
    with pytest.raises(ValueError, match="Sequential has none of model.layers.*children: 0, 1"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))


def test_report_and_tree(model):
    adapted = inject(model, target_modules=["q_proj", "up_proj"], layers=1, **LORA)
    assert "2 modules in 1 of 2 blocks: q_proj up_proj" in report(model, adapted)
    assert f"{count(model)[0]:,} of {count(model)[1]:,} parameters train" in report(model, adapted)
    drawn = show.tree(model)
    assert drawn.startswith("model.layers.1\n")
    assert "q_proj  LoRA  A (4, 32)  B (32, 4)" in drawn and "k_proj  frozen\n" in drawn


@pytest.mark.parametrize("path, block, inside", [
    ("model.layers.10.mlp.up_proj", 10, "mlp.up_proj"), ("lm_head", None, "lm_head"),
    ("transformer.h.2.mlp.experts.7.c_fc", 2, "mlp.experts.7.c_fc")])  # the first number counts
def test_the_block_of_a_module_path(path, block, inside):
    assert split_path(path) == (block, inside)
    assert block_numbers([path, path, "lm_head"]) == ([] if block is None else [block])


def test_block_numbers_are_sorted_as_numbers():
    assert block_numbers(f"model.layers.{i}.mlp.up_proj" for i in (10, 2, 2, 1)) == [1, 2, 10]


@pytest.mark.parametrize("name, where", [
    ("qwen2_5_vl", "model.language_model.layers"), ("gemma3", "model.language_model.layers"),
    ("smolvlm", "model.text_model.layers"), ("mpt", "transformer.blocks"),
    ("mamba", "backbone.layers"), ("git", "git.encoder.layer"),
    ("llama4", "language_model.model.layers"), ("kosmos-2.5", "text_model.model.layers")])
def test_the_blocks_of_the_text_are_found_and_no_tower_is_touched(name, where):
    model = zoo.make(name)
    assert find_blocks(model)[0] == where
    adapted = inject(model, **LORA)
    assert all(path.startswith(f"{where}.") for path in adapted)
    assert all(n.endswith(("lora_A", "lora_B")) for n, p in model.named_parameters()
               if p.requires_grad)


def test_two_lists_of_blocks_are_refused():
    with pytest.raises(ValueError, match="HrmTextForCausalLM has none of model.layers"):
        find_blocks(zoo.make("hrm_text"))


@pytest.mark.parametrize("name, path, reason", [
    ("qwen3_5_text", "linear_attn.in_proj_a", reach.SERVERS),
    ("gemma3n_text", "altup.modality_router", reach.SERVERS),
    ("gemma4_text", "per_layer_input_gate", reach.SERVERS),
    ("qwen3_next", "mlp.shared_expert_gate", reach.SERVERS),
    ("jamba", "mamba.dt_proj", reach.SILENT), ("phimoe", "mlp.router", reach.OTHER),
    ("doge", "self_attn.dt_proj", reach.UNFED), ("bamba", "mamba.out_proj", reach.READ),
    ("mixtral", "mlp.experts.gate_up_proj", "routed experts"),
    ("lfm2", "conv.conv", "convolutions")])
def test_what_all_linear_leaves_out_is_said_with_its_reason(name, path, reason):
    model = zoo.make(name)
    adapted = inject(model, **LORA)
    share, missing = reach.reached(model)
    assert missing[path] == reason and 0 < share < 1
    assert not any(one.endswith(path) for one in adapted)
    said = report(model, adapted)
    assert f"adapters on {share:.0%} of the blocks' weights, none on " in said
    assert path in said and reason in said


def test_what_is_left_out_by_default_may_be_named():
    adapted = inject(zoo.make("qwen3_5_text"), target_modules=["in_proj_a"], **LORA)
    assert [path.rpartition(".")[2] for path in adapted] == ["in_proj_a"]


def test_what_the_model_never_calls_cannot_be_named():
    with pytest.raises(ValueError, match=r"\['dt_proj'\] matched nothing. dt_proj: never called"):
        inject(zoo.make("jamba"), target_modules=["dt_proj"], **LORA)


def test_a_weight_of_several_blocks_gets_no_adapter():
    model = zoo.make("zamba")
    adapted = inject(model, **LORA)
    assert reach.SHARED in reach.reached(model)[1].values()
    assert len({id(layer.weight) for layer in lora_layers(model).values()}) == len(adapted)


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match="PaliGemma.* sees later tokens"):
        inject(zoo.make("paligemma"), **LORA)


def test_trying_a_model_draws_nothing_and_keeps_its_mode(model):
    model.train()
    state = torch.get_rng_state()
    reach.candidates(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert all(p.grad is None for p in model.parameters())
