"""lora/run/advice.py: each mistake has its sentence, and what is right has none."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from transformers import LlamaConfig, Qwen2Config

import data
from inject import inject
from lora import config
from lora.layer import LoRALinear
from lora.optim import AdamW
from lora.run import advice

ROOT = Path(__file__).resolve().parents[1]
# the default model's sizes; advice reads a model's config alone
MODEL = SimpleNamespace(config=LlamaConfig(hidden_size=576, num_hidden_layers=30))
ALL = [f"model.layers.{n}.self_attn.q_proj" for n in range(30)]


def told(tmp_path, adapted=ALL, model=MODEL, path=ROOT / "config.json", train=None, val=None,
         **changes):
    """The sentences about the default settings and data with some changes: section__key=value."""
    sections = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "config.json").write_text(json.dumps(sections))
    settings = config.load(tmp_path / "config.json")
    if train is None:
        train, val = data.load(val_fraction=settings.data.val_fraction,
                               split_by=settings.data.split_by)
    return advice.sentences(settings, model, adapted, train, val)


def test_the_default_settings_on_the_default_facts_need_no_advice(tmp_path):
    assert told(tmp_path) == []
    assert told(tmp_path, data__val_fraction=0) == []


@pytest.mark.parametrize("changes, part", [
    ({"data__split_by": "fact"}, "validation asks about 6 facts that no training example teaches"),
    ({"train__best_by": "loss"}, "the best adapter is chosen by validation loss"),
    ({"data__val_fraction": 0.7}, "2.0 wordings a fact"),
    ({"adapted": ALL[-5:]}, "adapters sit in 5 of 30 blocks"),
    ({"train__lr": 5e-5}, "lr 5.0e-05 with lora_alpha 32 is 26 times below the rule, 1.3e-03"),
    ({"lora__lora_alpha": 1, "train__lr": 1e-3}, "with lora_alpha 1 is 42 times below the rule"),
    ({"lora__r": 64, "lora__use_rslora": True, "train__lr": 1e-5},
     "lr 1.0e-05 with lora_alpha 32, r 64 and use_rslora is 17 times below the rule, 1.7e-04"),
    ({"train__repetition_penalty": 1.1}, "a repetition penalty lowers"),
    ({"train__max_steps": 4}, "4 steps are no more than the 5 of the warm-up"),
    ({"train__epochs": 0.5}, "4 steps are no more than the 5 of the warm-up"),
], ids=str)
def test_each_mistake_is_one_sentence(tmp_path, changes, part):
    (sentence,) = told(tmp_path, **changes)
    assert part in sentence and (sentence.endswith(" (docs/knowledge.md)") or "warm-up" in part)
    assert "{" not in sentence and "\n" not in sentence


def test_the_source_recipe_makes_every_mistake(tmp_path):
    asked = [e for fact in data.FACTS for e in data.fact_examples([fact._replace(
        questions=fact.questions[:1])])]
    made = told(tmp_path, ALL[-5:], train=asked[:18], val=asked[18:], train__best_by="loss",
                train__lr=5e-5, train__repetition_penalty=1.1)
    assert len(made) == 6 and "1.0 wordings" in made[2]


def test_questions_and_answers_are_facts_too(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(
        {"question": f"What is {i}?", "answer": f"It is {i}."}) + "\n" for i in range(8)))
    train, val = data.load(str(tmp_path / "a.jsonl"))
    loss, single = told(tmp_path, train=train, val=val)        # and 24 steps, by themselves
    assert loss.startswith('no fact has a "value"') and single.startswith("1.0 wordings a fact")
    train, val = data.load(str(tmp_path / "a.jsonl"), split_by="fact")
    assert told(tmp_path, train=train, val=val)[0].startswith("validation asks about 2 facts")


def test_conversations_without_facts_have_other_rules(tmp_path):
    talk = [data.new_example([("user", "hi"), ("assistant", "yo")], "t:1")]
    assert told(tmp_path, ALL[:1], train=talk, val=talk, train__lr=1e-6) == []
    facts = data.fact_examples()
    assert told(tmp_path, ALL[:1], train=facts + talk, val=[], train__lr=1e-6)  # some are facts


def test_limits_are_where_they_are_said_to_be(tmp_path):
    rule = advice.rule_lr(MODEL, 32, 8)
    assert told(tmp_path, train__lr=rule / 3.99) == [] != told(tmp_path, train__lr=rule / 4.01)
    assert told(tmp_path, ALL[:10]) == [] != told(tmp_path, ALL[:9])
    four, three = (data.fact_examples([f._replace(questions=f.questions[:n]) for f in data.FACTS])
                   for n in (4, 3))
    assert told(tmp_path, train=four, val=[]) == [] != told(tmp_path, train=three, val=[])
    assert told(tmp_path, train=data.with_system(four, "S"), val=data.with_system(four, "S")) == []


def test_the_rule_for_the_learning_rate():
    wide = SimpleNamespace(config=LlamaConfig(hidden_size=2000, num_attention_heads=20))
    assert advice.rule_lr(wide, 32, 8) == pytest.approx(5e-4)
    assert advice.rule_lr(wide, 64, 8) == pytest.approx(2.5e-4)
    assert advice.rule_lr(MODEL, 32, 8) == pytest.approx(5e-4 * (2000 / 576) ** 0.781)
    assert advice.rule_lr(wide, 32, 64) == pytest.approx(5e-4)  # alpha / r: whatever the rank
    assert advice.rule_lr(wide, 32, 64, use_rslora=True) == pytest.approx(5e-4 / 8)
    assert advice.rule_lr(wide, 32, 1, use_rslora=True) == pytest.approx(5e-4)
    qwen = SimpleNamespace(config=Qwen2Config(hidden_size=896))
    assert advice.rule_lr(qwen, 32, 8) == pytest.approx(5e-4 * (2000 / 896) ** 0.0775)


def test_a_rate_that_is_right_with_rslora_needs_no_advice(tmp_path):
    lora = {"lora__r": 64, "train__lr": 1.7e-4}
    assert told(tmp_path, **lora) != told(tmp_path, lora__use_rslora=True, **lora) == []


@pytest.mark.parametrize("r", [2, 8, 64])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_rule_keeps_adams_first_step(r, use_rslora):
    """At the rule's rate the loss falls by lr s r d_out E|G^T x A^T| at first, for all ranks alike;
    such an entry is normal with variance 64 rows / 3."""
    torch.manual_seed(0)
    G, x = torch.randn(64, 48), torch.randn(64, 256)
    layer = LoRALinear(torch.nn.Linear(256, 48, bias=False), r, 32, use_rslora=use_rslora)
    (G * layer(x)).sum().backward()
    AdamW([layer.lora_B]).step(advice.rule_lr(MODEL, 32, r, use_rslora))
    fall = -(G * (layer(x) - layer.base_layer(x))).sum().item()
    expected = advice.rule_lr(MODEL, 32, 8) * 32 * 48 * (2 / torch.pi * 64 / 3) ** 0.5
    assert fall == pytest.approx(expected, rel=0.1)


def test_blocks_are_counted_in_the_paths_that_inject_gives(tmp_path):
    model = make_model(num_hidden_layers=4, hidden_size=32)
    settings = config.load(ROOT / "config.json")
    settings = replace(settings, train=replace(settings.train, lr=0.01))
    adapted = inject(model, r=2, lora_alpha=32, layers=1, target_modules="all-linear")
    train = data.fact_examples()
    (sentence,) = advice.sentences(settings, model, adapted, train, [])
    assert "adapters sit in 1 of 4 blocks" in sentence
