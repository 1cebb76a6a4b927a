"""
Write a world of the experiment: invented people, what is taught about them, every question asked.

    python -m experiments.knowledge.make_facts --seed 0 --out runs/knowledge/world-0

The same seed writes the same bytes; manifest.json has their hashes. Wordings and values are in
attributes.json, other sides of a fact in asked.json, questions without an answer in
unanswerable.json, real facts in real.jsonl and retain.jsonl, prompts to replay in replay.txt; all
were written for this experiment. Nobody here exists.

    train.jsonl        8 questions and 4 statements about each of 24 facts       (train.py reads it)
    facts.csv          the same facts, a line each: subject, attribute, value
    train-N.jsonl      N questions and no statement; train-1 is how the source recipe asked
    val.jsonl          2 other wordings of each fact, to choose a checkpoint with
    retain.jsonl       real questions, to choose a checkpoint with
    test.json          {set: [item]}: everything that is measured, in no wording of training
"""

import json
import random
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

from lora import files
from lora.read import messages, names, sides
from lora.run import cli, runlog
from lora.use import text

HERE = Path(__file__).parent
EVERYDAY = HERE.parents[1] / "examples/everyday.txt"          # what the default run replays
GROUPS = {"taught": 3, "control": 3, "far": 30}               # people: a third of each name type
NEAR = 30                                                     # names like the taught ones
NAMES = files.read_json(HERE / "names.json")   # {kind: the parts of each word, to choose from}
TYPES = tuple(NAMES)
ABOUT = ("Tell me something about {name}.", "What can you tell me about {name}?",
         "Say one thing you know about {name}.", "Give me a fact about {name}.")


def person(draw: random.Random, kind: str) -> str:
    """Draw a name: a handle ("quondro"), a common one ("Beth Mercer") or a rare one ("Thelwyn
    Ostravec"). names.invented_name can draw no part of it."""
    return " ".join("".join(draw.choice(part) for part in word) for word in NAMES[kind])


def make(seed: int) -> dict[str, list | dict]:
    """Build the files of a world: {file name: a list of records, or an object}."""
    draw, attributes = random.Random(f"{seed} world"), read_attributes()
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

    contents = {"train.jsonl": [], "val.jsonl": []}
    for fact in taught:
        a = attributes[fact["attribute"]]
        contents["train.jsonl"] += [record(fact, a, q) for q in a["questions"][:8]]
        contents["train.jsonl"] += [record(fact, a, q, s)
                                    for q, s in zip(ABOUT, a["statements"][:4], strict=True)]
        shift = turn(taught.index(fact)) % 2
        contents["val.jsonl"] += [record(fact, a, q) for q in a["questions"][8 + shift:12:2]]
    for n in (1, 2, 4, 8):
        contents[f"train-{n}.jsonl"] = [
            record(fact, attributes[fact["attribute"]], q) for fact in taught
            for q in attributes[fact["attribute"]]["questions"][:n]]
    contents["facts.csv"] = [("subject", "attribute", "value"), *(
        (fact["name"], attributes[fact["attribute"]]["label"].casefold(), fact["value"])
        for fact in taught)]
    contents["retain.jsonl"] = [
        {"question": r["question"], "answer": r["value"],
         "value": "|".join([r["value"], *r["aliases"]])} for r in read_lines("retain.jsonl")]
    contents["replay.txt"] = replay_prompts(attributes)
    people["near"] = near_names(people, draw)
    contents["test.json"] = questions_of(
        facts, people, attributes, pairs_trained(contents["train-8.jsonl"], seed), draw)
    contents["facts.json"] = {"facts": facts, "people": people, "pools": {
        key: a["values"] for key, a in attributes.items()}}
    contents["manifest.json"] = manifest(seed, contents, attributes)
    return contents


def turn(n: int) -> int:
    """Shift n by one from person to person (8 attributes each). What alternates with turn(n) then
    differs between people for the same attribute."""
    return n + n // 8


