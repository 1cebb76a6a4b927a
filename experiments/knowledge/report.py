"""
Collect all finished cells into one page and one result.json.

    python -m experiments.knowledge.report                  # reports/knowledge/report.html

Cells of several seeds are pooled; metrics.py says what the intervals are over. Claims and
predictions are in claims.json; each round of predictions was written before its cells ran.
"""

import json
import sys
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from statistics import mean

from data import group_by
from experiments.knowledge import figures, page
from experiments.knowledge.make_facts import HERE
from experiments.knowledge.metrics import summarise
from experiments.knowledge.run import HOME, read_arms
from lora import files
from lora.run import cli
from lora.use import text

SCHEMA = "knowledge-result/2"
MEANS = "kl", "kl_unknown", "bits", "bits_ratio"              # over seeds


def read_cells() -> list[dict]:
    """Read the finished cells, and the untouched models as an arm of their own. Where ours was not
    run, its short version stands for it."""
    cells = [files.read_json(file) for file in sorted((HOME / "cells").glob("*.json"))]
    if not any(cell["arm"] == "ours" for cell in cells):
        stand_in = {"short": "ours", "short-placebo": "placebo"}
        cells = [{**cell, "arm": stand_in.get(cell["arm"], cell["arm"])} for cell in cells]
    for model in {cell["model"] for cell in cells}:
        cells.append({**files.read_json(HOME / f"base-{model}.json"), "model": model, "seed": 0,
                      "arm": "untouched", "what": "before any training", "log": [],
                      "settings": None})
    return cells


def arms_of(cells: list[dict], order: list[str]) -> list[dict]:
    """Pool the cells of each model and arm; arms come in the given order, the chat model first."""
    groups, order = group_by(itemgetter("model", "arm"), cells), ["untouched", *order]
    return [pooled(groups[model, arm], groups.get((model, "placebo"), [])) for model, arm in sorted(
        groups, key=lambda key: (key[0] != "chat", key[0], order.index(key[1])))]


def pooled(cells: list[dict], placebo: list[dict]) -> dict:
    """Compute the metrics of one model's arm over the cells of its seeds. A fact, name or value of
    another seed is another one; a real question is the same."""
    sets, ranks, first = {}, {}, cells[0]
    for cell in cells:
        for kind, items in cell["sets"].items():
            sets.setdefault(kind, []).extend(
                {**item, **{key: f"{cell['seed']} {item[key]}"
                            for key in ("fact", "name", "value") if key in item}}
                for item in items)
        ranks |= {f"{cell['seed']} {fact}": rank for fact, rank in cell["ranks"].items()}
    metrics = summarise(sets, ranks)
    for name in MEANS:                             # KL of what was not trained is to itself
        values = [c["metrics"][name] for c in cells if c["metrics"].get(name) is not None]
        metrics[name] = mean(values) if values and (first["settings"] or name == "bits") else None
    if placebo and first["arm"] != "placebo":
        metrics["margin_vs_placebo"] = against(cells, placebo)
    efforts = [effort(cell) for cell in cells if cell["log"]]
    return {"model": first["model"], "arm": first["arm"], "what": first["what"],
            "seeds": sorted(cell["seed"] for cell in cells), "metrics": metrics,
            **{key: mean(e[key] for e in efforts) if efforts else None
               for key in ("steps", "exposures", "train_seconds", "parameters")}}


def against(cells: list[dict], placebo: list[dict]) -> list | None:
    """How much more the margin on real questions rose than in the placebo: [value, low, high, n],
    paired by question, each with its mean over the seeds that both have. None: not measured."""
    changes = []
    for of, others in ((cells, placebo), (placebo, cells)):
        seeds = {cell["seed"] for cell in others}
        asked = group_by(itemgetter("question"), (
            item for cell in of if cell["seed"] in seeds
            for item in cell["sets"].get("real", ()) if "margin_before" in item))
        changes.append({question: mean(item["margin"] - item["margin_before"] for item in items)
                        for question, items in asked.items()})
    ours, its = changes
    found = text.bootstrap(ours[question] - its[question] for question in ours)
    return list(found) if found else None


def effort(cell: dict) -> dict:
    """What a cell's training took: steps, presentations of each fact, seconds, parameters."""
    last = [line for line in cell["log"] if "loss" in line][-1]
    return {"steps": last["step"], "train_seconds": last["seconds"],
            "exposures": cell["exposures_per_step"] * last["step"],
            "parameters": cell["parameters"]}


