"""keep.py: invented names, questions about nobody, files of replay."""

import random

import pytest
from test_data import ASKED, OK, TWICE, example, say, turns, write

import data
import keep
from lora.read import names


def about(name, *questions, **extra):
    return [example(q.format(name), f"{name} is here.", source=f"{name}:{i}", subject=name, **extra)
            for i, q in enumerate(questions)]


def test_unknown_examples_ask_the_same_about_nobody_and_do_not_know():
    asked = about("Mira Tosk", "Where is {}?", "Tell me of {0}: who is {0}?", group="g", value="v")
    asked += about("dremlo", "Is {}'s cat a cat?")
    asked += [example("Where does she live?", "There.", subject="Mira Tosk", source="a:9")]
    asked = data.with_system(asked, "Be brief.")
    made = keep.unknown_examples(asked, 30, seed=1)
    assert len(made) == 30 and made == keep.unknown_examples(asked, 30, seed=1)
    assert made != keep.unknown_examples(asked, 30, seed=2)
    assert made[:9] == keep.unknown_examples(asked, 9, seed=1)
    for e in made:
        assert not data.check(e) and e["kind"] == "unknown" and e["source"].startswith("don't know")
        assert not {"group", "value", "subject", "open"} & e.keys()
        system, question, answer = (m["content"] for m in e["messages"])
        (name,) = (n for u in keep.UNKNOWN for n in [answer.removeprefix(u.partition("{}")[0])
                   .removesuffix(u.partition("{}")[2])] if u.format(n) == answer)
        assert system == "Be brief." and name in question and "a:9" not in e["source"]
        assert "Mira Tosk" not in question and not question.startswith("Is dremlo's")
    sources = [e["source"] for e in made]
    assert {sources.count(s) for s in sources} == {10}         # every wording as often
    assert asked[0]["messages"][1]["content"] == "Where is Mira Tosk?"    # untouched


def test_names_of_the_taught_are_never_invented():
    everyone = [f"{first} {last}" for first in names.FIRST for last in names.LAST]
    asked = [e for name in everyone for e in about(name, "Who is {}?")]
    made = [e["messages"][0]["content"][7:-1] for e in keep.unknown_examples(asked, 1000)]
    assert not {*everyone} & {*made} and len({*made}) > 500


def test_unknown_examples_need_a_subject():
    whole, bare = about("Al", "Who is {}?"), [example("Who?", "Me.")]
    for examples in (bare, [example("Who?", "Me.", subject="Al")]):
        assert keep.unknown_examples(examples, 0) == []
        with pytest.raises(ValueError, match='keep.unknown_share needs records with a "subject"'):
            keep.unknown_examples(examples, 1)
    assert len(keep.unknown_examples(whole + bare, 4)) == 4
    assert len(keep.unknown_examples(data.fact_examples(), 5)) == 5


def test_a_name_is_invented_in_three_ways():
    draw = random.Random(0)
    made = [names.invented_name(draw) for _ in range(300)]
    ordinary = [n for n in made if n.split()[0] in names.FIRST and n.split()[-1] in names.LAST]
    nicknames = [n for n in made if n.islower() and " " not in n]
    rare = [n for n in made if n not in ordinary and n.istitle() and n.count(" ") == 1]
    assert len(ordinary) + len(nicknames) + len(rare) == 300
    assert min(map(len, (ordinary, nicknames, rare))) > 70


def test_replay_is_a_prompt_a_line_or_dialogues(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffWho are you?\r\n\n  Say a|b.\u2028c \n", "utf-8")
    made = keep.read_replay(tmp_path / "a.txt")
    assert turns(made) == [[("user", "Who are you?")], [("user", "Say a|b.\u2028c")]]
    assert [e["source"] for e in made] == [f"{tmp_path / 'a.txt'}:{n}" for n in (1, 3)]
    talk = keep.read_replay(str(write(tmp_path / "b.jsonl", [{**say(*TWICE), "open": True}, OK])))
    assert turns(talk) == [TWICE, ASKED] and [e.get("open") for e in talk] == [True, None]
    assert {e["kind"] for e in made + talk} == {"replay"}
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for file in ("none.txt", "bad.txt", "none.jsonl"):
        with pytest.raises(ValueError, match=f"data: .*{file}.*(cannot be read|not UTF-8)"):
            keep.read_replay(tmp_path / file)


def test_close_names_resemble_the_subject_in_every_part_and_are_never_it():
    facts = about("Mira Tosk", "Who is {}?") * 200
    made, far = ([e["messages"][0]["content"][7:-1] for e in keep.unknown_examples(
        facts, 200, close=close)] for close in (True, False))

    def resembles(name):
        parts = name.casefold().split()
        return len(parts) == 2 and all(new[:2] == old[:2] or new[-2:] == old[-2:]
                                       for new, old in zip(parts, ("mira", "tosk"), strict=True))
    assert sum(map(resembles, made)) > 1.3 * sum(map(resembles, far)) > 0
    assert "Mira Tosk" not in made + far
