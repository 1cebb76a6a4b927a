"""scripts/chat.py: every command, as a user types it."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest

from scripts import chat
from scripts.voices import DECODING, Voices, with_system

pytestmark = pytest.mark.auto


@pytest.fixture(scope="module")
def voices(home):
    with contextlib.chdir(home):
        return Voices(["runs/a", "runs/b", "runs/c"], "cpu")


def start(voices, **changes):
    options = SimpleNamespace(**{"memory": "window", "budget": 200, "max_new_tokens": 24,
                                 "temperature": 0.0, "top_p": 0.9, "repetition_penalty": 1.0,
                                 "seed": 0, "min_words": 0,
                                 **changes})
    return chat.Chat(voices, options)


def hear(talk, *lines):
    """What is printed for some lines."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for line in lines:
            talk.hear(line)
    return out.getvalue()


def test_an_answer_is_streamed_whole_and_remembered(voices):
    talk = start(voices)
    printed = hear(talk, "is it a dog?")
    asked = with_system([{"role": "user", "content": "is it a dog?"}], "You are a.")
    (answer,) = voices.ask([asked], "a", max_new_tokens=24)
    assert printed.startswith(f"a: {answer.text}")
    assert talk.talk.turns == [("is it a dog?", answer.text)]
    sent = talk.talk.messages("and?")
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "user"]


def test_use_changes_the_adapter_and_its_system_prompt(voices):
    talk = start(voices)
    assert "You are b." in hear(talk, "/use b") and "NO" in hear(talk, "is it a dog?")
    assert "now the base model" in hear(talk, "/base")
    assert hear(talk, "hello").startswith("base: ")
    assert "None" in hear(talk, "/use c") and talk.talk.system is None


def test_compare_shows_everybody_and_changes_nothing(voices):
    talk = start(voices)
    hear(talk, "is it a dog?")
    before = list(talk.talk.turns)
    printed = hear(talk, "/compare")
    assert re.findall("^(base|a|b|c): ", printed, re.M) == ["base", "a", "b", "c"]
    assert f"\na: {before[0][1]}" in printed and talk.talk.turns == before
    assert "\nc: " in hear(talk, "/compare see my cow?") and talk.talk.turns == before


def test_scale_zero_is_the_base(voices):
    talk = start(voices)
    hear(talk, "/scale 0", "see my cow?")
    base = start(voices)
    hear(base, "/base", "see my cow?")
    assert talk.talk.turns == base.talk.turns
    assert "0.6 times as strongly" in hear(talk, "/scale 0.6")


def test_another_system_prompt_is_said_out_loud(voices):
    talk = start(voices)
    assert "never trained on it" in hear(talk, "/system You are loud.")
    assert talk.talk.messages("x")[0]["content"] == "You are loud."
    assert "You are loud." in hear(talk, "/system")


def test_retry_asks_again_and_keeps_one_turn(voices):
    talk = start(voices, temperature=3.0, max_new_tokens=24)
    hear(talk, "is it a dog?")
    answers = {talk.talk.turns[0][1]}
    for _ in range(4):
        hear(talk, "/retry")
        answers.add(talk.talk.turns[0][1])
    assert len(talk.talk.turns) == 1 and len(answers) > 1


def test_a_conversation_is_saved_as_training_reads_it_and_never_over_another(voices, tmp_path):
    import data
    talk, file = start(voices), tmp_path / "said.jsonl"
    hear(talk, "is it a dog?", f"/save {file}", "/reset", "see my cow?", f"/save {file}")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["messages"][1]["content"] for r in records] == ["is it a dog?", "see my cow?"]
    assert len(data.read_examples(str(file))) == 2


def test_reset_forgets(voices):
    talk = start(voices)
    hear(talk, "is it a dog?", "/reset")
    assert talk.talk.turns == []


def test_a_long_conversation_keeps_to_its_budget(voices):
    talk = start(voices, budget=150)
    for memory in ("window", "retrieve", "summary"):
        hear(talk, f"/memory {memory}", *["is it a dog or a cow or an ant?"] * 6)
        sent = talk.talk.messages("well?")
        assert len(voices.voice("a").ids(sent)) <= 150
    assert "Earlier: " in sent[0]["content"]


def test_a_short_answer_is_asked_for_more_and_it_is_said(voices):
    talk = start(voices, min_words=100, max_new_tokens=24)
    printed = hear(talk, "is it a dog?")
    assert ("shorter than 100 words" in printed) == (talk.talk.turns[0][1] not in
                                                     printed.splitlines()[0])


@pytest.mark.parametrize("line, said", [
    ("/us b", "unknown command /us; there are /base /compare /help"),
    ("/use z", "no adapter 'z'; there are a, b, c"), ("/scale much", "expected a number"),
    ("/scale -1", "expected 0 .*to 4"), ("/memory all", "expected window, summary, retrieve"),
    ("/retry", "nothing to repeat"), ("/save x.jsonl", "nothing to save"),
    ("/compare", "nothing to compare"), ("x" * 500, "the message has .* tokens"),
    ("<|im_end|>", "special token")])
def test_what_cannot_be_done_is_one_line(voices, line, said):
    talk = start(voices)
    with pytest.raises(ValueError, match=said):
        talk.hear(line)
    assert talk.talk.turns == []


def test_help_names_every_command(voices):
    for name in (n[3:] for n in dir(chat.Chat) if n.startswith("do_")):
        assert f"/{name}" in chat.HELP


@pytest.mark.parametrize("last", chat.LEAVE)
def test_the_program_talks_until_it_is_told_to_leave(home, monkeypatch, capsys, last):
    """An empty line is no farewell."""
    monkeypatch.chdir(home)
    lines = iter(["is it a dog?", "", "  ", "/use z", "/use b", "see my cow?", last])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert chat.main(["runs/a", "runs/b", "--max-new-tokens=8", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "adapters a, b" in out and "no adapter 'z'" in out and "b: " in out
    assert "warning" not in out and next(lines, None) is None


def test_the_end_of_input_leaves_too(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main(["runs/a", "--device=cpu"]) == 0


def test_help_shows_the_decoding_that_is_used(capsys):
    with pytest.raises(SystemExit):
        chat.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"(default: {value})" in out for value in DECODING.values())
