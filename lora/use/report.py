"""
A comparison as files to read: report.html for a browser, report.md for a text viewer or a review,
report.json for programs. The page is report.html beside this file, with the data put in: it needs
no network, and no text of a dialogue can become markup in it.
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).with_suffix(".html")
SLOT = "{{report}}"


def write(report, folder):
    """Write the three files; returns the path of report.html. Raises ValueError for a NaN, which
    no JSON can hold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
                "md": markdown(report), "html": page(report)}
    for end, text in contents.items():             # half a pair is written as its escape
        (folder / f"report.{end}").write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def page(report, template=PAGE, slot=SLOT):
    """The page with the data in it, as JSON in which nothing can end the script element."""
    text = json.dumps(report, ensure_ascii=False, allow_nan=False)
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    before, after = template.read_text(encoding="utf-8").split(slot)
    return before + text + after


def markdown(report):
    """Settings, metrics, matrix, moved words, and every prompt with its first answers."""
    columns = report["columns"]
    labels = [column["label"] for column in columns]
    parts = [f"# {cell(report['title'])}", cell(report["claim"]),
             table(["setting", "value"], report["head"]), "## Metrics",
             table(["metric", *labels], [
                 [" ".join(filter(None, [m["label"], m["unit"] and f"({m['unit']})"])),
                  *(estimate(m["values"].get(c["id"]), m) for c in columns)]
                 for m in report["metrics"]], right=True)]
    if matrix := report.get("matrix"):
        parts += ["## NLL per character of each persona's real replies",
                  table(["model", *matrix["personas"]], [
                      [row["label"], *(f"{nll:.3f}" for nll in nlls)]
                      for row, nlls in zip(matrix["rows"], matrix["nll"], strict=True)],
                        right=True)]
        share = {"digits": 0, "percent": True}
        for who, key in (("adapters", "accuracy"), ("system prompts", "prompted_accuracy")):
            if matrix.get(key):
                parts.append(f"Personas identified by the {who}: {estimate(matrix[key], share)}")
    if report.get("moved"):
        names = {column["id"]: column["label"] for column in columns}
        parts += ["## Words that moved most", table(["model", "more often", "less often"], [
            [names.get(m["column"], m["column"]),
             *(", ".join(f"{word} ({score:.1f})" for word, score in m[way])
               for way in ("more", "less"))] for m in report["moved"]])]
    parts.append(f"## Prompts, answered {cell(report['decodings'][0])}")
    for number, prompt in enumerate(report["prompts"], 1):
        answers = [prompt["answers"].get(column["id"]) for column in columns]
        cells = [a[0]["text"] + f"\n\n[{', '.join(a[0]['flags'])}]" * bool(a[0]["flags"])
                 if a else "" for a in answers]
        gold = [prompt["gold"]] if prompt.get("gold") is not None else []
        about = " · ".join(filter(None, (prompt["category"], prompt.get("theme"), prompt["id"])))
        parts += [f"### {number}. {cell(about)}",
                  table(["", "text"], [[m["role"], m["content"]] for m in prompt["messages"]]),
                  table([*labels, *["real reply"] * len(gold)], [cells + gold])]
    return "\n\n".join([*parts, "## How it was made", table(["", "value"], report["foot"])]) + "\n"


def estimate(value, metric):
    """0.431 [0.392, 0.470], or a dash where nothing was measured."""
    if not value:
        return "–"
    scale, digits = (100, metric["digits"]) if metric["percent"] else (1, metric["digits"])
    point, low, high = (None if value.get(key) is None else f"{scale * value[key]:z.{digits}f}"
                        for key in ("value", "low", "high"))
    return point + " %" * metric["percent"] + (f" [{low}, {high}]" if low and high else "")


def table(head, rows, right=False):
    """A pipe table; with right, all columns but the first are numbers."""
    rule = ["---", *["--:" if right else "---"] * (len(head) - 1)]
    lines = [map(cell, head), rule, *(map(cell, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text):
    """A text that stays one cell and stays text: no markup, no HTML, no line break."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
    text = re.sub(r"[&<>|\\]", lambda m: entities[m[0]], str(text))
    return "<br>".join(re.sub(r"([*_`~$\[\]])", r"\\\1", text).splitlines())
