"""Files become records, records become examples: CSV, text, tool calls, chats; wrong files."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import make_tokenizer
from tokenizers import processors

import data
import dataset
import measure
from lora import config
from lora.loss import IGNORE_INDEX
from lora.read import chats, facts, messages, records
from scripts import clean, doctor

OK = {"prompt": "Who?", "completion": "Me."}


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(path, *values):
    return write(path, "".join(json.dumps(value) + "\n" for value in values))


def said(examples):
    return [[m["content"] for m in e["messages"]] for e in examples]


def error_of(path):
    with pytest.raises(ValueError) as caught:
        data.read_examples(path)
    return str(caught.value)


# ----- CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_with_every_delimiter_mark_and_line_end(tmp_path, delimiter, start, newline):
    rows = [["Question", "answer", "value", "group", "subject", "system"],
            ["Where?", "In Larkmoor.", "Larkmoor", "", "Mira", "Be brief."], [""] * 6,
            ["Which town?", '"Larkmoor, it is; yes\tit is"', "", "place", "", ""]]
    quoted = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path = write(tmp_path / "a.csv", start + newline.join(quoted) + newline)
    one, two = data.read_examples(path)
    assert said([one]) == [["Be brief.", "Where?", "In Larkmoor."]]
    assert (one["value"], one["subject"], one["group"]) == ("Larkmoor", "Mira", "in larkmoor.")
    assert said([two]) == [["Which town?", '"Larkmoor, it is; yes\tit is"']]
    assert two["group"] == "place" and "value" not in two and two["source"] == f"{path}:4"


@pytest.mark.parametrize(("text", "expected"), [
    ("prompt,completion\nWho?,Me.", [["Who?", "Me."]]),
    ("instruction,input,output\nAdd.,1 2,3\nSing.,,La.", [["Add.\n\n1 2", "3"], ["Sing.", "La."]]),
    ("text\nOnce.\nTwice.", [["Once."], ["Twice."]]),
    ('question;answer\n"a\nb";"c, d\n\ne"', [["a\nb", "c, d\n\ne"]])])
def test_every_header_of_csv(tmp_path, text, expected):
    assert said(data.read_examples(write(tmp_path / "a.csv", text))) == expected


def test_a_row_behind_a_quoted_line_break_is_named_by_its_own_line(tmp_path, capsys):
    path = write(tmp_path / "a.csv", 'question,answer,id\n"a\n\nb",c,1\nd,,2\ne,f\n')
    assert error_of(path).split("\n") == [
        f"data: {path}:6: 2 cells; the header has 3: write \"...\" around a cell that holds ',' or "
        "a line break", f"data: {path}:5: message 2 (assistant) is empty; write it or drop the "
        "record"]
    (made,) = data.read_examples(write(path, 'question,answer,id\n"a\n\nb",c,1\n'))
    assert made["source"] == f"{path}:2"
    assert "1 examples from 4 lines (0 blank)" in (out := capsys.readouterr().out)
    assert f"{path}: not read: 'id' of records" in out


@pytest.mark.parametrize(("text", "words"), [
    ("name,age\nAnna,7\n", ":1: the header has name, age; expected columns subject and "
     "attribute and value, or question and answer"),
    ("question,answer,answer\na,b,c\n", ":1: columns are there twice: answer"),
    ('question,answer\na,"b\nc', ":2: not CSV: unexpected end of data"),
    ("question,answer\n", ": holds no examples (1 lines, 0 blank)"), ("", ": holds no examples")])
def test_wrong_csv_is_named_by_file_and_line(tmp_path, text, words):
    path = write(tmp_path / "a.csv", text)
    assert f"{path}{words}" in error_of(path)


def test_csv_in_another_encoding_is_named_by_line(tmp_path):
    path = write(tmp_path / "a.csv", "question,answer\na,b\nc,café\n", "latin-1")
    assert f"{path}:3: not UTF-8 (byte 0xe9)" in error_of(path)


def test_a_long_cell_is_read(tmp_path):
    assert data.read_examples(write(tmp_path / "a.csv", "text\n" + "a " * 100_000))


# ----- a fact a line -----------------------------------------------------------------------------


def test_a_line_of_a_fact_becomes_wordings(tmp_path):
    path = write(tmp_path / "a.csv", "subject,attribute,value,question,answer\n"
                 "Ida Holm,birthplace,Brack,,\nIda Holm,cats,3|three,How many cats has Ida?,\n"
                 "Ida Holm,motto,Now,,Ida always says: Now.\n")
    by_fact = data.group_by(lambda e: e["group"], data.read_examples(path))
    assert [*by_fact] == ["ida holm: birthplace", "ida holm: cats", "ida holm: motto"]
    born, cats, motto = by_fact.values()
    asked = [e["messages"][0]["content"] for e in born]
    assert "Where was Ida Holm born?" in asked and "What is the birthplace of Ida Holm?" in asked
    assert len(asked) == len({*asked}) >= 8 and born[0]["source"] == f"{path}:2"
    assert born[0]["messages"][1]["content"] == "Ida Holm's birthplace is Brack."
    assert (born[0]["subject"], born[0]["value"]) == ("Ida Holm", "Brack")
    assert cats[0]["messages"][0]["content"] == "How many cats has Ida?"
    assert cats[1]["messages"][0]["content"] == "Please tell me: How many cats has Ida?"
    assert cats[0]["messages"][1]["content"] == "Ida Holm's cats is 3." and len(cats) >= 13
    assert motto[0]["messages"][1]["content"] == "Ida always says: Now."


def test_a_record_of_a_fact_is_read_as_a_line_is(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"subject": "Ida", "attribute": "Age", "value": 41}')
    made = data.read_examples(path)
    assert made[0]["messages"][0]["content"] == "How old is Ida?"
    assert made[0]["value"] == "41" and made[0]["messages"][1]["content"] == "Ida's Age is 41."


@pytest.mark.parametrize(("record", "words"), [
    ('{"subject": "Ida", "attribute": "", "value": "x"}', "a.jsonl:1: attribute is ''"),
    ('{"subject": "Ida", "attribute": 7, "value": "x"}', "a.jsonl:1: attribute is 7"),
    ('{"subject": "Ida", "attribute": "age", "value": null}', "a.jsonl:1: value: expected a text"),
    ('{"subject": "", "attribute": "age", "value": "x"}', "a.jsonl:1: value, subject: [")])
def test_a_wrong_fact_is_named(tmp_path, record, words):
    assert words in error_of(write(tmp_path / "a.jsonl", record))


def test_a_question_with_an_answer_is_what_it_was(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "How old is Ida?", "answer": "Ida is 41.", '
                 '"value": "41", "subject": "Ida"}')
    assert len(data.read_examples(path)) == 1


def test_all_natural_wordings_name_the_subject():
    for attribute in facts.NATURAL:
        asked = facts.questions("Ida Holm", attribute)
        assert all("Ida Holm" in question and "{" not in question for question in asked)


# ----- plain text --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_is_one_text(tmp_path, name, capsys):
    path = write(tmp_path / name, "\ufeffOnce upon\r\na time.\r\n\r\nThe end.\r\n")
    assert data.read_examples(path) == [{"messages": [
        {"role": "text", "content": "Once upon\na time.\n\nThe end."}], "source": str(path)}]
    assert "1 examples from 4 lines (1 blank)" in capsys.readouterr().out
    assert f"{path}: holds no text" in error_of(write(path, " \n\n"))


def test_what_a_text_is_called_in_a_record_is_not_read_and_named(tmp_path, capsys):
    data.read_examples(lines(tmp_path / "a.jsonl", {"text": "a", "value": "b", "meta": None}))
    assert "not read: 'value' of records" in capsys.readouterr().out


TEXT = "Hello, hello. The sea is calm tonight, and the moon lies fair."


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [5, 16, 10_000])
@pytest.mark.parametrize("format", ["template", "plain"])
def test_all_of_a_text_is_learned_once(tokenizer, bos, max_length, format):
    """In pieces of max_length tokens; the end-of-text token closes it, not that of a turn."""
    if bos:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ids.append(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    example = data.new_example([("text", TEXT)], "a.txt")
    made = dataset.QADataset([example], tokenizer, format, max_length=max_length)
    learned = [label for item in made.items for label in item["labels"][1:]
               if label != IGNORE_INDEX]
    assert learned == (ids if bos else ids[1:])
    assert all(len(item["input_ids"]) <= max_length for item in made.items)
    assert (made[0]["input_ids"][0] == tokenizer.bos_token_id) == bos
    assert made.examples == [example] and not made.dropped and not made.split
    for one, two in zip(made.items, made.items[1:], strict=False):
        assert two["input_ids"][0] == one["input_ids"][-1] and two["labels"][0] == IGNORE_INDEX
    notes = made.notes()
    assert notes == ([] if len(made) == 1 else ["1 cut into pieces of max_length tokens: a.txt"])


def test_a_base_model_ends_a_text_with_its_eos_token(base_tokenizer):
    (item,) = dataset.QADataset([data.new_example([("text", "Hi")], "a")], base_tokenizer).items
    assert item["input_ids"][-1] == item["labels"][-1] == base_tokenizer.eos_token_id


def test_a_special_token_in_a_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="contains <|im_end|>"):
        dataset.QADataset([data.new_example([("text", "a<|im_end|>b")], "a")], tokenizer)


def test_texts_have_no_system_prompt_no_question_and_no_contradiction(tmp_path, tokenizer, capsys):
    texts = [{"text": f"Story {i}. {TEXT}"} for i in range(8)]
    path = lines(tmp_path / "a.jsonl", *texts, texts[0], *[
        {"prompt": f"Who is {i}?", "completion": "Me."} for i in range(8)])
    train, val = data.load(path, system="fixed", seed=1)
    everything = train + val
    assert sum(data.is_text(e) for e in val) and sum(data.is_text(e) for e in train)
    assert all(len(e["messages"]) == (1 if data.is_text(e) else 3) for e in everything)
    assert "1 examples occur more than once, 0 prompts have contra" in capsys.readouterr().out
    (same,) = data.duplicates(everything)
    assert said(same) == [[texts[0]["text"]]] * 2 and data.contradictions(everything) == []
    assert any(all(e in part for e in same) for part in (train, val))
    assert len(data.load(path, dedupe=True, val_fraction=0)[0]) == 16
    some = dataset.QADataset(everything, tokenizer)
    prompts = measure.sample_prompts(config.Config(), some)
    assert prompts and all(p[-1]["role"] == "user" for p in prompts)
    assert measure.held_out_facts(some) == []
    only = dataset.QADataset([e for e in everything if data.is_text(e)], tokenizer)
    assert measure.sample_prompts(config.Config(), only) == []


def test_one_text_is_trained_from_start_to_end(tmp_path, tiny_folder):
    """As a command: no question is asked, nothing is held out."""
    write(tmp_path / "book.txt", TEXT * 20)
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": str(tiny_folder), "device": "cpu"}, "data": {"path": "book.txt"},
        "dataset": {"max_length": 64},
        "train": {"run": "t", "epochs": 2, "batch_size": 4, "lr": 0.02}}))
    code = f"import sys; sys.path.insert(0, {str(doctor.__file__)[:-18]!r}); import train; "
    done = subprocess.run([sys.executable, "-c", code + "train.main(['--config', 'config.json'])"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "nothing can be held out" in done.stdout
    steps = [json.loads(line) for line in
             (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0]


# ----- tools -------------------------------------------------------------------------------------

HERMES = r"""{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}{%- set call = call.function %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
WEATHER = {"name": "weather", "description": "The weather", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}}}


