"""python -m scripts.clean drops what is broken, nothing else, and never touches what is there."""

import json
import os
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from scripts import clean

OK = {"prompt": "Who?", "completion": "Me."}


def talk(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text}
                         for i, text in enumerate(texts)]}


def write(path, records, newline="\n", last="\n", encoding="utf-8"):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_bytes((newline.join(lines) + last).encode(encoding, "surrogatepass"))
    return path


@pytest.fixture
def run(tmp_path):
    """run(records, *options): the lines of the new file, and its report."""
    def run(records, *options):
        path = write(tmp_path / "my.jsonl", records)
        clean.main([str(path), *options])
        new, report = tmp_path / "my.clean.jsonl", tmp_path / "my.clean.md"
        made = new.read_text("utf-8").splitlines(), report.read_text("utf-8")
        new.unlink(), report.unlink()
        return made
    return run


def found(report):
    """[(line, kind)] of all that a report names, in its order."""
    return [(int(n), kind) for n, kind in re.findall(r"^- line (\d+): \*\*(\w+)\*\*", report, re.M)]


# ----- each kind, caught and not caught falsely --------------------------------------------------

BAD = {
    "mojibake": [
        "The cafÃ© is open.", "It isnâ€™t far.", "It is \ufffd far.", "锟斤拷烫烫烫。", "Nice ðŸ˜Š",
        "Tür fÃ¼r alle.", "ä½\xa0å¥½ã€‚", "ÐŸÑ€Ð¸Ð²ÐµÑ‚!", "Â£5.", "鐨勬槸。", "Ã–sterreich."],
    "filler": [
        "…", "...", "ok", "OK.", "hmm", "Hmm...", "嗯嗯", "嗯。", "？！", "——", "~", "哈哈哈",
        "Uh, um... ok", "Okay!", "nan", "ok 👍"],
    "cut": [
        "I went to the shop,", "我去了商店，", "买了苹果、", "Here is the list:", "步骤如下：",
        "It was well-", "We walked home and the", "I would like to say that it is because",
        'He said "I am not sure that', "He said “I am not sure that", "他说「我不知道",
        "见《红楼梦", "我觉得这样不行，因为", "The answer (see above is clear",
        "Here:\n```python\nprint(1)", "Items:\n- one\n-"],
    "loop": [
        "I am so happy. " * 5, "the cat sat on the mat " * 3 + ".", "好的我知道了吗。" * 4,
        "yes " * 30, "The sea is calm and the moon is up tonight. We sail. " * 2
        + "The moon is up tonight and the sea is calm and the moon is up tonight. We sail."]}
GOOD = [
    "True", "42", "No.", "A", "+", "π", "👍", "❤️", "好", "好的", "I went home 😊", "我回家了。",
    "我……", "The answer is A", "blood type AB-", "Wait, I—", "我——", "He said :(", "Sad :-(",
    "1) one\n2) two", "the interval [0, 1)", "He is 5'10\"", 'Born in "1984"', "好吧，，，",
    "我没事（", "Use `(` to open it", "Here you go:\n```python\nprint((1)\n```", "noooo, not the",
    "CAFÉ…", "“Let's meet at the café…”", "„Spaß“ sagt er", "“CAFÉ”", "voilà…", "MANHÃ”",
    "São Paulo", "ÉTÉ\xa0»", "no no no no!", "加油加油加油！", "merrily, merrily, merrily, merrily",
    "0 0 0 0 " * 9, "He is anything but", "Kind regards,", "Just because",
    "Great job :tada:", "*smiles*", "“Yes”", "「はい」", "人生没有但是", "这里很温和", "ありがとう",
    "Привет, как дела", "Thần À Ã Â", "quizás te sientas quemado/a"]


@pytest.mark.parametrize(("kind", "answer"), [(k, a) for k, some in BAD.items() for a in some])
def test_a_bad_answer_is_of_one_kind(kind, answer):
    assert [k for k, *_ in clean.faults("assistant", answer, False)] == [kind]


