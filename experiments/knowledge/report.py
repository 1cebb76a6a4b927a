"""
The report: all finished cells in one page and one result.json.

    python -m experiments.knowledge.report                  # reports/knowledge/report.html

Shares of several seeds are pooled by fact, and their intervals are a bootstrap over facts. Claims
and predictions are in claims.json; the predictions were written before the first full run.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from experiments.knowledge import page
from experiments.knowledge.make_facts import HERE
from experiments.knowledge.run import HOME, read_arms
from experiments.knowledge.score import summarise
from lora.config import run_cli

SCHEMA = "knowledge-result/1"
MEANS = "kl", "kl_unknown", "perplexity_ratio"                # of trained cells, over seeds


def read_cells(home=HOME):
    """[cell] of the finished cells, and the untouched models as an arm of their own."""
    cells = [json.loads(f.read_text(encoding="utf-8"))
             for f in sorted((home / "cells").glob("*.json"))]
    for model in {cell["model"] for cell in cells}:
        scores = json.loads((home / f"base-{model}.json").read_text(encoding="utf-8"))
        cells.append({**scores, "model": model, "arm": "untouched", "seed": 0, "log": [],
                      "what": "before any training", "settings": None})
    return cells


def arms_of(cells, order):
    """[arm]: the cells of one model and arm pooled over seeds."""
    groups = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["arm"]), []).append(cell)
    made = []
    for (model, arm), own in groups.items():
        sets, found = {}, {}
        for cell in own:
            for kind, items in cell["sets"].items():
                sets.setdefault(kind, []).extend(
                    {**item, **({"fact": f"{cell['seed']} {item['fact']}"} if "fact" in item
                                else {})} for item in items)
            found |= {f"{cell['seed']} {fact}": rank for fact, rank in cell["ranks"].items()}
        metrics = summarise(sets, found)
        if arm == "untouched":
            metrics |= {name: None for name in metrics if name.startswith("retention")}
        for name in MEANS:
            values = [value for c in own if (value := c["metrics"].get(name)) is not None]
            metrics[name] = mean(values) if values and own[0]["settings"] else None
        made.append({"model": model, "arm": arm, "what": own[0]["what"],
                     "seeds": sorted(cell["seed"] for cell in own), "metrics": metrics,
                     **{key: mean(values) if (values := [effort(cell)[key] for cell in own
                                                         if cell["log"]]) else None
                        for key in ("steps", "exposures", "train_seconds", "parameters")}})
    place = {name: i for i, name in enumerate(["untouched", *order])}
    return sorted(made, key=lambda a: (a["model"] != "chat", a["model"], place[a["arm"]]))


def effort(cell):
    """What a cell's training took: steps, presentations of each fact, seconds, parameters."""
    lines = [line for line in cell["log"] if "loss" in line]
    return {"steps": lines[-1]["step"], "train_seconds": lines[-1]["seconds"],
            "exposures": cell["exposures_per_step"] * lines[-1]["step"],
            "parameters": cell["parameters"]}


def curves_of(cells):
    """[curve]: what is known of a cell at each step, from its log and its kept adapters."""
    made = []
    for cell in cells:
        points, wanted = {}, ["val_loss", "recall", "retention", "kl"]
        if (cell["settings"] or {}).get("data", {}).get("split_by") == "fact":
            wanted.remove("recall")                           # of facts that nothing teaches
        for line in cell["log"]:
            if "val_loss" in line:
                points.setdefault(line["step"], {}).update(
                    {k: line[k] for k in wanted if k in line})
        for line in cell.get("trajectory", ()):
            points.setdefault(line["step"], {}).update(
                {k: v for k, v in line.items() if k not in ("step", "ranks")},
                rank_1=mean(r["rank"] == 1 for r in line["ranks"].values()))
        if points:
            best = [line["step"] for line in cell["log"] if line.get("best")]
            made.append({"model": cell["model"], "arm": cell["arm"], "seed": cell["seed"],
                         "best_step": best[-1] if best else None,
                         "points": [{"step": s, **points[s]} for s in sorted(points)]})
    return made


