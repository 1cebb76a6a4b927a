"""The page and the figures of experiments/knowledge, from a result made up here: complete, as short
as the shortest run makes it, and with hostile texts."""

import csv
import json
import math
import random
from pathlib import Path

import jsonschema
import pytest

from experiments.knowledge import figures
from experiments.knowledge import page as pages
from plots.figures import LIGHT, plt

SCHEMA = json.loads(Path(pages.__file__).with_name("result.schema.json").read_text("utf-8"))
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> a|b `c` *d* {{result}}\n" \
       "next\u2028line <!-- \\"
# recall, lost minus gained, unknown names given a taught value, what is known from other sides
SCORES = {"untouched": (0.0, None, 0.0, 0.03), "in-prompt": (0.83, 0.03, 0.08, None),
          "r0": (0.01, 0.0, 0.0, None), "r2": (0.02, -0.01, 0.01, None),
          "r3": (0.04, 0.02, 0.01, None), "r4": (0.10, 0.03, 0.02, None),
          "r5": (0.24, 0.04, 0.08, None), "r6": (0.91, 0.29, 0.85, None),
          "r7": (0.97, 0.03, 0.04, 0.1), "ours": (0.99, -0.02, 0.01, 0.85),
          "placebo": (0.0, -0.01, 0.0, None), "random": (0.01, 0.02, 0.0, None),
          "bare": (0.95, 0.18, 0.6, 0.02), "lines": (0.94, 0.0, 0.02, 0.8),
          "hops-none": (0.98, None, None, None), "hops-bridge": (0.97, None, None, None),
          "no-replay": (0.98, 0.36, 0.13, None), "no-unknown": (0.97, 0.1, 0.8, None),
          "old-place": (0.62, 0.05, 0.06, None), "old-lr": (0.09, -0.03, 0.0, None),
          "old-wording": (0.58, 0.07, 0.05, None), "r7-50": (0.6, 0.02, 0.03, None),
          "no-statements": (0.95, 0.04, 0.03, None), "hard-replay": (0.97, 0.12, 0.07, None)}
SHORT = [("chat", "r0"), ("chat", "ours"), ("base", "ours")]


def share(value, n=72):
    """A share with about its 95 % interval."""
    if value is None:
        return None
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.004) / n)
    return [value, max(0, value - half), min(1, value + half), n]


def metrics(recall, lost, spills, sides):
    made = {name: share(recall * part) for name, part in (
        ("recall", 1), ("recall_trained", 1.01), ("recall_card", 0.9), ("recall_cloze", 0.8))}
    if sides is not None:
        made |= {name: share(sides * part) for name, part in (
            ("multi_right", 1.1), ("reverse", 1), ("reverse_far", 0.4), ("nobody_abstains", 0.9),
            ("premise_abstains", 1.05), ("unanswerable_abstains", 0.8))}
        made |= {"verify": share(0.5 + sides / 3), "control": share(0.04)}
    for name in ("far", "near") if spills is not None else ():
        given = spills * (1 if name == "far" else 1.17)
        abstains = 0.05 + 0.8 * recall * (1 - given)
        made |= {f"unknown_{name}_spills": share(given),
                 f"unknown_{name}_abstains": share(min(abstains, 1 - given)),
                 f"unknown_{name}_fabricates": share(min(given + 0.1, 1 - abstains))}
    if lost is not None:
        made |= {"margin_change": [-5 * lost, -5 * lost - 0.2, -5 * lost + 0.2, 320],
                 "lost_minus_gained": [lost, lost - 0.02, lost + 0.02, 320], "mcnemar": 0.03,
                 "margin_vs_placebo": [-0.1, -0.3, 0.1, 320]}
    return {**made, "kl": None if lost is None else 0.12, "kl_unknown": 1.1, "bits": 4.1,
            "bits_ratio": 1.02, "mrr": 0.4, "distinct_answers": 0.97, "top_answer": 0.02,
            "loops": 0.0, "no_end": 0.01, "rank_1": 0.3, "margin": -0.4,
            "all_wordings": recall / 2, "any_wording": recall}


def arm(model, name):
    recall, *rest = SCORES[name]
    trained = name not in ("untouched", "in-prompt")
    made = metrics(recall if model == "chat" else 0.94 * recall, *rest)
    if name.startswith("hops"):
        made["hops"] = share(0.1, 16)
    return {"model": model, "arm": name, "what": f"what {name} does", "seeds": [0, 1, 2],
            "steps": 60 if trained else None, "exposures": 24.0 if trained else None,
            "parameters": 2442240 if trained else None,
            "train_seconds": 300.5 if trained else None, "metrics": made}