@pytest.mark.parametrize("answer", GOOD)
def test_a_good_answer_is_of_none(answer):
    assert not [*clean.faults("assistant", answer, False)]


def test_each_kind_drops_its_record_and_no_other(run):
    for kind, answers in BAD.items():
        lines, report = run([OK, talk("Why?", answers[0]), talk("And now?", "Nothing.")])
        assert found(report) == [(2, kind)] and len(lines) == 2
        assert f"| {kind:8} | drop   |       1 |" in report and "1 are dropped" in report


def test_a_bad_answer_in_the_middle_drops_its_dialogue(run):
    lines, report = run([OK, talk("Sad.", "Hmm.", "Well?", "Sit down."), talk("a", "b", "c", "d,")])
    assert found(report) == [(2, "filler"), (3, "cut")] and lines == [json.dumps(OK)]


def test_a_user_may_say_what_an_answer_may_not(run):
    assert not found(run([talk("…", "Yes?"), talk("I was,", "Go on."), talk("嗯嗯", "好。")])[1])


@pytest.mark.parametrize("record", [
    "{", "5", '["a"]', "\udcff", {"texts": "a"}, talk("a"), talk("a", "b", "c"), {"messages": None},
    {"messages": [{"role": "assistant", "content": "a"}]}, '{"prompt": "a", "completion": 5}',
    "[" * 100_000])
def test_what_data_py_refuses_goes_with_a_reason(tmp_path, record, run):
    lines, report = run([OK, record, OK | {"prompt": "Whom?"}], "--drop", "pii")
    assert found(report) == [(2, "refused")] and len(lines) == 2


@pytest.mark.parametrize("message", ["", " \n", "\u200b", "\ufeff"])
@pytest.mark.parametrize("role", [0, 1])
def test_a_message_with_nothing_to_see_goes(run, message, role):
    _, report = run([OK, talk(*("a", "b")[:role], message, *("a", "b")[role + 1:]), OK])
    assert (2, "empty") in found(report) and "| refused  | drop   |       0 |" in report


def test_half_a_surrogate_is_mojibake_that_cannot_be_kept(run):
    lines, report = run([OK, r'{"prompt": "a", "completion": "b \ud83d"}'], "--keep", "mojibake")
    assert lines == [json.dumps(OK)] and (2, "mojibake") in found(report)


LONG = "The kettle is on, and the chair by the window is yours for as long as you like."


def test_the_first_of_what_is_the_same_stays(run):
    lines, report = run([talk("Hi?", LONG), talk("hi? ", LONG.upper()), talk("Who?", "Me."), OK])
    assert found(report) == [(2, "same"), (4, "same")] and len(lines) == 2
    assert "as line 1" in report and "as line 3" in report


def test_nearly_the_same_answers_go_unless_the_first_went(run):
    again, cut = LONG.replace("window", "stove"), LONG.removesuffix(" you like.") + " the"
    lines, report = run([talk("a", LONG), talk("b", again), talk("c", LONG), talk("d", "Me.")])
    assert found(report) == [(2, "near"), (3, "near")] and len(lines) == 2
    assert re.search(r"line 2: \*\*near\*\*, \d\d% as line 1", report)
    assert "line 3: **near**, 100% as line 1" in report
    assert found(run([talk("a", cut), talk("b", LONG)])[1]) == [(1, "cut")]
    assert not found(run([talk("a", LONG), talk("b", again)], "--near", "0.95")[1])


def test_the_answers_of_a_dialogue_are_compared_together(run):
    other = "Snow fell on the harbour all night, and in the morning the boats were white hills."
    assert not found(run([talk("a", other, "b", LONG), talk("c", LONG)])[1])
    _, report = run([talk("a", other, "b", LONG), talk("c", other, "d", LONG)])
    assert found(report) == [(2, "near")]


def test_facts_and_short_answers_may_be_said_again(run):
    facts = [{"questions": [f"a{i}", f"b{i}"], "answer": LONG, "group": "g"} for i in range(3)]
    labels = [talk(f"Is {i} odd?", "Yes, it is." if i % 2 else "False") for i in range(20)]
    assert not found(run(facts + labels)[1])


