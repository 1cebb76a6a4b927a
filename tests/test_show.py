"""docs/maths.md and scripts/show.py: every number of the text is printed by a command there."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import make_model

from lora.base import load
from plots import study
from plots.figures import LIGHT, plt
from scripts import show

ROOT = Path(__file__).resolve().parents[1]
TEXT = study.TEXT.read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", TEXT, flags=re.M)[1:]
OUTPUTS = study.outputs(TEXT)
NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


@pytest.fixture(autouse=True)
def tidy():
    """A command computes on one thread; the other tests keep theirs, and no figure stays open."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    plt.close("all")


def values(text: str) -> list[tuple[float, float]]:
    """(number, a unit of its last digit) of every number in a text."""
    found = []
    for word in re.findall(NUMBER, text):
        digits, _, exponent = word.replace(",", "").partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        found.append((float(word.replace(",", "")), unit))
    return found


def assert_same_output(ours: str, texts: str) -> None:
    """Word for word; a number may differ by one in its last digit, as another CPU may round."""
    assert re.sub(NUMBER, "#", ours) == re.sub(NUMBER, "#", texts)
    for (one, unit), (other, _) in zip(values(ours), values(texts), strict=True):
        assert abs(one - other) <= 1.01 * unit, f"{one} is {other} in the text:\n{ours}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.real) if name == "labels"
                                  else name for name in show.PARTS])
def test_the_text_quotes_what_the_command_prints(name, capsys):
    show.main([name])
    assert_same_output(capsys.readouterr().out, "\n".join(OUTPUTS[name]) + "\n")


def test_all_runs_every_part_in_the_order_of_the_text(monkeypatch, capsys):
    for name in show.PARTS:
        monkeypatch.setitem(show.PARTS, name, lambda name=name: print(name))
    show.main(["all"])
    assert capsys.readouterr().out.split() == [*OUTPUTS] == [*show.PARTS]
    with pytest.raises(ValueError, match="invalid choice: 'nothing'"):
        show.main(["nothing"])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text[:1])
def test_every_section_ends_in_a_command_and_has_its_lines_of_code(section):
    assert re.search(r"```sh\npython -m scripts\.show \w+\n```\n```\n[^`]+```\n*$", section)
    assert len(re.findall(r"^- `[\w/]+\.py`: `", section, re.M)) >= 3


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text[:1])
def test_every_number_of_the_text_is_printed_by_a_command_of_its_section(section):
    """But for whole numbers up to 16 (sizes of examples, numbers of equations) and sources."""
    printed = "".join("\n".join(OUTPUTS[name]) + "\n" for name in re.findall(
        r"^python -m scripts\.show (\w+)$", section, re.M))
    said = re.sub(r"```sh\n.*?```\n```\n.*?```|<picture>.*?</picture>|^- `.*?$|\]\(.*?\)|"
                  r"\[[^\]]*LoRA 59|arXiv:[\d.]+|section \d\.\d|[\w.]+ 20\d\d|N \+ 1e-6", "",
                  section, flags=re.S | re.M)
    numbers = [abs(value) for value, _ in values(printed)]
    missing = [value for value, unit in values(said) if not (unit == 1 and abs(value) <= 16) and
               not any(abs(abs(value) - number) <= 0.501 * unit for number in numbers)]
    assert not missing, f"no command of this section prints {missing}"


def test_parts_are_short():
    tree = ast.parse((ROOT / "scripts" / "show.py").read_text(encoding="utf-8"))
    assert max(f.end_lineno - f.lineno + 1 for f in ast.walk(tree)
               if isinstance(f, ast.FunctionDef)) < 30


def test_the_table_of_ranks_is_what_the_text_says():
    """The laws of section 1, in the numbers that the text quotes."""
    rows = {line[:21].strip(): study.floats(line[21:]) for line in OUTPUTS["rank"]
            if "alpha" in line}
    ratios = {name: [b / a for a, b in zip(row, row[1:], strict=False)]
              for name, row in rows.items()}
    assert ratios["SGD, alpha / r"] == pytest.approx(5 * [0.5], rel=0.06)
    assert ratios["SGD, alpha / sqrt(r)"] == pytest.approx(5 * [1], rel=0.05)
    assert ratios["Adam, alpha / r"] == pytest.approx(5 * [1], rel=0.02)
    assert ratios["Adam, alpha / sqrt(r)"] == pytest.approx(5 * [2**0.5], rel=0.06)