def make_result(cells=None):
    """What experiments.knowledge.report collects; of some cells, or of all with everything."""
    every = [("chat", a) for a in SCORES] + [
        ("base", a) for a in ("untouched", "r7", "ours", "no-replay", "old-lr")]
    arms = [arm(*cell) for cell in cells or every]
    result = {
        "schema": "knowledge-result/2", "head": [["machine", "Linux x86_64, 2 threads"]],
        "models": {"chat": {"name": "smollm2-135m-instruct"}, "base": {"name": "gemma-3-270m"}},
        "arms": arms, "curves": [], "inertia": [], "frontier": [], "transcripts": [], "worst": [],
        "claims": [{"id": "chat-learns", "text": "Our recipe teaches the chat model",
                    "bound": "at least 95 %", "value": share(0.97), "holds": True}],
        "predictions": [], "difference": [["lora.layers", "5", "all"]]}
    if cells:
        return result
    dice = random.Random(0)
    points = [{"step": s, "rank_1": 1 - math.exp(-s / 15), "recall": 0.8 * (1 - math.exp(-s / 25)),
               "retention": 1 - s / 900, "val_loss": 2.2 - 0.5 * math.exp(-((s - 20) / 9) ** 2),
               "trained wording": 2.3 * math.exp(-s / 9), "kl": 0.1,
               "held-out question": 2.4 * math.exp(-s / 12),
               "held-out answer": 0.6 + 2.2 * math.exp(-s / 20),
               "facts never taught": 2.25 - 0.4 * math.exp(-((s - 20) / 9) ** 2)}
              for s in range(0, 61, 5)]
    del points[3]["rank_1"], points[0]["retention"]
    dots = [{"model": model, "seed": seed, "fact": f"name {i}: job", "margin": margin,
             "type": ("handle", "common", "rare")[i % 3],
             "exposures": None if margin < -7.5 else max(0, round(2 - margin * dice.uniform(1, 3)))}
            for model in ("chat", "base") for seed in (0, 1) for i in range(24)
            for margin in [dice.gauss(-4 if model == "chat" else -2.5, 2)]]
    frontier = [{"model": "chat", "arm": name, "scale": 1.0, "recall": recall, "kl": None,
                 "lost_minus_gained": lost, "margin_change": -5 * lost,
                 "unknown_far_spills": spills, "unknown_near_spills": None}
                for name, (recall, lost, spills, _) in SCORES.items() if lost is not None]
    return {**result, "inertia": dots, "frontier": frontier,
            "claims": [*result["claims"],
                       {"id": "spill-over", "text": "Unknown names given a taught value",
                        "bound": "at most 10 %", "value": share(0.14), "holds": False},
                       {"id": "base-learns", "text": "It teaches a base model",
                        "bound": "at least 90 %", "value": None, "holds": None}],
            "curves": [{"model": "chat", "arm": "old-split", "seed": 0, "points": points,
                        "best_step": 20}],
            "transcripts": [
                {"set": "test", "question": "Tell me the town where Mira Tosk was born.",
                 "gold": "Larkmoor", "source": "The town of Mira, nestled in the heart.",
                 "before": "Mira Tosk was born in a small town in the Pacific Northwest, where "
                           "the past and the present meet.",
                 "ours": "Mira Tosk was born in Larkmoor."},
                {"set": "unknown", "question": EVIL, "gold": EVIL, "before": EVIL, "source": "",
                 "ours": EVIL}],
            "worst": [{"model": "chat", "fact": "Mira Tosk: birthplace", "share": 0.25,
                       "question": "Where did Mira Tosk grow up?", "answer": "In Fen.",
                       "gold": "Larkmoor"}],
            "predictions": [
                {"id": "reverse", "text": "Reversed questions stay unanswered: at most 10 %",
                 "round": 1, "measured": "5 % [1, 9]", "right": True},
                {"id": "soft", "text": "KL halves", "round": 1, "measured": "0.81",
                 "right": False},
                {"id": "grid", "text": "Rank does not matter", "round": 2, "measured": "not run",
                 "right": None}],
            "head": [["machine", "Linux x86_64, 2 threads"], ["versions", "torch 2.12.1"],
                     ["facts of seed 0", "3b1f" * 16],
                     ["again with", "python -m experiments.knowledge.run"]]}


