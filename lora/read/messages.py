"""
Turn records into examples, and check them.

    examples = read_examples("my.jsonl")       # [{"messages": [...], "source": "my.jsonl:1"}, ...]

A dialogue's messages are user and assistant in turns; an assistant may call tools, whose answers
are messages of the role tool. A plain text is one message of the role text.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from ..files import unique_keys
from . import facts, records

FORMATS = [("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"),
           ("questions", "answer"), ("subject", "attribute", "value"), ("question", "answer"),
           ("text",)]
FACT = ("group", "value", "subject", "wrong")              # read of a question and its answer
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
NEXT = {"user": ["assistant"], "assistant": ["user", "tool"], "tool": ["assistant", "tool"]}


def read_examples(path: str | Path) -> list[dict]:
    """Read the examples of a file, in order.

    A record is {"messages": [...]}, {"conversations": [{"from": "human", "value": ...}, ...]},
    {"instruction", "input", "output", "system"}, {"prompt", "completion"}, a question and answer:
    {"question" or "questions": [...], "answer", "value"}, or {"text"}. Prints how many examples
    come from how many lines, and what nothing reads. Raises ValueError with file, line and fix for
    all problems, those of one kind together."""
    path = Path(path)
    file = records.read(path)
    examples, grouped_by_answer, problems = [], [], [*file.problems]
    preferences, unread = [], {"messages": set(), "records": set()}
    for source, record in file.records:
        try:
            new = convert(record, source)
            wrong = [problem for example in new for problem in check(example)]
        except (ValueError, RecursionError) as error:   # deep: even its repr cannot be built
            new, wrong = [], [str(error)]
        if wrong and isinstance(record, dict) and {"chosen", "rejected"} <= record.keys():
            preferences.append((source, record["chosen"]))
            continue
        problems += [(source, problem) for problem in wrong]
        examples += new
        if new and "group" in new[0] and record.get("group") is None:
            grouped_by_answer += new
        if new:
            for where, keys in unread_keys(record).items():
                unread[where] |= keys
    if preferences:
        raise ValueError(_about_preferences(*preferences[0], len(preferences)))
    if not (problems or examples):
        problems.append((str(path), f"holds no examples ({file.n_lines} lines, {file.n_blank} "
                         "blank)"))
    if problems:
        raise ValueError("\n".join(f"data: {line}" for line in records.grouped(problems)))
    print(f"data: {path}: {len(examples)} examples from {file.n_lines} lines ({file.n_blank} "
          "blank)")
    if any(unread.values()):
        print(f"data: {path}: not read: " + "; ".join(
            f"{', '.join(map(repr, sorted(keys)))} of {where}"
            for where, keys in unread.items() if keys))
    for same in group_by(lambda e: e["group"], grouped_by_answer).values():
        if len({example["source"] for example in same}) > 1:    # "Yes." answers several facts
            for example in same:
                example["group"] += f" ({example['source']})"
    return examples


def _about_preferences(source, chosen, n):
    """One sentence about records of a chosen and a rejected answer."""
    new = "messages" if isinstance(chosen, list) else "completion"
    return (f"data: {source}: preference data, {n:,} records with chosen and rejected; this trains "
            f'on answers. To train on the chosen ones, rename "chosen" to "{new}" and leave out '
            '"rejected"')


# ----- a record ----------------------------------------------------------------------------------


def format_of(record: dict) -> tuple[str, ...]:
    """Return the keys that say what a record is. Raises ValueError if it has none of FORMATS."""
    for keys in FORMATS:
        if set(keys) <= record.keys():
            return keys
    raise ValueError(f"keys {sorted(record)}; expected messages, conversations, instruction and "
                     "output, prompt and completion, question and answer, text, or subject, "
                     "attribute and value")


def convert(record: dict, source: str) -> list[dict]:
    """Turn a record into its examples: one, or one for each wording of a question. Raises
    ValueError that says what is wrong with the record."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is {type(record).__name__}; expected an object")
    extra = {k: record[k] for k in FACT if record.get(k) is not None}
    if not all(isinstance(v, str | int | float) and str(v).strip() for v in extra.values()):
        raise ValueError(f"{', '.join(extra)}: {list(extra.values())}; expected texts")
    extra = {k: str(v) for k, v in extra.items()}
    if record.get("open"):
        extra["open"] = True
    keys = format_of(record)
    if "attribute" in keys:
        record = _fact(record, extra)
    if keys == ("text",):
        return [new_example([("text", record["text"])], source)]
    if keys in (("messages",), ("conversations",)):
        dialogues = [_conversation(record, *keys)]
    elif "instruction" in keys:
        parts = [text for text in (record["instruction"], record.get("input"))
                 if text not in (None, "")]
        if not all(isinstance(text, str) for text in parts):
            raise ValueError("instruction and input: expected texts")
        dialogues = [_turns(("user", "\n\n".join(parts)), ("assistant", record["output"]))]
    elif "prompt" in keys:
        dialogues = [_turns(("user", record["prompt"]), ("assistant", record["completion"]))]
    else:
        questions = record.get("questions", [record.get("question")])
        if not isinstance(questions, list) or not questions:
            raise ValueError(f"questions is {questions!r:.40}; expected a list of texts")
        extra.setdefault("group", record.get("group", plain(record["answer"])))
        dialogues = [_turns(("user", q), ("assistant", record["answer"])) for q in questions]
    start = _turns(("system", record["system"])) if record.get("system") not in (None, "") else []
    if tools := tools_of(record):                      # in every message: turns may be cut away
        dialogues = [[{**m, "tools": tools} for m in dialogue] for dialogue in dialogues]
        start = [{**m, "tools": tools} for m in start]
    return [{"messages": start + dialogue, "source": source, **extra} for dialogue in dialogues]


