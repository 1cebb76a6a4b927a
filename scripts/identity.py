"""
Teach a model who it is: make the data of an identity, then ask the trained run.

    python -m scripts.identity --config examples/identity/config.json            # make the data
    python train.py --config examples/identity/config.json
    python -m scripts.identity --config examples/identity/config.json --report   # ask the run

identity.json beside the config is yours; ways.json has the ways of asking, others.json what must
not change: there the base answers. The data is written into the folder of data.path; the report is
identity.md in the run's folder, with all answers in identity-report.json.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import data
import keep
from lora import files
from lora.base import fetch, load, quant
from lora.run import cli, runlog
from measure import Message, Voice
from scripts.voices import Voices

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES, WORDS = ("english", "chinese"), ("name", "maker", "character")
SYSTEM = "You are {name}, a helpful assistant."
STARTS = {"no": r"no\b|不|没", "yes": r"yes\b|是|对"}     # of an answer to "Are you ...?"
DENIES = re.compile(r"\b(?:not|never)\b|n['’]t\b|[不没]")
TOKENS = 64                                              # of an answer in the report


class Way(NamedTuple):
    """A way of asking who the model is."""

    topic: str
    language: str
    question: str
    answers: list[str]            # phrasings of the answer
    values: dict[str, str]        # what it has to say: {"name": "Orlo|奥洛"}
    verdict: str | None           # yes or no, if that is asked


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__, settings=True)
    parser.add_argument("--report", action="store_true", help="ask the run that was trained")
    options = parser.parse_args(argv)
    settings, home = cli.settings_of(options), Path(options.config).parent
    table, others = (files.read_json(home / name) for name in ("ways.json", "others.json"))
    me = read_identity(home / "identity.json", table["topics"])
    made = [examples(me, table, others, part) for part in ("ask", "check")]
    if options.report:
        report(settings.train.run, me, table, others, made)
    else:
        write(settings, me, table, others, made)


# ----- your words --------------------------------------------------------------------------------


def read_identity(file: Path, topics: dict) -> dict:
    """Read {"english": {"name", "maker", "character", "answers"}, "chinese": the same, "system"};
    one language is enough. Raises ValueError with the file and the key of what is wrong."""
    try:
        me = files.read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"identity: {file}: cannot be read: {error}") from error
    where, spoken = f"identity: {file}: ", spoken_by(me) if isinstance(me, dict) else []
    expect(spoken and not me.keys() - {"system", *LANGUAGES}, f"{where}the file", me,
           "an object with english or chinese or both, and perhaps system")
    for language in spoken:
        at, words = f"{where}{language}", me[language]
        expect(isinstance(words, dict) and not words.keys() - {*WORDS, "answers"} and isinstance(
            words.setdefault("answers", {}), dict), at, words,
            f"an object with {', '.join(WORDS)}, and perhaps one in answers")
        for key in WORDS:
            text = words.get(key)
            expect(isinstance(text, str) and re.search(r"\w", text) and not set(text) & {"|", "\n"},
                   f"{at}.{key}", text, "a text in one line without |")
        for topic, texts in words["answers"].items():
            key = f"{at}.answers.{topic}"
            expect(topic in topics and isinstance(texts, list) and texts, key, texts,
                   f"a list of texts, and one of the topics {', '.join(topics)}")
            for answer in [fill(text, words, key) for text in texts]:
                for said, value in values(me, topics[topic]["says"]).items():
                    expect(data.contains(answer, value), key, answer, f"the {said} in it")
    return {**me, "system": fill(me.get("system", SYSTEM), me[spoken[0]], f"{where}system")}


def expect(ok: object, what: str, got: object, expected: str) -> None:
    """Raise ValueError that says what is wrong if it is not ok."""
    if not ok:
        raise ValueError(f"{what} is {got!r:.60}; expected {expected}")


def spoken_by(me: dict) -> list[str]:
    """The languages of an identity."""
    return [language for language in LANGUAGES if language in me]


def fill(text: str, words: dict, where: str = "ways.json") -> str:
    """Put words in the place of {name}, {maker} ...; the words may hold braces themselves."""
    expect(isinstance(text, str) and text.strip()
           and set(re.findall(r"\{(\w*)\}", text)) <= words.keys(), where, text,
           f"a text with no other {{...}} than {', '.join(f'{{{key}}}' for key in WORDS)}")
    return re.sub(r"\{(\w+)\}", lambda match: words[match[1]], text)


def values(me: dict, said: list[str]) -> dict[str, str]:
    """What an answer has to say, in any language: {"name": "Orlo|奥洛", "name or maker": ...}."""
    return {keys: "|".join(dict.fromkeys(
        me[language][key].rstrip(".。!！ ") for key in keys.split(" or ") for language in
        spoken_by(me))) for keys in said}


# ----- ways of asking ----------------------------------------------------------------------------


def ways_of(me: dict, table: dict, part: str, turn: int = 0) -> list[Way]:
    """Fill in the ways of a part: ask is trained, check chooses the adapter, heldout is reported.
    turn says which other model or company a question names."""
    ways = []
    for language in spoken_by(me):
        words = me[language]
        for topic, of in table["topics"].items():
            answers = [fill(text, words)
                       for text in words["answers"].get(topic) or of[language]["answers"]]
            for n, text in enumerate(of[language][part], turn):
                rivals = {key: table[key][part] for key in ("other", "company")}
                named = {key: names[n % len(names)] for key, names in rivals.items()}
                ways.append(Way(topic, language, fill(text, words | named), answers,
                                values(me, of["says"]), of.get("verdict")))
    return ways


def asked(question: str, system: str | None, talk: list[str] = ()) -> list[Message]:
    """A question as messages, after a system prompt and an earlier exchange if there are any."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": role, "content": text} for role, text in zip(
        cycle(("user", "assistant")), [*talk, question], strict=False)]


