"""
The experiment on one page, three times: result.json for programs, report.html for a browser,
report.md for a text viewer. Both pages show the same sections, which are made here; figures that
plots/knowledge.py has drawn into the folder stand in both, in report.html as data. The HTML is
page.html beside this file with the data put in: it needs no network, and no text can become markup.

    python -m experiments.knowledge.page reports/knowledge       # again, from its result.json
"""

import base64
import json
import re
import sys
from pathlib import Path
from statistics import median

from lora import report
from lora.config import run_cli

PAGE = Path(__file__).with_suffix(".html")
SLOT = "{{result}}"
TITLE = "When does LoRA put facts into a model, and at what price?"
RECIPES = "untouched", "in-prompt", "r0", "r1", "r7", "r8", "full"     # rows of the main table
ALTS = {"ladder": "Recall of each rung of the repair ladder, with intervals",
        "early": "What is known and several losses over the steps of a run that held facts out",
        "which": "Recall, retention and spill-over with one repair taken out of r7",
        "inertia": "Exposures a fact needed against its margin before training",
        "price": "Recall against retention, and kinds of answers about unknown names"}
METRICS = {
    "recall": "recall, held-out wordings", "recall_trained": "recall, trained wordings",
    "recall_card": "recall, asked for a profile", "recall_cloze": "recall, text to complete",
    "all_wordings": "facts said in every wording", "any_wording": "facts said in any wording",
    "reverse": "reversed questions", "multi_right": "two facts in one question",
    "verify": "yes or no, balanced (50 % is chance)", "control": "facts never taught, said",
    "premise_abstains": "false premise declined", "unanswerable_abstains": "unanswerable declined",
    "unanswerable_spills": "unanswerable: a taught value given",
    "unknown_abstains": "unknown names declined",
    "unknown_fabricates": "unknown names: any value given",
    "unknown_spills": "unknown names: a taught value given",
    "retention": "retention", "retention_neighbours": "retention, neighbouring topics",
    "retention_general": "retention, general", "kl": "KL to the untouched model, nats",
    "kl_unknown": "the same on unknown names, nats", "perplexity_ratio": "perplexity, times before",
    "distinct_answers": "distinct answers", "top_answer": "the most frequent answer",
    "loops": "answers that loop", "no_end": "answers without end",
    "rank_1": "right value ranked first", "mrr": "mean reciprocal rank",
    "margin": "margin of the right value, nats"}
NOT_SHARES = {"kl", "kl_unknown", "perplexity_ratio", "mrr", "margin"}
MAIN = ("recall", "recall_trained", "reverse", "multi_right", "unanswerable_abstains",
        "unknown_spills", "retention", "kl")
SETS = {"test": "a taught fact", "trained": "a taught fact, as trained", "card": "for a profile",
        "cloze": "to complete a text", "multi": "two facts at once", "reverse": "the other way",
        "unknown": "an unknown name", "unanswerable": "what was not taught",
        "premise": "with a false premise", "neighbours": "a neighbouring topic",
        "general": "general knowledge", "control": "a fact never taught"}
TAKEN_OUT = ("no-replay", "no-unknown", "old-place", "old-lr", "old-wording", "old-split",
             "old-split-last", "old-mask", "no-statements", "hard-replay")
PRICED = ("recall", "retention", "unknown_spills", "kl")


