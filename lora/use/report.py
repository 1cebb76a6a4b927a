"""
A comparison as files to read: report.html for a browser, report.md for a text viewer, report.json
for programs. report.html beside this file is the template of the page: it needs no network, and no
text of a dialogue can become markup in it.
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).with_suffix(".html")
SLOT = "{{report}}"


def write(report: dict, folder: Path | str) -> Path:
    """Write the three files and return the path of report.html. Raises ValueError for a NaN, which
    JSON cannot hold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
                "md": markdown(report), "html": page(report)}
    for end, text in contents.items():             # half a surrogate pair becomes its escape
        (folder / f"report.{end}").write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"


def page(report: dict, template: Path = PAGE, slot: str = SLOT) -> str:
    """The page with the data in it, as JSON in which nothing can end the script element."""
    text = json.dumps(report, ensure_ascii=False, allow_nan=False)
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    before, after = template.read_text(encoding="utf-8").split(slot)
    return before + text + after


def markdown(report: dict) -> str:
    """Settings, metrics, matrix, moved words, and every prompt with its first answers."""
    labels = {column["id"]: column["label"] for column in report["columns"]}
    metrics = [[f"{m['label']} ({m['unit']})" if m["unit"] else m["label"],
                *(estimate(m["values"].get(id), m) for id in labels)] for m in report["metrics"]]
    parts = [f"# {cell(report['title'])}", cell(report["claim"]),
             table(["setting", "value"], report["head"]),
             "## Metrics", table(["metric", *labels.values()], metrics, right=True)]
    if matrix := report["matrix"]:
        nats = [[row["label"], *(f"{nll:.3f}" for nll in nlls)]
                for row, nlls in zip(matrix["rows"], matrix["nll"], strict=True)]
        parts += ["## NLL per character of each persona's real replies",
                  table(["model", *matrix["personas"]], nats, right=True)]
        for who, key in (("adapters", "accuracy"), ("system prompts", "prompted_accuracy")):
            if matrix[key]:
                share = estimate(matrix[key], {"digits": 0, "percent": True})
                parts.append(f"Personas identified by the {who}: {share}")
    if report["moved"]:
        moved = [[labels[m["column"]], *(", ".join(f"{word} ({z:.1f})" for word, z in m[way])
                                         for way in ("more", "less"))] for m in report["moved"]]
        parts += ["## Words that moved most", table(["model", "more often", "less often"], moved)]
    parts.append(f"## Prompts, answered {cell(report['decodings'][0])}")
    for number, prompt in enumerate(report["prompts"], 1):
        heads = [*labels.values()]
        cells = [_first(prompt["answers"].get(id)) for id in labels]
        if prompt["gold"] is not None:
            heads.append("real reply")
            cells.append(prompt["gold"])
        about = " · ".join(filter(None, (prompt["category"], prompt["theme"], prompt["id"])))
        parts += [f"### {number}. {cell(about)}",
                  table(["", "text"], [[m["role"], m["content"]] for m in prompt["messages"]]),
                  table(heads, [cells])]
    return "\n\n".join([*parts, "## How it was made", table(["", "value"], report["foot"])]) + "\n"


def _first(answers):
    """The first answer with its flags; "" without one."""
    if not answers:
        return ""
    flags = ", ".join(answers[0]["flags"])
    return f"{answers[0]['text']}\n\n[{flags}]" if flags else answers[0]["text"]


def estimate(value: dict | None, metric: dict) -> str:
    """0.431 [0.392, 0.470], or a dash where nothing was measured."""
    if not value:
        return "–"
    scale, unit = (100, " %") if metric["percent"] else (1, "")
    point, low, high = (None if value.get(key) is None else
                        f"{scale * value[key]:z.{metric['digits']}f}"
                        for key in ("value", "low", "high"))
    return f"{point}{unit} [{low}, {high}]" if low and high else f"{point}{unit}"


def table(head: list[str], rows: list[list], right: bool = False) -> str:
    """A pipe table; with right, all columns but the first are numbers."""
    lines = [[cell(text) for text in row] for row in (head, *rows)]
    lines.insert(1, ["---"] + ["--:" if right else "---"] * (len(head) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text) -> str:
    """A text that stays one cell and stays text: no markup, no HTML, no line break."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
    text = re.sub(r"[&<>|\\]", lambda m: entities[m[0]], str(text))
    return "<br>".join(re.sub(r"([*_`~$\[\]])", r"\\\1", text).splitlines())