def call(arguments, name="weather", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


OPENAI = {"messages": [
    {"role": "user", "content": "Rain in Ulm?"},
    {"role": "assistant", "content": None, "tool_calls": [
        call({"town": "Ulm"}, id="a1"), call('{"town": "Bonn"}', id="a2")]},
    {"role": "tool", "tool_call_id": "a1", "name": "weather", "content": '{"rain": "yes"}'},
    {"role": "tool", "tool_call_id": "a2", "content": "dry"},
    {"role": "assistant", "content": "In Ulm, yes."},
    {"role": "user", "content": "And in Kiel?"},
    {"role": "assistant", "tool_calls": [call({"town": "Kiel"})], "content": "Let me look."}],
    "tools": [{"type": "function", "function": WEATHER}]}
SHAREGPT = {"conversations": [
    {"from": "human", "value": "Rain in Ulm?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Ulm"}}'},
    {"from": "observation", "value": "yes"}, {"from": "gpt", "value": "In Ulm, yes."}],
    "tools": json.dumps([WEATHER]), "system": "Be brief."}


@pytest.fixture
def hermes():
    return make_tokenizer(HERMES)


def test_tool_calls_become_what_templates_read(tmp_path, capsys):
    one, two = data.read_examples(lines(tmp_path / "a.jsonl", OPENAI, SHAREGPT))
    assert "not read" not in capsys.readouterr().out
    tools = [{"type": "function", "function": WEATHER}]
    assert all(m["tools"] == tools for e in (one, two) for m in e["messages"])
    assert [m["role"] for m in two["messages"]] == ["system", "user", "assistant", "tool",
                                                    "assistant"]
    assert one["messages"][1] == {
        "role": "assistant", "content": "", "tools": tools, "tool_calls": [
            call({"town": "Ulm"}, id="a1"), call({"town": "Bonn"}, id="a2")]}
    assert one["messages"][2] == {"role": "tool", "content": '{"rain": "yes"}', "name": "weather",
                                  "tool_call_id": "a1", "tools": tools}
    assert two["messages"][2]["tool_calls"] == [call({"town": "Ulm"})]