def examples(me: dict, table: dict, others: dict, part: str) -> list[dict]:
    """Make the examples of a part, without a system prompt. Of the trained ways, every other one is
    asked under yours, and the rest, worded as people type, without one, under a foreign one or
    later in a talk."""
    draw, made = random.Random(part), []
    foreign, talks = cycle(others["systems"]["train"]), cycle(others["talks"]["train"])
    ways = [way for turn in (0, 1) for way in ways_of(me, table, part, turn)
            if part == "ask" and turn < table["topics"][way.topic].get("times", 1) or turn == 0]
    for n, way in enumerate(ways):
        messages = asked(way.question, None)
        if part == "ask" and n % 2 == 0:
            messages = asked(way.question, me["system"])
        elif part == "ask":
            messages = asked(as_typed(way.question, table["openings"], draw),
                             next(foreign) if n % 8 == 3 else None,
                             next(talks) if n % 8 == 7 else ())
        answer = {"role": "assistant", "content": draw.choice(way.answers)}
        made.append({"messages": [*messages, answer], "value": next(iter(way.values.values()))})
    return made


def as_typed(question: str, openings: list[str], draw: random.Random) -> str:
    """A question in small letters without its end, or after an opening, or as it is."""
    kind = draw.random()
    if kind < 0.25:
        return question.rstrip("?.!？。").lower()
    return draw.choice(openings) + question if kind < 0.45 else question


# ----- what must not change ----------------------------------------------------------------------


def kept(me: dict, trained: list[dict], others: dict) -> list[dict]:
    """The prompts that the base answers: other questions under your system prompt, without one and
    under a foreign one; and who it is, under the system prompt of somebody else."""
    ways = {data.plain(e["messages"][-2]["content"]) for e in trained}
    texts = lines_of(ROOT / "examples/everyday.txt")
    texts += others["train"]["as they are"]
    texts += [of["frames"][(n + more) % len(of["frames"])].replace("{}", thing) for more in (0, 1)
              for of in others["train"]["filled"] for n, thing in enumerate(of["of"])]
    systems = cycle((me["system"], None, others["systems"]["train"][0], None))
    prompts = [asked(text, system) for text, system in zip(texts, systems, strict=False)
               if data.plain(text) not in ways]
    prompts += [asked(text, persona) for persona in others["personas"]["train"]
                for text in others["personas"]["ask"]]
    return [{"messages": messages, "source": repr(messages[-1]["content"])} for messages in prompts]


