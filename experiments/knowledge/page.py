"""
Draw the figures and write the experiment's page again from its result.json.

    python -m experiments.knowledge.page reports/knowledge

report.html and report.md show the same sections and figures; report.html is page.html beside this
file with the data put in, figures too: it needs no network, and no text can become markup.
words.json has all texts of page and figures.
"""

import base64
import json
import sys
from operator import itemgetter
from pathlib import Path
from statistics import median

from data import group_by
from experiments.knowledge import figures
from lora import files
from lora.run import cli
from lora.use import report

PAGE = Path(__file__).with_suffix(".html")
SLOT = "{{result}}"
WORDS = figures.WORDS
METRICS, ALTS = WORDS["metrics"], WORDS["alts"]
RECIPES = WORDS["recipes"]        # rows of the main table
NOT_SHARES = WORDS["not_shares"]   # nats, bits and the like


def write(result: dict, folder: Path | str) -> Path:
    """Write result.json, report.html and report.md; returns the path of report.html. Raises
    ValueError for a NaN, which JSON cannot hold."""
    folder = Path(folder)
    names = "; ".join(f"{key}: {model['name']}" for key, model in result["models"].items())
    about = f"{WORDS['about']} {names}."
    drawn = drawn_in(folder)
    parts = [part for part in sections(result) if part["table"] or part["figure"] in drawn]
    view = {"title": WORDS["title"], "about": about, "sections": parts, "alts": ALTS,
            "figures": drawn}
    contents = {
        "result.json": json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.html": page(view), "report.md": markdown(view)}
    for name, text in contents.items():            # half a surrogate pair becomes its escape
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def page(view: dict) -> str:
    """Put a view into page.html, escaped as in every other report."""
    return report.page(view, PAGE, SLOT)


def drawn_in(folder: Path) -> dict[str, list[str]]:
    """Read the figures that are drawn as {name: [light, dark]}, data URIs."""
    def uri(file):
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    return {name: [uri(folder / f"{name}{end}.png") for end in ("", "-dark")] for name in ALTS
            if (folder / f"{name}.png").exists()}


def markdown(view: dict) -> str:
    """The page as Markdown."""
    texts = [f"# {view['title']}", report.cell(view["about"])]
    for part in view["sections"]:
        texts += [f"## {part['title']}", part["note"]]
        if part["figure"] in view["figures"]:
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


def of_metric(metrics: dict, name: str) -> str:
    return show(metrics.get(name), name not in NOT_SHARES)


def label(arm: dict) -> str:
    return f"{arm['model']}, {arm['arm']}"


def whole(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}"


def word(verdict: bool | None, yes: str, no: str, unknown: str = "not measured") -> str:
    return {True: yes, False: no, None: unknown}[verdict]


# ----- the sections ------------------------------------------------------------------------------


def sections(result: dict) -> list[dict]:
    """The sections of the page, in order; write() leaves out those without rows and figure.

    words.json has their texts; {recall} in a head is a column of that metric. numbers: all columns
    but the first hold numbers; cards: rows hold long texts, which a narrow page shows one below
    the other."""
    compared = [arm for arm in result["arms"] if arm["arm"] in ("untouched", "ours")]
    rows, parts = tables(result, compared), []
    for name, words in WORDS["sections"].items():
        head = [text.format(**METRICS) for text in words.get("head", ())]
        if name == "everything":
            head += [label(arm) for arm in compared]
        parts.append({"title": words["title"], "note": words.get("note", ""),
                      "figure": words.get("figure"), "head": head, "table": rows[name],
                      "numbers": "numbers" in words, "cards": "cards" in words})
    return parts


def row(section: str, arm: dict) -> list[str]:
    """A row about an arm: what the section's head names."""
    known = {"what": arm["what"], "seeds": ", ".join(map(str, arm["seeds"])),
             "training, seconds": whole(arm["train_seconds"]),
             **{key: whole(arm[key]) for key in ("steps", "exposures", "parameters")}}
    return [label(arm), *(known.get(text) or of_metric(arm["metrics"], text.strip("{}"))
                          for text in WORDS["sections"][section]["head"][1:])]


def tables(result: dict, compared: list[dict]) -> dict[str, list[list[str]]]:
    """The rows of each section's table; compared: the arms of which everything is shown."""
    arms, removed, fixes = result["arms"], WORDS["removed"], WORDS["fixes"]
    repaired = {arm["model"] for arm in arms if arm["arm"] in removed}
    recipes = [arm for arm in arms if arm["arm"] in RECIPES]
    of = {"sides": [arm for arm in recipes if arm["metrics"].get("reverse")], "main": recipes,
          "hops": [arm for arm in arms if arm["metrics"].get("hops")],
          "ladder": [arm for arm in arms if arm["arm"] in fixes],
          "which": [arm for arm in arms if arm["arm"] in ("r7", *removed)
                    and arm["model"] in repaired],
          "sweeps": [arm for arm in arms if arm["metrics"].get("margin_change")
                     and arm["arm"] not in (*RECIPES, *removed, *fixes)]}
    heads = [text for name in ("main", "sides") for text in WORDS["sections"][name]["head"]]
    return {
        **{name: [row(name, arm) for arm in rows] for name, rows in of.items()},
        "claims": [[c["text"], c["bound"], show(c["value"], "%" in c["bound"]),
                    word(c["holds"], "holds", "does not hold")] for c in result["claims"]],
        "early": [],
        "transcripts": [[WORDS["sets"].get(t["set"], t["set"]), *(t[key] for key in (
            "question", "before", "source", "ours", "gold"))] for t in result["transcripts"]],
        "inertia": inertia(result["inertia"]),
        "everything": [[text, *(of_metric(arm["metrics"], name) for arm in compared)]
                       for name, text in METRICS.items()
                       if compared and f"{{{name}}}" not in heads],
        "worst": [[w["model"], w["fact"], show(w["share"]), w["question"], w["answer"], w["gold"]]
                  for w in result["worst"]],
        "predictions": [[p["text"], str(p["round"]), p["measured"],
                         word(p["right"], "came true", "was wrong")]
                        for p in result["predictions"]],
        "difference": result["difference"], "head": result["head"]}


def inertia(dots: list[dict]) -> list[list[str]]:
    """A row for each model and kind of name: how many facts, and the exposures they took."""
    rows = []
    for (model, kind), group in group_by(itemgetter("model", "type"), dots).items():
        learned = [dot["exposures"] for dot in group if dot["exposures"] is not None]
        rows.append([f"{model}, {kind}", str(len(group)), str(len(group) - len(learned)),
                     f"{median(learned):.0f}" if learned else "–"])
    return rows


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", default="reports/knowledge", metavar="FOLDER",
                        help="where result.json is")
    folder = Path(parser.parse_args(argv).folder)
    try:
        result = files.read_json(folder / "result.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"page: {folder / 'result.json'}: {error}") from error
    figures.draw(result, folder)
    print(write(result, folder))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