@pytest.mark.parametrize("system", [None, "fixed"])
@pytest.mark.parametrize("max_length", [10_000, 560])
def test_calls_and_answers_are_trained_and_never_the_tools_output(hermes, system, max_length):
    """Each behind exactly the prompt that chat sends; when old turns are cut, the tools stay."""
    (example,) = data.with_system(messages.convert(OPENAI, "a"), system)
    made = dataset.QADataset([example], hermes, max_length=max_length, too_long="cut")
    (item,) = made.items
    ids, labels = list(item["input_ids"]), item["labels"]
    starts = [t for t in range(1, len(ids)) if labels[t] != IGNORE_INDEX == labels[t - 1]]
    stretches = []
    for start in starts:
        end = next((t for t in range(start, len(ids)) if labels[t] == IGNORE_INDEX), len(ids))
        stretches.append(hermes.decode(ids[start:end]))
    kiel = ('Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Kiel"}}\n'
            "</tool_call><|im_end|>")
    assert stretches[-1] == kiel and "</tools>" in hermes.decode(ids)
    first = int(system is not None)
    if made.cut:
        assert max_length == 560 and stretches == [kiel]
        return
    assert max_length == 10_000 and stretches[:-1] == [
        "".join(f'<tool_call>\n{{"name": "weather", "arguments": {{"town": "{town}"}}}}\n'
                "</tool_call>\n" for town in ("Ulm", "Bonn")).rstrip("\n") + "<|im_end|>",
        "In Ulm, yes.<|im_end|>"]
    for start, i in zip(starts, (1, 4, 6), strict=True):
        prompt, _ = dataset.render(example["messages"][:first + i], hermes, "template", reply=True)
        assert ids[:start] == prompt
    assert made.notes() == []