def inertia_of(cells):
    """[dot]: for each fact the model's margin against it before training, and how often it was
    shown until it ranked first among 16 values and stayed there; None: never."""
    made = []
    for cell in cells:
        lines = cell.get("trajectory", ())
        if cell["arm"] != "r7-steps" or not lines:
            continue
        for fact, before in lines[0]["ranks"].items():
            wrong = [i for i, line in enumerate(lines) if line["ranks"][fact]["rank"] > 1]
            first = wrong[-1] + 1 if wrong else 0
            made.append({"model": cell["model"], "seed": cell["seed"], "fact": fact,
                         "type": before["type"], "margin": before["margin"],
                         "exposures": lines[first]["step"] * cell["exposures_per_step"]
                         if first < len(lines) else None})
    return made


def judged(entry, arms):
    """(measured value or interval, whether it is as the entry says); (None, None) if not run."""
    def metric(name):
        arm = next((a for a in arms if f"{a['model']}/{a['arm']}" == name), None)
        return arm and arm["metrics"].get(entry["metric"])
    value = metric(entry["of"])
    other = metric(entry["less"] if "less" in entry else entry["over"]) if \
        {"less", "over"} & set(entry) else 0
    if value is None or other is None:
        return None, None
    first, second = (x[0] if isinstance(x, list) else x for x in (value, other))
    number = first / second if "over" in entry else first - second
    holds = entry.get("at_least", -1e9) <= number <= entry.get("at_most", 1e9)
    if "low_at_least" in entry:
        holds = holds and value[1] >= entry["low_at_least"]
    return value if not {"less", "over"} & set(entry) else number, holds


def bound(entry):
    words = [f"{word} {entry[key]:.0%}" for key, word in (
        ("at_least", "at least"), ("at_most", "at most"),
        ("low_at_least", "and its interval's low end at least")) if key in entry]
    return ", ".join(words)


def transcripts_of(cells, n=12):
    """The same questions, before and after: [{set, question, gold, before, source, ours}]."""
    def cell(arm, seed):
        return next((c for c in cells if (c["model"], c["arm"], c["seed"]) == ("chat", arm, seed)),
                    None)
    before, source, ours = cell("untouched", 0), cell("r1", 0) or cell("r0", 0), cell("r7", 0)
    if not (before and ours):
        return []

    def answers(of, kind):
        return {i["question"]: i["answer"] for i in of["sets"].get(kind, ())} if of else {}
    made = []
    for kind, many in (("test", 4), ("card", 1), ("multi", 1), ("reverse", 1), ("unknown", 2),
                       ("unanswerable", 1), ("neighbours", 1), ("general", 1)):
        items = ours["sets"][kind]
        old, tried = answers(before, kind), answers(source, kind)
        for item in items[::max(1, len(items) // many)][:many]:
            question = item["question"]
            made.append({"set": kind, "question": question, "before": old.get(question, ""),
                         "source": tried.get(question, ""), "ours": item["answer"],
                         "gold": ", ".join(item["gold"]) if item.get("gold") else
                         "(says that it does not know)"})
    return made[:n]


def worst_of(cells, n=10):
    """The taught facts that ours says least often, with a wrong answer each."""
    groups = {}
    for cell in cells:
        if cell["arm"] == "r7":
            for item in cell["sets"]["test"]:
                groups.setdefault((cell["model"], cell["seed"], item["fact"]), []).append(item)
    made = []
    for (model, _, fact), items in groups.items():
        wrong = [item for item in items if not item["right"]]
        if wrong:
            made.append({"model": model, "fact": fact, "share": 1 - len(wrong) / len(items),
                         "question": wrong[0]["question"], "answer": wrong[0]["answer"],
                         "gold": wrong[0]["gold"][0]})
    return sorted(made, key=lambda w: w["share"])[:n]


def frontier_of(arms, cells):
    """[point]: recall against retention for every arm that learned, and for other strengths."""
    points = []
    for arm in arms:
        m = arm["metrics"]
        if arm["model"] == "chat" and m.get("retention") and m.get("recall"):
            points.append({"model": arm["model"], "arm": arm["arm"], "scale": scale_of(arm, cells),
                           "recall": m["recall"][0], "retention": m["retention"][0],
                           "unknown_spills": m["unknown_spills"] and m["unknown_spills"][0],
                           "kl": m["kl"]})
    return points


def scale_of(arm, cells):
    return next(c["scale"] for c in cells if (c["model"], c["arm"]) == (arm["model"], arm["arm"]))


def difference(arms):
    """[[key, in r0, in r7]] of what the two recipes set differently."""
    old, new = arms["r0"]["train"], arms["r7"]["train"]
    return [[key, *("" if key not in part else json.dumps(part[key]) for part in (old, new))]
            for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def collect(home=HOME):
    """The content of result.json from the cells of a home."""
    arms = read_arms()
    cells = read_cells(home)
    if not cells:
        raise ValueError(f"report: {home}/cells holds no finished cell; run "
                         "python -m experiments.knowledge.run")
    made = arms_of(cells, list(arms["arms"]))
    texts = json.loads((HERE / "claims.json").read_text(encoding="utf-8"))
    claims, predictions = [], []
    for entry in texts["claims"]:
        value, holds = judged(entry, made)
        claims.append({"id": entry["id"], "text": entry["text"], "bound": bound(entry),
                       "value": value, "holds": holds})
    for entry in texts["predictions"]:
        value, holds = judged(entry, made)
        shown = "not run" if value is None else "{:.0%} ({:.0%} to {:.0%})".format(*value) \
            if isinstance(value, list) else f"{value:+.0%}" if "less" in entry else f"{value:.2f}"
        predictions.append({"id": entry["id"], "text": entry["text"], "measured": shown,
                            "right": holds})
    seeds = Counter(cell["seed"] for cell in cells)
    head = [["models", ", ".join(f"{m}: {arms['models'][m]['name']}" for m in
                                 dict.fromkeys(a["model"] for a in made))],
            ["cells", str(len(cells))],
            *([f"facts of seed {seed}", json.loads((home / f"world-{seed}/manifest.json").read_text(
                encoding="utf-8"))["files"]["train.jsonl"]] for seed in sorted(seeds)),
            ["machine", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} "
                        "threads"],
            ["versions", ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))],
            ["again with", "python -m experiments.knowledge.run && "
                           "python -m experiments.knowledge.report"]]
    return {"schema": SCHEMA, "head": head, "claims": claims, "arms": made,
            "models": {m: {"name": arms["models"][m]["name"]}
                       for m in dict.fromkeys(a["model"] for a in made)},
            "curves": curves_of(cells), "inertia": inertia_of(cells),
            "frontier": frontier_of(made, cells), "transcripts": transcripts_of(cells),
            "worst": worst_of(cells), "predictions": predictions,
            "difference": difference(arms["arms"])}