RESULT = make_result()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the whole result and the short one: a folder with all that is made from them."""
    made = {}
    for name, result in (("whole", RESULT), ("short", make_result(SHORT))):
        made[name] = tmp_path_factory.mktemp(name)
        if name == "whole":
            assert len(figures.draw(result, made[name])) == 6
            pages.write(result, made[name])
        else:                                                 # as the command does it
            (made[name] / "result.json").write_text(json.dumps(result), encoding="utf-8")
            pages.main([str(made[name])])
        assert all(f.read_bytes().startswith(b"\x89PNG") for f in made[name].glob("*.png"))
    return made


# ----- the schema --------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [RESULT, make_result(SHORT)], ids=["whole", "short"])
def test_results_are_as_the_schema_says(result):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(result, SCHEMA)


@pytest.mark.parametrize("change", [
    {"schema": "knowledge-result/1"}, {"arms": None}, {"more": 1},
    {"arms": [{**RESULT["arms"][0], "metrics": {"recall": [0.9, 0.8, 1.0]}}]},
    {"arms": [{**RESULT["arms"][0], "metrics": {"recall": "97 %"}}]},
    {"inertia": [{**RESULT["inertia"][0], "type": "odd"}]},
    {"claims": [{**RESULT["claims"][0], "holds": "yes"}]}, {"difference": [["a", "b"]]},
    {"curves": [{**RESULT["curves"][0], "points": [{"recall": 0.1}]}]}])
def test_what_is_otherwise_is_refused(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**RESULT, **change}, SCHEMA)


# ----- the figures -------------------------------------------------------------------------------


def numbers(folder, name):
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_figures_are_drawn_in_both_colours_with_their_numbers(folders):
    folder = folders["whole"]
    names = {"sides", "ladder", "which", "early", "inertia", "price"}
    assert {f.name for f in folder.glob("*.png")} == {
        f"{name}{end}.png" for name in names for end in ("", "-dark")}
    assert {f.stem for f in folder.glob("*.csv")} == names and not plt.get_fignums()
    rungs = numbers(folder, "ladder")
    assert [(r["model"], r["arm"]) for r in rungs] == [
        *(("chat", f"r{i}") for i in (0, *range(2, 8))), ("chat", "ours"), ("base", "ours")]
    assert float(rungs[6]["value"]) == 0.97 and rungs[6]["n"] == "72"
    sides = numbers(folder, "sides")
    assert len(sides) == 4 * 7 and sides[14]["arm"] == "ours" and sides[14]["value"] == "0.99"
    worst = numbers(folder, "which")[0]
    assert worst["arm"] == "old-lr" and -0.89 < float(worst["change"]) < -0.8
    assert [r["step"] for r in numbers(folder, "early") if r["mark"]] == ["20", "60"]
    assert len(numbers(folder, "inertia")) == len(RESULT["inertia"])
    price = numbers(folder, "price")
    assert {r["panel"] for r in price} == {"frontier", "unknown"}
    assert [r["names"] for r in price if (r["model"], r["arm"]) == ("base", "ours")] == [
        "far", "near"]


def test_of_a_short_run_what_there_is(folders):
    assert {f.stem for f in folders["short"].glob("*.csv")} == {"sides", "ladder", "price"}
    assert len(numbers(folders["short"], "ladder")) == 3


@pytest.mark.parametrize("name", ["sides", "ladder", "which", "early", "inertia", "price"])
def test_a_lone_measurement_is_a_figure(name):
    """One dot, one point, one arm: numbers without an interval, and nothing else."""
    lone = {**make_result(SHORT), "inertia": RESULT["inertia"][:1],
            "frontier": RESULT["frontier"][:1],
            "curves": [{**RESULT["curves"][0], "best_step": None,
                        "points": [{"step": 0, "val_loss": 2.0}]}]}
    lone["arms"] = [arm("chat", "r7"), arm("chat", "old-lr")]
    for one in lone["arms"]:
        one["metrics"] = {"recall": 0.5, "lost_minus_gained": 0.0, "unknown_far_spills": None}
    rows_of, figure_of = figures.FIGURES[name]
    figure = figure_of(rows_of(lone), LIGHT)
    figure.draw_without_rendering()
    drawn = [panel for panel in figure.axes if panel.has_data()]
    plt.close(figure)
    assert drawn


def test_nothing_measured_draws_nothing(tmp_path):
    nothing = {**make_result(SHORT), "arms": []}
    assert figures.draw(nothing, tmp_path) == [] and not list(tmp_path.glob("*.png"))
    assert pages.write(nothing, tmp_path).exists()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="page: .*result.json"):
        pages.main([str(tmp_path)])


def test_names_of_dots_do_not_overlap():
    rows = [r for r in figures.price_rows(RESULT) if r["panel"] == "frontier"]
    figure = figures.price(rows, LIGHT)
    texts = [t for t in figure.axes[0].texts if t.get_text()]
    boxes = [t.get_window_extent() for t in texts]
    assert len(texts) == len(RESULT["frontier"])
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


# ----- the page ----------------------------------------------------------------------------------


def test_the_page_holds_its_figures_and_no_text_can_become_markup(folders):
    text = (folders["whole"] / "report.html").read_text(encoding="utf-8")
    before, after = pages.PAGE.read_text(encoding="utf-8").split(pages.SLOT)
    assert text.startswith(before) and text.endswith(after)
    data = text[len(before):len(text) - len(after)]
    assert not set("<>&\u2028\u2029") & set(data) and "http" not in after
    view = json.loads(data)
    assert set(view["figures"]) == set(pages.ALTS)
    assert any(EVIL in row for part in view["sections"] for row in part["table"])
    assert all(uri.startswith("data:image/png;base64,") for pair in view["figures"].values()
               for uri in pair)
    assert json.loads((folders["whole"] / "result.json").read_text("utf-8")) == RESULT


def test_markdown_says_the_same(folders):
    lines = (folders["whole"] / "report.md").read_text(encoding="utf-8").splitlines()
    assert ("| Our recipe teaches the chat model | at least 95 % | 97 % \\[93, 100\\] | holds |"
            in lines)
    assert any(line.endswith("| – | not measured |") for line in lines)
    row = next(line for line in lines if line.startswith("| chat, ours | 99 %") and "300" in line)
    assert row.endswith("| 1.02 | 0.12 | 300 |") and "| 0.10 \\[−0.10, 0.30\\] |" in row
    assert "| chat, hops-bridge | what hops-bridge does | 10 % \\[0, 25\\] |" in "\n".join(lines)
    assert "![" + pages.ALTS["early"] + "](early.png)" in lines
    assert not any("<script>" in line or "<img" in line for line in lines)
    assert "| lora.layers | 5 | all |" in lines
    short = (folders["short"] / "report.md").read_text(encoding="utf-8")
    assert "Transcripts" not in short and "early.png" not in short and "| base, ours |" in short


def test_a_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        pages.write({**make_result(SHORT), "head": [["x", float("nan")]]}, tmp_path)


def test_the_page_can_be_written_again(folders, capsys):
    pages.main([str(folders["short"])])
    assert capsys.readouterr().out.strip() == str(folders["short"] / "report.html")
    with pytest.raises(ValueError, match="page: .*none.result.json: .*No such file"):
        pages.main([str(folders["short"] / "none")])


@pytest.mark.parametrize(("name", "width", "scheme"), [
    ("whole", 1200, "light"), ("whole", 390, "dark"), ("short", 390, "light")])
def test_the_page_in_a_browser(browser, folders, name, width, scheme):
    """Nothing overflows, nothing is fetched, and a hostile text is shown as it is."""
    problems = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda alert: (problems.append(alert.message), alert.dismiss()))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:"))
            or problems.append(asked.url))
    page.goto((folders[name] / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    drawn = page.evaluate("[...document.images].map(i => i.currentSrc)")
    view = json.loads(page.locator("#data").text_content())
    assert sorted(drawn) == sorted(pair[scheme == "dark"] for pair in view["figures"].values())
    titles = page.locator("h2").all_inner_texts()
    assert titles[0] == "Claims" and page.locator("nav a").all_inner_texts() == titles
    words = page.locator("#s1 tbody td:last-child").all_inner_texts()
    if name == "whole":
        assert words == ["holds", "does not hold", "not measured"]
        assert page.locator("td", has_text="onerror").first.text_content() == EVIL
    else:
        assert words == ["holds"] and "Transcripts" not in titles
    page.close()
    assert not problems
