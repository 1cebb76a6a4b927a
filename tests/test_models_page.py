"""docs/models.md is what python -m tests.models_page writes."""

import re

import models_page
import pytest
import zoo

from lora.use import readers

PAGE = models_page.PAGE.read_text(encoding="utf-8")
LINES = {found[1]: line for line in PAGE.splitlines() if (found := re.match(r"\| `(.+?)`", line))}


def test_every_toy_has_a_row():
    assert list(LINES) == sorted(zoo.TOYS) and len(LINES) >= 75


@pytest.mark.parametrize("name", [
    "llama", "qwen3", "gpt2", "gemma3", "gemma4", "qwen3_5", "qwen3_next", "mixtral", "lfm2",
    "granitemoehybrid", "mistral3", "deepseek_v3", "stablelm", "mpt", "rwkv"])
def test_a_row_is_what_the_toy_says(name):
    assert models_page.line(models_page.row(name)) == LINES[name]


def test_what_peft_ignores_is_known_to_the_check():
    """The readers' tables name every model type of which PEFT reads only a part."""
    kinds = {name: zoo.MODEL_TYPES[name] for name in LINES}
    assert {kinds[name] for name, line in LINES.items()
            if "| ignores a part |" in line} == readers.PEFT_LOSES
    assert {kinds[name] for name, line in LINES.items() if "| equal after export |" in line} <= (
        readers.PEFT_MIXES | {"qwen3_5", "qwen3_5_moe", "qwen4_exp", "llama4", "mllama", "emu3",
                              "dots3_note"})


def test_most_architectures_are_trained_and_open_in_peft():
    assert sum(line.split(" | ")[5].startswith("equal") for line in LINES.values()) >= 75
