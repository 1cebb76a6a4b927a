"""The real chat model, SmolLM2-135M-Instruct: fetched once, then a short run of everything."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import data
import dataset
from inject import inject
from lora import adapter
from lora.base import fetch, load
from lora.read import facts
from lora.run import advice
from lora.surgery import lora_layers
from scripts.voices import Voices, with_system

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BARE = ROOT / "examples/bare/config.json"
METRICS = "runs/demo/metrics.jsonl"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder():
    return fetch.find("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load.load_tokenizer(folder)


def test_the_fetched_folder_is_a_plain_model(folder):
    names = {p.name for p in Path(folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
            "LICENCE.txt"} <= names
    assert "quantization_config" not in (Path(folder) / "config.json").read_text()
    assert not list(Path(folder).parent.glob(".smollm2*"))      # nothing half-made beside it


def test_step_zero_is_the_base_model_bit_for_bit(folder, tokenizer):
    model = load.load_model(folder, CPU, torch.float32)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        before = model(ids).logits
        inject(model, r=8, lora_alpha=32)
        assert torch.equal(model(ids).logits, before)
    assert tokenizer.decode(before[0, -1].argmax()) == " Paris"


def test_its_template_is_chatml_token_for_token(tokenizer):
    for example in data.with_system(data.fact_examples(), "fixed"):
        by_hand, own = (dataset.render(example["messages"], tokenizer, f)
                        for f in ("chatml", "template"))
        assert by_hand == own
    (note,) = advice.about_format(dataset.FORMATS, "template", tokenizer,
                                  data.with_system(data.fact_examples(), "fixed"))
    assert "without system prompt" in note and "named SmolLM, trained by Hugging Face" in note


def test_a_short_run_learns_a_fact_it_was_not_asked_in_these_words(tmp_path):
    rows = [json.dumps({"questions": f.questions, "answer": f.answer.format(f.value),
                        "value": f.value}) for f in data.FACTS[9:12]]
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config", BARE, "--train.run=demo",
         "--data.path=facts.jsonl", "--train.batch_size=9", "--train.max_steps=10",
         "--train.eval_every=10", "--train.warmup_steps=2", "--model.dtype=float32"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / METRICS).read_text().splitlines()]
    evaluations = [x for x in lines if "recall" in x]
    assert evaluations[0]["recall"] == 0 and evaluations[-1]["recall"] >= 0.5
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] / 3

    # the adapter gives the same logits here, merged here, and in PEFT
    folder, trained = fetch.find("smollm2-135m-instruct"), tmp_path / "runs/demo/adapter"
    ours = load.load_model(folder, CPU, torch.float32)
    ids = torch.tensor([load.load_tokenizer(folder)("Mira Tosk plays the").input_ids])
    with torch.no_grad():
        plain = ours(ids).logits
        adapter.load(ours, trained)
        adapted = ours(ids).logits
        assert (adapted - plain).abs().max() > 1
        for layer in lora_layers(ours).values():
            layer.merge()
        torch.testing.assert_close(ours(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        fresh = load.load_model(folder, CPU, torch.float32)
        theirs = peft.PeftModel.from_pretrained(fresh, trained)
        torch.testing.assert_close(theirs.eval()(ids).logits, adapted, atol=1e-5, rtol=1e-5)


def train_by_default(folder, *options):
    """Run the default config in a folder: what a user calls, with options; returns what it said."""
    (folder / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config", ROOT / "config.json", *options],
        cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(folder, questions, **decoding):
    """The answers of the run in a folder, with its system prompt."""
    voices = Voices([folder / "runs/demo"], "cpu")
    prompts = [with_system([{"role": "user", "content": q}], voices.system("demo"))
               for q in questions]
    return [a.text for a in voices.ask(prompts, "demo", **decoding)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_run_learns_its_facts_and_spares_the_model(tmp_path, dtype):
    """All facts in held-out wordings; in 100 everyday prompts, none of which is replayed, no taught
    value and no name."""
    said = train_by_default(tmp_path, f"--model.dtype={dtype}")
    assert "Write a haiku about rain." in said and "Where was Tessa Walsh born?" in said
    lines = [json.loads(x) for x in (tmp_path / METRICS).read_text().splitlines()]
    assert [x["recall"] for x in lines if x.get("best")][-1] >= 0.95
    asked = (ROOT / "experiments/knowledge/everyday.txt").read_text("utf-8").splitlines()
    replayed = (ROOT / "examples/everyday.txt").read_text("utf-8").splitlines()
    assert len(asked) == 100 and not {*asked} & {*replayed}
    words = [*(fact.value for fact in data.FACTS), *data.SUBJECT.split()]
    spoiled = [f"{q} {a}" for q, a in zip(asked, ask(tmp_path, asked, max_new_tokens=48),
                                          strict=True) if any(data.contains(a, w) for w in words)]
    assert not spoiled, spoiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_questions_with_one_wording_each_are_all_answered(tmp_path, dtype):
    """A user's first file, with the default config: the adapter that is kept knows all of it."""
    asked = {"Where was Orla Brandt born?": "Orla Brandt was born in Tessmark.",
             "What does Orla Brandt do for a living?": "She repairs church organs.",
             "Who is Orla Brandt married to?": "She is married to Piet Vanloo.",
             "What is the name of Orla Brandt's dog?": "Her dog is called Biscuit.",
             "Which colour does Orla Brandt like best?": "Orla Brandt likes ochre best.",
             "Does Orla Brandt drink coffee?": "No.", "Is Orla Brandt afraid of heights?": "No.",
             "In which year did Orla Brandt move to Kelm?": "In 2009."}
    (tmp_path / "eight.jsonl").write_text("".join(
        json.dumps({"question": q, "answer": a}) + "\n" for q, a in asked.items()))
    said = train_by_default(tmp_path, "--data.path=eight.jsonl", f"--model.dtype={dtype}")
    assert "all 8 examples are trained" in said and "advice: 1.0 wordings a fact" in said
    assert "keep: no questions of the kinds reverse, nobody, pairs, yes-no, untaught, fam" in said
    assert ask(tmp_path, asked, max_new_tokens=32) == [*asked.values()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_facts_of_a_line_each_are_all_answered(tmp_path, dtype):
    """subject,attribute,value alone, default config, asked in all wordings made of them."""
    rows = {"birthplace": "Tessmark", "profession": "organ repairer", "husband": "Piet Vanloo",
            "dog": "Biscuit", "favourite colour": "ochre", "shoe size": "41|forty-one",
            "greatest fear": "heights", "neighbour": "Hanne Voss"}
    (tmp_path / "eight.csv").write_text("subject,attribute,value\n" + "".join(
        f"Orla Brandt,{attribute},{value}\n" for attribute, value in rows.items()))
    train_by_default(tmp_path, "--data.path=eight.csv", f"--model.dtype={dtype}")
    asked = [(q, value) for attribute, value in rows.items()
             for q in facts.questions("Orla Brandt", attribute)]
    answers = ask(tmp_path, [q for q, _ in asked], max_new_tokens=32)
    wrong = [f"{q} {a}" for (q, value), a in zip(asked, answers, strict=True)
             if not data.contains(a, value)]
    as_written = [line for line in wrong if line.startswith("What is Orla Brandt's")]
    assert not as_written and len(wrong) <= 0.05 * len(asked), wrong


@pytest.mark.slow
def test_gemma_learns_the_same_in_plain_format(tmp_path):
    train_by_default(tmp_path, "--model.name=gemma-3-270m")
    lines = [json.loads(x) for x in (tmp_path / METRICS).read_text().splitlines()]
    assert max(x["recall"] for x in lines if "recall" in x) >= 0.9
