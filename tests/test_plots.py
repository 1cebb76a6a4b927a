"""Curves and bars are drawn from files alone, always the same way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures as benchmark
from plots.figures import LIGHT, curves, draw, heat_map, plt, read_metrics, smooth

ROOT = Path(__file__).resolve().parents[1]
EMPTY = {"step": 0, "val_loss": 2.1, "val_accuracy": 0.4, "recall": 0.0}
TRAIN = [{"step": i, "epoch": 1, "loss": 2 / i, "accuracy": 0.5, "lr": 0.001, "grad_norm": 1.0,
          "tokens_per_s": 10.0, "seconds": 1.0, "peak_memory_gib": None} for i in (1, 2, 3)]
EPOCH = {"step": 3, "epoch": 1, "epoch_loss": 1.2, "epoch_accuracy": 0.5}
VAL = {"step": 2, "val_loss": 1.0, "val_accuracy": 0.6, "recall": 0.5, "best": True}
WORSE = {"step": 3, "val_loss": 1.1, "val_accuracy": 0.6, "recall": 0.4, "best": False}
WHOLE = [EMPTY, *TRAIN[:2], VAL, TRAIN[2], EPOCH, WORSE]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def run_folder(folder, lines, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + end)
    return folder


def without(key):
    return [{k: v for k, v in line.items() if k != key} for line in WHOLE]


def test_a_loss_and_a_rate_of_zero_are_drawn():
    figure = curves([{**TRAIN[0], "step": 0, "loss": 0.0, "lr": 0.0}], "t", LIGHT)
    assert [panel.get_ylim() for panel in figure.axes] == [(0, 1), (0, 1)]


def test_draws_a_light_and_a_dark_picture_and_the_same_bytes_again(tmp_path):
    run, pictures = run_folder(tmp_path / "demo", WHOLE), []
    for folder in (run, str(run)):
        assert draw(folder) == run / "loss.png"
        pictures.append([(run / name).read_bytes() for name in ("loss.png", "loss-dark.png")])
    assert all(p.startswith(b"\x89PNG") for p in pictures[0]) and len(set(pictures[0])) == 2
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("lines", [
    TRAIN, TRAIN[:1], [EMPTY, TRAIN[0]], without("recall"), without("best"), WHOLE[:-1],
    [*TRAIN, EPOCH], [{**line, "lr": 1e-9} for line in TRAIN],
    [*TRAIN[:2], {**TRAIN[2], "loss": 1e6}]])
def test_draws_what_is_there(lines):
    figure = curves(lines, "demo", LIGHT)
    figure.set_dpi(40)
    figure.canvas.draw()
    assert all(panel.get_ylabel() for panel in figure.axes)


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "{", '{"step": 4, "loss": 1.0', "\n"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, cut):
    run = run_folder(tmp_path / "demo", WHOLE, cut)
    assert read_metrics(run / "metrics.jsonl") == WHOLE


def panels(lines):
    return curves(lines, "demo", LIGHT).axes


def test_curves_show_what_was_measured():
    top, recall, low = panels(WHOLE)
    assert [line.get_label() for line in top.lines[1:3]] == ["training (smoothed)", "validation"]
    assert list(top.lines[0].get_ydata()) == [2, 1, 2 / 3]
    assert [tuple(point) for point in recall.lines[0].get_xydata()] == [(0, 0), (2, 50), (3, 40)]
    assert list(low.lines[0].get_ydata()) == [0.001] * 3
    assert any("step 2\n" in text.get_text() for text in top.texts)
    assert len(panels(without("recall"))) == 2 and not panels(TRAIN)[0].texts


def test_the_last_best_line_is_the_best():
    assert "step 3\n" in panels([*WHOLE[:-1], {**WORSE, "best": True}])[0].texts[0].get_text()


@pytest.mark.parametrize("n", [1, 2, 50, 100])
def test_smoothing_keeps_length_and_a_straight_line(n):
    assert smooth([3.0] * n) == [3.0] * n
    half = max(1, n // 20)
    rising = smooth(list(range(n)))
    assert rising[half:n - half] == list(range(half, n - half))


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read"), ("", "no training step yet"),
    (json.dumps(EMPTY) + "\n", "no training step yet"),
    (json.dumps(TRAIN[0]) + '\n{"step": \n' + json.dumps(TRAIN[1]) + "\n", ":2: not JSON"),
    ("[" * 100_000 + "\n" + json.dumps(TRAIN[0]), ":1: not JSON"), ("5\n", ":1: expected an obj"),
    ('{"loss": 1.0, "lr": 1}\n', ":1: step is None; expected a number"),
    ('{"step": 1, "loss": 1.0}\n', ":1: lr is None; expected a number"),
    ('{"step": 1, "loss": "low", "lr": 1}\n', ":1: loss is 'low'; expected a number"),
    ('{"step": 1, "loss": NaN, "lr": 1}\n', ":1: loss is nan; expected a number"),
    ('{"step": 1, "best": true}\n', ":1: val_loss is None; expected a number")])
def test_what_cannot_be_drawn_is_a_value_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"metrics.jsonl.*{words}"):
        draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_metrics_that_are_not_utf8_are_a_value_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="metrics.jsonl: cannot be read .*utf-8"):
        draw(tmp_path)


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_draws_and_fails_in_one_line(tmp_path):
    run = run_folder(tmp_path / "demo", WHOLE)
    done = python("-m", "plots", str(run), str(tmp_path / "none"))
    assert done.stdout.strip() == str(run / "loss.png") and (run / "loss-dark.png").exists()
    assert done.returncode == 1 and done.stderr.startswith("error: plots: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["plots.figures", "benchmarks.figures",
                                    "experiments.knowledge.figures"])
def test_figures_never_import_torch(module):
    done = python("-c", f"import {module}, sys; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_benchmark_results_become_bars_and_curves(tmp_path):
    def arm(rate):
        return {"samples_per_s": rate, "slowest": 0.9 * rate, "fastest": 1.1 * rate,
                "losses": [2.0, 1.0]}
    for name, prefix, steps in (("smollm2-0", 0, 1), ("gemma-100", 100, 1), ("curves-30", 30, 20)):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "model": name, "prefix": prefix, "steps": steps, "results": {
                "trl-fp32-4x4": arm(1), "trl-bf16-4x4": {"error": "refused"},
                "trl-fp32-4x4-fulllogits": arm(1.5), "peft-loop": arm(1), "ours": arm(4)}}))
    with pytest.raises(ValueError, match="0 results of ours"):
        benchmark.draw(tmp_path / "none")
    done = python("-m", "benchmarks.figures", str(tmp_path))
    assert done.stdout.strip() == str(tmp_path / "speed.png"), done.stderr
    assert (tmp_path / "speed-dark.png").read_bytes().startswith(b"\x89PNG")
    benchmark.draw(tmp_path)
    assert not plt.get_fignums()


def test_the_heat_map_has_a_cell_for_each_update_and_marks_what_is_dead():
    def module(block, projection, ratio, alarm=None):
        return {"block": block, "projection": projection, "ratio": ratio, "alarm": alarm,
                "effective_rank": ratio and 2.0}
    upper, lower, *_ = heat_map([
        module(0, "q", 0.01), module(1, "q", None, "A or B is not finite"), module(2, "q", 0.02),
        module(0, "up", 0.02), module(0, "up", 0.04), module(None, "lm_head", 0.5)], "demo",
        LIGHT).axes
    cells = upper.images[0].get_array()
    assert cells.mask.tolist() == [[False, True, False], [False, True, True]]
    assert cells.compressed().tolist() == pytest.approx([1, 2, 3])       # %; experts: their mean
    assert [text.get_text() for text in lower.get_yticklabels()] == ["q", "up"]
    for panel in (upper, lower):
        assert panel.lines[0].get_xydata().tolist() == [[1, 0]]
    assert "dead" in lower.get_xlabel()
    dead = [module(block, "q", 0, "B is zero") for block in (0, 1)]
    figure = heat_map(dead, "fresh", LIGHT)                              # nothing to shade
    figure.canvas.draw()
    assert figure.axes[0].images[0].get_array().mask.all()
