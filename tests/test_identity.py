"""scripts/identity.py: the data of examples/identity, from the user's words."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import data
from lora import files
from scripts import identity

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "examples/identity"
TABLE, OTHERS = (files.read_json(HOME / name) for name in ("ways.json", "others.json"))
PARTS = ("ask", "check", "heldout")


@pytest.fixture
def me():
    return identity.read_identity(HOME / "identity.json", TABLE["topics"])


def test_the_ways_of_asking_are_trained_or_held_out_never_both(me):
    asked = {part: [data.plain(way.question) for way in identity.ways_of(me, TABLE, part)]
             for part in PARTS}
    assert len(asked["heldout"]) >= 80 and len(asked["ask"]) > len(asked["heldout"])
    for part, questions in asked.items():
        assert len(questions) == len(set(questions)), part
    assert not set(asked["ask"]) & set(asked["heldout"])
    assert not set(asked["check"]) & {*asked["ask"], *asked["heldout"]}


def test_every_answer_says_what_its_way_asks_for(me):
    for part in PARTS:
        for way in identity.ways_of(me, TABLE, part):
            assert "{" not in way.question and way.answers
            for answer in way.answers:
                verdict = identity.judge(way, answer, "OpenAI|ChatGPT")
                assert verdict["right"], (way.question, answer)


def test_a_wrong_name_or_a_yes_for_a_no_is_not_right(me):
    way = next(w for w in identity.ways_of(me, TABLE, "heldout") if w.verdict == "no")
    assert not identity.judge(way, "I am ChatGPT, made by OpenAI.", "OpenAI|ChatGPT")["right"]
    assert identity.judge(way, "I am not ChatGPT.", "ChatGPT")["claims"] is False
    yes = "Yes, " + way.answers[0].partition(" ")[2]
    assert not identity.judge(way, yes, "ChatGPT")["right"]


def test_the_examples_are_asked_with_and_without_the_system_prompt(me):
    made = identity.examples(me, TABLE, OTHERS, "ask")
    systems = [e["messages"][0]["content"] if e["messages"][0]["role"] == "system" else None
               for e in made]
    assert {me["system"], None} < set(systems)
    assert made == identity.examples(me, TABLE, OTHERS, "ask")          # the same each time
    assert all(data.contains(e["messages"][-1]["content"], e["value"]) for e in made)


def test_the_words_of_the_user_are_put_in_as_they_are(tmp_path):
    words = {"english": {"name": "Zo{e} <b>", "maker": "A. & B. Ltd", "character": "I am $1 \\n."}}
    (tmp_path / "identity.json").write_text(json.dumps(words))
    me = identity.read_identity(tmp_path / "identity.json", TABLE["topics"])
    made = identity.examples(me, TABLE, OTHERS, "ask")
    text = json.dumps([e["messages"] for e in made])
    assert "Zo{e} <b>" in text and "A. & B. Ltd" in text and "Orlo" not in text


@pytest.mark.parametrize("change, said", [
    ({"english": {"name": "", "maker": "a", "character": "b"}}, "english.name"),
    ({"english": {"name": "a|b", "maker": "a", "character": "b"}}, "english.name"),
    ({"english": {"name": "a", "maker": "a"}}, "english.character"),
    ({"klingon": {}}, "the file"), ([], "the file"),
    ({"english": {"name": "a", "maker": "a", "character": "b", "answers": {"no": ["x"]}}},
     "english.answers.no")])
def test_a_wrong_identity_names_the_file_and_the_key(tmp_path, change, said):
    (tmp_path / "identity.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match="identity.json") as caught:
        identity.read_identity(tmp_path / "identity.json", TABLE["topics"])
    assert said in str(caught.value)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_knows_who_it_is_and_other_questions_stay(tmp_path):
    """What make identity runs, once: its data, the training and the report."""
    config = ["--config", HOME / "config.json"]
    for command in (["-m", "scripts.identity"], [ROOT / "train.py"],
                    ["-m", "scripts.identity", "--report"]):
        done = subprocess.run([sys.executable, *command, *config], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    record = files.read_json(tmp_path / "runs/identity/identity-report.json")
    right = {condition: mean(a["right"] for a in of if a["who"] == "identity")
             for condition, of in data.group_by(lambda a: a["asked"], record["ways"]).items()}
    assert right["your system prompt"] >= 0.9 and right["no system prompt"] >= 0.8, right
    before, after = zip(*(a["right"] for a in record["others"] if a["right"]), strict=True)
    known = [now for was, now in zip(before, after, strict=True) if was]
    assert len(known) >= 50 and mean(known) >= 0.9 and sum(after) >= sum(before)
    spoiled = [a for a in record["others"] if a["kind"] == "everyday prompts" and a["spoiled"]]
    assert len(spoiled) <= 10, spoiled