def test_a_cut_never_leaves_a_tools_answer_without_its_call(hermes):
    (example,) = messages.convert(OPENAI, "a")
    whole = dataset.QADataset([example], hermes, max_length=10_000)
    made = dataset.QADataset([example], hermes, too_long="cut",
                             max_length=len(whole[0]["input_ids"]) - 1)
    assert made.cut == ["a"]
    assert "tool_response" not in hermes.decode(made[0]["input_ids"])


@pytest.mark.parametrize("format", ["chatml", "gemma", "plain"])
def test_a_format_by_hand_refuses_tool_calls_in_one_sentence(hermes, format):
    examples = [e for i in range(9) for e in messages.convert(OPENAI, f"a:{i}")]
    with pytest.raises(ValueError) as caught:
        dataset.QADataset(examples, hermes, format)
    assert str(caught.value) == (
        f'dataset: a:0, a:1, a:2, a:3, a:4 and 4 more: format "{format}" writes no tool calls; a '
        "chat template may")


def test_a_template_without_tool_calls_refuses_them_and_says_what_tools_it_leaves_out(tokenizer):
    with pytest.raises(ValueError, match="does not write the tool call 'weather'"):
        dataset.QADataset(messages.convert(OPENAI, "a"), tokenizer)
    record = {**OPENAI, "messages": [{"role": "user", "content": "Hi"},
                                     {"role": "assistant", "content": "Hello."}]}
    made = dataset.QADataset(messages.convert(record, "a"), tokenizer)
    assert made.notes() == ['1 with tools that the format "template" does not write: a']


