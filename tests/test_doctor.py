"""python -m scripts.doctor finds what is wrong with the data, and nothing in clean data."""

import json
import re

import pytest

from scripts import doctor

CLEAN = [(f"What is number {i}?", f"It is {i}.") for i in range(8)]


@pytest.fixture
def examine(tiny_folder, tmp_path, capsys):
    """examine(pairs, *overrides): exit code and what was printed."""
    (tmp_path / "c.json").write_text("{}")

    def run(pairs, *overrides):
        if pairs != "data.py":
            pairs = write(tmp_path / "a.jsonl", pairs)
        code = doctor.main(["--config", str(tmp_path / "c.json"), f"--model.name={tiny_folder}",
                            f"--data.path={pairs}", *overrides])
        return code, capsys.readouterr().out
    return run


def write(file, pairs):
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def found(out, *levels):
    """The lines of these levels, without the level: 2 examples occur more than once: ..."""
    return [line.split(maxsplit=1)[1] for line in out.splitlines()
            if line.startswith(tuple(f"  {level} " for level in levels))]


@pytest.mark.parametrize("pairs", ["data.py", CLEAN])
@pytest.mark.parametrize("format", ["auto", "chatml", "plain"])
def test_clean_data_passes(examine, pairs, format):
    code, out = examine(pairs, f"--dataset.format={format}")
    assert code == 0 and not found(out, "ERROR") and not found(out, "warn")
    assert "doctor: 0 errors, 0 warnings" in out and len(found(out, "ok")) >= 5


def test_lengths_and_the_first_example_are_shown(examine):
    _, out = examine(CLEAN, "--data.val_fraction=0")
    bars = [line for line in out.splitlines() if "█" in line]
    assert sum(int(line.split()[-1]) for line in bars) == len(CLEAN)
    assert "tokens: " in out and "8 training and 0 validation examples" in out
    first = out.partition("first example")[2]
    assert "a.jsonl:1)" in first and "\033[1;32mIt is 0.\033[0m" in first


def test_repetitions_and_contradictions_are_warnings_with_their_lines(examine, tmp_path):
    code, out = examine([*CLEAN, ("what is number 0?", "It  is 0."), ("What is number 1?", "Two.")],
                        "--data.val_fraction=0")
    file = tmp_path / "a.jsonl"
    assert code == 0 and "0 errors, 2 warnings" in out
    again, against = found(out, "warn")
    assert re.search(rf"more than once.*{file}:1 = {file}:9$", again)
    assert re.search(rf"contradictory.*{file}:2 = {file}:10$", against)


LONG = "The kettle is on, and the chair by the window is yours for as long as you like."


@pytest.mark.parametrize("other", [LONG, LONG.upper(), LONG.replace("kettle", "stove")])
def test_answers_that_are_nearly_the_same_are_a_warning(examine, tmp_path, other):
    code, out = examine([*CLEAN, ("a", LONG), ("b", other), ("c", "Yes."), ("d", "Yes.")],
                        "--data.val_fraction=0")
    (line,) = found(out, "warn")
    file = tmp_path / "a.jsonl"
    assert code == 0 and line == f"1 answers are nearly the same: {file}:9 = {file}:10"


def test_answers_of_the_two_files_are_compared(examine, tmp_path):
    val = write(tmp_path / "val.jsonl", [("A new one?", "No."), ("b", LONG)])
    _, out = examine([*CLEAN, ("a", LONG)], f"--data.val_path={val}")
    (line,) = found(out, "warn")
    assert line.endswith(f"nearly the same: {tmp_path / 'a.jsonl'}:9 = {val}:2")


def test_a_repeated_example_is_no_near_one(examine):
    _, out = examine([*CLEAN, ("a", LONG), ("A", LONG)], "--data.val_fraction=0")
    (line,) = found(out, "warn")
    assert "more than once" in line


def test_the_wordings_of_a_fact_may_share_an_answer(examine, tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"questions": ["a", "b", "c"], "answer": LONG}) + "\n"
                    + json.dumps({"prompt": "d", "completion": LONG, "group": "g"}))
    _, out = examine(CLEAN, f"--data.path={file}", "--data.val_fraction=0")
    (line,) = found(out, "warn")                      # and no word of the answers
    assert "2.0 wordings a fact" in line


def test_the_advice_about_the_data_is_given_here_too(examine, tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(
        {"question": f"What is {c}?", "answer": f"It is {c}."}) + "\n" for c in "abcdefgh"))
    code, out = examine(CLEAN, f"--data.path={file}", "--train.max_steps=4",
                        "--data.val_fraction=0.25", "--train.warmup_steps=5")
    assert code == 0 and "all 8 examples are trained" in out
    short, loss, single = found(out, "warn")
    assert "4 steps are no more than the 5 of the warm-up" in short
    assert 'no fact has a "value"' in loss and "1.0 wordings a fact" in single


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_an_example_that_cannot_fit_is_named(examine, tmp_path, too_long):
    long = ("What is " + "very " * 30 + "long?", "This.")
    code, out = examine([*CLEAN, long], "--data.val_fraction=0", "--dataset.max_length=100",
                        f"--dataset.too_long={too_long}")
    (line,) = found(out, "warn", "note")
    assert code == 0 and "dropped" in line and line.endswith(f"{tmp_path / 'a.jsonl'}:9")


def test_an_example_that_loses_turns_is_named(examine, tmp_path):
    talk = [{"role": role, "content": f"Word {i}."} for i in range(3)
            for role in ("user", "assistant")]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk[:n]}) for n in (2, 6)))
    code, out = examine(CLEAN, f"--data.path={file}", "--data.val_fraction=0",
                        "--dataset.max_length=100", "--dataset.too_long=cut")
    (line,) = found(out, "warn", "note")
    assert code == 0 and "oldest turns" in line and line.endswith(f"{file}:2")


@pytest.mark.parametrize("asked", ["What is number 3?", "what is NUMBER 3?", " What is  number 3?"])
@pytest.mark.parametrize("system", ["null", "fixed", "random"])
def test_a_prompt_in_both_files_is_an_error(examine, tmp_path, asked, system):
    val = write(tmp_path / "val.jsonl", [("A new one?", "Yes.")] * 9 + [(asked, "Three.")])
    code, out = examine(CLEAN, f"--data.val_path={val}", f"--data.system={system}")
    (line,) = found(out, "ERROR")
    assert code == 1 and "in training too" in line and line.endswith(f"{val}:10")
    assert "doctor: 1 errors" in out


@pytest.mark.parametrize("seed", range(4))
def test_the_split_itself_never_leaks(examine, seed):
    jokes = [("Tell me a joke.", f"Joke {i}.") for i in range(8)]
    code, out = examine([*CLEAN, *jokes], f"--train.seed={seed}")
    assert code == 0 and not found(out, "ERROR")


def test_an_argument_that_is_not_understood_is_an_error(examine):
    with pytest.raises(ValueError, match="--epochs: unknown option; did you mean --train.epochs"):
        examine(CLEAN, "--epochs=2")


def test_the_data_is_a_plain_argument(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": str(tiny_folder)}}))
    write(tmp_path / "my.jsonl", CLEAN)
    assert doctor.main(["my.jsonl"]) == 0 and "(my.jsonl:" in capsys.readouterr().out


def test_an_example_of_another_length_is_in_another_bar(capsys):
    doctor.histogram([1, 1, 8])
    out = capsys.readouterr().out
    assert "█" * 40 + " 2" in out and "tokens: 1 to 8, median 1" in out
    doctor.histogram([5])
    assert "tokens: 5 to 5, median 5" in capsys.readouterr().out