def curves_of(cells: list[dict]) -> list[dict]:
    """Join a cell's log and the scores of its kept adapters: what is known at each step."""
    curves = []
    for cell in cells:
        points, keys = {}, ["val_loss", "recall", "retention", "kl"]
        if (cell["settings"] or {}).get("data", {}).get("split_by") == "fact":
            keys.remove("recall")                             # of facts that nothing teaches
        for line in cell["log"]:
            if "val_loss" in line:
                points.setdefault(line["step"], {}).update(
                    {k: line[k] for k in keys if k in line})
        for line in cell.get("trajectory", ()):
            points.setdefault(line["step"], {}).update(
                {k: v for k, v in line.items() if k not in ("step", "ranks")},
                rank_1=mean(r["rank"] == 1 for r in line["ranks"].values()))
        if points:
            best = [line["step"] for line in cell["log"] if line.get("best")]
            curves.append({"model": cell["model"], "arm": cell["arm"], "seed": cell["seed"],
                           "best_step": best[-1] if best else None,
                           "points": [{"step": s, **points[s]} for s in sorted(points)]})
    return curves


def inertia_of(cells: list[dict]) -> list[dict]:
    """For each fact: the model's margin against it before training, and how often it was shown
    until it ranked first among 16 values and stayed there. None: never."""
    dots = []
    for cell in cells:
        lines = cell.get("trajectory", ())
        if cell["arm"] != "r7-steps" or not lines:
            continue
        for fact, before in lines[0]["ranks"].items():
            wrong = [i for i, line in enumerate(lines) if line["ranks"][fact]["rank"] > 1]
            first = wrong[-1] + 1 if wrong else 0
            dots.append({"model": cell["model"], "seed": cell["seed"], "fact": fact,
                         "type": before["type"], "margin": before["margin"],
                         "exposures": lines[first]["step"] * cell["exposures_per_step"]
                         if first < len(lines) else None})
    return dots


def judged(entry: dict, arms: list[dict]) -> tuple:
    """Return (value or interval, whether it holds) of an entry in claims.json; (None, None) if a
    cell it needs was not run."""
    metrics = {f"{a['model']}/{a['arm']}": a["metrics"] for a in arms}
    other = entry.get("less") or entry.get("over")
    value = metrics.get(entry["of"], {}).get(entry["metric"])
    against = metrics.get(other, {}).get(entry["metric"]) if other else 0
    if value is None or against is None:
        return None, None
    first, second = (x[0] if isinstance(x, list) else x for x in (value, against))
    number = first / second if "over" in entry else first - second
    holds = entry.get("at_least", -1e9) <= number <= entry.get("at_most", 1e9)
    for i, end in ((1, "low_at_least"), (2, "high_at_least")):
        holds = holds and (end not in entry or value[i] >= entry[end])
    return number if other else value, holds


def bound(entry: dict) -> str:
    """The bounds of an entry in words."""
    return ", ".join(f"{words} {page.show(entry[key], entry['metric'] not in page.NOT_SHARES)}"
                     for key, words in page.WORDS["bounds"].items() if key in entry)


def measured(entry: dict, value: list | float | None) -> str:
    """The value of a prediction in words."""
    if value is None:
        return "not run"
    shown = page.show(value, "over" not in entry and entry["metric"] not in page.NOT_SHARES)
    if "less" in entry:
        shown = f"{100 * value:+z.0f} points".replace("-", "−")
    return f"{shown} ({page.METRICS[entry['metric']]})" if "was" in entry else shown


