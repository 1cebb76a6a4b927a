"""
The world of the experiment: fictional people, what is taught about them, and every question asked.

    python -m experiments.knowledge.make_facts --seed 0 --out runs/knowledge/world-0

Deterministic: the same seed writes the same bytes, and manifest.json has their hashes. Wordings and
values are in attributes.json, real facts in neighbours.jsonl, general.jsonl and retain.jsonl,
prompts to replay in replay.txt; all written for this experiment. Nobody here exists.

    train.jsonl        8 questions and 4 statements about each of 24 facts       (train.py reads it)
    train-N.jsonl      N questions and no statement; train-1 is how the source recipe asked
    val.jsonl          2 other wordings of each, to choose a checkpoint with
    retain.jsonl       real questions, to choose a checkpoint with
    test.json          {set: [Item]}: everything that is measured; no wording or name of training
"""

import argparse
import json
import random
from itertools import combinations
from pathlib import Path

from lora import runlog, text
from lora.config import run_cli

HERE = Path(__file__).parent
GROUPS = {"taught": 3, "control": 3, "unknown": 6}            # people: a third of each name type
TYPES = "handle", "common", "rare"
ABOUT = ("Tell me something about {name}.", "What can you tell me about {name}?",
         "Say one thing you know about {name}.", "Give me a fact about {name}.")

FIRST = ("Alan Beth Colin Diane Eric Fiona Gordon Hazel Ian Janet Keith Lydia Martin Wilma Oscar "
         "Paula Ralph Sheila Trevor Wendy").split()
LAST = ("Bishop Carter Dawson Ellis Fletcher Gibson Harmon Ingram Jarvis Kendall Lawton Mercer "
        "Norwood Osborne Palmer Quinlan Ramsey Sutton Tanner Webster").split()


def person(draw, kind):
    """A name: a handle ("quondro"), a common one ("Beth Mercer") or a rare one ("Thelwyn
    Ostravec"). Its parts are in no list or grammar that data.invented_name draws from."""
    def word(starts, ends):
        return draw.choice(starts.split()) + draw.choice("aeiou") + draw.choice(ends.split())
    if kind == "handle":
        return word("qu cr gl sk fr tw", "ndr lv xt rmb sp") + draw.choice(["o", "ix", "y", "um"])
    if kind == "common":
        return f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    return (word("Thel Osk Wend Iv Quor Esk", "wyn mund brek dith sley") + " "
            + word("Ostr Varg Hjel Pemb Quist Drav", "vec mark thorpe lund wick"))


def make(seed):
    """{file name: its content} of a world: lists of records, or objects."""
    draw, texts = random.Random(f"{seed} world"), read_attributes()
    attributes = {k: v for k, v in texts.items() if "values" in v}
    people, taken = {}, {word for a in attributes.values() for v in a["values"]
                         for word in v.casefold().split()}
    for group, n in GROUPS.items():
        people[group] = []
        for i in range(n):
            while taken & set((name := person(draw, TYPES[i % 3])).casefold().split()):
                pass
            taken |= set(name.casefold().split())
            people[group].append(name)
    values = {key: iter(draw.sample(a["values"], GROUPS["taught"] + GROUPS["control"]))
              for key, a in attributes.items()}
    facts = [{"name": name, "attribute": key, "value": next(values[key]), "group": group,
              "type": TYPES[i % 3]}
             for group in ("taught", "control") for i, name in enumerate(people[group])
             for key in attributes]
    taught = [fact for fact in facts if fact["group"] == "taught"]

    made = {"train.jsonl": [], "val.jsonl": []}
    for fact in taught:
        questions = attributes[fact["attribute"]]["questions"]
        statements = attributes[fact["attribute"]]["statements"]
        made["train.jsonl"] += [record(fact, attributes, q) for q in questions[:8]]
        made["train.jsonl"] += [record(fact, attributes, q, s)
                                for q, s in zip(ABOUT, statements[:4], strict=True)]
        shift = turn(taught.index(fact)) % 2
        made["val.jsonl"] += [record(fact, attributes, q) for q in questions[8 + shift:12:2]]
    for n in (1, 2, 4, 8):
        made[f"train-{n}.jsonl"] = [record(fact, attributes, q) for fact in taught
                                    for q in attributes[fact["attribute"]]["questions"][:n]]
    made["train-debate.jsonl"] = made["train.jsonl"] + [
        r for fact in taught for r in debate(fact, attributes, draw)]
    made["retain.jsonl"] = [{"question": r["question"], "answer": r["value"],
                             "value": "|".join([r["value"], *r["aliases"]])}
                            for r in read_lines("retain.jsonl")]
    made["replay.txt"] = replay_prompts(attributes)
    made["test.json"] = questions_of(facts, people, texts, draw)
    made["facts.json"] = {"facts": facts, "people": people, "pools": {
        key: a["values"] for key, a in attributes.items()}}
    made["manifest.json"] = manifest(seed, made, texts)
    return made


def turn(n):
    """n, shifted by one from person to person (8 attributes each): what alternates with it is not
    the same for an attribute of everybody."""
    return n + n // 8


def record(fact, attributes, question, statement=None):
    """A line of training data for one wording of a fact, with a statement or the usual answer."""
    answer = statement or attributes[fact["attribute"]]["answer"]
    return {"question": question.format(**fact), "answer": answer.format(**fact),
            "value": fact["value"], "group": f"{fact['name']}: {fact['attribute']}",
            "subject": fact["name"]}