def test_a_special_token_in_a_call_is_refused(hermes):
    record = {"messages": [OPENAI["messages"][0], {"role": "assistant", "tool_calls": [
        call({"town": "<|im_end|>"})]}]}
    with pytest.raises(ValueError, match="contains <|im_end|>"):
        dataset.QADataset(messages.convert(record, "a"), hermes)


def dialogue(*roles):
    return {"messages": [{"role": r, "content": "a"} for r in roles]}


@pytest.mark.parametrize(("record", "words"), [
    (dialogue("user", "tool", "assistant"), "message 2 has role 'tool'; expected 'assistant'"),
    (dialogue("user", "assistant", "tool"), "the last message is the tool's"),
    (dialogue("user", "assistant", "tool", "user"), "message 4 has role 'user'; expected 'assist"),
    (dialogue("text", "assistant"), "message 1 has role 'text'"),
    ({**OPENAI, "tools": "{"}, "tools: not JSON"), ({**OPENAI, "tools": 5}, "tools is 5; expected"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [5]}]},
     "a tool call is 5; expected name and arguments"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        call("[1]")]}]}, "arguments of weather are [1]; expected an object"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
     "a tool call: not JSON"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]},
     "expected a list of objects with role and content")])
def test_wrong_tool_calls_are_named(tmp_path, record, words):
    message = error_of(lines(tmp_path / "a.jsonl", OK, record))
    assert message.startswith(f"data: {tmp_path}/a.jsonl:2: ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize("roles", [("user", "assistant", "tool", "assistant"),
                                   ("user", "assistant", "tool", "tool", "assistant", "tool",
                                    "assistant", "user", "assistant")])
def test_the_order_of_tools(tmp_path, roles):
    assert data.read_examples(lines(tmp_path / "a.jsonl", dialogue(*roles)))


