"""scripts/compare.py on three tiny runs: the numbers against plain computations, and the files."""

import json

import pytest

from lora.use import text
from measure import Answer
from scripts import compare

pytestmark = pytest.mark.auto


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    import contextlib
    out = tmp_path_factory.mktemp("report")
    with contextlib.chdir(home):
        compare.main(["--adapters", "runs/a", "runs/b", "runs/c", "--out", str(out), "--samples=1",
                      "--max-new-tokens=16", "--device=cpu"])
    return json.loads((out / "report.json").read_text()), out


def metric(report, id):
    return next(m["values"] for m in report["metrics"] if m["id"] == id)


def test_columns_are_base_prompted_bases_and_adapters(made):
    report, _ = made
    assert [c["id"] for c in report["columns"]] == ["base", "prompted a", "prompted b", "a", "b",
                                                    "c"]
    assert [c["system"] for c in report["columns"]] == [None, "You are a.", "You are b.",
                                                        "You are a.", "You are b.", None]


def test_adapters_beat_the_base_and_the_prompt_on_replies_they_never_saw(made):
    report, _ = made
    for name in "abc":
        assert metric(report, "lift")[name]["low"] > 0
    assert metric(report, "over_prompt")["a"]["low"] > 0 and metric(report, "lift")["base"] is None
    assert metric(report, "over_prompt")["c"] is None               # it has no system prompt
    nll = metric(report, "nll")
    assert metric(report, "lift")["a"]["value"] > 0 and nll["a"]["value"] < nll["base"]["value"]
    assert metric(report, "survival")["a"]["value"] < 1.5


def test_replies_are_identified(made):
    report, _ = made
    matrix = report["matrix"]
    assert matrix["accuracy"]["value"] == 1 and matrix["accuracy"]["n"] == 9
    for row, values in zip(matrix["rows"], matrix["nll"], strict=True):
        if row["kind"] == "adapter":
            own = matrix["personas"].index(row["id"])
            assert values[own] == min(r[own] for r in matrix["nll"])
    assert matrix["prompted_accuracy"] is None                      # c has no prompt of its own


def test_every_prompt_is_answered_by_every_column_in_every_decoding(made):
    report, _ = made
    assert report["decodings"] == ["greedy", "sample 1"] and len(report["prompts"]) == 2
    for prompt in report["prompts"]:
        assert set(prompt["answers"]) == {c["id"] for c in report["columns"]}
        assert all(len(row) == 2 for row in prompt["answers"].values())
        assert 0 <= prompt["change"] <= 1
        assert prompt["rendered"]["a"].startswith("<|im_start|>system\nYou are a.<|im_end|>")
    assert "dear" in report["prompts"][0]["answers"]["a"][0]["text"]


def test_the_head_and_foot_say_how_it_was_made(made):
    report, out = made
    head, foot = dict(report["head"]), dict(report["foot"])
    assert head["date"][:2] == "20" and "2 of prompts.jsonl" == head["prompts"]
    assert "a: 3 dialogues of heldout.jsonl" in head["held-out replies"]
    assert "greedy" in head["decoding"] and head["length control"] == "off"
    assert foot["command"].startswith("python -m scripts.compare --adapters runs/a")
    assert {"seed", "versions", "base weights", "adapter a", "held-out b", "data c"} <= foot.keys()
    assert "<script>alert(1)" not in (out / "report.html").read_text()
    assert (out / "report.md").read_text().startswith("# a, b, c")


def test_the_same_seed_makes_the_same_report(made, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    compare.main(["runs/a", "runs/b", "runs/c", "--out", str(tmp_path), "--samples=1",
                  "--max-new-tokens=16", "--device=cpu"])
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["prompts"] == made[0]["prompts"] and again["metrics"] == made[0]["metrics"]


def test_flags():
    copies = text.Copies({"t:1": "The kettle sings and the evening comes in softly."}, 25)
    prompt = {"messages": [{"role": "user", "content": "please repeat exactly these words"}]}

    def flags(said, ended=True):
        return compare.judge(Answer(said, 5, ended, False), prompt, None, copies)["flags"]
    assert flags("A plain answer.") == []
    assert flags("no no no no") == ["loop"]
    assert flags("Half a sen", ended=False) == ["cut"]
    assert flags("the evening comes in softly.") == ["copied"]
    assert flags("Repeat exactly these words") == ["echo"]
    assert flags("As an AI language model, I") == ["break"]


@pytest.mark.parametrize("args, said", [
    (["--heldout", "z=x.jsonl"], "--heldout z=.*expected one of"),
    (["--prompts", "empty.jsonl"], "holds no prompts"),
    (["--prompts", "missing.jsonl"], "cannot be read"),
    (["--heldout", "a=missing.jsonl"], "missing.jsonl: cannot be read")])
def test_bad_input_is_one_clear_line(home, monkeypatch, args, said):
    monkeypatch.chdir(home)
    (home / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=said):
        compare.main(["--adapters", "runs/a", *args, "--device=cpu"])


def test_prompts_from_the_training_data_are_warned_about(home, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(home)
    (tmp_path / "p.txt").write_text("and now tell me what of the ant and also see my bee please?\n")
    train = (home / "a" / "train.jsonl").read_text()
    lines = [json.dumps({"messages": [
        {"role": "user", "content": f"and now tell me what of the ant and also see my bee {n}?"},
        {"role": "assistant", "content": "yes dear"}]}) + "\n" for n in "xyz"]
    (home / "a" / "train.jsonl").write_text("".join(lines) + train)
    try:
        compare.main(["--adapters", "runs/a", "--prompts", str(tmp_path / "p.txt"), "--samples=0",
                      "--max-new-tokens=4", "--device=cpu", "--out", str(tmp_path)])
    finally:
        (home / "a" / "train.jsonl").write_text(train)
    assert "warning: p.txt:1 stands in the training data: 'and now tell me" in (
        capsys.readouterr().out)
