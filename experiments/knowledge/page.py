"""
Write the experiment's page again from its result.json: report.html and report.md.

    python -m experiments.knowledge.page reports/knowledge

Both show the same sections and the figures that figures.py has drawn into the folder; report.html
holds them as data. It is page.html beside this file with the data put in: it needs no network, and
no text can become markup.
"""

import base64
import json
import re
import sys
from pathlib import Path
from statistics import median

from lora import config
from lora.use import report

PAGE = Path(__file__).with_suffix(".html")
SLOT = "{{result}}"
RUNG = re.compile(r"r\d+")        # of the repair ladder
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


def write(result: dict, folder: Path | str) -> Path:
    """Write result.json, report.html and report.md; returns the path of report.html. Raises
    ValueError for a NaN, which JSON cannot hold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in sections(result) if part["table"] or (
        part["figure"] and (folder / f"{part['figure']}.png").exists())]
    contents = {
        "result.json": json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.html": page({"title": TITLE, "about": about(result), "sections": parts,
                             "alts": ALTS, "figures": figures(folder)}),
        "report.md": markdown(result, parts, folder)}
    for name, text in contents.items():            # half a surrogate pair becomes its escape
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def page(view: dict) -> str:
    """Put a view into page.html, escaped as in every other report."""
    return report.page(view, PAGE, SLOT)


def figures(folder: Path) -> dict[str, list[str]]:
    """Read the figures that are drawn as {name: [light, dark]}, data URIs."""
    def uri(file):
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    pairs = {name: [folder / f"{name}{end}.png" for end in ("", "-dark")] for name in ALTS}
    return {name: [uri(file) for file in pair] for name, pair in pairs.items()
            if all(file.exists() for file in pair)}


def markdown(result: dict, parts: list[dict], folder: Path) -> str:
    """The page as Markdown."""
    texts = [f"# {TITLE}", report.cell(about(result))]
    for part in parts:
        texts += [f"## {part['title']}", part["note"]]
        if part["figure"] and (folder / f"{part['figure']}.png").exists():
            texts.append(f"![{ALTS[part['figure']]}]({part['figure']}.png)")
        if part["table"]:
            texts.append(report.table(part["head"], part["table"], part["numbers"]))
    return "\n\n".join(filter(None, texts)) + "\n"


# ----- how a number is written -------------------------------------------------------------------


def show(metric: list | float | None, percent: bool = True) -> str:
    """Write 97 % [93, 100], 0.12, or a dash where nothing was measured."""
    if metric is None:
        return "–"
    numbers = metric[:3] if isinstance(metric, list) else [metric]
    point, *ends = ((f"{100 * x:z.0f}" if percent else f"{x:z.2f}").replace("-", "−")
                    for x in numbers)
    interval = f" [{', '.join(ends)}]" if ends else ""
    return f"{point} %{interval}" if percent else f"{point}{interval}"


def of_metric(arm: dict, name: str) -> str:
    return show(arm["metrics"].get(name), name not in NOT_SHARES)


def label(arm: dict) -> str:
    return f"{arm['model']}, {arm['arm']}"


def whole(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}"


def word(verdict: bool | None, yes: str, no: str, unknown: str = "not measured") -> str:
    return {True: yes, False: no, None: unknown}[verdict]


# ----- the sections ------------------------------------------------------------------------------


def about(result: dict) -> str:
    names = [f"{key}: {model['name']}" for key, model in result["models"].items()]
    return ("Made-up facts, trained by LoRA, asked in wordings the model never saw. "
            "r0 is the source recipe, r7 ours. " + "; ".join(names) + ".")


def section(title: str, head=(), table=(), note: str = "", figure: str | None = None,
            numbers: bool = False, cards: bool = False) -> dict:
    """A section of the page. numbers: all columns but the first hold numbers; cards: rows hold long
    texts, which a narrow page shows one below the other."""
    return {"title": title, "note": note, "figure": figure, "head": list(head),
            "table": list(table), "numbers": numbers, "cards": cards}


def sections(result: dict) -> list[dict]:
    """The sections of the page, in order; write() leaves out those without rows and figure."""
    return [*first_sections(result), *more_sections(result)]


def first_sections(result: dict) -> list[dict]:
    """Claims, the main table, the repair ladder, the wrong early stop, transcripts."""
    arms, names = result["arms"], METRICS
    return [
        section("Claims", ["claim", "bound", "measured", "outcome"], [
            [claim["text"], claim["bound"], show(claim["value"], "%" in claim["bound"]),
             word(claim["holds"], "holds", "does not hold")] for claim in result["claims"]],
            "Brackets, here and below: 95 % intervals."),
        section("What the models know, and what it cost", [
            "model, recipe", *(names[m] for m in MAIN), "training, seconds"], [
            [label(arm), *(of_metric(arm, m) for m in MAIN), whole(arm["train_seconds"])]
            for arm in arms if arm["arm"] in RECIPES],
            "untouched: no training. in-prompt: no training, all facts in the system prompt. "
            "Retention: of the real questions answered right before, the share still answered "
            "right.", numbers=True),
        section("The repair ladder", ["rung", "what", "recall", "retention", "steps", "exposures",
                                      "parameters", "seeds"], [
            [label(arm), arm["what"], of_metric(arm, "recall"), of_metric(arm, "retention"),
             whole(arm["steps"]), whole(arm["exposures"]), whole(arm["parameters"]),
             ", ".join(map(str, arm["seeds"]))] for arm in arms if RUNG.fullmatch(arm["arm"])],
            "Each rung takes over the one before and repairs one thing; exposures: how often each "
            "fact was shown.", "ladder"),
        section("The wrong early stop", figure="early", note=(
            "r7 with a fifth of the facts held out: the validation loss is theirs, and they were "
            "never taught. Marks: where it says stop, and the last step.")),
        section("Transcripts", ["asked", "question", "before", "source recipe", "ours", "gold"], [
            [SETS.get(t["set"], t["set"]), *(t[key] for key in (
                "question", "before", "source", "ours", "gold"))]
            for t in result["transcripts"]], "The chat model, the same questions.", cards=True)]


def more_sections(result: dict) -> list[dict]:
    """What repairs, settings, facts and strengths change; predictions; how it was made."""
    arms, prices = result["arms"], [METRICS[m] for m in PRICED]
    ours = {arm["model"]: arm for arm in arms if arm["arm"] == "r7"}
    removed = [arm for arm in arms if arm["arm"] in TAKEN_OUT and arm["model"] in ours]
    repairs = [arm for arm in ours.values() if arm["model"] in {a["model"] for a in removed}]
    sweeps = [arm for arm in arms if arm["metrics"].get("retention") and not RUNG.fullmatch(
        arm["arm"]) and arm["arm"] not in (*RECIPES, *TAKEN_OUT)]
    columns = [arm for arm in arms if arm["arm"] in ("untouched", "r7")]

    def priced(rows):
        return [[label(arm), arm["what"], *(of_metric(arm, m) for m in PRICED)] for arm in rows]
    return [
        section("Which repair matters", ["model, recipe", "what", *prices],
                priced([*repairs, *removed]), "r7, and r7 with one thing taken out.", "which"),
        section("Other settings", ["model, recipe", "what", *prices], priced(sweeps)),
        section("Which facts are hard", ["model, kind of name", "facts", "never learned",
                                         "exposures needed, median of the learned"],
                inertia(result["inertia"]),
                "A fact counts as learned when its value ranks first among 16 and stays there.",
                "inertia", numbers=True),
        section("The price", ["model, recipe", "strength", *prices], [
            [label(p), f"{p['scale']:g}", *(show(p.get(m), m != "kl") for m in PRICED)]
            for p in result["frontier"]],
            "Strength: what the trained update is multiplied with.", "price", numbers=True),
        section("What is not learned, and everything else measured", [
            "measure", *map(label, columns)], [
            [text, *(of_metric(arm, name) for arm in columns)] for name, text in METRICS.items()
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


def inertia(dots: list[dict]) -> list[list[str]]:
    """A row for each model and kind of name: how many facts, and the exposures they took."""
    rows = []
    for model, kind in dict.fromkeys((dot["model"], dot["type"]) for dot in dots):
        group = [d["exposures"] for d in dots if (d["model"], d["type"]) == (model, kind)]
        learned = [exposures for exposures in group if exposures is not None]
        rows.append([f"{model}, {kind}", str(len(group)), str(len(group) - len(learned)),
                     f"{median(learned):.0f}" if learned else "–"])
    return rows


def main(argv: list[str]) -> None:
    parser = config.Parser(__doc__)
    parser.add_argument("folder", nargs="?", default="reports/knowledge", metavar="FOLDER",
                        help="where result.json is")
    folder = Path(parser.parse_args(argv).folder)
    file = folder / "result.json"
    if not file.exists():
        raise ValueError(f"page: there is no {file}")
    print(write(json.loads(file.read_text(encoding="utf-8")), folder))


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
