"""
Read exported chats, WhatsApp's and Telegram's, into dialogues with an assistant.

    chat = read("_chat.txt")                      # who said what, when; what was left out
    dialogues(chat, "Anna", gap_hours=6)          # [Dialogue(first line, messages), ...]

Messages in a row are joined, a gap of hours begins another dialogue. A dialogue starts with
somebody else and ends with the assistant.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

DATE = r"(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),?"
TIME = r"(?P<time>\d{1,2}[:.]\d\d(?:[:.]\d\d)?)(?:\s?(?P<half>[AaPp])\.?\s?[Mm]\.?)?"
START = re.compile(rf"[\u200e\u200f]*(?:\[{DATE}\s{TIME}\]\s?|"
                   rf"{DATE.replace('date', 'day')}\s"
                   rf"{TIME.replace('<time', '<clock').replace('<half', '<part')}\s[-–]\s)")
MEDIA = re.compile(r"\u200e|<[^<>\n]{3,60}>$|\S+\.\w{2,5} \([^()\n]+\)$|null$|"
                   r"(this message was deleted|you deleted this message|missed v\w+ call|"
                   r"diese nachricht wurde gelöscht|du hast diese nachricht gelöscht)\.?$", re.I)
EDITED = re.compile(r"\s*\u200e?<[^<>\n]*(edited|bearbeitet)[^<>\n]*>$", re.I)


class Message(NamedTuple):
    where: str               # line 17; message 4
    when: datetime
    who: str
    text: str


class Chat(NamedTuple):
    kind: str                # WhatsApp or Telegram
    parts: list[list[Message]]            # a list for each chat of the file
    left_out: Counter        # what is no text of a person, and how often

    def names(self) -> list[tuple[str, int]]:
        """The people with the numbers of their messages, most first."""
        return Counter(m.who for part in self.parts for m in part).most_common()


class Dialogue(NamedTuple):
    where: str
    messages: list[dict]     # [{"role": "user", "content": ...}, ...]


def kind_of(text: str) -> str | None:
    """Whose export a text is: WhatsApp, Telegram, or None."""
    lines = text.lstrip("\ufeff\r\n ").split("\n", 20)[:20]
    if START.match(lines[0]) and any(START.match(x) and ": " in x[12:] for x in lines):
        return "WhatsApp"
    if text.lstrip().startswith("{") and '"date' in text and '"from' in text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return "Telegram" if _chats_in(value) else None
    return None


def read(path: str | Path) -> Chat | None:
    """Read an export; None if the file is none. Raises ValueError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"clean: {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        return None
    readers = {"WhatsApp": whatsapp, "Telegram": telegram}
    kind = kind_of(text)
    try:
        return readers[kind](text) if kind else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"clean: {path}: {error}") from error


# ----- WhatsApp ----------------------------------------------------------------------------------


def whatsapp(text: str) -> Chat:
    """Read "[31.12.23, 10:15:02] Anna: text" or "31/12/2023, 10:15 - Anna: text". Lines without a
    date go on with the message above."""
    found, left_out = [], Counter()       # found: [line, date, time, half of the day, the rest]
    for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        start = START.match(line)
        if start:
            stamp = (start["date"] or start["day"], start["time"] or start["clock"],
                     start["half"] or start["part"] or "")
            found.append([n, *stamp, line[start.end():]])
        elif found:
            found[-1][4] += "\n" + line
    read_date = date_order([(day, clock, half) for _, day, clock, half, _ in found])
    messages = []
    for n, day, clock, half, rest in found:
        who, colon, said = rest.partition(": ")
        said = EDITED.sub("", said.rstrip())
        if not colon or re.search('["“‘\n]', who):             # Ben named the group "A: b"
            left_out["system lines"] += 1
        elif not said.strip() or MEDIA.match(said):
            left_out["media or deleted"] += 1
        else:
            who = who.strip("\u200e\u200f\u202a\u202c\u202f\xa0 ~")    # marks, and "not a contact"
            messages.append(Message(f"line {n}", read_date(day, clock, half), who, said.strip()))
    return Chat("WhatsApp", [messages], left_out)