README = {"recall": "held-out wordings of what was taught", "recall_trained": "trained wordings",
          "reverse": "reversed questions (who was born in ...?)",
          "multi_right": "two facts in one question",
          "unanswerable_abstains": "never taught about a taught person: declined",
          "unknown_spills": "unknown names: a taught value given",
          "retention": "real questions it got right, and still does",
          "kl": "KL to its untouched self, nats/token"}


def readme(result):
    """The README's table and claims: what result.json says, and nothing else."""
    arms = {(a["model"], a["arm"]): a for a in result["arms"]}
    columns = {("chat", "untouched"): "chat model, untouched", ("chat", "r0"): "the failed recipe",
               ("chat", "r7"): "ours", ("base", "r7"): "base model, ours"}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name, label in README.items():
        lines.append(f"| {label} | " + " | ".join(
            page.of_metric(arms[key], name) for key in columns) + " |")
    lines.append("")
    for claim in result["claims"]:
        word = page.word(claim["holds"], "Holds", "**Does not hold**", "Not run")
        lines.append(f"- {word}: {claim['text']}: {page.show(claim['value'])} ({claim['bound']}).")
    return "\n".join(lines)


def main(argv):
    parser = argparse.ArgumentParser(description="Collect finished cells into a report.")
    parser.add_argument("--out", default="reports/knowledge")
    asked = parser.parse_args(argv)
    from plots import knowledge
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = collect()
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False),
                                        encoding="utf-8")
    knowledge.draw(folder)
    print(page.write(result, folder))
    for claim in result["claims"]:
        word = {True: "holds", False: "does not hold", None: "not run"}[claim["holds"]]
        print(f"{word:14} {claim['text']}: {page.show(claim['value'])} ({claim['bound']})")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