@pytest.mark.parametrize("optimizer, use_rslora, ratio", [
    ("SGD", False, 1 / 8), ("SGD", True, 1), ("Adam", False, 1), ("Adam", True, 8**0.5)])
def test_the_laws_of_ranks_hold_for_another_model(optimizer, use_rslora, ratio):
    """The tests' tiny Llama, of another width, vocabulary and size of weights."""
    low, high = (show.drop(make_model(), r, 0, optimizer, use_rslora) for r in (8, 64))
    assert high / low == pytest.approx(ratio, rel=0.15)


def test_the_first_step_of_both_optimizers_is_what_was_derived():
    """On one layer, not on the tiny model: the formulas of section 1 with their factors."""
    torch.manual_seed(0)
    G, x, lr = torch.randn(64, 48), torch.randn(64, 256), 1e-3
    M = G.T @ x
    for r in (2, 16, 128):
        for use_rslora in (False, True):
            layer = show.adapted(256, 48, r=r, lora_alpha=32, use_rslora=use_rslora)
            s, A = layer.scaling, layer.lora_A.detach()
            show.backward(layer, (G * layer(x)).sum())
            show.descend(layer, lr)
            update = layer.delta_weight().detach()
            torch.testing.assert_close(update, -lr * s**2 * M @ A.T @ A, rtol=1e-3, atol=1e-3)
            on_average = (M * update).sum() / (-lr * s**2 * r / (3 * 256) * M.square().sum())
            assert on_average.item() == pytest.approx(1, rel=0.25)
            layer = show.adapted(256, 48, r=r, lora_alpha=32, use_rslora=use_rslora)
            show.backward(layer, (G * layer(x)).sum())
            show.AdamW([layer.lora_B]).step(lr)
            fall, A = -(M * layer.delta_weight().detach()).sum(), layer.lora_A.detach()
            torch.testing.assert_close(fall, lr * s * (M @ A.T).abs().sum(), rtol=1e-3, atol=0)


def test_the_figures_are_drawn_from_the_text_and_lie_in_the_gallery(tmp_path):
    drawn = study.draw(study.TEXT, tmp_path)
    both = sorted([*(path.name for path in drawn), *(f"{p.stem}-dark.png" for p in drawn)])
    assert both == sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in study.FOLDER.iterdir())
    for path in drawn:
        assert TEXT.count(f"../plots/gallery/study/{path.name}") == 1
        assert TEXT.count(f"../plots/gallery/study/{path.stem}-dark.png") == 1
        assert plt.imread(path).std() > 0.05                   # not an empty page


def test_a_figure_shows_the_numbers_of_the_text(tmp_path):
    figure = study.rank(OUTPUTS["rank"], LIGHT)
    drawn = [line.get_ydata().tolist() for panel in figure.axes for line in panel.lines]
    quoted = [study.floats(line[21:]) for line in OUTPUTS["rank"] if "alpha" in line]
    assert drawn == quoted
    (tmp_path / "empty.md").write_text("# No outputs here\n")
    with pytest.raises(ValueError, match="empty.md has no output of `scripts.show gradient`"):
        study.draw(tmp_path / "empty.md", tmp_path)


def test_the_mask_that_is_printed_is_the_plans_own():
    """By another way: a token sees itself and the tokens before it in its sample."""
    items = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3, 4, 9], [1, 2, 5, 9],
                                                           [1, 2, 6, 7, 8, 9])]
    inputs = show.flat.flatten(items, share=2).inputs
    ids = inputs["input_ids"][0].tolist()
    seen = show.visible(inputs["plan"], len(ids))
    for query, row in zip(ids, seen, strict=True):
        samples = [item["input_ids"] for item in items if query in item["input_ids"]]
        text = samples[0][:samples[0].index(query) + 1]
        assert sorted(key for key, on in zip(ids, row, strict=True) if on) == sorted(text)


def test_the_tiny_model_of_the_text_is_selftests():
    torch.manual_seed(7)
    one, other = show.tiny(), load.tiny_model(torch.device("cpu"), torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(),
                                                 strict=True))
