"""
Clean a file of dialogues before training: drop broken records, warn of odd ones.

    python -m scripts.clean my.jsonl                          # my.clean.jsonl and my.clean.md
    python -m scripts.clean my.jsonl --dry-run                # prints the report, writes nothing
    python -m scripts.clean my.jsonl --keep near --drop pii   # only warn of the one, drop the other
    python -m scripts.clean _chat.txt --assistant Anna        # WhatsApp; or Telegram's result.json

It reads what data.py reads. A record stays unchanged or is dropped whole: one bad answer drops its
dialogue, for every answer is trained on. Of equal records the first stays; what data.py refuses is
always dropped. The new file has a record a line; clean never writes to a file that exists.

Of an exported chat it makes dialogues: messages in a row are joined, a gap of hours begins another
one, each starts with somebody else and ends with the assistant; private data becomes stars.
"""

import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from tqdm import tqdm

import data
from lora import files
from lora.read import chats, kinds, messages
from lora.read import records as read_records
from lora.run import cli
from lora.use.text import loops, near_duplicates, rep, words

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
KINDS = TABLE["kinds"]    # kind: [what is done with such a record, what it is]
FEW, LONG = 12, 20        # words: fewer may repeat, more should end as a sentence does
CODE, END, FACE, FILLER, LAST, MOJIBAKE, PRIVATE = (
    re.compile("|".join(TABLE["patterns"][name]).replace("HIGH", TABLE["HIGH"]))
    for name in ("code", "end", "face", "filler", "last", "mojibake", "private"))
NARROW = str.maketrans("０１２３４５６７８９＠－＋", "0123456789@-+")


@dataclass
class Record:
    where: str       # line 17
    line: bytes      # its line in the new file
    examples: list   # empty if data.py refuses it
    faults: dict     # {kind: (why, excerpt)}

    def stays(self, drop: set[str]) -> bool:
        return bool(self.examples) and not drop & self.faults.keys()

    def answers(self) -> list[str]:
        """What is trained: the answers' words, or a plain text."""
        return [m["content"] for m in self.examples[0]["messages"]
                if m["role"] in ("assistant", "text")]


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.epilog = "\n".join(
        ["kinds:", *(f"  {k:9} {do}  {what}" for k, (do, what) in KINDS.items())])
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="JSONL, JSON, CSV, text or an exported chat; never "
        "written to")
    add("--assistant", metavar="NAME", help="of an exported chat: who is the assistant")
    add("--gap", type=float, default=6, metavar="HOURS", help="a longer silence ends a dialogue")
    add("--out", type=Path, help="the new file (default: FILE.clean.jsonl)")
    add("--report", type=Path, help="the report (default: like the new file, with .md)")
    add("--drop", nargs="+", metavar="KIND", choices=KINDS, default=[], action="extend",
        help="drop this kind too (default: as below)")
    add("--keep", nargs="+", metavar="KIND", choices=[*KINDS][2:], default=[], action="extend",
        help="only warn of this kind; not of refused and empty")
    add("--near", type=float, default=0.6, help="share of word triples in common")
    add("--dry-run", action="store_true", help="only report: print it, or write it to --report")
    args = parser.parse_args(argv)
    if not 0 < args.near <= 1:
        raise ValueError(f"clean: --near is {args.near:g}; expected above 0 and at most 1")
    if not args.gap > 0:
        raise ValueError(f"clean: --gap is {args.gap:g}; expected above 0 hours")
    drop = {k for k in KINDS if k in args.drop or KINDS[k][0] == "drop" and k not in args.keep}
    lines = [*read(args.file, args.assistant, args.gap)]
    out = args.out or args.file.with_name(f"{args.file.stem}.clean.jsonl")
    report = args.report or (None if args.dry_run else out.with_suffix(".md"))
    may_write(args.file, None if args.dry_run else out, report)
    records = [read_record(*line) for line in tqdm(lines, "cleaning", disable=len(lines) < 2000)]
    for mark in (mark_same, lambda left: mark_near(left, args.near), mark_unended):
        mark([r for r in records if r.stays(drop)])
    head, rows = describe(args.file.name, records, drop)
    print(head if report else head + rows)
    for kind in [*KINDS][2:]:
        if kind in drop and sum(kind in r.faults for r in records) > len(records) / 4:
            print(f"clean: {kind} is much of this file; is it meant? --keep {kind} only warns")
    stay = b"".join(r.line for r in records if r.stays(drop))
    if not stay:
        raise ValueError(f"clean: {args.file}: nothing would remain, so nothing was written; "
                         "--dry-run names every record, --keep KIND only warns of a kind")
    if not args.dry_run:
        write(out, stay)
    if report:
        write(report, (head + rows).encode("utf-8", "replace"))