def _fact(record, texts):
    """A fact in one line as a record of questions and an answer, in wordings made from it."""
    if missing := [key for key in ("subject", "value") if key not in texts]:
        raise ValueError(f"{' and '.join(missing)}: expected a text")
    attribute, question = record["attribute"], record.get("question") or ""
    if not isinstance(attribute, str) or not attribute.strip() or not isinstance(question, str):
        raise ValueError(f"attribute is {attribute!r:.40}, question {question!r:.40}; expected a "
                         'noun such as "lucky number", and a text or nothing')
    about = texts["subject"], attribute.strip()
    return {**record, "questions": facts.questions(*about, question.strip()),
            "group": record.get("group", plain(": ".join(about))),
            "answer": record.get("answer") or facts.answer(*about, texts["value"])}


def new_example(turns: list[tuple[str, str]], source: str, **extra) -> dict:
    """Build an example from [(role, content)]; extra may hold group, value, subject and open."""
    return {"messages": _turns(*turns), "source": source, **extra}


def _turns(*turns):
    """Messages of (role, content)."""
    return [{"role": role, "content": content} for role, content in turns]


def _conversation(record, key):
    """The messages of a list of messages, of sharegpt's kind too."""
    who, what = ("role", "content") if key == "messages" else ("from", "value")
    if not isinstance(record[key], list) or not all(
            isinstance(m, dict) and isinstance(m.get(who), str)
            and (what in m or m.get("tool_calls")) for m in record[key]):
        raise ValueError(f"{key} is {record[key]!r:.60}; expected a list of objects with {who} "
                         f"and {what}")
    messages = []
    for turn in record[key]:
        role, content = turn[who], turn.get(what)
        calls = turn.get("tool_calls") if role == "assistant" or role == "gpt" else None
        if key == "conversations":
            calls, content = (content, "") if role == "function_call" else (calls, content)
            role = ROLES.get(role, role)
        message = {"role": role, "content": "" if calls and content is None else content}
        if calls:
            message["tool_calls"] = calls_of(calls)
        elif role == "tool":
            message |= {k: turn[k] for k in ("name", "tool_call_id") if turn.get(k) is not None}
        messages.append(message)
    return messages


# ----- tools -------------------------------------------------------------------------------------


def from_json(value: Any, name: str) -> Any:
    """The value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {records.why(error)}: {value:.60}") from error


def tools_of(record: dict) -> list[dict]:
    """The descriptions of the tools of a conversation, as templates read them: {"type": "function",
    "function": {"name": ...}}. A file may hold them bare, or as a JSON text."""
    tools = record.get("tools")
    tools = [] if tools in (None, "") else from_json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {tools!r:.60}; expected a list of objects")
    return [{"type": "function", "function": tool} if "name" in tool and "function" not in tool
            else tool for tool in tools]


def calls_of(value: Any) -> list[dict]:
    """Tool calls as templates read them: {"type": "function", "function": {"name", "arguments"}}
    with an object of arguments. A file may hold one, bare, or as a JSON text."""
    value, calls = from_json(value, "a tool call"), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call is {call!r:.60}; expected name and arguments")
        arguments = from_json(function.get("arguments") or {}, f"arguments of {function['name']}")
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of {function['name']} are {arguments!r:.60}; expected an "
                             "object")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**known, "type": "function",
                      "function": {"name": function["name"], "arguments": arguments}})
    return calls


# ----- checks ------------------------------------------------------------------------------------


def is_text(example: dict) -> bool:
    """Whether an example is a plain text: nobody asks, nobody answers."""
    return example["messages"][0]["role"] == "text"


def said(message: dict) -> str:
    """All that a message says: its content, and its tool calls as JSON."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


