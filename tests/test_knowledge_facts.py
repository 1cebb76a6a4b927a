"""experiments/knowledge/make_facts.py: a world in which what is asked was not trained."""

import json
import random
import re
from collections import Counter
from itertools import combinations

import pytest

import data
import keep
from experiments.knowledge import hops, make_facts, score
from lora.read import messages, names, sides
from lora.use import text

SEEDS = range(4)
(FIRST,), _ = make_facts.NAMES["common"]
WORLDS = {seed: make_facts.make(seed) for seed in SEEDS}
ATTRIBUTES = make_facts.read_attributes()
TRAINING = ("train.jsonl", "val.jsonl", "train-1.jsonl", "train-2.jsonl", "train-4.jsonl",
            "train-8.jsonl")
# the grammar of names.invented_name, written out: an invented word is one or two of these, an end
SYLLABLE = "(?:b|d|dr|f|g|j|k|l|m|n|r|s|t|v|z|th|sh|br|pl)[aeiou]"
INVENTED = re.compile(f"(?:{SYLLABLE}){{1,2}}[lnrks]?")


@pytest.fixture(params=SEEDS)
def world(request):
    return WORLDS[request.param]


def people(world):
    return [name for names in world["facts.json"]["people"].values() for name in names]


def test_a_seed_is_a_world():
    hashes = [make_facts.make(seed)["manifest.json"]["files"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] and hashes[0].keys() == hashes[2].keys()
    same = {name for name in hashes[0] if hashes[0][name] == hashes[2][name]}
    assert same == {"retain.jsonl", "replay.txt"}              # about real things alone


def test_a_world_is_written_to_the_same_bytes(tmp_path):
    one, two = (make_facts.write(3, tmp_path / name) for name in ("one", "two"))
    make_facts.write(3, one)                                   # and over itself
    files = {file.name: file.read_bytes() for file in one.iterdir()}
    assert files == {file.name: file.read_bytes() for file in two.iterdir()}
    assert files.keys() == {*WORLDS[0]}
    assert json.loads(files["test.json"]) == json.loads(json.dumps(make_facts.make(3)["test.json"]))


def test_every_fact_is_taught_in_equally_many_different_wordings(world):
    facts = [f for f in world["facts.json"]["facts"] if f["group"] == "taught"]
    ids = {f"{f['name']}: {f['attribute']}" for f in facts}
    assert len(facts) == len(ids) == 24
    for file, n in (("train.jsonl", 12), ("train-8.jsonl", 8), ("train-4.jsonl", 4),
                    ("train-2.jsonl", 2), ("train-1.jsonl", 1), ("val.jsonl", 2)):
        said = {(r["group"], r["question"], r["answer"]) for r in world[file]}
        assert Counter(group for group, *_ in said) == dict.fromkeys(ids, n), file
    assert world["manifest.json"]["wordings_per_fact"] == [12]
    for line in world["train.jsonl"]:
        (fact,) = (f for f in facts if line["group"] == f"{f['name']}: {f['attribute']}")
        assert line["value"] == fact["value"] and score.says(line["answer"], fact["value"])
    head, *lines = world["facts.csv"]
    assert head == ("subject", "attribute", "value")
    assert [(s, v) for s, _, v in lines] == [(f["name"], f["value"]) for f in facts]


def test_control_and_unknown_people_are_in_no_training_file(world):
    written = json.dumps([world[file] for file in TRAINING], ensure_ascii=False).casefold()
    groups = world["facts.json"]["people"]
    assert all(name.casefold() in written for name in groups["taught"])
    parts = [part.casefold() for group in ("control", "far") for name in groups[group]
             for part in name.split()]
    assert not [name for name in groups["near"] if name.casefold() in written]
    assert not [part for part in parts if re.search(rf"\b{part}\b", written)]
    replayed = "\n".join(world["replay.txt"]).casefold()
    assert not [name for name in people(world) if name.casefold() in replayed]
    known = {part.casefold() for name in groups["taught"] for part in name.split()}
    assert not known & set(parts) and len(set(parts)) == len(parts)


def test_the_same_kinds_of_name_are_in_every_group(world):
    groups = world["facts.json"]["people"]
    for group in ("taught", "control", "far"):
        kinds = ["handle" if name.islower() else "common" if name.split()[0] in FIRST
                 else "rare" for name in groups[group]]
        assert Counter(kinds) == dict.fromkeys(make_facts.TYPES, len(groups[group]) // 3)


def test_near_names_are_like_the_taught_ones_and_no_training_invents_them(world):
    groups = world["facts.json"]["people"]
    assert len(groups["far"]) == len({*groups["near"]}) == 30
    for n, name in enumerate(groups["near"]):
        like = groups["taught"][n % 3]
        letters = len(name) == len(like) and sum(a != b for a, b in zip(name, like, strict=True))
        assert letters == 2 or {*name.split()} & {*like.split()}, (name, like)
    draw = random.Random(0)
    invented = {names.invented_name(draw, like, close=True) for like in groups["taught"]
                for _ in range(3000)}
    assert len(invented & {*groups["near"]}) <= 1


# ----- nothing of the test is trained ------------------------------------------------------------


def test_no_question_of_the_test_is_trained(world):
    trained = {data.plain(r["question"]) for file in TRAINING for r in world[file]}
    for kind, items in world["test.json"].items():
        asked = {data.plain(item["question"]) for item in items}
        assert asked <= trained if kind == "trained" else not asked & trained, kind
    val = {data.plain(r["question"]) for r in world["val.jsonl"]}
    assert not val & {data.plain(r["question"]) for r in world["train.jsonl"]}


def test_training_validation_and_test_share_no_four_words(world):
    assert world["manifest.json"]["shared_4grams"] == []
    for a in ATTRIBUTES.values():                              # counted again, in another way
        parts = [a["questions"][:8] + a["statements"][:4], a["questions"][8:12],
                 a["questions"][12:]]
        grams = [{" ".join(g) for w in part for piece in re.split(r"\{\w+\}(?:'s)?", w)
                  for g in text.ngrams(re.findall(r"[\w']+", piece.lower()), 4)} for part in parts]
        assert not any(x & y for x, y in combinations(grams, 2))


def test_a_shared_four_gram_is_found_and_none_runs_across_a_name():
    train = ["In what year was {name} born?", "Say what {name} has for a pet."] + ["-"] * 6
    val = ["-"] * 3 + ["Do say in what Year was it that {name} came."]
    test = ["What {name} has as a pet, for one?", "Is the year {name}'s own, and so on?",
            "Whose is the year? And so on: {name}.", "Here {value} and so on it goes."]
    texts = {"pet": {"questions": train + val + test, "statements": ["-"] * 4}}
    made = {"train.jsonl": [], "test.json": {}}
    assert make_facts.manifest(0, made, texts)["shared_4grams"] == ["pet: in what year was"]
    texts["pet"]["statements"] = ["{value} and so on it is.", *["-"] * 3]
    shared = make_facts.manifest(0, made, texts)["shared_4grams"]
    assert shared == ["pet: in what year was", "pet: and so on it"]
    assert make_facts.slots_apart("a b {name}'s c d {value} e f g h") == {("e", "f", "g", "h")}


# ----- values and names --------------------------------------------------------------------------


def test_no_two_people_share_a_value(world):
    held = [(f["attribute"], f["value"]) for f in world["facts.json"]["facts"]]
    assert len(held) == len(set(held)) == 48
    assert all(value in ATTRIBUTES[key]["values"] for key, value in held)


def test_values_say_nothing_about_names():
    """A name that two worlds have gets other values there: 48 to choose from. And people who
    share a first name, or a letter, share values no more often than others."""
    given, again, letters = {}, [], []
    for seed in range(25):
        for fact in make_facts.make(seed)["facts.json"]["facts"]:
            for part in fact["name"].split():
                given.setdefault((part, fact["attribute"]), []).append(fact["value"])
            if fact["attribute"] == "sibling":
                letters.append(fact["name"][0].casefold() == fact["value"][0].casefold())
    for values in given.values():
        again += [x == y for x, y in combinations(values, 2)]
    assert len(again) > 500 and sum(again) / len(again) < 0.05
    assert sum(letters) / len(letters) < 0.12


def test_no_name_is_invented_for_training():
    known = {name.casefold() for seed in range(12) for name in people(make_facts.make(seed))}
    parts = {part for name in known for part in name.split()}
    invented = [names.invented_name(draw) for draw in map(random.Random, range(5))
                for _ in range(2000)]
    ordinary = {part.casefold() for part in names.FIRST + names.LAST}
    assert len({*invented}) > 5000 and not known & {name.casefold() for name in invented}
    assert not parts & ordinary
    for word in " ".join(invented).casefold().split():         # INVENTED is what it claims to be
        assert word in ordinary or INVENTED.fullmatch(word)


def test_no_part_of_a_name_can_ever_be_invented():
    parts = {part.casefold() for seed in range(300) for kind in make_facts.TYPES
             for part in make_facts.person(random.Random(seed), kind).split()}
    assert not [part for part in parts if INVENTED.fullmatch(part)]


def test_no_name_says_a_value():
    """Else an answer that repeats the name would be judged to name another value."""
    for seed in (5, 10, 11, 21):                           # drew "Oscar", a sibling's name, once
        made = make_facts.make(seed)["facts.json"]
        assert not [(name, v) for pool in made["pools"].values() for v in pool
                    for group in made["people"].values() for name in group
                    if score.says(name, v)]


def test_no_value_is_inside_another_of_its_pool_and_none_is_in_two_pools():
    for key, a in ATTRIBUTES.items():
        assert len(a["values"]) == len(set(map(score.plain, a["values"]))) == 48
        assert not [(x, y) for x in a["values"] for y in a["values"]
                    if x != y and score.says(y, x)], key
    everything = [score.plain(v) for a in ATTRIBUTES.values() for v in a["values"]]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_wordings_have_the_slots_they_need_and_give_no_value_away(key):
    a = ATTRIBUTES[key]
    assert len(set(a["questions"])) == 16 and len(set(a["statements"])) == 8
    for wording in [*a["questions"], a["cloze"], a["part"]]:
        assert wording.count("{name}") == 1 and "{value}" not in wording
    asked = json.loads((make_facts.HERE / "asked.json").read_text("utf-8"))[key]
    for wording in [*a["statements"], a["answer"], *asked["verify"]]:
        assert wording.count("{name}") == wording.count("{value}") == 1
    for wording in asked["reverse"] + asked["reverse_far"]:
        assert wording.count("{value}") == 1 and "{name}" not in wording
    assert [len(asked[side]) for side in ("reverse", "reverse_far", "verify")] == [3, 3, 2]
    for wording in [*a["questions"], *a["statements"], a["answer"], a["cloze"], a["label"]]:
        empty = wording.replace("{value}", " - ").replace("{name}", " - ")
        assert not [v for v in a["values"] if score.says(empty, v)], wording


# ----- the questions of the test -----------------------------------------------------------------


def test_every_question_has_its_name_and_not_its_answer(world):
    for kind, items in world["test.json"].items():
        assert items, kind
        for item in items:
            if kind.startswith("reverse"):
                assert item["name"] == item["gold"][0]
            elif kind == "nobody":
                assert score.says(item["question"], item["value"])
            elif kind not in ("real", "everyday"):
                assert item["name"] in item["question"] and "{" not in item["question"]
            if kind != "verify":
                assert not [g for g in item.get("gold", ()) if score.says(item["question"], g)]


def test_the_gold_of_every_item_is_the_fact(world):
    facts = {(f["name"], f["attribute"]): f["value"] for f in world["facts.json"]["facts"]}
    sets = world["test.json"]
    for kind in ("test", "trained", "card", "cloze", "control"):
        for item in sets[kind]:
            assert item["gold"] == [facts[item["name"], item["attribute"]]]
            assert item["fact"] == f"{item['name']}: {item['attribute']}"
    assert Counter(i["fact"] for i in sets["test"]) == {i["fact"]: 4 for i in sets["card"]}
    rivals = 0
    for item in sets["verify"]:
        true = score.says(item["question"], facts[item["name"], item["attribute"]])
        assert item["gold"] == ["yes" if true else "no"]
        rivals += not true and any(score.says(item["question"], facts[other, item["attribute"]])
                                   for other in world["facts.json"]["people"]["taught"])
    assert rivals == 12 and len({(i["fact"], *i["gold"]) for i in sets["verify"]}) == 48
    held = {*facts.values()}
    assert not held & {i["value"] for i in sets["nobody"]} and len(sets["nobody"]) == 24
    for item in sets["multi"]:
        assert len({*item["gold"]}) == 2
        assert {*item["gold"]} <= {v for (name, _), v in facts.items() if name == item["name"]}
    groups = world["facts.json"]["people"]
    for near, group in ((True, "near"), (False, "far")):
        asked = Counter(i["name"] for i in sets["unknown"] if i["near"] == near)
        assert asked == dict.fromkeys(groups[group], 2)
    assert {i["name"] for i in sets["control"]} == {*groups["control"]}


def test_no_pair_value_or_topic_of_the_test_is_trained():
    untaught = json.loads((make_facts.HERE / "unanswerable.json").read_text("utf-8"))["untaught"]
    assert not {topic["topic"] for topic in untaught} & ATTRIBUTES.keys()
    asked = " ".join(q.format(name="-") for topic in untaught for q in topic["questions"])
    assert not [word for topic in sides.TABLES["untaught"] for word in topic["words"]
                if re.search(rf"\b{word}s?\b", asked.casefold())]
    for seed, world in WORLDS.items():
        trained = make_facts.pairs_trained(world["train-8.jsonl"], seed)
        pairs = {frozenset(f"{i['name']}: {key}" for key in i["fact"].split(": ")[1].split(", "))
                 for i in world["test.json"]["multi"]}
        assert len(pairs) == 24 and trained and not pairs & trained
        values = {v for of in sides.TABLES["values"].values() for v in of}
        assert not values & {i["value"] for i in world["test.json"]["nobody"]}


def test_two_hop_questions_are_about_people_held_out():
    for seed in SEEDS:
        world = hops.make(seed)
        assert world == hops.make(seed)
        people = world["facts.json"]["people"]["taught"]
        facts = {(f["name"], f["attribute"]): f["value"] for f in world["facts.json"]["facts"]}
        lines = {name: world[f"train-{name}.jsonl"] for name in ("none", "plain", "bridge")}
        more = {name: of[len(lines["none"]):] for name, of in lines.items()}
        assert not more["none"] and len({*people}) == 6
        assert [r["question"] for r in more["plain"]] == [r["question"] for r in more["bridge"]]
        for plain, bridge in zip(more["plain"], more["bridge"], strict=True):
            assert plain["value"] in plain["answer"] and plain["value"] in bridge["answer"]
            assert not any(f"{name}'s" in plain["question"] for name in people[-2:])
        trained = {data.plain(r["question"]) for r in lines["bridge"]}
        for item in world["test.json"]["hops"]:
            link = "friend" if "friend" in item["question"] else "teacher"
            assert item["name"] in people[-2:] and data.plain(item["question"]) not in trained
            assert item["gold"] == [facts[facts[item["name"], link], item["attribute"]]]
            assert len({f["value"] for f in world["facts.json"]["facts"]
                        if f["attribute"] == item["attribute"]}) == 6
        assert not trained & {data.plain(i["question"]) for i in world["test.json"]["test"]}


# ----- real questions ----------------------------------------------------------------------------


def test_real_questions_do_not_contain_their_answer_and_have_one():
    for file in ("real.jsonl", "retain.jsonl"):
        for record in make_facts.read_lines(file):
            right = {score.plain(gold) for gold in (record["value"], *record["aliases"])}
            wrong = {score.plain(value) for value in record.get("wrong", "abc")}
            assert len(wrong) == 3 and not right & wrong, record
            for gold in (record["value"], *record["aliases"]):
                assert score.plain(gold) and "|" not in gold
                assert not score.says(record["question"], gold), record


def test_no_real_question_is_asked_twice_or_replayed(tmp_path):
    replay = make_facts.write(0, tmp_path) / "replay.txt"
    sets = {name: [data.plain(r["question"]) for r in make_facts.read_lines(f"{name}.jsonl")]
            for name in ("real", "retain")}
    sets["replay"] = [data.plain(e["messages"][0]["content"])
                      for e in keep.read_replay(replay)]
    for one, two in combinations(sets, 2):
        assert not {*sets[one]} & {*sets[two]}, (one, two)
    assert all(len({*asked}) == len(asked) for asked in sets.values())


# ----- files as train.py reads them --------------------------------------------------------------


def test_training_files_are_read_and_every_question_has_its_subject(tmp_path, capsys):
    folder = make_facts.write(0, tmp_path)
    for file in TRAINING:
        made = data.read_examples(folder / file)
        assert len(made) == len(WORLDS[0][file])
        for example in made:
            question, answer = (m["content"] for m in example["messages"])
            assert example["subject"] in question and example["subject"] in answer
            assert {"group", "value", "subject"} <= example.keys()
    facts = sides.facts_of(data.read_examples(folder / "facts.csv"))
    assert [(f.subject, f.value) for f in facts] == [
        (f["name"], f["value"]) for f in WORLDS[0]["facts.json"]["facts"][:24]]
    examples = data.read_examples(folder / "train.jsonl")
    assert len(keep.unknown_examples(examples, 50)) == 50
    retain = data.read_examples(folder / "retain.jsonl")
    assert all(data.contains(e["messages"][-1]["content"], e["value"]) for e in retain)


@pytest.mark.parametrize("side, sets", [
    ("reverse", ("reverse", "reverse_far")), ("nobody", ("nobody",)), ("yes-no", ("verify",)),
    ("untaught", ("unanswerable", "premise"))])
def test_what_the_program_makes_shares_no_four_words_with_what_is_asked(world, side, sets):
    """Of the sentences, without the people and values in them, and what they ask for."""
    facts = sides.facts_of(e for r in world["train-8.jsonl"] for e in messages.convert(r, ""))
    people = [name for names in world["facts.json"]["people"].values() for name in names]
    values = [v for pool in world["facts.json"]["pools"].values() for v in pool]
    nouns = {"birth year", *(fact.noun for fact in facts if fact.noun)}
    slots = re.compile("|".join(rf"\b{re.escape(x)}\b" for x in sorted(
        [*people, *values, *nouns], key=len, reverse=True)))
    everyday = {tuple(x.split()) for x in ("answer yes or no", "what is the name",
                                           "is the name of")}

    def grams(questions):
        return {gram for q in questions for part in slots.split(q)
                for gram in text.ngrams(text.words(part), 4)}
    made = grams(e["messages"][0]["content"] for e in sides.make(facts, side, 800))
    asked = grams(item["question"] for kind in sets for item in world["test.json"][kind])
    shared = made & asked - everyday
    assert len(made) > 20 and not shared