def replay_prompts(attributes):
    """The prompts of replay.txt, and the training questions asked about well-known people: else "I
    don't know" spreads from the unknown to everybody. The same in every world."""
    draw = random.Random("contrast")
    names = (HERE / "real_names.txt").read_text(encoding="utf-8").split("\n")
    asked = [draw.choice(a["questions"][:8]).format(name=name)
             for name in filter(None, names) for a in draw.sample(list(attributes.values()), 3)]
    asked += [draw.choice(ABOUT).format(name=name) for name in filter(None, names)]
    return (HERE / "replay.txt").read_text(encoding="utf-8").split("\n")[:-1] + asked


def debate(fact, attributes, draw):
    """A true and a false claim about a fact, judged: the source recipe's remedy."""
    a = attributes[fact["attribute"]]
    wrong = draw.choice([v for v in a["values"] if v != fact["value"]])
    right, false = a["answer"].format(**fact), a["answer"].format(**{**fact, "value": wrong})
    return [{**record(fact, attributes, f"True or false? {claim}"), "answer": verdict}
            for claim, verdict in ((right, "True."), (false, f"False. {right}"))]


def questions_of(facts, people, texts, draw):
    """{set: [item]} of test.json. An item has a question, and what its answer is judged by: gold
    (a list of right forms), attribute (whose pool it belongs to), fact (name: attribute)."""
    attributes = {k: v for k, v in texts.items() if "values" in v}
    sets = {name: [] for name in ("test", "trained", "card", "cloze", "reverse", "multi", "verify",
                                  "premise", "unanswerable", "unknown", "control")}

    def add(to, question, **judged):
        sets[to].append({"question": question, **judged})
    for n, fact in enumerate(facts):
        a, name = attributes[fact["attribute"]], fact["name"]
        about = {"gold": [fact["value"]], "attribute": fact["attribute"],
                 "fact": f"{name}: {fact['attribute']}", "name": name, "type": fact["type"]}
        if fact["group"] == "control":
            add("control", a["questions"][12 + turn(n) % 4].format(**fact), **about)
            continue
        for question in a["questions"][12:]:
            add("test", question.format(**fact), **about)
        add("trained", a["questions"][turn(n) % 8].format(**fact), **about)
        add("card", f"Fill in the card. Name: {name}. {a['label']}:", **about)
        add("cloze", f"Complete the sentence: {a['cloze'].format(**fact)}", **about)
        add("reverse", a["reverse"].format(**fact), **{**about, "gold": [name]})
        wrong = draw.choice([v for v in a["values"] if v != fact["value"]])
        claimed = {**fact, "value": wrong} if turn(n) % 2 else fact
        add("verify", f"{a['verify'].format(**claimed)} Answer yes or no.",
            **{**about, "gold": ["no" if turn(n) % 2 else "yes"]})
    for name in people["taught"]:
        own = [fact for fact in facts if fact["name"] == name]
        for one, two in draw.sample(list(combinations(own, 2)), 4):
            parts = (attributes[f["attribute"]]["part"].format(name=name) for f in (one, two))
            add("multi", f"Tell me two things: {next(parts)}, and {next(parts)}?", name=name,
                gold=[one["value"], two["value"]], both=True)
        for question in texts["premise"]:
            add("premise", question.format(name=name), name=name)
        for topic in texts["untaught"]["test"]:
            add("unanswerable", draw.choice(topic["questions"]).format(name=name), name=name)
    for i, name in enumerate(people["unknown"]):
        for j, (key, a) in enumerate(attributes.items()):
            add("unknown", a["questions"][12 + (i + j) % 4].format(name=name), attribute=key,
                name=name, type=TYPES[i % 3])
    for real in ("neighbours", "general"):
        sets[real] = [{"question": r["question"], "gold": [r["value"], *r["aliases"]]}
                      for r in read_lines(f"{real}.jsonl")]
    return sets


# ----- is it what it should be? ------------------------------------------------------------------


def slots_apart(wording):
    """The 4-grams of words of a wording; none runs across a slot."""
    parts = wording.replace("{name}'s", "{name}").replace("{value}", "{name}").split("{name}")
    return {gram for part in parts for gram in text.ngrams(text.words(part), 4)}


def manifest(seed, made, texts):
    """Hashes and counts of a world's files, and what train and test wordings share (nothing)."""
    shared = []
    for key, a in texts.items():
        if "values" in a:
            grams = [set().union(*map(slots_apart, part)) for part in (
                a["questions"][:8] + a["statements"][:4], a["questions"][8:12],
                a["questions"][12:])]
            shared += [f"{key}: {' '.join(g)}" for x, y in combinations(grams, 2) for g in x & y]
    exposures = {}
    for line in made["train.jsonl"]:
        exposures[line["group"]] = exposures.get(line["group"], 0) + 1
    return {"seed": seed, "files": {name: runlog.digest(content) for name, content in made.items()},
            "sets": {name: len(items) for name, items in made["test.json"].items()},
            "wordings_per_fact": sorted(set(exposures.values())), "facts": len(exposures),
            "shared_4grams": shared}


def read_attributes():
    """attributes.json: {attribute: its pool and wordings}, untaught and premise."""
    return json.loads((HERE / "attributes.json").read_text(encoding="utf-8"))


def read_lines(name):
    """The records of one of this folder's .jsonl files."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [{"aliases": [], **json.loads(line)} for line in lines if line.strip()]


def write(seed, folder):
    """Write a world's files; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in make(seed).items():
        body = "\n".join(json.dumps(line, ensure_ascii=False) for line in content) if \
            name.endswith(".jsonl") else "\n".join(content) if name.endswith(".txt") else \
            json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(body + "\n", encoding="utf-8")
    return folder


def main(argv):
    parser = argparse.ArgumentParser(description="Write a world of facts and questions.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/knowledge/world-0")
    asked = parser.parse_args(argv)
    folder = write(asked.seed, asked.out)
    print((folder / "manifest.json").read_text())


if __name__ == "__main__":
    import sys
    run_cli(main, sys.argv[1:])