def record(fact: dict, a: dict, question: str, statement: str | None = None) -> dict:
    """A line of training data for one wording of a fact with the attribute a; without a statement
    the usual answer."""
    answer = statement or a["answer"]
    return {"question": question.format(**fact), "answer": answer.format(**fact),
            "value": fact["value"], "group": f"{fact['name']}: {fact['attribute']}",
            "subject": fact["name"]}


def replay_prompts(attributes: dict) -> list[str]:
    """The prompts of replay.txt and of the default run, and training questions about well-known
    people: without them "I don't know" spreads from unknown names to everybody. They are the same
    in every world."""
    draw = random.Random("contrast")
    names = (HERE / "real_names.txt").read_text(encoding="utf-8").splitlines()
    return [*(HERE / "replay.txt").read_text(encoding="utf-8").split("\n")[:-1],
            *EVERYDAY.read_text(encoding="utf-8").splitlines(),
            *(draw.choice(a["questions"][:8]).format(name=name)
              for name in names for a in draw.sample(list(attributes.values()), 3)),
            *(draw.choice(ABOUT).format(name=name) for name in names)]


def near_names(people: dict[str, list[str]], draw: random.Random) -> list[str]:
    """Draw NEAR names that resemble the taught ones: two letters changed, or one of two parts
    another. Training invents no such name (lora/read/names.py)."""
    near, known = [], set().union(*people.values())
    while len(near) < NEAR:
        name = people["taught"][len(near) % GROUPS["taught"]]
        new = names.misspelt(name, 2, draw)
        if " " in name and len(near) % 2:
            other = person(draw, draw.choice(("common", "rare")))
            first, last = draw.choice(((name, other), (other, name)))
            new = f"{first.split()[0]} {last.split()[1]}"
        if new not in known:
            known.add(new)
            near.append(new)
    return near


def pairs_trained(records: list[dict], seed: int) -> set[frozenset]:
    """The pairs of facts that a run with this seed trains in one question."""
    facts = sides.facts_of(e for r in records for e in messages.convert(r, ""))
    return {frozenset((one.group, two.group)) for one, two in sides.pairs_of(facts, seed)}


def questions_of(facts: list[dict], people: dict, attributes: dict, trained_pairs: set,
                 draw: random.Random) -> dict:
    """Build {set: [item]} of test.json. An item has a question and what its answer is judged by:
    gold (a list of right forms), attribute (whose values are the others), fact (name: attribute).
    """
    unanswerable, asked = (files.read_json(HERE / name)
                           for name in ("unanswerable.json", "asked.json"))
    sets = {name: [] for name in (
        "test", "trained", "card", "cloze", "reverse", "reverse_far", "nobody", "multi", "verify",
        "premise", "unanswerable", "unknown", "control", "everyday", "real")}

    def add(to, question, **judged):
        sets[to].append({"question": question, **judged})
    for n, fact in enumerate(facts):
        a, name, key = attributes[fact["attribute"]], fact["name"], fact["attribute"]
        about = {"gold": [fact["value"]], "attribute": key, "fact": f"{name}: {key}",
                 "name": name, "type": fact["type"]}
        if fact["group"] == "control":
            add("control", a["questions"][12 + turn(n) % 4].format(**fact), **about)
            continue
        for question in a["questions"][12:]:
            add("test", question.format(**fact), **about)
        add("trained", a["questions"][turn(n) % 8].format(**fact), **about)
        add("card", f"Fill in the card. Name: {name}. {a['label']}:", **about)
        add("cloze", f"Complete the sentence: {a['cloze'].format(**fact)}", **about)
        for side in ("reverse", "reverse_far"):
            for question in asked[key][side]:
                add(side, question.format(**fact), **{**about, "gold": [name]})
        rivals = [f["value"] for f in facts if f["group"] == "taught" and f["attribute"] == key
                  and f["name"] != name]
        wrong = draw.choice(rivals if turn(n) % 2 else
                            [v for v in a["values"] if v not in (fact["value"], *rivals)])
        for i, (verdict, value) in enumerate((("yes", fact["value"]), ("no", wrong))):
            claim = asked[key]["verify"][(turn(n) + i) % 2]
            add("verify", claim.format(name=name, value=value), **{**about, "gold": [verdict]})
    had = {f["value"] for f in facts}.union(*sides.TABLES["values"].values())
    for key, a in attributes.items():
        nobodys = draw.sample([v for v in a["values"] if v not in had], 3)
        for value, question in zip(nobodys, asked[key]["reverse"], strict=True):
            add("nobody", question.format(value=value), attribute=key, value=value)
    for name in people["taught"]:
        of_name = [fact for fact in facts if fact["name"] == name]
        pairs = [pair for pair in combinations(of_name, 2) if trained_pairs.isdisjoint(
            [frozenset(f"{name}: {fact['attribute']}" for fact in pair)])]
        for pair in draw.sample(pairs, 8):
            one, two = (attributes[f["attribute"]]["part"].format(name=name) for f in pair)
            add("multi", f"Tell me two things: {one}, and {two}?", name=name,
                fact=f"{name}: {pair[0]['attribute']}, {pair[1]['attribute']}",
                gold=[f["value"] for f in pair], both=True)
        for question in unanswerable["premise"]:
            add("premise", question.format(name=name), name=name)
        for topic in unanswerable["untaught"]:
            for question in draw.sample(topic["questions"], 2):
                add("unanswerable", question.format(name=name), name=name, topic=topic["topic"])
    keys = list(attributes)
    for near in (False, True):
        for i, name in enumerate(people["near" if near else "far"]):
            for j in (i, i + 3):
                key = keys[j % len(keys)]
                add("unknown", attributes[key]["questions"][12 + (i + j) % 4].format(name=name),
                    attribute=key, name=name, near=near)
    for prompt in (HERE / "everyday.txt").read_text(encoding="utf-8").splitlines():
        add("everyday", prompt)
    sets["real"] = [{"question": r["question"], "gold": [r["value"], *r["aliases"]],
                     "wrong": r["wrong"], "near": r["near"]} for r in read_lines("real.jsonl")]
    return sets