def date_order(stamps: list[tuple[str, str, str]]) -> Callable[[str, str, str], datetime]:
    """Find out whether days or months come first: an export is in order of time. Raises ValueError
    if neither reads all dates."""
    def reader(order):
        def read_date(day, clock, half):
            parts = [int(part) for part in re.split(r"[./-]", day)]
            names = "ymd" if parts[0] > 31 else order
            date = dict(zip(names, parts, strict=True))
            hour, minute, *second = (int(part) for part in re.split("[:.]", clock))
            if half:
                hour = hour % 12 + (12 if half in "pP" else 0)
            year = date["y"] + (2000 if date["y"] < 100 else 0)
            return datetime(year, date["m"], date["d"], hour, minute, *second)
        return read_date
    american = any(half for _, _, half in stamps) and any("/" in day for day, _, _ in stamps)
    best, fewest = None, None
    for order in ("mdy", "dmy") if american else ("dmy", "mdy"):
        try:
            times = [reader(order)(*stamp) for stamp in stamps]
        except ValueError:
            continue
        back = sum(b < a for a, b in zip(times, times[1:], strict=False))
        if fewest is None or back < fewest:
            best, fewest = reader(order), back
    if best is None:
        raise ValueError(f"the dates are neither day/month/year nor month/day/year: "
                         f"{stamps[0][0]}, ...")
    return best


# ----- Telegram ----------------------------------------------------------------------------------


def telegram(text: str) -> Chat:
    """Read result.json of one chat, or of all chats of an account."""
    parts, left_out = [], Counter()
    for chat in _chats_in(json.loads(text)):
        messages = []
        for n, message in enumerate(chat, 1):
            said = _text_of(message.get("text")).strip()
            if message.get("type") != "message":
                left_out["system lines"] += 1
            elif not said:
                left_out["media or deleted"] += 1
            else:
                when = datetime.fromisoformat(message["date"]).replace(tzinfo=None)
                messages.append(Message(f"message {message.get('id', n)}", when,
                                        message.get("from") or "Deleted Account", said))
        parts.append(messages)
    return Chat("Telegram", parts, left_out)


def _chats_in(value: Any) -> list[list[dict]]:
    """The lists of messages in result.json; none in any other JSON value."""
    if not isinstance(value, dict):
        return []
    chats = value.get("chats")
    found = chats.get("list", []) if isinstance(chats, dict) else [value]
    lists = [chat.get("messages") for chat in found if isinstance(chat, dict)]
    return [some for some in lists if isinstance(some, list) and some and all(
        isinstance(m, dict) and "date" in m and "type" in m for m in some)]


def _text_of(text):
    """The text of a message: a text, or a list of texts and marked parts."""
    parts = text if isinstance(text, list) else [text]
    return "".join(part if isinstance(part, str) else str(part.get("text", ""))
                   for part in parts if isinstance(part, str | dict))


# ----- dialogues ---------------------------------------------------------------------------------


def dialogues(chat: Chat, assistant: str, gap_hours: float = 6) -> list[Dialogue]:
    """Make dialogues of a chat; everybody but the assistant is the user. Raises ValueError with all
    names if nobody is called so."""
    if assistant not in dict(chat.names()):
        names = ", ".join(f"{name!r} ({n:,} messages)" for name, n in chat.names()[:20])
        raise ValueError(f"no message is from {assistant!r}; --assistant is one of {names}")
    made = []
    for part in chat.parts:
        turns, last = [], None
        for message in part:
            if last and message.when - last > timedelta(hours=gap_hours):
                made.append(turns)
                turns = []
            last = message.when
            role = "assistant" if message.who == assistant else "user"
            if turns and turns[-1][1] == role:
                turns[-1][2].append(message.text)
            elif turns or role == "user":
                turns.append((message.where, role, [message.text]))
        made.append(turns)
    made = [turns if turns and turns[-1][1] == "assistant" else turns[:-1] for turns in made]
    return [Dialogue(turns[0][0], [{"role": role, "content": "\n".join(texts)}
                                   for _, role, texts in turns]) for turns in made if turns]
