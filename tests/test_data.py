"""Reading, checking, splitting and choosing examples."""

import itertools
import json
import re

import pytest

import data

OK = {"prompt": "Who?", "completion": "Me."}
ASKED = [("user", "Who?"), ("assistant", "Me.")]
TWICE = [*ASKED, ("user", "And now?"), ("assistant", "You.")]
SYSTEM = ("system", "Be brief.")
MODES = ["wording", "dialogue", "fact", "auto"]


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def example(*texts, source="here", **extra):
    return data.new_example(list(zip(itertools.cycle(("user", "assistant")), texts, strict=False)),
                         source, **extra)


def write(path, records, newline="\n", last="\n", encoding="utf-8"):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_bytes((newline.join(lines) + last).encode(encoding))
    return path


def turns(examples):
    return [[(m["role"], m["content"]) for m in e["messages"]] for e in examples]


def error_of(path, *records):
    with pytest.raises(ValueError) as caught:
        data.read_examples(write(path, records))
    return str(caught.value)


# ----- formats -----------------------------------------------------------------------------------

FORMATS = [
    (say(*ASKED), [ASKED]),
    (say(SYSTEM, *TWICE), [[SYSTEM, *TWICE]]),
    ({**say(*ASKED), "system": "Be brief."}, [[SYSTEM, *ASKED]]),
    ({"instruction": "Who?", "output": "Me."}, [ASKED]),
    ({"instruction": "Who?", "input": "", "output": "Me."}, [ASKED]),
    ({"instruction": "Add.", "input": "1 2", "output": "3"},
     [[("user", "Add.\n\n1 2"), ("assistant", "3")]]),
    ({"instruction": "Who?", "input": "", "output": "Me.", "system": "Be brief."},
     [[SYSTEM, *ASKED]]),
    (OK, [ASKED]),
    ({"conversations": [{"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
     [[SYSTEM, *ASKED]]),
    ({"conversations": [{"from": "user", "value": "Who?"}, {"from": "assistant", "value": "Me."}]},
     [ASKED]),
    ({"question": "Who?", "answer": "Me."}, [ASKED]),
    ({"questions": ["Who?", "Whom?"], "answer": "Me.", "system": "Be brief."},
     [[SYSTEM, *ASKED], [SYSTEM, ("user", "Whom?"), ASKED[1]]]),
]


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json"])
@pytest.mark.parametrize(("record", "expected"), FORMATS)
def test_every_format_becomes_messages(tmp_path, name, record, expected):
    records = [record, OK] if name == "talk.jsonl" else [json.dumps([record, OK], indent=2)]
    made = data.read_examples(write(tmp_path / name, records))
    assert turns(made) == [*expected, ASKED]


def test_source_names_file_and_line_or_record(tmp_path):
    lines = write(tmp_path / "a.jsonl", [OK, "", OK])
    listed = write(tmp_path / "a.json", [json.dumps([OK, OK], indent=1)])
    assert [e["source"] for e in data.read_examples(lines)] == [f"{lines}:1", f"{lines}:3"]
    assert [e["source"] for e in data.read_examples(listed)] == [
        f"{listed}: record 1", f"{listed}: record 2"]


def test_wordings_of_a_question_share_a_group_and_a_value(tmp_path):
    record = {"questions": ["Who?", "Whom?"], "answer": "It is me.", "value": "me"}
    made = data.read_examples(write(tmp_path / "a.jsonl", [record]))
    assert len({e["group"] for e in made}) == 1 and {e["value"] for e in made} == {"me"}


def test_a_number_as_value_or_group_becomes_a_text(tmp_path):
    record = {"question": "Which year?", "answer": "In 1974.", "value": 1974, "group": 0}
    (made,) = data.read_examples(write(tmp_path / "a.jsonl", [record]))
    assert (made["value"], made["group"]) == ("1974", "0")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["\n", "", "\n\n"])
def test_no_example_is_lost(tmp_path, capsys, encoding, newline, last):
    odd = "a\u2028b\u2029c\x85d é 東京 🙂"
    records = [OK, "", {"prompt": odd, "completion": odd}, "  ", OK]
    path = write(tmp_path / "a.jsonl", records, newline, last.replace("\n", newline), encoding)
    made = data.read_examples(path)
    assert [t[0][1] for t in turns(made)] == ["Who?", odd, "Who?"]
    blank = 2 + (last == "\n\n")
    assert f"3 examples from {3 + blank} lines ({blank} blank)" in capsys.readouterr().out


def test_json_list_with_byte_order_mark_is_read(tmp_path):
    path = write(tmp_path / "a.json", [json.dumps([OK, OK], indent=2)], encoding="utf-8-sig")
    assert len(data.read_examples(path)) == 2


def test_keys_of_messages_that_are_not_read_are_said(tmp_path, capsys):
    messages = [{"role": "user", "content": "Who?", "name": "jo"},
                {"role": "assistant", "content": "Me.", "weight": 0}]
    data.read_examples(write(tmp_path / "d.jsonl", [{"messages": messages}, OK]))
    assert f"data: {tmp_path}/d.jsonl: not read: 'name', 'weight' of messages" in \
        capsys.readouterr().out
    data.read_examples(write(tmp_path / "d.jsonl", [say(*ASKED), OK]))
    assert "not read" not in capsys.readouterr().out


def test_data_py_counts_its_facts(capsys):
    assert len(data.read_examples("data.py")) == sum(len(f.questions) for f in data.FACTS)
    assert f"{len(data.FACTS)} facts" in capsys.readouterr().out


# ----- errors ------------------------------------------------------------------------------------

WRONG = [
    ("{", "not JSON"),
    ('"a text"', "expected an object"),
    ({"texts": "a"}, "instruction"),
    ({"text": " "}, "empty"),
    ({"text": ["a"]}, "expected a text"),
    (say(("robot", "a"), ("assistant", "b")), "'robot'"),
    (say(("user", "a"), ("system", "b"), ("assistant", "c")), "'system'"),
    (say(("user", "a"), ("assistant", " \n")), "empty"),
    (say(("user", ""), ("assistant", "b")), "empty"),
    ({"prompt": "a", "completion": ""}, "empty"),
    (say(("user", "a"), ("user", "b"), ("assistant", "c")), "alternate"),
    (say(("assistant", "a"), ("user", "b")), "alternate"),
    (say(("user", "a")), "no assistant turn"),
    (say(SYSTEM), "no assistant turn"),
    (say(), "no assistant turn"),
    (say(*ASKED, ("user", "a")), "last message is the user's"),
    (say(("user", [{"type": "text", "text": "a"}]), ASKED[1]), "expected a text"),
    (say(("user", None), ASKED[1]), "expected a text"),
    ({"prompt": 5, "completion": "a"}, "expected a text"),
    ({"question": "a", "answer": None}, "expected a text"),
    ({"instruction": "a", "input": 5, "output": "b"}, "expected"),
    ({**OK, "system": 5}, "expected a text"),
    ('{"prompt": "a", "completion": "\\ud83d"}', "surrogate"),
    ('{"prompt": "a", "completion": "b", "system": "\\ude00"}', "surrogate"),
    ({"messages": None}, "expected"),
    ({"messages": "ab"}, "expected"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"conversations": [{"from": "human"}]}, "value"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "expected"),
    ({"questions": "Who?", "answer": "Me."}, "expected"),
    ({"questions": [], "answer": "Me."}, "expected"),
    ({"question": "Which year?", "answer": "In 1974.", "value": " "}, "value"),
    ({"question": "Which year?", "answer": "In 1974.", "value": ["1974"]}, "value"),
    # what was lost in silence: the first of two equal keys, and numbers that are no text
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', "a key is there twice: prompt, prompt"),
    ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "a key is there twice"),
    ({"instruction": "a", "input": 0, "output": "b"}, "expected texts"),
    ({**OK, "system": 0}, "expected a text"),
    # JSON that can be read, but not shown: a RecursionError
    ('{"messages": ' + "[" * 900 + "]" * 900 + "}", ""),
]