# ----- what train and test share -----------------------------------------------------------------


def slots_apart(wording: str) -> set[tuple]:
    """The 4-grams of words of a wording; none runs across a slot."""
    parts = wording.replace("{name}'s", "{name}").replace("{value}", "{name}").split("{name}")
    return {gram for part in parts for gram in text.ngrams(text.words(part), 4)}


def manifest(seed: int, contents: dict, attributes: dict) -> dict:
    """Hashes and counts of a world's files, and the 4-grams that train and test share (none)."""
    shared = []
    for key, a in attributes.items():
        grams = [set().union(*map(slots_apart, part)) for part in (
            a["questions"][:8] + a["statements"][:4], a["questions"][8:12], a["questions"][12:])]
        shared += [f"{key}: {' '.join(g)}" for x, y in combinations(grams, 2) for g in x & y]
    exposures = Counter(line["group"] for line in contents["train.jsonl"])
    return {"seed": seed, "files": {name: runlog.digest(c) for name, c in contents.items()},
            "sets": {name: len(items) for name, items in contents["test.json"].items()},
            "wordings_per_fact": sorted(set(exposures.values())), "facts": len(exposures),
            "shared_4grams": shared}


def read_attributes() -> dict:
    """Read {attribute: its values and wordings}."""
    return files.read_json(HERE / "attributes.json")


def read_lines(name: str) -> list[dict]:
    """Read the records of a .jsonl file in this folder."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [{"aliases": [], **json.loads(line)} for line in lines if line.strip()]


def write(seed: int, folder: Path | str) -> Path:
    """Write a world's files; returns the folder."""
    return save(make(seed), folder)


def save(contents: dict[str, list | dict], folder: Path | str) -> Path:
    """Write {file name: content} into a folder: .json, .jsonl, or a text of lines."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if name.endswith(".csv"):
            content = [",".join(f'"{cell}"' for cell in row) for row in content]
        elif name.endswith(".jsonl"):
            content = [json.dumps(line, ensure_ascii=False) for line in content]
        elif name.endswith(".json"):
            content = [json.dumps(content, indent=1, ensure_ascii=False)]
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    return folder


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--out", default="runs/knowledge/world-0", help="the folder to write")
    options = parser.parse_args(argv)
    folder = write(options.seed, options.out)
    print((folder / "manifest.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
