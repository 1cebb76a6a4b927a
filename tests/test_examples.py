"""The example data: enough of it, varied, held out honestly, and read as any user's would be."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from conftest import make_tokenizer

import data
import dataset
from lora import config
from lora.use import text
from scripts.voices import read_prompts

FOLDERS = {"companion": 200, "friends/bram": 60, "friends/juno": 60, "friends/ottoline": 60,
           "zh": 40}


@pytest.fixture(params=FOLDERS)
def example(request, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    folder = Path("examples") / request.param
    prompts = next(f / "prompts.jsonl" for f in (folder, folder.parent)
                   if (f / "prompts.jsonl").exists())
    return {"settings": config.load(folder / "config.json"), "least": FOLDERS[request.param],
            "train": data.read_examples(folder / "train.jsonl"),
            "heldout": data.read_examples(folder / "heldout.jsonl"),
            "prompts": [p["messages"][-1]["content"] for p in read_prompts(prompts)]}


def said(examples, role):
    return [m["content"] for e in examples for m in e["messages"] if m["role"] == role]


def test_there_is_enough_and_the_config_points_at_it(example):
    assert len(example["train"]) >= example["least"] and len(example["heldout"]) >= 12
    assert len(example["prompts"]) >= 16 and example["settings"].data.system
    assert Path(example["settings"].data.path).exists()
    assert any(len(e["messages"]) > 2 for e in example["train"])


def test_nothing_is_there_twice_or_nearly_twice(example):
    everything = example["train"] + example["heldout"]
    assert data.duplicates(everything) == [] == data.contradictions(everything)
    assert text.near_duplicates(said(everything, "assistant"), 0.3) == []
    assert text.near_duplicates(said(everything, "user"), 0.6) == []
    openings = [tuple(text.words(a)[:3]) for a in said(everything, "assistant")]
    assert max(openings.count(o) for o in openings) <= 0.02 * len(openings) + 1


def test_prompts_and_held_out_questions_are_not_in_training(example):
    asked = said(example["train"], "user")
    assert text.shared_ngrams(example["prompts"], asked, 5) == []
    assert text.shared_ngrams(said(example["heldout"], "user"), asked, 6) == []
    assert text.shared_ngrams(example["prompts"], said(example["heldout"], "user"), 6) == []


def test_every_dialogue_renders_and_nothing_falls_out_of_character(example):
    made = dataset.QADataset(
        data.with_system(example["train"], example["settings"].data.system), make_tokenizer(),
        max_length=10_000)
    assert len(made) == len(example["train"])
    assert [a for a in said(example["train"], "assistant") if text.breaks(a) or text.loops(a)] == []


def test_the_companion_has_five_themes_of_forty():
    lines = Path("examples/companion/train.jsonl").read_text(encoding="utf-8").splitlines()
    themes = [json.loads(line)["theme"] for line in lines]
    assert {t: themes.count(t) for t in themes} == dict.fromkeys(
        ("loneliness", "health", "burden", "nostalgia", "needed"), 40)


def test_the_friends_answer_the_same_held_out_messages():
    asked = [said(data.read_examples(f"examples/friends/{name}/heldout.jsonl"), "user")
             for name in ("bram", "juno", "ottoline")]
    assert all(a == b for a, b in combinations(asked, 2))


def test_the_chinese_file_starts_with_a_bom_and_has_full_width_characters():
    raw = Path("examples/zh/train.jsonl").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf") and any(c in raw.decode() for c in "０１２８９ＡＢ")
    assert data.read_examples("examples/zh/train.jsonl")[0]["messages"][0]["content"][0] != "\ufeff"