def test_of_hundreds_of_near_answers_one_stays():
    lines = [json.dumps(talk(f"q{i}", f"{LONG} Land {i}.")).encode() for i in range(600)]
    records = [clean.read_record(f"line {i}", line) for i, line in enumerate(lines)]
    clean.mark_near(records, 0.6)
    assert [i for i, r in enumerate(records) if not r.faults] == [0]


def test_a_long_answer_without_an_end_is_a_warning_where_others_have_one(run):
    draw, whole = random.Random(0), []
    for i in range(20):
        said = draw.sample([f"{a}{b}" for a in "bcdfgklm" for b in "aeiou"], 24)
        whole.append(talk(f"q{i}", "So " + " ".join(said) + ". Or so."))
    bare = [talk(f"p{i}", f"{first} {' '.join(draw.sample(said, 24))} said")
            for i, first in enumerate(("And", "and"))]
    lines, report = run(whole + bare)
    assert found(report) == [(21, "open")] and len(lines) == 22
    style = [talk(*(m["content"].strip(".") for m in r["messages"])) for r in whole]
    assert not found(run(style + bare)[1])


# ----- what is personal --------------------------------------------------------------------------

PERSONAL = [
    "jo.smith@mail.co.uk", "zhang_3@qq.com", "13812345678", "138-1234-5678", "+86 138 1234 5678",
    "11010519491231002X", "+44 20 7946 0958", "(555) 123-4567", "555-123-4567", "020 7946 0958",
    "010-12345678", "01 23 45 67 89", "１３８００１３８０００"]


@pytest.mark.parametrize("personal", PERSONAL)
@pytest.mark.parametrize("around", ["call {} now.", "我的是{}，记下来。", "{}"])
def test_what_is_personal_is_a_warning_and_masked(run, personal, around):
    lines, report = run([talk("Where?", around.format(personal)), talk(personal, "Thanks."), OK])
    assert found(report) == [(1, "pii"), (2, "pii")] and len(lines) == 3
    plain = report.translate(clean.NARROW)
    assert personal.translate(clean.NARROW) not in plain and "***" in plain


@pytest.mark.parametrize("personal", PERSONAL)
@pytest.mark.parametrize("answer", ["{} and the rest of it is in the", "Ring\n{},", "见{}，", ""])
def test_no_other_excerpt_gives_it_away(run, personal, answer):
    said = talk(f"at\n{personal}", answer.format(personal))
    broken = json.dumps(talk(f"a\n{personal}"), ensure_ascii=False)
    _, report = run([OK, said, said, broken, broken[:-4]])
    assert personal.translate(clean.NARROW) not in report.translate(clean.NARROW)
    assert {n for n, _ in found(report)} == {2, 3, 4, 5}


@pytest.mark.parametrize("text", [
    "3.14159265358979", "from 1914-1918 to 1939-1945", "2024-01-02 03:04:05", "01/02/2024 12:30",
    "10 000 000 000", "1,000,000,000", "978-3-16-148410-0", "192.168.10.255", "0.123456789",
    "1 2 3 4 5 6 7 8 9 10 11", "1234567890123", "me@home", "you@example.com", "12:00-13:30",
    "550e8400-e29b-41d4-a716-446655440000", "20240102030405"])
def test_other_numbers_are_not_personal(text):
    assert not [*clean.faults("user", text, False)]


# ----- actions -----------------------------------------------------------------------------------


def test_keep_and_drop_change_what_is_done(run):
    records = [OK, talk("a", "hmm"), talk("b", "Ring 13812345678."), talk("c", "one,")]
    lines, report = run(records, "--keep", "filler", "cut", "--drop", "pii")
    assert [json.loads(line) for line in lines] == [OK, records[1], records[3]]
    assert found(report) == [(3, "pii"), (2, "filler"), (4, "cut")]
    assert "3 stay, 2 of them with a warning; 1 are dropped" in report