def read(path: Path, assistant: str | None = None, gap: float = 6) -> Iterable[tuple[str, bytes]]:
    """Return (where, JSON) of each record: a line of JSONL, an item of a JSON list, a row of CSV, a
    text, a dialogue of an exported chat. Raises ValueError if there can be none."""
    raw = read_records.raw_bytes(path, "clean", "a .jsonl or .json file")
    if chat := chats.read(path):
        return read_chat(path, chat, assistant, gap)
    if assistant:
        raise ValueError(f"clean: {path} is no WhatsApp or Telegram export, so --assistant has no "
                         "use; leave it out")
    if path.suffix.lower() in read_records.TABLES | read_records.TEXTS:
        file = read_records.read(path)
        if file.problems:
            raise ValueError("\n".join(f"clean: {x}" for x in read_records.grouped(file.problems)))
        return [(source.replace(f"{path}:", "line ").replace(str(path), "text"), as_line(record))
                for source, record in file.records]
    return read_json(path, raw.removeprefix("\ufeff".encode()))


def read_json(path: Path, raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (where, bytes) of each line of JSONL, or item of a JSON list."""
    try:
        values = json.loads(raw.decode()) if raw.lstrip().startswith(b"[") else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"clean: {path}: not JSON: {error}; expected a list of records, or one a "
                         "line") from error
    if values is None and not re.search(rb"^\s*{.*}\s*$", raw, re.M):
        if kind := kinds.of_text(path, raw.decode("utf-8", "replace")):
            raise ValueError(f"clean: {path}{kind}")
    for n, line in enumerate(io.BytesIO(raw) if values is None else (), 1):
        if line.strip():
            yield f"line {n}", line
    for n, value in enumerate(values or (), 1):
        yield f"record {n}", as_line(value)


def as_line(value: object) -> bytes:
    """A record as a line; half surrogates go back to the escapes they were."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_chat(path: Path, chat: chats.Chat, assistant: str | None,
              gap: float) -> list[tuple[str, bytes]]:
    """Make dialogues of an exported chat, private data masked; print what became of it."""
    if assistant is None:
        names = ", ".join(f"{name!r} ({n:,} messages)" for name, n in chat.names()[:20])
        raise ValueError(f"clean: {path} is a {chat.kind} export. Whose messages are the answers? "
                         f"--assistant NAME; the names: {names or 'none'}")
    try:
        dialogues = chats.dialogues(chat, assistant, gap)
    except ValueError as error:
        raise ValueError(f"clean: {path}: {error}") from error
    masked, lines = 0, []
    for dialogue in dialogues:
        for message in dialogue.messages:
            if PRIVATE.search(message["content"].translate(NARROW)):
                message["content"] = mask(message["content"])
                masked += 1
        lines.append((dialogue.where, as_line({"messages": dialogue.messages})))
    people = ", ".join(f"{name} {n:,}" for name, n in chat.names()[:5])
    left_out = ", ".join(f"{n:,} {what}" for what, n in chat.left_out.items())
    print(f"clean: {path}: {chat.kind} export; messages: {people}; left out: {left_out or 'none'}")
    print(f"clean: {len(lines):,} dialogues, with silences under {gap:g} hours; {assistant} is the "
          f"assistant, everybody else the user; private data masked in {masked:,} messages")
    return lines


