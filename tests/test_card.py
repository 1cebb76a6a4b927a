"""The README.md of an adapter: what it says, and what it must not say."""

import doctest
import json
import re

import pytest

from inject import inject
from lora import adapter, config
from lora.run import card

INFO = {"dtype": "torch.float32", "base_weights": "0123456789abcdef", "data": "fedcba9876543210",
        "format": "template", "system": "You are a | b.\nBe kind.",
        "systems": 1}
BEST = {"step": 27, "val_loss": 0.03591, "val_accuracy": 0.99, "recall": 0.979}
BEFORE = {"step": 0, "val_loss": 2.30044, "val_accuracy": 0.62}
ADAPTER = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 8,
           "lora_alpha": 32}


def settings(tmp_path, **changes):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changes))
    return config.load(file)


def test_the_card_says_base_data_settings_numbers_and_how_to_load(tmp_path):
    s = settings(tmp_path, train={"run": "demo", "lr": 0.002})
    text = card.card(INFO, s, BEST, BEFORE, ADAPTER)
    assert text.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    assert "| data | data.py, digest `fedcba9876543210` |" in text
    assert "| system prompt | You are a \\| b. Be kind. |" in text
    assert "| measure | before | step 27 |" in text
    assert "| val_loss | 2.3004 | 0.0359 |" in text and "| recall | – | 0.9790 |" in text
    assert "PeftModel.from_pretrained(" in text and "--max-lora-rank 16 --lora-modules" in text
    assert "python -m scripts.chat runs/demo" in text
    values = json.loads(re.search("```json\n(.*?)```", text, re.S)[1])
    assert values["train"]["lr"] == 0.002
    assert {f"{a}.{b}" for a, part in values.items() for b in part} == set(config.flat(s))


def test_the_card_holds_no_path_of_this_machine(tmp_path):
    home = "/home/somebody/secret"
    s = settings(tmp_path, model={"name": f"{home}/base", "adapter": f"{home}/runs/first/adapter/"},
                 data={"path": f"{home}/facts.jsonl", "val_path": "C:\\secret\\val.jsonl"},
                 keep={"replay": f"{home}/replay.txt", "retain": "../secret/retain.jsonl"})
    text = card.card(INFO, s, BEST, None, ADAPTER)
    assert "secret" not in text and "somebody" not in text
    assert all(name in text for name in ("facts.jsonl", "val.jsonl", "replay.txt", "retain.jsonl"))


@pytest.mark.parametrize("name", ["model.name", *sorted(card.FILES)])
def test_settings_that_name_a_file_exist(name):
    assert name in config.flat(config.Config())


@pytest.mark.parametrize("r, rank", [(1, 16), (16, 16), (17, 32), (24, 32), (64, 64), (300, 512)])
def test_the_rank_is_one_that_vllm_takes(tmp_path, r, rank):
    from lora.use.readers import VLLM_RANKS
    text = card.card(INFO, settings(tmp_path), BEST, None, {**ADAPTER, "r": r})
    assert f"--max-lora-rank {rank} " in text and rank in VLLM_RANKS


def test_an_adapter_nobody_measured_and_several_system_prompts(tmp_path):
    text = card.card({**INFO, "systems": 3}, settings(tmp_path), {"step": 4},
                     {"step": 0}, ADAPTER)
    assert "Nothing was measured: it is the adapter of step 4." in text
    assert "| system prompt | You are a \\| b. Be kind. (the most frequent of 3) |" in text
    text = card.card({**INFO, "systems": 1, "system": None}, settings(
        tmp_path, model={"quant": "nf4"}), BEST, None, ADAPTER)
    assert "| system prompt | none |" in text and "in float32, its linear layers in nf4 |" in text


def test_it_is_written_beside_the_adapter_which_still_loads(tmp_path, model):
    inject(model, r=4, lora_alpha=8)
    adapter.save(model, tmp_path / "adapter", "tiny")
    s = settings(tmp_path)
    card.write(tmp_path / "adapter", INFO, s, BEST, BEFORE)
    once = (tmp_path / "adapter" / "README.md").read_bytes()
    assert b"A LoRA adapter of tiny, rank 4" in once
    card.write(tmp_path / "adapter", INFO, s, BEST, BEFORE)
    assert (tmp_path / "adapter" / "README.md").read_bytes() == once
    assert adapter.load(model, tmp_path / "adapter")


def test_the_example_of_file_name():
    assert doctest.testmod(card) == (0, 1)