def test_help_lists_every_kind_with_its_action(capsys):
    with pytest.raises(SystemExit) as caught:
        clean.main(["--help"])
    out = capsys.readouterr().out
    assert not caught.value.code
    assert all(f"{kind:9} {do}  {what}" in out for kind, (do, what) in clean.KINDS.items())


@pytest.mark.parametrize("options", [["--keep", "refused"], ["--keep", "empty"], ["--drop", "x"]])
def test_a_kind_that_cannot_be_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"{options[0]}: invalid choice: '{options[1]}'"):
        clean.main([str(write(tmp_path / "my.jsonl", [OK])), *options])


@pytest.mark.parametrize("near", ["0", "-1", "1.1", "nan"])
def test_near_is_a_share(run, near):
    with pytest.raises(ValueError, match="--near"):
        run([OK], "--near", near)


def test_much_of_a_kind_is_asked_about(run, capsys):
    run([OK, talk("a", "def f(x):"), talk("b", "while x:")])
    assert "cut is much of this file; is it meant? --keep cut" in capsys.readouterr().out


# ----- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_lines_stay_byte_for_byte(tmp_path, encoding, newline, last):
    odd = '{ "prompt":"a\u2028b\u2029c\x85d \\u00e9",  "completion": "東京 🙂.", "more": [1e3] }'
    path = write(tmp_path / "my.jsonl", [odd, "", "{", OK, "  "], newline, last, encoding)
    before = path.read_bytes()
    clean.main([str(path)])
    assert path.read_bytes() == before
    assert (tmp_path / "my.clean.jsonl").read_bytes() == (
        odd + newline + json.dumps(OK) + newline).encode()
    assert found((tmp_path / "my.clean.md").read_text("utf-8")) == [(3, "refused")]
    assert {p.name for p in tmp_path.iterdir()} == {"my.clean.jsonl", "my.clean.md", "my.jsonl"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_json_list_becomes_lines(tmp_path, encoding):
    records = [OK, talk("a", "b,"), {"x": 1}, {**talk("你", "好。"), "more": "\ud83d", "n": 1e3}]
    path = write(tmp_path / "my.json", ["\n" + json.dumps(records, indent=2)], encoding=encoding)
    clean.main([str(path), "--out", str(tmp_path / "new.jsonl")])
    made = (tmp_path / "new.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in made.split("\n")[:-1]] == [OK, records[3]] and "你" in made
    assert "- record 2: **cut**" in (tmp_path / "new.md").read_text("utf-8")


def test_examples_of_all_formats_stay(tmp_path):
    formats = Path(data.__file__).with_name("examples") / "formats.jsonl"
    clean.main([str(formats), "--out", str(tmp_path / "a.jsonl"), "--drop", *clean.KINDS])
    assert (tmp_path / "a.jsonl").read_bytes() == formats.read_bytes()


def alias(how, path):
    other = path.with_name(f"other-{path.name}")
    if how == "symlink":
        other.symlink_to(path)
    elif how == "hard link":
        os.link(path, other)
    elif how == "spelling":
        other = f"{path.parent}/../{path.parent.name}/{path.name}"
    return path if how == "itself" else other


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize("how", ["itself", "spelling", "symlink", "hard link"])
def test_the_input_is_never_written_over(tmp_path, option, how):
    path = write(tmp_path / "my.jsonl", [OK, "{"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the input") as caught:
        clean.main([str(path), option, str(alias(how, path))])
    assert "\n" not in str(caught.value) and path.read_bytes() == before


@pytest.mark.parametrize("name", ["my.clean.jsonl", "my.clean.md"])
@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder"])
def test_nothing_that_is_there_is_written_over(tmp_path, name, kind):
    path, there = write(tmp_path / "my.jsonl", [OK]), tmp_path / name
    {"file": there.touch, "folder": there.mkdir,
     "link to nothing": lambda: there.symlink_to(tmp_path / "nothing")}[kind]()
    with pytest.raises(ValueError, match="exists already"):
        clean.main([str(path)])
    assert {p.name for p in tmp_path.iterdir()} == {"my.jsonl", name}


def test_two_files_need_two_names(tmp_path):
    path = write(tmp_path / "my.jsonl", [OK])
    with pytest.raises(ValueError, match="two files"):
        clean.main([str(path), "--out", str(tmp_path / "a.md")])
    with pytest.raises(ValueError, match="cannot be written"):
        clean.main([str(path), "--out", str(tmp_path / "no" / "a.jsonl")])
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("records", [[], [""], ["{"], [talk("a", "hmm")], ["[]"]])
def test_an_empty_result_is_an_error_and_no_file(tmp_path, records):
    path = write(tmp_path / "my.jsonl", records)
    with pytest.raises(ValueError, match="nothing would remain"):
        clean.main([str(path)])
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("content", ["[1,]", '[{"a": 1}', "[" * 100_000, "[\ud800]"])
def test_a_broken_list_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match="not JSON"):
        clean.main([str(write(tmp_path / "my.json", [content]))])


@pytest.mark.parametrize("name", ["no.jsonl", "."])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read"):
        clean.main([str(tmp_path / name)])


def test_a_dry_run_prints_the_report_and_writes_nothing_else(tmp_path, capsys):
    path = write(tmp_path / "my.jsonl", [OK, talk("a", "one,")])
    clean.main([str(path), "--dry-run"])
    assert found(capsys.readouterr().out) == [(2, "cut")] and [*tmp_path.iterdir()] == [path]
    clean.main([str(path), "--dry-run", "--report", str(tmp_path / "r.md")])
    assert found((tmp_path / "r.md").read_text("utf-8")) == [(2, "cut")]
    assert not found(capsys.readouterr().out) and not (tmp_path / "my.clean.jsonl").exists()


def test_a_report_holds_no_markup_of_the_data(run):
    _, report = run([OK, talk("a", "![x](y) <b> `c` \x1b[31m\u202e and so\non and the")])
    (line,) = [line for line in report.split("\n") if line.startswith("- line")]
    assert line.count("`") == 2 and line.isprintable()


# ----- anything ----------------------------------------------------------------------------------

TEXTS = st.text(max_size=30) | st.sampled_from([a for some in BAD.values() for a in some] + GOOD
                                               + PERSONAL)
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | TEXTS, lambda inner:
                    st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
RECORDS = st.one_of(
    st.lists(TEXTS, max_size=5).map(lambda texts: talk(*texts)), JSON,
    st.fixed_dictionaries({"questions": st.lists(TEXTS), "answer": TEXTS},
                          optional={"value": JSON, "group": JSON, "system": JSON}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(
        ["messages", "conversations", "instruction", "input", "output", "prompt", "completion",
         "question", "questions", "answer", "system", "value", "group"], JSON)))
LINES = RECORDS.map(lambda r: json.dumps(r).encode()) | st.binary(max_size=20).map(
    lambda raw: raw.replace(b"\n", b""))


@given(st.lists(LINES, max_size=8), st.sets(st.sampled_from([*clean.KINDS][2:])))
@settings(deadline=None)
def test_whatever_the_lines_some_of_them_stay_and_can_be_read(lines, keep):
    with tempfile.TemporaryDirectory() as folder:
        path, new = Path(folder) / "my.jsonl", Path(folder) / "my.clean.jsonl"
        path.write_bytes(b"\n".join([json.dumps(OK).encode(), *lines]))
        before = path.read_bytes()
        clean.main([str(path), "--keep", *keep] if keep else [str(path)])
        rest = iter(before.split(b"\n"))
        assert all(line in rest for line in new.read_bytes().removesuffix(b"\n").split(b"\n"))
        assert path.read_bytes() == before and data.read_examples(new)


@given(st.text())
@settings(deadline=None)
def test_masking_and_excerpts_hold_for_any_text(text):
    assert len(clean.mask(text)) == len(text)
    assert clean.excerpt(text).isprintable() and "`" not in clean.excerpt(text)
