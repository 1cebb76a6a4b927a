"""
Say what a file looks like that holds no records, and what to do with it.

    of_bytes(path, raw)      # ": is a PDF; put its text into a .txt file (pdftotext does)"
    of_text(path, text)      # ": looks like a WhatsApp export; ..."; None: looks like nothing known
"""

import json
import re
import shlex
import zipfile
from pathlib import Path

from . import chats

RECORDS = 'a record a line, {"prompt": "...", "completion": "..."}'
MAGIC = [   # (first bytes, what such a file is, the way out)
    (b"%PDF", "is a PDF", "put its text into a .txt file (pdftotext does)"),
    (b"\xd0\xcf\x11\xe0", "is an old Word or Excel file", "save a text as .txt, a table as .csv, "
     "in UTF-8"),
    (b"{\\rtf", "is a rich text file", "save it as plain text, .txt, in UTF-8"),
    (b"PAR1", "is a Parquet file", "write it as JSON lines (pandas: read_parquet, then to_json "
     "with orient='records', lines=True)"),
    (b"\x1f\x8b", "is compressed", "unpack it (gunzip)"),
    (b"SQLite format 3", "is a database", f"export {RECORDS}")]
ZIPPED = [  # (a folder or file in the zip, what it is, the way out)
    ("word/", "is a Word file", "save it as plain text, .txt, in UTF-8"),
    ("xl/", "is an Excel file", 'save it as "CSV UTF-8"'),
    ("content.xml", "is an OpenDocument file", "save a text as .txt, a table as .csv, in UTF-8"),
    ("_chat.txt", "is a zipped WhatsApp export", "unpack it, then python -m scripts.clean "
     "_chat.txt --assistant NAME")]


def of_bytes(path: Path, raw: bytes) -> str | None:
    """Say what a file is that is no UTF-8 text, by its first bytes; None for any other."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or _is_wide(raw):
        byte = f"(byte 0x{raw[0]:02x}): " if raw[0] >= 0x80 else ""
        return f":1: not UTF-8 {byte}it is UTF-16; save the file as UTF-8"
    if raw.startswith(b"PK\x03\x04"):
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        for inside, what, fix in ZIPPED:
            if any(name.startswith(inside) for name in names):
                return f": {what}; {fix}"
        return ": is a zip file; unpack it"
    return next((f": {what}; {fix}" for start, what, fix in MAGIC if raw.startswith(start)), None)


def _is_wide(raw):
    """Whether every second byte of the beginning is zero and the others are not."""
    even, odd = raw[0:64:2], raw[1:64:2]
    return len(raw) >= 8 and (not any(odd) and all(even) or not any(even) and all(odd))


def of_text(path: Path, text: str, is_table: bool = False) -> str | None:
    """Say what a text is that holds no records; None if it looks like nothing known. is_table: it
    was read as CSV."""
    start = text.lstrip()[:200].casefold()
    if chat := chats.kind_of(text):
        return (f": looks like a {chat} export; python -m scripts.clean {shlex.quote(str(path))} "
                "--assistant NAME makes dialogues of it")
    if re.match(r"<!doctype html|<html|<\?xml", start):
        return ": is a web page or XML; put its text into a .txt file"
    if start.startswith("{"):
        return _of_object(path, text)
    if path.suffix.lower() in (".txt", ".md", ".text", ".markdown") or is_table:
        return None                                   # any other text is plain text
    lines = [line for line in text.split("\n") if line.strip()][:20]
    for delimiter in "\t;,":
        counts = {line.count(delimiter) for line in lines}
        if len(counts) == 1 and counts != {0} and len(lines) > 1:
            return ":1: looks like CSV; name the file .csv, with a header such as question,answer"
    return None


def _of_object(path, text):
    """What a text is that begins with {: records in a file with another name, or one object over
    several lines."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        try:
            json.loads(text.lstrip().partition("\n")[0])
            return ":1: looks like JSON, a record a line; name the file .jsonl"
        except (ValueError, RecursionError):
            pass
    try:
        value = json.loads(text) if "\n" in text.strip() else None
    except (ValueError, RecursionError):
        return None
    if value is None:
        return None
    names = ", ".join(map(str, value))
    return (f": is one JSON object over several lines, with {names:.60}; expected a list of "
            f"records, or {RECORDS}")