# ----- one record --------------------------------------------------------------------------------


def read_record(where: str, line: bytes) -> Record:
    """Read a record and collect its faults."""
    examples, by_kind = [], {}
    try:
        examples = messages.convert(json.loads(line.decode()), where)
        problems = [problem for example in examples for problem in messages.check(example)]
    except (ValueError, RecursionError) as error:
        problems = [f"not JSON: {error.msg} (column {error.colno})"
                    if isinstance(error, json.JSONDecodeError) else str(error)]
    for example in examples:
        for m in example["messages"]:
            if not isinstance(m["content"], str) or m["role"] == "tool" and not m["content"]:
                continue
            role = "call" if "tool_calls" in m else m["role"]      # its JSON is no prose
            for kind, *fault in faults(role, messages.said(m), "value" in example):
                by_kind.setdefault(kind, fault)
    if problems and "empty" not in by_kind:
        raw = re.sub(r"\\[nrt]", " ", line.decode("utf-8", "replace"))
        by_kind["refused"] = excerpt(problems[0], 0, 120), excerpt(raw)
    return Record(where, line, [] if problems else examples, by_kind)


def faults(role: str, text: str, fact: bool) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, why, excerpt) for each fault of a message."""
    if role != "system" and not any(c.isprintable() and not c.isspace() for c in text):
        yield "empty", f"the {role}'s message", excerpt(text)
        return
    if bad := MOJIBAKE.search(text):
        yield "mojibake", f"the {role}'s message", excerpt(text, *bad.span())
    if hits := PRIVATE.findall(text.translate(NARROW)):
        yield "pii", f"the {role}'s message", mask("; ".join(hits))
    if role != "assistant":
        return
    prose, tokens = CODE.sub("`", text), words(text)
    if not fact and (all(map(FILLER.fullmatch, tokens)) if tokens else
                     all(category(c)[0] in "PZC" or c in "~～^`" for c in text)):
        yield "filler", "all of the answer", excerpt(text)
    elif why := cut(text):
        yield "cut", f"ends with {why}", excerpt(text, len(text))
    again = rep(prose)
    spans = [prose[start:end] for start, end in loops(prose)] if again else []
    if again >= 0.5 and len(tokens) >= 2 * FEW:
        spans.append(prose)
    for span in spans:
        if len(words(span)) >= FEW and re.search(r"[^\W\d_]", span):
            yield "loop", f"{again:.0%} of it was said before", excerpt(span)
            return


def cut(text: str) -> str | None:
    """The end of an answer that stops in the middle, or None. It needs no full stop."""
    if len(re.findall(r"^[ \t]*```[^`\n]*$", text, re.M)) % 2:
        return "an open code fence"
    text = FACE.sub("`", CODE.sub("`", text).strip())
    if END.search(text[-40:]):
        return None
    last = LAST.search(text)
    if last and (len(words(text)) >= 5 or not last[0][-1].isalpha()):
        return f'"{last[0].strip()}"'
    if text.count('"') % 2 and len(re.findall(r'(?<!\d)"', text)) % 2:         # 5'10" is no quote
        return "an open quote"
    depth = 0
    for c in text if "„" not in text else "":                                 # 1) and [0, 1) may be
        depth = max(0, depth + (c in "([{（【“「『《") - (c in ")]}）】”」』》"))
    return "an open bracket or quote" if depth else None


def mask(text: str) -> str:
    """Replace personal data, but for its ends, by stars; the length stays."""
    def stars(hit):
        n = max(1, min(3, len(hit[0]) // 5))
        return hit[0][:n] + "*" * (len(hit[0]) - 2 * n) + hit[0][-n:]
    return PRIVATE.sub(stars, text.translate(NARROW))


def excerpt(text: str, start: int = 0, end: int = 50) -> str:
    """Show text[start:end] with its surroundings: one short line, masked."""
    start, text = max(0, start - 30), mask(text)
    end = min(len(text), max(end, start) + 30, start + 150)
    line = " ".join(text[start:end].split()).replace("`", "'")
    line = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line)
    return ("…" if start else "") + line + ("…" if end < len(text) else "")


# ----- records against others --------------------------------------------------------------------


def mark_same(records: list[Record]) -> None:
    """Mark records whose examples all occur earlier."""
    seen = {}
    for record in records:
        keys = [(data.prompt_of(e), data.answer_of(e)) for e in record.examples]
        if all(key in seen for key in keys):
            record.faults["same"] = f"as {seen[keys[0]]}", excerpt(record.answers()[-1])
        for key in keys:
            seen.setdefault(key, record.where)


def mark_near(records: list[Record], threshold: float) -> None:
    """Mark records whose answers, taken together, are nearly those of an earlier one."""
    long = [r for r in records if len(words(" ".join(r.answers()))) >= FEW
            and "group" not in r.examples[0] and "same" not in r.faults]
    for i, j, share in near_duplicates([" ".join(r.answers()) for r in long], threshold,
                                       first=True):
        new, old = long[j], long[i]
        new.faults["near"] = f"{share:.0%} as {old.where}", excerpt(" / ".join(new.answers()))


def mark_unended(records: list[Record]) -> None:
    """Mark long answers that end with a plain word, if at most one in ten does. An answer that
    starts with a small letter needs no full stop."""
    long = [(r, a.strip()) for r in records for a in r.answers() if len(words(a)) >= LONG]
    bare = [(r, a) for r, a in long if not a[0].islower()
            and re.search(r"(?:^|\s)[a-z'’]+$|[\u4e00-\u9fff]$", last := a.rpartition("\n")[2])
            and (re.search("[.!?] |[。！？]", last) or len(words(last)) >= LONG)]
    for r, answer in bare if len(bare) * 10 <= len(long) else ():
        r.faults["open"] = "ends with a plain word", excerpt(answer, len(answer))


# ----- writing -----------------------------------------------------------------------------------


def describe(name: str, records: list[Record], drop: set[str]) -> tuple[str, str]:
    """The report in Markdown: (its head with the counts, a line for each fault)."""
    stay = [r for r in records if r.stays(drop)]
    warned = sum(bool(r.faults) for r in stay)
    head = [f"# {name}, cleaned\n", f"{len(records)} records: {len(stay)} stay, {warned} of them "
            f"with a warning; {len(records) - len(stay)} are dropped.\n",
            "| kind     | action | records | what it is |", "|---|---|--:|---|"]
    head += [f"| {kind:8} | {'drop' if kind in drop else 'warn'}   | "
             f"{sum(kind in r.faults for r in records):7} | {what} |"
             for kind, (_, what) in KINDS.items()]
    rows = []
    for title, stays in (("Dropped", False), ("Stays, with a warning", True)):
        lines = [f"- {r.where}: **{kind}**, {why}" + (f": `{shown}`" if shown else "")
                 for r in records if r.stays(drop) == stays
                 for kind, (why, shown) in r.faults.items()]
        if lines:
            rows += [f"\n## {title}\n", *lines]
    return "\n".join(head) + "\n", "\n".join(rows) + "\n"


def may_write(source: Path, out: Path | None, report: Path | None) -> None:
    """Raise ValueError if a file to be written exists, or if both are one."""
    for option, path in (("--out", out), ("--report", report)):
        if path and os.path.lexists(path):
            what = "is the input" if path.exists() and path.samefile(source) else "exists already"
            raise ValueError(f"clean: {path} {what}; expected a new file in {option}")
    if out and report and out.resolve() == report.resolve():
        raise ValueError(f"clean: {out} is both --out and --report; expected two files")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and say so."""
    try:
        files.write(path, content)
    except ValueError as error:
        reason = error.__cause__.strerror
        raise ValueError(f"clean: {path}: cannot be written ({reason})") from error
    print(f"clean: wrote {path}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