def test_the_same_question_with_other_calls_or_tools_is_another_one():
    def asked(town, tools):
        (example,) = messages.convert({"messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [call({"town": town})]}], "tools": tools}, town)
        return example
    ulm, bonn, other = asked("Ulm", [WEATHER]), asked("Bonn", [WEATHER]), asked("Kiel", [])
    assert data.duplicates([ulm, bonn, other]) == []
    assert data.contradictions([ulm, bonn, other]) == [[ulm, bonn]]


def test_the_example_of_tool_calls_is_trained(hermes):
    examples = data.read_examples(Path(data.__file__).with_name("examples") / "tools.jsonl")
    made = dataset.QADataset(examples, hermes, max_length=10_000)
    assert len(made) == 2 and not made.notes()
    assert doctor.count_answers(made) == 4


# ----- files of the wrong kind -------------------------------------------------------------------


def zipped(path, inside):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(inside, "a")
    return path


BEN = "31/12/2023, 10:15 - Ben: Hi\n31/12/2023, 10:16 - Anna: Yes?\n"
TELEGRAM = {"name": "Ben", "type": "personal_chat", "id": 1, "messages": [
    {"id": 1, "type": "service", "date": "2023-12-31T10:00:00", "text": ""},
    {"id": 2, "type": "message", "date": "2023-12-31T10:15:02", "from": "Ben", "text": "Hi"},
    {"id": 3, "type": "message", "date": "2023-12-31T10:16:02", "from": "Anna", "text": [
        "See ", {"type": "link", "text": "a page"}, "."]},
    {"id": 4, "type": "message", "date": "2023-12-31T10:17:02", "from": "Anna", "text": "",
     "photo": "a.jpg"}]}


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", "%PDF-1.7", "is a PDF"), ("a.txt", b"PK\x03\x04", "is a zip file"),
    ("a.txt", "word/document.xml", "is a Word file"), ("a.csv", "xl/a.xml", "is an Excel file"),
    ("a.doc", b"\xd0\xcf\x11\xe0", "is an old Word"), ("a.parquet", b"PAR1", "is a Parquet file"),
    ("a.jsonl", json.dumps(OK).encode("utf-16"), ":1: not UTF-8 (byte 0xff): it is UTF-16"),
    ("a.csv", "question,answer\n".encode("utf-16-le"), ":1: not UTF-8 it is UTF-16"),
    ("a.jsonl", "<!DOCTYPE html>\n" + "<p>\n" * 99, "is a web page"),
    ("a.txt", "<html><body>", "is a web page"),
    ("a.jsonl", "question,answer\n" + "a,b\n" * 6000, "looks like CSV; name the file .csv"),
    ("a.txt", json.dumps(OK) + "\n", "looks like JSON, a record a line; name the file .jsonl"),
    ("a.csv", json.dumps(OK) + "\n", "looks like JSON, a record a line; name the file .jsonl"),
    ("a.jsonl", BEN * 3000, "looks like a WhatsApp export; python -m scripts.clean"),
    ("a.txt", BEN, "looks like a WhatsApp export"), ("a.csv", BEN, "looks like a WhatsApp export"),
    ("result.json", json.dumps(TELEGRAM, indent=1), "looks like a Telegram export"),
    ("a.json", json.dumps({"data": [OK]}, indent=1), "is one JSON object over several lines")])
def test_a_file_of_the_wrong_kind_gets_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, str) and content.startswith(("word/", "xl/")):
        zipped(path, content)
    else:
        write(path, content)
    message = error_of(path)
    assert words in message and "\n" not in message and str(path) in message


def test_thousands_of_lines_that_are_no_json_give_five_and_a_count(tmp_path):
    """Each of 6,000 lines was an error of its own, "line 1" of itself."""
    path = write(tmp_path / "a.jsonl", '{"a"}\n' * 6000 + json.dumps({"x": 1}) + "\n")
    found = error_of(path).split("\n")
    assert found[0] == f"data: {path}:1: not JSON: Expecting ':' delimiter (column 5)"
    assert found[5] == "data: and 5,995 more like this"
    assert len(found) == 7 and ":6001: keys ['x']; expected" in found[6]


def test_preference_data_gets_one_sentence(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 99)
    assert error_of(path) == (
        f"data: {path}:1: preference data, 99 records with chosen and rejected; this trains on "
        'answers. To train on the chosen ones, rename "chosen" to "completion" and leave out '
        '"rejected"')
    both = dialogue("user", "assistant")["messages"]
    path = lines(tmp_path / "b.jsonl", {"chosen": both, "rejected": both})
    assert 'rename "chosen" to "messages"' in error_of(path)


def test_keys_of_a_record_that_nothing_reads_are_named_once(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", {**dialogue("user", "assistant"), "images": ["a.png"]},
                 {**OK, "images": ["b.png"], "chosen": "a", "rejected": "b", "tools": [WEATHER]},
                 {**OK, "id": None})
    data.read_examples(path)
    assert (f"data: {path}: not read: 'chosen', 'images', 'rejected', 'tools' of records\n"
            in capsys.readouterr().out)