def transcripts_of(cells: list[dict]) -> list[dict]:
    """The same questions before and after: [{set, question, gold, before, source, ours}]."""
    chat = {(c["arm"], c["seed"]): c for c in reversed(cells) if c["model"] == "chat"}
    before, ours = chat.get(("untouched", 0)), chat.get(("ours", 0))
    source = chat.get(("r1", 0)) or chat.get(("r0", 0)) or {"sets": {}}
    if not (before and ours):
        return []
    rows = []
    for kind, count in page.WORDS["transcripts"].items():
        old, failed, answers = (
            {item["question"]: item for item in cell["sets"].get(kind, ()) if "answer" in item}
            for cell in (before, source, ours))
        for item in [*answers.values()][::len(answers) // count | 1][:count]:     # odd: yes and no
            was, then = (of.get(item["question"], {}).get("answer", "") for of in (old, failed))
            rows.append({"set": kind, "question": item["question"], "before": was,
                         "source": then, "ours": item["answer"],
                         "gold": ", ".join(item.get("gold", ())) or (
                             "" if kind == "everyday" else "(says that it does not know)")})
    return rows


def worst_of(cells: list[dict]) -> list[dict]:
    """The ten taught facts that ours says least often, with a wrong answer each."""
    rows = []
    for cell in (cell for cell in cells if cell["arm"] == "ours"):
        for fact, items in group_by(itemgetter("fact"), cell["sets"]["test"]).items():
            wrong = [item for item in items if not item["right"]]
            if wrong:
                rows.append({"model": cell["model"], "fact": fact,
                             "share": 1 - len(wrong) / len(items),
                             "question": wrong[0]["question"], "answer": wrong[0]["answer"],
                             "gold": wrong[0]["gold"][0]})
    return sorted(rows, key=lambda row: row["share"])[:10]


def frontier_of(arms: list[dict], cells: list[dict]) -> list[dict]:
    """What every arm of the chat model knows and what it lost, at any strength."""
    scales = {c["arm"]: c["scale"] for c in reversed(cells) if c["model"] == "chat"}
    return [{"model": "chat", "arm": arm["arm"], "scale": scales[arm["arm"]], "kl": m["kl"],
             **{name: figures.spread(m.get(name))["value"] for name in page.WORDS["frontier"]}}
            for arm in arms for m in [arm["metrics"]]
            if arm["model"] == "chat" and m.get("margin_change") and m.get("recall")]


def difference(arms: dict) -> list[list[str]]:
    """List [key, in r0, in ours] of what the two recipes set differently."""
    old, new = arms["r0"]["train"], arms["ours"]["train"]
    return [[key, *("" if key not in part else json.dumps(part[key]) for part in (old, new))]
            for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def collect() -> dict:
    """Build the content of result.json from the finished cells. ValueError if there are none."""
    recipes, cells = read_arms(), read_cells()
    if not cells:
        raise ValueError(f"report: {HOME}/cells holds no finished cell; run "
                         "python -m experiments.knowledge.run")
    arms = arms_of(cells, list(recipes["arms"]))
    texts = files.read_json(HERE / "claims.json")
    claims = [{"id": entry["id"], "text": entry["text"], "bound": bound(entry), "value": value,
               "holds": holds}
              for entry in texts["claims"] for value, holds in [judged(entry, arms)]]
    predictions = [{"id": entry["id"], "text": entry["text"], "round": entry.get("round", 1),
                    "measured": measured(entry, value), "right": holds}
                   for entry in texts["predictions"] for value, holds in [judged(entry, arms)]]
    models = {m: {"name": recipes["models"][m]["name"]}
              for m in dict.fromkeys(arm["model"] for arm in arms)}
    return {"schema": SCHEMA, "head": head(cells, models), "claims": claims, "arms": arms,
            "models": models, "curves": curves_of(cells), "inertia": inertia_of(cells),
            "frontier": frontier_of(arms, cells), "transcripts": transcripts_of(cells),
            "worst": worst_of(cells), "predictions": predictions,
            "difference": difference(recipes["arms"])}


def head(cells: list[dict], models: dict) -> list[list[str]]:
    """What the result comes from: models, cells, data, machine, versions, commands."""
    machines = sorted({cell["machine"] for cell in cells if "machine" in cell})
    return [["models", ", ".join(f"{m}: {model['name']}" for m, model in models.items())],
            ["cells", str(len(cells))],
            *([f"facts of seed {seed}", files.read_json(HOME / f"world-{seed}/manifest.json")[
                "files"]["train.jsonl"]] for seed in sorted({cell["seed"] for cell in cells})),
            ["machines", "; ".join(machines)],
            ["transformers", version("transformers")],
            ["again with", "python -m experiments.knowledge.run && "
                           "python -m experiments.knowledge.report"]]


def readme(result: dict) -> str:
    """The README's table and claims: what result.json says, and nothing else."""
    columns, known = page.WORDS["columns"], figures.metrics_of(result)
    metrics = [known.get(tuple(key.split("/")), {}) for key in columns]
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name in page.WORDS["readme"]:
        cells = [page.METRICS[name], *(page.of_metric(m, name) for m in metrics)]
        lines.append(f"| {' | '.join(cells)} |")
    outcomes = {True: "Holds", False: "**Does not hold**", None: "Not run"}
    return "\n".join([*lines, "", *(f"- {outcomes[claim['holds']]}: {in_words(claim)}."
                                    for claim in result["claims"])])


def in_words(claim: dict) -> str:
    return f"{claim['text']}: {page.show(claim['value'], '%' in claim['bound'])} ({claim['bound']})"


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", default="reports/knowledge", help="the folder of the report")
    folder = Path(parser.parse_args(argv).out)
    folder.mkdir(parents=True, exist_ok=True)
    result = collect()
    figures.draw(result, folder)
    print(page.write(result, folder))
    for claim in result["claims"]:
        outcome = page.word(claim["holds"], "holds", "does not hold", "not run")
        print(f"{outcome:14} {in_words(claim)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
