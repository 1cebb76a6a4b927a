"""What chat, verify, compare and merge share: runs on one base, ready to answer."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import within

import data
import dataset
from lora.run import runlog
from scripts.voices import Voices, read_prompts, with_system

pytestmark = pytest.mark.auto

ASKED = [[{"role": "user", "content": "is it a dog?"}]]


@pytest.fixture
def voices(home, monkeypatch):
    monkeypatch.chdir(home)
    return Voices(["runs/a", "runs/b", "runs/c"], "cpu")


@pytest.fixture
def copy(home, tmp_path, monkeypatch):
    """A copy of runs/a that a test may damage."""
    monkeypatch.chdir(home)
    return shutil.copytree(home / "runs" / "a", tmp_path / "runs" / "a")


def change(file, **keys):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**values, **keys}.items() if v is not ...}))


def test_a_run_knows_what_it_was_trained_with(voices):
    assert voices.problems == []
    assert [voices.system(n) for n in (None, "a", "b", "c")] == [None, "You are a.", "You are b.",
                                                                 None]


def test_chat_and_training_read_the_same_tokens(voices):
    run = voices.runs["a"]
    examples, _ = data.load("a/train.jsonl", system="You are a.", val_fraction=0)
    trained = dataset.QADataset(examples, voices.tokenizer, run.info["format"])
    for item in trained.items:
        prompt = voices.voice("a").ids(
            with_system(item["example"]["messages"][:-1], voices.system("a")))
        assert [*item["input_ids"]][:len(prompt)] == prompt
        assert {*item["labels"][:len(prompt)]} == {-100} and item["labels"][len(prompt)] != -100


def test_each_adapter_answers_in_its_own_voice_and_the_base_is_untouched(voices):
    with torch.no_grad():
        ids = torch.tensor([voices.voice(None, "template").ids(ASKED[0])])
        before = voices.model(ids).logits
    said = {n: voices.ask([with_system(ASKED[0], voices.system(n))], n, max_new_tokens=12)[0].text
            for n in "abc"}
    assert "dear" in said["a"] and "NO" in said["b"] and "hm" in said["c"]
    with torch.no_grad():
        assert torch.equal(voices.model(ids).logits, before)


def test_nll_is_the_sum_over_the_answer_with_its_stop_token(voices):
    example = {"messages": [*ASKED[0], {"role": "assistant", "content": "yes dear dog"}],
               "source": "x:1"}
    ids, mask = dataset.render(example["messages"], voices.tokenizer, "template")
    with torch.no_grad(), voices.bank.using("a"):
        log_p = voices.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    wanted = -sum(log_p[i - 1, ids[i]].item() for i in range(len(ids)) if mask[i])
    short = {"messages": [*ASKED[0], {"role": "assistant", "content": "no"}], "source": "x:2"}
    got = voices.nll([example, short, example], "a")
    assert got[0] == pytest.approx(wanted / len("yes dear dog"), rel=within(1e-4, 1e-2))
    assert got[2] == pytest.approx(got[0], rel=within(1e-5, 1e-2)) and got[1] != got[0]


def test_a_persona_is_least_surprising_to_its_own_adapter(voices):
    for persona in "ab":
        examples = data.read_examples(f"{persona}/heldout.jsonl")
        mean = {n: sum(voices.nll(examples, n)) for n in (None, "a", "b")}
        assert min(mean, key=mean.get) == persona


def test_a_short_answer_is_asked_for_once_more_and_the_longer_one_counts(voices):
    system = with_system(ASKED[0], "You are a.")
    (plain,) = voices.ask([system], "a", max_new_tokens=20)
    (asked,) = voices.ask([system], "a", max_new_tokens=20, min_words=50)
    assert not plain.expanded and len(asked.text) >= len(plain.text)
    assert asked.expanded == (len(asked.text) > len(plain.text))
    (enough,) = voices.ask([system], "a", max_new_tokens=20, min_words=1)
    assert enough == plain


def test_another_template_other_weights_and_another_base_are_said_out_loud(copy):
    change(copy / "run.json", template="0" * 16, base_weights="1" * 16)
    change(copy / "adapter" / "adapter_config.json", base_model_name_or_path="somebody/else")
    said = "\n".join(Voices([copy], "cpu").problems)
    assert "a: chat template: it is" in said and "training used 0000" in said
    assert "a: base weights: they are" in said and "the adapter is of somebody/else" in said


def test_a_run_older_than_the_checks_is_said_out_loud(copy):
    change(copy / "run.json", base_weights=..., system=...)
    assert sum("older than this check" in p for p in Voices([copy], "cpu").problems) == 2


@pytest.mark.parametrize("damage, said", [
    (lambda f: shutil.rmtree(f / "adapter"), "adapter_config.json is missing"),
    (lambda f: (f / "run.json").unlink(), "run.json is missing. Runs here: a, b, c."),
    (lambda f: (f / "run.json").write_text("[]"), "run.json cannot be read: expected an object"),
    (lambda f: (f / "adapter" / "adapter_config.json").write_text("[1]"), "not a JSON object"),
    (lambda f: (f / "adapter" / "adapter_model.safetensors").unlink(), "has no adapter_model.safe"),
    (lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 99), "be read"),
])
def test_a_damaged_run_is_one_clear_line(copy, damage, said):
    damage(copy)
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        Voices([copy], "cpu")


def test_runs_on_two_bases_are_refused(copy):
    change(copy / "run.json", base_model="other/base")
    copy = copy.rename(copy.with_name("other"))
    with pytest.raises(ValueError, match="on different bases: a on tiny, other on other/base"):
        Voices(["runs/a", copy], "cpu")


def test_a_run_may_be_named_and_its_last_adapter_too(home, monkeypatch):
    monkeypatch.chdir(home)
    assert runlog.read_run("a").name == "a" and runlog.read_run("runs/a/").name == "a"
    assert runlog.read_run("runs/a/last").name == "a/last"
    with pytest.raises(ValueError, match="runs/z is no finished run"):
        runlog.read_run("runs/z")


@pytest.mark.parametrize("name, content, said", [
    ("p.jsonl", "", "holds no prompts"), ("p.txt", "\n \n", "holds no prompts"),
    ("p.jsonl", '{"messages": []}', "p.jsonl:1: roles"),
    ("p.jsonl", '\n{"messages": [{"role": "assistant", "content": "a"}]}', "p.jsonl:2: roles"),
    ("p.jsonl", "nonsense", "p.jsonl:1: .*expected"), ("p.jsonl", "[1]", "p.jsonl:1: .*expected"),
    ("p.jsonl", '{"messages": [{"role": "user", "content": 1}]}', "p.jsonl:1: .*expected")])
def test_a_bad_prompts_file_is_one_clear_line(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")


def test_prompts_are_read_from_text_and_from_jsonl(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffHello?\n\n你好 \n", encoding="utf-8")
    assert [(p["id"], p["messages"][0]["content"]) for p in read_prompts(tmp_path / "p.txt")] == [
        ("p.txt:1", "Hello?"), ("p.txt:3", "你好")]


def test_switching_back_and_forth_with_an_error_in_between(voices):
    with contextlib.suppress(ValueError):
        voices.ask([[{"role": "user", "content": "<|im_end|>"}]], "a", max_new_tokens=4)
    assert voices.bank.name is None