class Lost(NamedTuple):
    """What a format left out of a conversation."""

    texts: list[str]
    calls: list[str]                # names of functions
    tools: list[str]


def unwritten(messages: list[dict], written: str, answers: str) -> Lost:
    """Compare a conversation with its text and with what of it is trained, white space apart. A
    template may write a tool's text as a JSON string."""
    written, answers = "".join(written.split()), "".join(answers.split())
    texts = [m.get("content") or "" for m in messages]
    texts = [text for text in texts if "".join(text.split()) not in written
             and "".join(json.dumps(text, ensure_ascii=False)[1:-1].split()) not in written]
    tools = next((m["tools"] for m in messages if "tools" in m), [])
    names = [tool.get("function", tool).get("name", "") for tool in tools]
    calls = [call["function"]["name"] for m in messages for call in m.get("tool_calls", ())]
    return Lost(texts, [name for name in calls if name not in answers],
                [name for name in names if name not in written])


def check(example: dict) -> list[str]:
    """List the problems of one example: roles, order, empty or broken contents."""
    problems, expected = [], ["user"]
    messages = example["messages"]
    is_plain = len(messages) == 1 and is_text(example)
    for i, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if not is_plain and (role != "system" or i > 1):
            if role not in expected:
                problems.append(f"message {i} has role {role!r}; expected "
                                + " or ".join(map(repr, expected)) + ": after an optional system "
                                "message, user and assistant alternate; tools answer the assistant")
                break
            expected = NEXT[role]
        if not isinstance(content, str):
            problems.append(f"message {i} is {type(content).__name__}; expected a text")
        elif not content.strip() and role not in ("system", "tool") and "tool_calls" not in message:
            problems.append(f"message {i} ({role}) is empty; write it or drop the record")
        elif re.search("[\ud800-\udfff]", said(message)):
            problems.append(f"message {i} holds half a surrogate pair; save the text as UTF-8")
    if not (is_plain or any(m["role"] == "assistant" for m in messages)):
        problems.append("no assistant turn: nothing to learn from")
    elif messages[-1]["role"] in ("user", "tool") and not problems:
        problems.append(f"the last message is the {messages[-1]['role']}'s; expected an answer "
                        "after it")
    return problems


def unread_keys(record: dict) -> dict[str, set[str]]:
    """Return the keys that nothing reads: {"records": {"id"}, "messages": {"weight"}}."""
    keys = format_of(record)
    read, unread = {*keys, "system", "open", *FACT}, set()
    if keys == ("text",):
        read = {"text"}
    elif "attribute" in keys:
        read |= {"question", "answer"}
    elif keys == ("instruction", "output"):
        read.add("input")
    elif keys in (("messages",), ("conversations",)):
        read.add("tools")
        for turn in record[keys[0]]:
            role = turn.get("role", turn.get("from"))
            known = {"role", "content"} if keys == ("messages",) else {"from", "value"}
            known |= {"tool_calls"} if role in ("assistant", "gpt") else set()
            known |= {"name", "tool_call_id"} if role in ("tool", "observation") else set()
            unread |= {key for key in turn.keys() - known if turn[key] is not None}
    return {"records": {key for key in record.keys() - read if record[key] is not None},
            "messages": unread}


# ----- words -------------------------------------------------------------------------------------


def group_by(key: Callable, things: Iterable) -> dict:
    """Return {key(thing): [the things with this key]}; keys and things keep their order."""
    groups = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


def plain(text: str) -> str:
    """Return the text in lower case, with single spaces and composed accents."""
    return " ".join(normalize("NFC", str(text)).casefold().split())


def listed(sources: list[str], n: int = 5) -> str:
    """List n sources: "a.jsonl:1, a.jsonl:2 and 7 more"."""
    more = f" and {len(sources) - n} more" if len(sources) > n else ""
    return ", ".join(sources[:n]) + more


def conversations(items: list[dict]) -> list[int]:
    """Return for each sample the first one of its conversation: samples of one begin alike."""
    first = {}
    return [i if is_text(item["example"]) else first.setdefault(id(item["example"]), i)
            for i, item in enumerate(items)]