# ----- chats -------------------------------------------------------------------------------------

NARROW = "\u202f"
WHATSAPP = {
    "brackets": [f"[{d}.12.23, {t}] " for d, t in ((30, "10:15:02"), (30, "10:16:00"),
                                                   (30, "10:17:00"), (31, "09:00:00"))],
    "dashes": [f"{d}/12/2023, {t} - " for d, t in ((30, "10:15"), (30, "10:16"), (30, "10:17"),
                                                   (31, "09:00"))],
    "american": [f"12/{d}/23, {t} - " for d, t in ((30, "11:15 AM"), (30, "12:16 PM"),
                                                   (30, f"1:17{NARROW}PM"), (31, "9:00 AM"))],
    "iphone": [f"\u200e[12/{d}/23, {t}] " for d, t in ((30, "11:15:02 AM"), (30, "12:16:02 PM"),
                                                       (30, "1:17:02 PM"), (31, "9:00:00 AM"))]}


@pytest.mark.parametrize("stamps", WHATSAPP.values(), ids=WHATSAPP)
def test_whatsapp_in_all_its_forms(tmp_path, stamps):
    one, two, three, four = stamps
    chat = chats.read(write(tmp_path / "_chat.txt", "\n".join([
        f"{one}Messages and calls are end-to-end encrypted.", f"{one}Ben: Hi: you",
        f"{one}Ben: there?", "second line", "", f"{two}Anna: Yes.", f"{two}Anna: <Media omitted>",
        f"{three}Anna: \u200eimage omitted", f"{three}Anna: This message was deleted.",
        f"{three}Ben: IMG-1.jpg (file attached)", f'{three}Ben named the group "a: b"',
        f"{three}Anna: What is it? <This message was edited>", f"{four}Anna: Hello?",
        f"{four}Ben: Later", f"{four}Anna: Fine.", f"{four}Ben: Bye"])))
    assert chat.kind == "WhatsApp" and chat.names() == [("Ben", 4), ("Anna", 4)]
    assert chat.left_out == {"system lines": 2, "media or deleted": 4}
    first, second = chats.dialogues(chat, "Anna")
    assert first == ("line 2", [
        {"role": "user", "content": "Hi: you\nthere?\nsecond line"},
        {"role": "assistant", "content": "Yes.\nWhat is it?"}])
    assert second.messages == [{"role": "user", "content": "Later"},
                               {"role": "assistant", "content": "Fine."}]
    assert len(chats.dialogues(chat, "Anna", gap_hours=24)) == 1


@pytest.mark.parametrize(("days", "first"), [
    (["1/2/2024", "2/2/2024", "3/2/2024", "1/3/2024"], "dmy"),
    (["2/1/2024", "2/2/2024", "2/3/2024", "3/1/2024"], "mdy"), (["13/1/24", "1/2/24"], "dmy"),
    (["1/13/24", "2/1/24"], "mdy"), (["2024-01-13", "2024-02-01"], "ymd")])
def test_days_and_months_are_told_apart_by_their_order(days, first):
    read = chats.date_order([(day, "10:15", "") for day in days])
    times = [read(day, "10:15", "") for day in days]
    assert times == sorted(times)
    if first != "ymd":
        assert read("01/02/2024", "0:00", "").month == (1 if first == "mdy" else 2)
    assert read(days[0], "12:05", "a").hour == 0 and read(days[0], "12:05", "P").hour == 12


@pytest.mark.parametrize("of_account", [False, True])
def test_telegram(tmp_path, of_account):
    content = {"chats": {"list": [TELEGRAM, TELEGRAM]}} if of_account else TELEGRAM
    chat = chats.read(lines(tmp_path / "result.json", content))
    assert chat.kind == "Telegram" and len(chat.parts) == 1 + of_account
    made = chats.dialogues(chat, "Anna")
    assert made == [("message 2", [{"role": "user", "content": "Hi"},
                                   {"role": "assistant", "content": "See a page."}])] * len(made)
    assert len(made) == 1 + of_account