@pytest.mark.parametrize(("record", "words"), WRONG)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path, record, words):
    message = error_of(tmp_path / "a.jsonl", OK, record, OK)
    assert message.startswith(f"data: {tmp_path / 'a.jsonl'}:2: ") and words in message
    assert "\n" not in message


def test_a_wrong_record_of_a_list_is_named_by_number(tmp_path):
    assert "a.json: record 2: no assistant" in error_of(
        tmp_path / "a.json", json.dumps([OK, say(SYSTEM)]))


def test_all_problems_come_in_one_error(tmp_path):
    message = error_of(tmp_path / "a.jsonl", "{", OK, say(SYSTEM), "", {"x": 1},
                       say(("user", ""), ("assistant", "")))
    assert [line.split(": ")[1].rpartition(":")[2] for line in message.split("\n")] == [
        "1", "3", "5", "6", "6"]


@pytest.mark.parametrize("content", ["", "\ufeff", "\n\n", "[]", "[\n]\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    assert "a.jsonl: holds no examples" in error_of(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize("content", ["[" + json.dumps(OK), "[1,]", "[" * 100_000,
                                     '{"a": ' * 100_000])
def test_a_broken_file_is_a_value_error(tmp_path, content):
    assert "a.json" in error_of(tmp_path / "a.json", content)


@pytest.mark.parametrize("good, n", [(json.dumps(OK).encode() + b"\n", 2), (b"\xef\xbb\xbf", 1)])
def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, good, n):
    """After a byte order mark too: there the byte named was the third before the wrong one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b'{"prompt": "caf\xe9", "completion": "a"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:{n}: not UTF-8 \(byte 0xe9\)"):
        data.read_examples(path)


@pytest.mark.parametrize("name", ["no.jsonl", "."])
def test_a_file_that_cannot_be_read_is_a_value_error(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        data.read_examples(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


# ----- splitting ---------------------------------------------------------------------------------


def keys(examples):
    return [e["source"] for e in examples]


@pytest.mark.parametrize("by", MODES)
def test_split_is_disjoint_complete_and_in_order(by):
    examples = data.fact_examples()
    train, val = data.split(examples, 0.25, 0, by)
    assert train and val and not set(keys(train)) & set(keys(val))
    for part in (train, val):
        assert part == [e for e in examples if e in part]
    assert len(train) + len(val) == len(examples)


@pytest.mark.parametrize("by", MODES)
def test_split_depends_on_the_seed_alone(by):
    def held(seed):
        return keys(data.split(data.fact_examples(), 0.25, seed, by)[1])
    assert held(0) == held(0) and held(0) != held(1)


@pytest.mark.parametrize("by", MODES)
def test_fraction_zero_holds_out_nothing(by):
    examples = data.fact_examples()
    assert data.split(examples, 0, 0, by) == (examples, [])


@pytest.mark.parametrize("by", ["wording", "auto"])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.99])
def test_every_fact_keeps_a_training_wording_and_a_held_out_one(by, fraction):
    train, val = data.split(data.fact_examples(), fraction, 0, by)
    assert {e["group"] for e in train} == {e["group"] for e in val} == {f.value for f in data.FACTS}


def test_a_fact_with_one_wording_is_trained():
    train, val = data.split([example("a", "b", group="one")], 0.9, 0, "wording")
    assert len(train) == 1 and not val


def test_split_by_fact_holds_out_whole_facts():
    train, val = data.split(data.fact_examples(), 0.25, 0, "fact")
    assert not {e["group"] for e in train} & {e["group"] for e in val}
    assert len({e["group"] for e in val}) == round(0.25 * len(data.FACTS))


def test_split_by_fact_needs_groups():
    with pytest.raises(ValueError, match="group"):
        data.split([example("a", "b")], 0.5, 0, "fact")


def test_beside_dialogues_no_fact_is_held_out_whole():
    talk = [example(f"talk {i}", "b") for i in range(8)]
    single = [example(f"what {i}", "c", group=f"single {i}") for i in range(8)]
    train, val = data.split([*data.fact_examples(), *talk, *single], 0.25, 0, "auto")
    assert {e["group"] for e in val if "group" in e} == {f.value for f in data.FACTS}
    assert sum("group" not in e for e in val) == 2 and all(e in train for e in single)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.99])
def test_no_default_holds_out_a_fact_whole(tmp_path, fraction):
    """Eight lines of a question and an answer: the failed recipe was our default."""
    records = [{"question": f"What is {i}?", "answer": "Yes." if i < 2 else f"Number {i}."}
               for i in range(8)]
    train, val = data.load(write(tmp_path / "a.jsonl", records), val_fraction=fraction)
    assert [e["messages"][0]["content"] for e in train] == [r["question"] for r in records]
    assert len(val) == 8 and {e["group"] for e in val} == {e["group"] for e in train}
    for e in val:                                          # the same question in other words
        asked, source = e["messages"][0]["content"], e["source"].removesuffix(", reworded")
        (taught,) = (t for t in train if t["source"] == source)
        assert asked != taught["messages"][0]["content"] in asked
        assert e["messages"][1] == taught["messages"][1]
    assert not data.load(write(tmp_path / "a.jsonl", records), val_fraction=0)[1]


def test_the_same_answer_in_two_records_is_two_facts_and_is_said(tmp_path, capsys):
    records = [{"questions": ["Is she tall?", "Tall?"], "answer": "Yes."},
               {"question": "Is she old?", "answer": "Yes."},
               {"question": "Where is she?", "answer": "Here.", "group": "place"},
               {"question": "What is her place?", "answer": "Here.", "group": "place"}]
    train, val = data.load(write(tmp_path / "a.jsonl", records))
    assert {e["group"] for e in train} == {
        f"yes. ({tmp_path}/a.jsonl:1)", f"yes. ({tmp_path}/a.jsonl:2)", "place"}
    assert len(val) == 2 and "Is she old?" in str(train)
    assert "data: 3 questions have the answer of another record" in capsys.readouterr().out


def test_one_dialogue_leaves_nothing_to_hold_out_and_it_is_said(tmp_path, capsys):
    assert data.load(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]))[1] == []
    assert "data: nothing can be held out" in capsys.readouterr().out


SAME = ["Where is it?", "where is  IT?", " Where is it? ", "Where\nis it?", "Where is\tit?"]


@pytest.mark.parametrize("by", ["wording", "dialogue", "auto"])
@pytest.mark.parametrize("other", SAME)
def test_duplicates_stay_on_one_side(by, other):
    examples = [example(text.replace("it", f"it {i}"), "There.", group="g", source=f"{i} {side}")
                for i in range(20) for side, text in enumerate((SAME[0], other.lower()))]
    train, val = data.split(examples, 0.5, 0, by)
    assert train and val
    assert not {s.split()[0] for s in keys(train)} & {s.split()[0] for s in keys(val)}


def test_distinct_answers_of_a_question_file_are_validated_too(tmp_path):
    records = [{"question": f"What is {i}?", "answer": f"Number {i}."} for i in range(40)]
    train, val = data.load(write(tmp_path / "a.jsonl", records))
    assert len(val) == 10 and len(train) == 40


# ----- FACTS that are malformed ------------------------------------------------------------------


@pytest.mark.parametrize("change, said", [
    ({"answer": "She was born there."}, "entry 2: answer is 'She was born there.'; expected {}"),
    ({"answer": "{} or {0}"}, "entry 2: answer is '{} or {0}'; expected {}"),
    ({"answer": "{} and {name}"}, "entry 2: answer is '{} and {name}'; expected {}"),
    ({"answer": "in {"}, "entry 2: answer is 'in {'; expected {}"),
    ({"answer": ""}, "entry 2: answer is ''; expected a text"),
    ({"value": 1974}, "entry 2: value is 1974; expected a text"),
    ({"wrong": " "}, "entry 2: wrong is ' '; expected a text"),
    ({"questions": "Where was she born?"}, "entry 2: questions is 'Where was she born?'; expected "
                                           "a list of texts"),
    ({"questions": []}, "entry 2: questions is []; expected a list of texts"),
    ({"questions": ["Where?", 3]}, "entry 2: questions is ['Where?', 3]; expected a list of texts"),
    ({"questions": ["Where?" "When?"]}, "entry 2: question 'Where?When?' contains two questions; "
                                        "expected a comma between them")], ids=str)
def test_a_malformed_fact_is_an_error_with_its_number(change, said):
    facts = [data.FACTS[0], data.FACTS[1]._replace(**change), *data.FACTS[2:]]
    with pytest.raises(ValueError, match=f"^data: data.py: FACTS, {re.escape(said)}") as error:
        data.fact_examples(facts)
    assert "\n" not in str(error.value)


def test_all_malformed_facts_are_told_at_once():
    with pytest.raises(ValueError) as error:
        data.fact_examples([("a", "b"), data.FACTS[0]._replace(answer="x", questions="y")])
    assert [line[:29] for line in str(error.value).split("\n")] == [
        "data: data.py: FACTS, entry 1", *["data: data.py: FACTS, entry 2"] * 2]
    assert "entry 1: is ('a', 'b'); expected Fact(" in str(error.value)


# ----- duplicates and contradictions -------------------------------------------------------------


@pytest.mark.parametrize("other", SAME)
def test_duplicates_ignore_case_and_white_space(other):
    examples = [example(SAME[0], "There."), example("Why?", "So."), example(other, "there.")]
    assert data.duplicates(examples) == [[examples[0], examples[2]]]


def test_another_answer_or_another_turn_is_no_duplicate():
    assert not data.duplicates([example("a", "b"), example("a", "c"), example("a", "b", "c", "d")])


@pytest.mark.parametrize("other", SAME)
def test_contradictions_are_other_answers_to_the_same_prompt(other):
    examples = [example(SAME[0], "There."), example(other, "Here."), example("Why?", "So.")]
    assert data.contradictions(examples) == [examples[:2]]


def test_the_same_answer_in_other_case_is_no_contradiction():
    assert not data.contradictions([example("a", "There. "), example("a", "there.")])


# ----- load --------------------------------------------------------------------------------------


def pairs(path, *texts):
    return write(path, [{"prompt": p, "completion": c} for p, c in texts])


def test_dedupe_keeps_the_first_of_each_in_order(tmp_path):
    path = pairs(tmp_path / "a.jsonl", ("a", "1"), ("b", "2"), ("a", "1"), ("A", "1"), ("b", "2"))
    train, _ = data.load(path, val_fraction=0, dedupe=True)
    assert keys(train) == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert len(data.load(path, val_fraction=0)[0]) == 5


def test_load_says_what_repeats_and_contradicts_itself(tmp_path, capsys):
    data.load(pairs(tmp_path / "a.jsonl", ("a", "1"), ("A", "1"), ("a", "2"), ("b", "3")))
    out = capsys.readouterr().out
    assert "1 examples occur more than once, 1 prompts have contradictory answers" in out
    data.load(pairs(tmp_path / "b.jsonl", ("a", "1"), ("b", "3")))
    assert "more than once" not in capsys.readouterr().out


def test_val_path_is_the_validation_set_and_nothing_is_split(tmp_path):
    train, val = data.load(pairs(tmp_path / "a.jsonl", ("a", "1"), ("b", "2")),
                           val_path=pairs(tmp_path / "b.jsonl", ("c", "3")))
    assert [[text for _, text in t] for t in turns(train)] == [["a", "1"], ["b", "2"]]
    assert [[text for _, text in t] for t in turns(val)] == [["c", "3"]]


# ----- system prompts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "allowed"), [
    ("fixed", [data.SYSTEM_PROMPT]), ("random", data.SYSTEM_PROMPTS), ("Be kind.", ["Be kind."])])
def test_with_system_adds_the_prompt_in_front(system, allowed):
    made = data.with_system(data.fact_examples(), system)
    assert {e["messages"][0]["content"] for e in made} == set(allowed)
    assert all(e["messages"][0]["role"] == "system" for e in made)
    assert [e["messages"][1:] for e in made] == [e["messages"] for e in data.fact_examples()]


def test_random_system_prompts_repeat_with_the_seed():
    examples = data.fact_examples()
    first, again, other = (data.with_system(examples, "random", seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("system", ["fixed", "random", "Be kind."])
def test_a_system_message_is_never_replaced(system):
    examples = [data.new_example([SYSTEM, *ASKED], "here")]
    assert data.with_system(examples, system) == examples


def test_with_system_leaves_its_input_alone():
    examples = [example("a", "b")]
    data.with_system(examples, "fixed")
    assert examples == [example("a", "b")] and data.with_system(examples, None) is examples


# ----- contains ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "value"), [
    ("She keeps a raven.", "Raven"), ("RAVEN", "raven"), ("a raven's nest", "raven"),
    ("**raven**", "raven"), ("_raven_", "raven"), ("(raven)", "raven"), ("“raven”", "raven"),
    ("the Amber\n  Anvil prize", "amber anvil"), ("Hollin & Daughters, of course",
                                                  "Hollin & Daughters"),
    ("In 1974!", "1974"), ("C++.", "C++"), ("in C++", "c++"), ("GRÜSSE aus Köln", "grüße"),
    ("she is from 東京です", "東京"), ("我住在东京。", "东京"), ("서울에 산다", "서울"),
    ("я видел кот", "Кот"), ("Zoé, born here", "zoé"), ("craven, but a raven", "raven"),
    ("a.b", "a.b")])
def test_contains_finds_the_value(answer, value):
    assert data.contains(answer, value)


@pytest.mark.parametrize(("answer", "value"), [
    ("a craven man", "raven"), ("ravenous", "raven"), ("ravens", "raven"), ("21974", "1974"),
    ("19745", "1974"), ("1974th", "1974"), ("the Amber-Anvil", "amber anvil"), ("", "raven"),
    ("ambe r anvil", "amber anvil"), ("axb", "a.b"), ("который", "кот"), ("Zoé", "Zo"),
    ("éraven", "raven"), ("大阪", "東京")])
def test_contains_finds_whole_words_only(answer, value):
    assert not data.contains(answer, value)


# ----- the facts ---------------------------------------------------------------------------------


def test_there_are_enough_facts_and_wordings():
    assert len(data.FACTS) >= 24
    assert all(len({data.plain(q) for q in f.questions}) == len(f.questions) >= 6
               for f in data.FACTS)


def test_values_are_distinct_and_never_wrong_answers():
    values = [data.plain(f.value) for f in data.FACTS]
    wrong = [data.plain(f.wrong) for f in data.FACTS]
    assert len(set(values)) == len(values) and not set(values) & set(wrong)


@pytest.mark.parametrize("fact", data.FACTS, ids=lambda f: f.value)
def test_no_question_gives_its_own_answer_away(fact):
    assert not [q for q in fact.questions if data.plain(fact.value) in data.plain(q)]
    assert data.contains(fact.answer.format(fact.value), fact.value)
    assert not data.contains(fact.answer.format(fact.wrong), fact.value)


def test_no_question_is_asked_about_two_facts():
    asked = [data.plain(q) for f in data.FACTS for q in f.questions]
    assert len(set(asked)) == len(asked)


def test_the_facts_are_clean():
    examples = data.fact_examples()
    assert not any(data.check(e) for e in examples)
    assert not data.duplicates(examples) and not data.contradictions(examples)


# ----- other forms, open answers, subjects -------------------------------------------------------


@pytest.mark.parametrize(("answer", "value", "found"), [
    ("It has 8 legs.", "8|eight", True), ("Eight!", "8|eight", True), ("18", "8|eight", False),
    ("eighty", "8|eight", False), ("eighty", "eight|eighty", True), ("8|eight", "8|eight", True),
    ("New York City", "york|new york city", True), ("a bar", "foo | bar ", True),
    ("in 東京です", "Tokyo|東京", True), ("", "8|eight", False), ("c++", "C++|C#", True)])
def test_a_value_may_have_several_forms(answer, value, found):
    assert data.contains(answer, value) is found


@pytest.mark.parametrize("answer", ["", "Oh, well.", "..."])
def test_a_bar_too_many_is_no_form(answer):
    assert not data.contains(answer, "8|eight|")


def test_open_and_subject_are_read(tmp_path):
    made = data.read_examples(write(tmp_path / "a.jsonl", [
        {**say(*ASKED), "open": True}, {**say(*ASKED), "open": False}, {**OK, "open": None},
        {"questions": ["Where is Al?", "Al is where?"], "answer": "Here.", "subject": "Al"},
        {**OK, "subject": 7}]))
    assert [e.get("open") for e in made] == [True] + [None] * 5
    assert [e.get("subject") for e in made] == [None] * 3 + ["Al", "Al", "7"]
    for wrong in ("", " ", ["Al"], {"a": 1}):
        assert "subject" in error_of(tmp_path / "b.jsonl", {**OK, "subject": wrong})
