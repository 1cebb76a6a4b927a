"""docs/exercises.md: what it plants still applies and is caught, what it runs still runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import plant

ROOT = Path(__file__).resolve().parents[1]
PAGE = plant.PAGE.read_text(encoding="utf-8")
MISTAKES = plant.mistakes()
EXERCISES = re.split(r"^### (?=\d+\. )", PAGE, flags=re.M)[1:]


def test_the_exercises_are_numbered_and_each_has_its_parts():
    """To build: what to delete, to write, to check. To break: what to plant, to ask, to run."""
    assert [int(part.partition(".")[0]) for part in EXERCISES] == [*range(1, 18)]
    build, broken = EXERCISES[:7], EXERCISES[7:]
    for parts, words in (
            (build, ("You learn", "Delete", "Write", "Invariants", "Check")),
            (broken, ("You learn", "Predict", "Run", "Caught by"))):
        for part in parts:
            assert not [word for word in words if f"**{word}**" not in part], part[:40]
            assert "<details><summary>What you should have seen</summary>" in part
            assert part.count("<details>") == part.count("</details>") <= 5
    assert [part.splitlines()[0].split("`")[1] for part in broken] == list(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_applies_to_the_code_as_it_is(name):
    changes, _ = MISTAKES[name]
    texts = {change.file: (ROOT / change.file).read_text("utf-8") for change in changes}
    before = {**texts}
    for change in changes:
        texts[change.file] = plant.changed(change, texts[change.file])
        if change.file.endswith(".py"):
            compile(texts[change.file], change.file, "exec")
    assert texts and all(texts[file] != before[file] for file in texts)


def test_the_checks_name_tests_that_exist():
    commands = re.findall(r"`(?:python -m pytest) (.+?)`", PAGE)
    assert len(commands) == 17
    for command in commands:
        files, _, names = command.partition(" -k ")
        texts = [(ROOT / file).read_text("utf-8") for file in files.split()]
        for name in filter(None, names.strip('"').split(" or ")):
            assert any(re.search(rf"def test_\w*{name}", text) for text in texts), command


def test_links_into_the_maths_lead_to_sections():
    heads = re.findall(r"^#+ (.+)$", (ROOT / "docs/maths.md").read_text("utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    links = re.findall(r"\]\(maths\.md#(.+?)\)", PAGE)
    assert len(links) == 5 and {*links} <= anchors


def test_it_is_planted_in_a_copy_outside_this_project_alone(tmp_path, capsys):
    before = (ROOT / "lora/layer.py").read_bytes()
    plant.main(["both-zero", str(tmp_path / "broken")])
    assert "test_layer.py -k kaiming_a" in capsys.readouterr().out
    assert "zeros_(self.lora_A)" in (tmp_path / "broken/lora/layer.py").read_text("utf-8")
    assert (ROOT / "lora/layer.py").read_bytes() == before
    assert not {".git", ".venv", "runs"} & {p.name for p in (tmp_path / "broken").iterdir()}
    for folder in (tmp_path / "broken", ROOT / "broken"):
        with pytest.raises(ValueError, match="exists or lies inside this project"):
            plant.main(["both-zero", str(folder)])
    with pytest.raises(ValueError, match="invalid choice: 'one-zero'"):
        plant.main(["one-zero", str(tmp_path / "other")])


def python_block(n, folder, tmp_path):
    """A Python block of the page, on the tiny model and a run's adapter in another folder."""
    code = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)[n]
    for text, path in (('fetch.find("smollm2-135m-instruct")', folder),
                       ('"runs/short/adapter"', tmp_path / "runs/t/adapter")):
        code = code.replace(text, repr(str(path)))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, text=True,
                          capture_output=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_an_adapter_opens_in_peft_with_the_same_logits(place, tiny_folder, monkeypatch):
    import train
    monkeypatch.chdir(place)
    train.main([])
    said = python_block(0, tiny_folder, place)
    moved, apart = re.fullmatch(r"moved by (\d+), apart by ([\d.]+)\n", said).groups()
    assert int(moved) >= 1 and float(apart) == 0


def test_the_thought_that_the_prompt_ends_in_is_not_supervised(tiny_folder, tmp_path):
    """What exercise 16 shows, on the right code: green begins behind the thought."""
    said = python_block(1, tiny_folder, tmp_path)
    assert "</think>⏎\n⏎\n\033[0m\033[1;32mYes." in said


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught_by_its_test(name, tmp_path):
    plant.plant(name, tmp_path / "broken")
    words = re.findall(r'"[^"]*"|\S+', MISTAKES[name][1])
    done = subprocess.run([sys.executable, *(word.strip('"') for word in words[1:])],
                          cwd=tmp_path / "broken", capture_output=True, text=True)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout + done.stderr