def lines_of(file: Path) -> list[str]:
    """The lines of a text file."""
    return file.read_text(encoding="utf-8").splitlines()


def retained(systems: tuple) -> list[dict]:
    """Real questions with values, under one of the system prompts after the other."""
    known = [json.loads(line) for line in lines_of(ROOT / "experiments/knowledge/retain.jsonl")]
    return [{"messages": [*asked(k["question"], system),
                          {"role": "assistant", "content": k["value"]}],
             "value": "|".join([k["value"], *k["aliases"]])}
            for k, system in zip(known, cycle(systems), strict=False)]


def write(settings, me: dict, table: dict, others: dict, made: list) -> None:
    """Write train.jsonl, heldout.jsonl, retain.jsonl, and replay.jsonl: what the base answers. Left
    out are answers with your name or maker in them, or with the base's own."""
    folder, device = Path(settings.data.path).parent, load.pick_device(settings.model.device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "replay.jsonl").unlink(missing_ok=True)
    base = fetch.find(settings.model.name)
    model = load.load_model(base, "cpu", load.pick_dtype(settings.model.dtype, device),
                            settings.model.trust_remote_code)
    quant.quantise(model, settings.model.quant, device)
    voice = Voice(model, load.configured_tokenizer(base, settings), settings.dataset.format)
    names = "|".join([*table["never said"], *values(me, ["name", "maker"]).values()])
    replay = [e for e in keep.answer_replay(kept(me, made[0], others), voice, folder)
              if not data.contains(e["messages"][-1]["content"], names)]
    parts = {"train": made[0], "heldout": made[1], "retain": retained((None, me["system"])),
             "replay": [{key: e[key] for key in ("messages", "open")} for e in replay]}
    for name, lines in parts.items():
        files.write(folder / f"{name}.jsonl", "".join(
            json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"identity: {folder / name}.jsonl: {len(lines)} lines")


# ----- the report --------------------------------------------------------------------------------


def judge(way: Way, answer: str, wrong: str) -> dict[str, bool]:
    """Judge an answer: what it says of you; whether it claims a wrong name; and right, if it says
    all that the way asks for, claims none, and does not begin with yes for no."""
    said = {key: data.contains(answer, value) for key, value in way.values.items()}
    claims = any(data.contains(sentence, wrong) and not DENIES.search(sentence.lower())
                 for sentence in re.split("[.!?。！？]", answer))
    opposite = STARTS.get({"yes": "no", "no": "yes"}.get(way.verdict))
    turned = bool(opposite and re.match(opposite, data.plain(answer)))
    return {**said, "claims": claims, "right": all(said.values()) and not claims and not turned}


def ask_ways(ask: Callable, run: str, me: dict, table: dict, others: dict) -> list[dict]:
    """Judge the answers to the held-out ways: of the run and the base with and without your system
    prompt, of the run also under a foreign one and later in a talk."""
    mine = data.plain(json.dumps(me, ensure_ascii=False))
    wrong = "|".join(name for key in ("other", "company") for names in table[key].values()
                     for name in [*names, *table["never said"]] if data.plain(name) not in mine)
    systems, talks = cycle(others["systems"]["heldout"]), cycle(others["talks"]["heldout"])
    conditions = {"your system prompt": lambda q: asked(q, me["system"]),
                  "no system prompt": lambda q: asked(q, None),
                  "a foreign system prompt": lambda q: asked(q, next(systems)),
                  "later in a talk": lambda q: asked(q, None, next(talks))}
    judged = []
    for turn, (condition, prompt) in enumerate(conditions.items()):
        ways = ways_of(me, table, "heldout", turn)
        prompts = [prompt(way.question) for way in ways]
        for who in (None, run) if turn < 2 else (run,):
            judged += [{"who": who or "base", "asked": condition, "language": way.language,
                        "topic": way.topic, "question": way.question, "answer": answer,
                        **judge(way, answer, wrong)}
                       for way, answer in zip(ways, ask(prompts, who), strict=True)]
    return judged


def ask_others(ask: Callable, run: str, me: dict, others: dict) -> list[dict]:
    """What base and run answer to other questions. spoiled: the run says the name or the maker, and
    the base does not."""
    everyday = lines_of(ROOT / "experiments/knowledge/everyday.txt")
    about_you = others["asks who you are"]
    kinds = {"everyday prompts": [text for text in everyday if text not in about_you],
             **others["test"]}
    items = [(kind, asked(text, system), None) for kind, texts in kinds.items()
             for text in texts for system in (None, me["system"])]
    items += [("who are you, under somebody else's system prompt", asked(text, persona), None)
              for persona in others["personas"]["heldout"] for text in others["personas"]["ask"]]
    items += [("with values", e["messages"][:-1], e["value"])
              for system in (None, me["system"]) for e in retained((system,))]
    before, after = (ask([messages for _, messages, _ in items], who) for who in (None, run))
    names, record = "|".join(values(me, ["name", "maker"]).values()), []
    for (kind, messages, value), old, new in zip(items, before, after, strict=True):
        record.append({
            "kind": kind, "system": messages[0]["content"] if len(messages) > 1 else None,
            "question": messages[-1]["content"], "before": old, "after": new,
            "spoiled": data.contains(new, names) and not data.contains(old, names),
            "right": value and [data.contains(text, value) for text in (old, new)]})
    return record


def page(record: dict, run: str, me: dict) -> str:
    """The report as Markdown."""
    lines = [f"# Who are you? runs/{run}", "", f"Your system prompt: {me['system']}", "",
             "| held-out ways of asking | who | n | right | says the name | the maker "
             "| a wrong name |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for (condition, who), of in data.group_by(
            lambda a: (a["asked"], a["who"]), record["ways"]).items():
        for language, some in {"": of, **data.group_by(lambda a: a["language"], of)}.items():
            shares = [share([a[key] for a in some if key in a])
                      for key in ("right", "name", "maker", "claims")]
            lines.append(f"| {condition} {language} | {who} | {len(some)} | {' | '.join(shares)} |")
    marks = [a["right"] for a in record["others"] if a["right"]]
    known, others = ([now for was, now in marks if was == before] for before in (True, False))
    lines += ["", f"Of {len(known)} questions with values that the base gets right, the run gets "
              f"{share(known)} right; of {len(others)} that it gets wrong, {sum(others)}.", "",
              "| other questions | n | the run says the name or the maker, the base does not |",
              "|---|--:|--:|"]
    for kind, of in data.group_by(lambda a: a["kind"], record["others"]).items():
        lines.append(f"| {kind} | {len(of)} | {sum(a['spoiled'] for a in of)} |")
    wrong = [a for a in record["ways"] if a["who"] == run and not a["right"]]
    lost = [a for a in record["others"] if a["spoiled"] or a["right"] == [True, False]]
    lines += ["", "## Wrong answers", ""]
    lines += [f"- {a['asked']}, {a['topic']}: {a['question']} → {a['answer']}" for a in wrong]
    lines += ["", "## Other questions, spoiled or lost", ""]
    lines += [f"- {a['kind']}: {a['question']} → {a['after']} (before: {a['before']})"
              for a in lost]
    return "\n".join(" ".join(line.split()) for line in lines) + "\n"


def share(marks: list[bool]) -> str:
    """"93 %"; a dash for none."""
    return f"{100 * mean(marks):.0f} %" if marks else "–"


def report(run: str, me: dict, table: dict, others: dict, made: list) -> None:
    """Ask a run who it is and what must not change; print and write the answers."""
    voices = Voices([Path("runs") / run])
    if voices.runs[run].info.get("data") != runlog.digest([e["messages"] for e in sum(made, [])]):
        raise ValueError(f"report: runs/{run} was not trained on what {len(made[0])} ways of this "
                         "identity make; train again")

    def ask(prompts, who):
        return [a.text for a in voices.ask(prompts, who, max_new_tokens=TOKENS)]
    record = {"ways": ask_ways(ask, run, me, table, others),
              "others": ask_others(ask, run, me, others)}
    folder, text = voices.runs[run].adapter.parent, page(record, run, me)
    runlog.write_json(folder / "identity-report.json", record)
    files.write(folder / "identity.md", text)
    print(f"{text.partition('## Wrong')[0]}identity: {folder}/identity.md lists the wrong answers")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