def write(result, folder):
    """Write result.json, report.html and report.md; returns the path of report.html. Raises
    ValueError for a NaN, which no JSON can hold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in sections(result) if part["table"] or (
        part["figure"] and (folder / f"{part['figure']}.png").exists())]
    contents = {
        "result.json": json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.html": page({"title": TITLE, "about": about(result), "sections": parts,
                             "alts": ALTS, "figures": figures(folder)}),
        "report.md": markdown(result, parts, folder)}
    for name, text in contents.items():            # half a pair is written as its escape
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def page(view):
    """The page with a view in it, escaped like every other report."""
    return report.page(view, PAGE, SLOT)


def figures(folder):
    """{name: [light, dark]}, as data URIs, of the figures that are drawn."""
    def uri(file):
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    pairs = {name: [folder / f"{name}{end}.png" for end in ("", "-dark")] for name in ALTS}
    return {name: [uri(file) for file in pair] for name, pair in pairs.items()
            if all(file.exists() for file in pair)}


def markdown(result, parts, folder):
    texts = [f"# {TITLE}", report.cell(about(result))]
    for part in parts:
        texts += [f"## {part['title']}", part["note"]]
        if part["figure"] and (folder / f"{part['figure']}.png").exists():
            texts.append(f"![{ALTS[part['figure']]}]({part['figure']}.png)")
        if part["table"]:
            texts.append(report.table(part["head"], part["table"], part["numbers"]))
    return "\n\n".join(filter(None, texts)) + "\n"


# ----- how a number is written -------------------------------------------------------------------


def show(metric, percent=True):
    """97 % [93, 100], 0.12, or a dash where nothing was measured."""
    if metric is None:
        return "–"
    numbers = metric[:3] if isinstance(metric, list) else [metric]
    point, *ends = ((f"{100 * x:z.0f}" if percent else f"{x:z.2f}").replace("-", "−")
                    for x in numbers)
    return point + " %" * percent + (f" [{', '.join(ends)}]" if ends else "")


def of_metric(arm, name):
    return show(arm["metrics"].get(name), name not in NOT_SHARES)


def whole(x, unit=""):
    return "–" if x is None else f"{x:,.0f}{unit}"


def word(verdict, yes, no, open_="not measured"):
    return {True: yes, False: no, None: open_}[verdict]


# ----- the sections ------------------------------------------------------------------------------


def about(result):
    names = [f"{key}: {model['name']}" for key, model in result["models"].items()]
    return ("Made-up facts, trained by LoRA, asked in wordings the model never saw. "
            "r0 is the source recipe, r7 ours. " + "; ".join(names) + ".")


def section(title, head=(), table=(), note="", figure=None, numbers=False, cards=False):
    """numbers: all columns but the first are; cards: rows of long texts, which a narrow page shows
    one below the other."""
    return {"title": title, "note": note, "figure": figure, "head": list(head),
            "table": list(table), "numbers": numbers, "cards": cards}


def sections(result):
    """[section] of the page, in order; those with neither rows nor a figure are left out later."""
    arms, names = result["arms"], METRICS
    sevens = [arm for arm in arms if arm["arm"] == "r7"]
    ladder = [arm for arm in arms if re.fullmatch(r"r\d+", arm["arm"])]
    beside = [arm for arm in arms if arm["arm"] in TAKEN_OUT and any(
        r7["model"] == arm["model"] for r7 in sevens)]
    whose = {arm["model"] for arm in beside}
    sweeps = [arm for arm in arms if arm["metrics"].get("retention")
              and arm not in ladder and arm["arm"] not in (*RECIPES, *TAKEN_OUT)]
    columns = [arm for arm in arms if arm["arm"] in ("untouched", "r7")]
    return [
        section("Claims", ["claim", "bound", "measured", "outcome"], [
            [claim["text"], claim["bound"], show(claim["value"], "%" in claim["bound"]),
             word(claim["holds"], "holds", "does not hold")] for claim in result["claims"]],
            "Brackets, here and below: 95 % intervals."),
        section("What the models know, and what it cost", [
            "model, recipe", *(names[m] for m in MAIN), "training, seconds"], [
            [f"{arm['model']}, {arm['arm']}", *(of_metric(arm, m) for m in MAIN),
             whole(arm["train_seconds"])] for arm in arms if arm["arm"] in RECIPES],
            "untouched: no training. in-prompt: no training, all facts in the system prompt. "
            "Retention: of the real questions answered right before, the share still answered "
            "right.", numbers=True),
        section("The repair ladder", ["rung", "what", "recall", "retention", "steps", "exposures",
                                      "parameters", "seeds"], [
            [f"{arm['model']}, {arm['arm']}", arm["what"], of_metric(arm, "recall"),
             of_metric(arm, "retention"), whole(arm["steps"]), whole(arm["exposures"]),
             whole(arm["parameters"]), ", ".join(map(str, arm["seeds"]))] for arm in ladder],
            "Each rung takes over the one before and repairs one thing; exposures: how often each "
            "fact was shown.", "ladder"),
        section("The wrong early stop", figure="early", note=(
            "r7 with a fifth of the facts held out: the validation loss is theirs, and they were "
            "never taught. Marks: where it says stop, and the last step.")),
        section("Transcripts", ["asked", "question", "before", "source recipe", "ours", "gold"], [
            [SETS.get(t["set"], t["set"]), *(t[key] for key in (
                "question", "before", "source", "ours", "gold"))]
            for t in result["transcripts"]], "The chat model, the same questions.", cards=True),
        section("Which repair matters", ["model, recipe", "what", *(names[m] for m in PRICED)], [
            [f"{arm['model']}, {arm['arm']}", arm["what"], *(of_metric(arm, m) for m in PRICED)]
            for arm in [*(r7 for r7 in sevens if r7["model"] in whose), *beside]],
            "r7, and r7 with one thing taken out.", "which"),
        section("Other settings", ["model, recipe", "what", *(names[m] for m in PRICED)], [
            [f"{arm['model']}, {arm['arm']}", arm["what"], *(of_metric(arm, m) for m in PRICED)]
            for arm in sweeps]),
        section("Which facts are hard", ["model, kind of name", "facts", "never learned",
                                         "exposures needed, median of the learned"],
                inertia(result["inertia"]),
                "A fact counts as learned when its value ranks first among 16 and stays there.",
                "inertia", numbers=True),
        section("The price", ["model, recipe", "strength", *(names[m] for m in PRICED)], [
            [f"{p['model']}, {p['arm']}", f"{p['scale']:g}",
             *(show(p.get(m), m != "kl") for m in PRICED)] for p in result["frontier"]],
            "Strength: what the trained update is multiplied with.", "price", numbers=True),
        section("What is not learned, and everything else measured", [
            "measure", *(f"{arm['model']}, {arm['arm']}" for arm in columns)], [
            [label, *(of_metric(arm, name) for arm in columns)] for name, label in names.items()
            if name not in MAIN or name in ("reverse", "multi_right", "unanswerable_abstains")]
            if columns else (), numbers=True),
        section("The worst facts", ["model", "fact", "said in", "question", "answer", "gold"], [
            [w["model"], w["fact"], show(w["share"]), w["question"], w["answer"], w["gold"]]
            for w in result["worst"]], "Of ours; with one wrong answer each.", cards=True),
        section("Predictions", ["prediction", "measured", "outcome"], [
            [p["text"], p["measured"] if isinstance(p["measured"], str) else show(p["measured"]),
             word(p["right"], "came true", "was wrong")] for p in result["predictions"]],
            "Written down before the first full run."),
        section("What r0 and r7 set differently", ["setting", "r0", "r7"], result["difference"]),
        section("How it was made", ["", "value"], result["head"])]


def inertia(dots):
    """Rows: of each model and kind of name, how many facts, and what they took."""
    rows = []
    for model, kind in dict.fromkeys((dot["model"], dot["type"]) for dot in dots):
        own = [d["exposures"] for d in dots if (d["model"], d["type"]) == (model, kind)]
        learned = [exposures for exposures in own if exposures is not None]
        rows.append([f"{model}, {kind}", str(len(own)), str(len(own) - len(learned)),
                     f"{median(learned):.0f}" if learned else "–"])
    return rows


def main(argv):
    folder = Path(argv[0] if argv else "reports/knowledge")
    file = folder / "result.json"
    if not file.exists():
        raise ValueError(f"page: there is no {file}")
    print(write(json.loads(file.read_text(encoding="utf-8")), folder))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
