"""
Write a small world in which facts link people, for questions that take two facts: "Where was Ian
Kendall's best friend born?"

    python -m experiments.knowledge.hops --seed 0 --out runs/knowledge/hops-0

Six people have a best friend and a teacher among the six, and four facts more. Every fact is taught
alone. Questions over two facts are taught about four of them, in one of three files, and asked
about the other two:

    train-none.jsonl      the facts alone
    train-plain.jsonl     and two-hop questions, with the last value in the answer
    train-bridge.jsonl    the same questions; the answer says both facts (Balesni et al. 2024,
                          arXiv:2411.16353: without the bridge, separate facts stay at chance)
"""

import random
import sys
from pathlib import Path

from experiments.knowledge.make_facts import HERE, TYPES, person, read_attributes, record, save
from lora import files
from lora.run import cli

KEYS = ("birthplace", "instrument", "pet", "dish")
PEOPLE, HELD_OUT = 6, 2                # held out: nobody asks a two-hop question about them


def make(seed: int) -> dict[str, list | dict]:
    """Build the files of a world of linked people: {file name: records, or an object}."""
    draw, attributes = random.Random(f"{seed} hops"), read_attributes()
    links, people = files.read_json(HERE / "hops.json"), []
    while len(people) < PEOPLE:
        name = person(draw, TYPES[len(people) % len(TYPES)])
        people += [name] if name not in people else []
    facts = [{"name": name, "attribute": key, "value": value, "group": "taught",
              "type": TYPES[i % len(TYPES)]}
             for key in KEYS for i, (name, value) in enumerate(
                 zip(people, draw.sample(attributes[key]["values"], PEOPLE), strict=True))]
    circles = [draw.sample(people, PEOPLE) for _ in links]     # each is the next one's
    linked = [{"name": one, "attribute": link, "value": other, "group": "taught", "type": None}
              for link, circle in zip(links, circles, strict=True)
              for one, other in zip(circle, circle[1:] + circle[:1], strict=True)]
    texts, taught = {**attributes, **links}, [*facts, *linked]
    direct = [record(f, texts[f["attribute"]], q) for f in taught
              for q in texts[f["attribute"]]["questions"][:8]]
    hops, sets = {"plain": [], "bridge": []}, {"test": [], "hops": []}
    for f in taught:
        sets["test"] += [{"question": q.format(**f), "gold": [f["value"]], "name": f["name"],
                          "attribute": f["attribute"], "fact": f"{f['name']}: {f['attribute']}"}
                         for q in texts[f["attribute"]]["questions"][-2:]]
    for link in linked:
        for f in (f for f in facts if f["name"] == link["value"]):
            a = attributes[f["attribute"]]
            phrase = links[link["attribute"]]["phrase"].format(**link)
            if link["name"] in people[-HELD_OUT:]:
                sets["hops"] += [{"question": q.format(name=phrase), "gold": [f["value"]],
                                  "attribute": f["attribute"], "name": link["name"],
                                  "fact": f"{phrase}: {f['attribute']}"}
                                 for q in a["questions"][-2:]]
                continue
            last = a["answer"].format(name=phrase, value=f["value"])
            first = links[link["attribute"]]["answer"].format(**link)
            bridge = f"{first} {a['answer'].format(**f)}"
            for name, answer in (("plain", last), ("bridge", bridge)):
                hops[name] += [{"question": q.format(name=phrase), "answer": answer,
                                "value": f["value"], "group": f"{phrase}: {f['attribute']}"}
                               for q in a["questions"][:4]]
    return {"train-none.jsonl": direct,
            **{f"train-{name}.jsonl": direct + more for name, more in hops.items()},
            "val.jsonl": [record(f, texts[f["attribute"]], texts[f["attribute"]]["questions"][8])
                          for f in taught],
            "test.json": sets,
            "facts.json": {"facts": taught, "people": {"taught": people}, "pools": {
                key: attributes[key]["values"] if key in KEYS else people
                for key in (*KEYS, *links)}}}


def write(seed: int, folder: Path | str) -> Path:
    """Write a world's files; returns the folder."""
    return save(make(seed), folder)


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--out", default="runs/knowledge/hops-0", help="the folder to write")
    options = parser.parse_args(argv)
    print(f"hops: {write(options.seed, options.out)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