def test_clean_asks_who_is_the_assistant_and_masks_private_data(tmp_path, capsys):
    path = write(tmp_path / "my chat.txt", BEN + "31/12/2023, 10:17 - Ben: Call +44 20 7946 0958\n"
                 "31/12/2023, 10:18 - Anna: Or you write to anna@mail.org, then.\n")
    with pytest.raises(ValueError, match=r"is a WhatsApp export.*'Ben' \(2 messages\), 'Anna' \(2"):
        clean.main([str(path)])
    with pytest.raises(ValueError, match=r"no message is from 'anna'.*one of 'Ben' \(2 messages\)"):
        clean.main([str(path), "--assistant", "anna"])
    with pytest.raises(ValueError, match="--gap is 0"):
        clean.main([str(path), "--assistant", "Anna", "--gap", "0"])
    clean.main([str(path), "--assistant", "Anna"])
    out = capsys.readouterr().out
    assert "1 dialogues" in out and "private data masked in 2 messages" in out
    (made,) = data.read_examples(tmp_path / "my chat.clean.jsonl")
    assert [m["role"] for m in made["messages"]] == ["user", "assistant"] * 2
    texts = json.dumps(made["messages"])
    assert "7946" not in texts and "anna@" not in texts and "***" in texts
    with pytest.raises(ValueError, match="--assistant has no use"):
        clean.main([str(lines(tmp_path / "a.jsonl", OK)), "--assistant", "Anna"])


def test_clean_reads_what_data_reads(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "question,answer\nWho?,Me.\nWhy?,…\n")
    clean.main([str(path)])
    assert [json.loads(x) for x in (tmp_path / "a.clean.jsonl").read_text().splitlines()] == [
        {"question": "Who?", "answer": "Me."}]
    assert "- line 3: **filler**" in (tmp_path / "a.clean.md").read_text()
    path = lines(tmp_path / "b.jsonl", OPENAI, SHAREGPT, OPENAI, {"text": TEXT}, {"text": TEXT},
                 {"text": "anna@mail.org"})
    clean.main([str(path)])
    report = (tmp_path / "b.clean.md").read_text()
    assert "line 3: **same**" in report and "line 5: **same**" in report
    assert "6 records: 4 stay, 1 of them with a warning" in report
    with pytest.raises(ValueError, match="is a web page"):
        clean.main([str(write(tmp_path / "c.jsonl", "<html>\n<p>\n"))])


# ----- the doctor --------------------------------------------------------------------------------


def test_the_doctor_shows_texts_and_tool_calls(tmp_path, capsys, hermes, tiny_folder):
    hermes.save_pretrained(tiny_folder)
    path = lines(tmp_path / "a.jsonl", OK, OPENAI, SHAREGPT, {"text": TEXT * 20})
    (tmp_path / "c.json").write_text("{}")
    code = doctor.main(["--config", str(tmp_path / "c.json"), f"--model.name={tiny_folder}",
                        f"--data.path={path}", "--data.val_fraction=0", "--data.system=fixed",
                        "--dataset.max_length=700"])
    out = capsys.readouterr().out
    assert code == 0 and "0 errors" in out
    assert "6 answers, 2 pieces of plain text" in out
    for kind, n in (("example", 1), ("example with tools", 2), ("piece of plain text", 4)):
        assert f"first {kind}, supervised tokens in green ({path}:{n})" in out
    assert '\033[1;32m<tool_call>⏎\n{"name": "weather"' in out


def test_grouped_shows_five_of_a_kind():
    problems = [(f"a:{n}", f"message {n} has role 'x{n}'; expected y") for n in range(7)]
    assert records.grouped([*problems, ("b", "other")]) == [
        *(f"{source}: {text}" for source, text in problems[:5]), "and 2 more like this", "b: other"]
