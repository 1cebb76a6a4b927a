"""
Read a file into records: JSON, JSONL, CSV with a header, plain text.

    file = read("my.csv")
    file.records      # [("my.csv:2", {"question": "Who?", "answer": "Me."}), ...]
    file.problems     # [("my.csv:7", "3 cells; the header has 2 ..."), ...]

What a record means is messages.py's part. A file of another kind is one ValueError that says what
it looks like and what to do (kinds.py).
"""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..files import unique_keys
from . import kinds

TEXTS, TABLES = {".txt", ".md", ".text", ".markdown"}, {".csv", ".tsv"}
HEADERS = [("subject", "attribute", "value"), ("question", "answer"), ("prompt", "completion"),
           ("instruction", "output"), ("text",)]


class File(NamedTuple):
    records: list[tuple[str, Any]]        # (source, record)
    problems: list[tuple[str, str]]       # (source, what is wrong)
    n_lines: int
    n_blank: int


def read(path: str | Path) -> File:
    """Read a file as its name ends: .csv and .tsv, .txt and .md, else JSON. Raises ValueError if
    it cannot be read, is not UTF-8 or is of another kind."""
    path = Path(path)
    text = decode(path, raw_bytes(path, "data", 'a .jsonl, .json, .csv, .txt or .md file, or '
                                  '"data.py"'))
    if path.suffix.lower() in TABLES:
        return table(path, text)
    if path.suffix.lower() in TEXTS:
        return document(path, text)
    return json_records(path, text)


def raw_bytes(path: Path, who: str, expected: str) -> bytes:
    """Read a file's bytes. Raises ValueError that begins with who if it cannot be read, or is of
    another kind than text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{who}: {path}: cannot be read ({error.strerror}); expected "
                         f"{expected}") from error
    if kind := kinds.of_bytes(path, raw):
        raise ValueError(f"{who}: {path}{kind}")
    return raw


def decode(path: str | Path, raw: bytes) -> str:
    """Decode UTF-8, with a byte order mark or without. Raises ValueError with the line."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:                # counts from behind a byte order mark
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"data: {path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x});"
                         " save the file as UTF-8") from error


# ----- JSON --------------------------------------------------------------------------------------


def json_records(path: Path, text: str) -> File:
    """Read a list of records, or a record a line. Lines end at \\n or \\r\\n and nowhere else: a
    U+2028 inside a text is no end of line."""
    lines = text.removesuffix("\n").split("\n") if text else []
    blank, records, problems = sum(not line.strip() for line in lines), [], []
    is_list = text.lstrip().startswith("[")
    for n, part in enumerate([text] if is_list else lines, 1):
        source = str(path) if is_list else f"{path}:{n}"
        if not part.strip():
            continue
        try:
            value = json.loads(part, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            problems.append((source, f"not JSON: {why(error, is_list)}"))
            continue
        records += [(f"{path}: record {i}", record) for i, record in enumerate(value, 1)
                    ] if is_list else [(source, value)]
    if problems and not any(isinstance(record, dict) for _, record in records):
        if kind := kinds.of_text(path, text):
            raise ValueError(f"data: {path}{kind}")
    return File(records, problems, len(lines), blank)


def why(error: Exception, has_lines: bool = False) -> str:
    """Say what is wrong with a JSON text, and where in its line, or in which line."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    line = f"line {error.lineno}, " if has_lines else ""
    return f"{error.msg} ({line}column {error.colno})"


# ----- tables and texts --------------------------------------------------------------------------


def table(path: Path, text: str) -> File:
    """Read CSV: a header, then a record a row; cells are divided by , ; or a tab."""
    csv.field_size_limit(10**9)                       # a cell may hold a whole text
    header = next((line for line in text.splitlines() if line.strip()), "")
    found = {delimiter: names_of(header, delimiter) for delimiter in ",;\t"}
    delimiter = max(found, key=lambda one: (is_known(found[one]), len(found[one])))
    n_lines = len(text.removesuffix("\n").split("\n")) if text else 0
    records, problems, names, end, n_blank = [], [], [], 0, 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = end + 1
        try:
            row = next(reader, None)
        except csv.Error as error:                    # a quote out of place: the rest is unsure
            problems.append((f"{path}:{start}", f'not CSV: {error}; a " inside a cell is ""'))
            break
        if row is None:
            break
        end = reader.line_num
        if not any(cell.strip() for cell in row):
            n_blank += end - start + 1
        elif not names:
            names = [cell.strip().casefold() for cell in row]
            must_be_known(path, start, names, text)
        elif len(row) != len(names):
            problems.append((f"{path}:{start}", f"{len(row)} cells; the header has {len(names)}: "
                             f'write "..." around a cell that holds {delimiter!r} or a line break'))
        else:
            cells = zip(names, row, strict=True)
            records.append((f"{path}:{start}", {
                name: cell for name, cell in cells if cell or is_required(name, names)}))
    return File(records, problems, n_lines, n_blank)


def names_of(line: str, delimiter: str) -> list[str]:
    """The column names in a header line."""
    return [cell.strip().casefold() for cell in next(csv.reader([line], delimiter=delimiter), [])]


def is_known(names: list[str]) -> bool:
    """Whether one of HEADERS is among the column names."""
    return any(set(header) <= set(names) for header in HEADERS)


def is_required(name: str, names: list[str]) -> bool:
    """Whether a column must have a text in every row; an empty cell of another is no key."""
    header = next(header for header in HEADERS if set(header) <= set(names))
    return name in header


def must_be_known(path: Path, line: int, names: list[str], text: str) -> None:
    """Raise ValueError if the columns have no known names, or two have one."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"data: {path}:{line}: columns are there twice: {', '.join(twice)}")
    if not is_known(names):
        kind = kinds.of_text(path, text, is_table=True)
        raise ValueError(f"data: {path}{kind}" if kind else
                         f"data: {path}:{line}: the header has {', '.join(names):.80}; expected "
                         "columns " + ", or ".join(" and ".join(one) for one in HEADERS)
                         + ": name them so in the first line")


def document(path: Path, text: str) -> File:
    """Read a text file as one record {"text": ...}."""
    if kind := kinds.of_text(path, text):
        raise ValueError(f"data: {path}{kind}")
    text = text.replace("\r\n", "\n").strip("\n")
    lines = text.split("\n")
    if not text.strip():
        raise ValueError(f"data: {path}: holds no text")
    return File([(str(path), {"text": text})], [], len(lines), sum(not x.strip() for x in lines))


# ----- problems ----------------------------------------------------------------------------------


def grouped(problems: Iterable[tuple[str, str]], shown: int = 5) -> list[str]:
    """Write problems, those of one kind together: a few of each, the rest counted. Problems are of
    one kind if they begin with the same words, numbers and quotations apart.

    >>> grouped([(f"a:{n}", f"message {n} is empty") for n in (1, 2, 3)], shown=1)
    ['a:1: message 1 is empty', 'and 2 more like this']
    """
    by_kind = {}
    for source, problem in problems:
        words = re.findall("[A-Za-z]+", re.sub("'[^']*'", "", re.split("[:;]", problem)[0]))
        by_kind.setdefault(tuple(words[:4]), []).append(f"{source}: {problem}")
    lines = []
    for alike in by_kind.values():
        lines += alike[:shown]
        if len(alike) > shown:
            lines.append(f"and {len(alike) - shown:,} more like this")
    return lines
