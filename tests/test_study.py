"""The notebook and the page that scripts/study.py makes of docs/maths.md, and the Chinese text."""

import html
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_show import assert_same_output

from scripts import study

ROOT = Path(__file__).parents[1]
TEXT, SHOW = (path.read_text(encoding="utf-8") for path in (study.TEXT, study.SHOW))
BOOK = json.loads(study.notebook(TEXT, SHOW))
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
RUNNER = """import contextlib, io, json, sys
session, outputs = {"__name__": "__main__"}, {}
for cell in json.load(open("maths.ipynb", encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), session)
        outputs[cell["id"]] = out.getvalue()
json.dump(outputs, sys.stdout)"""
SHORT = """# A title

Words with `code` & **bold**, [a link](use.md).

## 1. First

```sh
python -m scripts.show start
```

```
out < 1
```

| a | b |
|---|---|
| 1 | `<2>` |

- `lora/layer.py`: `return self.scaling * (self.lora_B @ self.lora_A)`
"""


# ----- the notebook ------------------------------------------------------------------------------


def test_the_notebook_is_what_the_command_makes():
    made = study.notebook(TEXT, SHOW)
    assert (ROOT / "docs/maths.ipynb").read_text(encoding="utf-8") == made, (
        "run python -m scripts.study")


def test_the_notebook_is_nbformat_4_5_and_holds_the_whole_text():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert [cell["id"] for cell in CODE] == ["setup", *study.COMMAND.findall(TEXT)]
    prose = "\n".join("".join(cell["source"]) for cell in BOOK["cells"])
    for block in study.blocks(TEXT):
        if not block.startswith(("```", "<picture>")):
            assert block in prose
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.real
def test_the_notebook_runs_from_docs_and_gives_the_outputs_of_the_text():
    done = subprocess.run([sys.executable, "-c", RUNNER], cwd=ROOT / "docs", capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr
    outputs = json.loads(done.stdout)
    for cell in CODE:
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert_same_output(outputs[cell["id"]], stored)


def test_a_command_that_show_does_not_have_is_named():
    with pytest.raises(ValueError, match="runs startt; expected functions of scripts/show.py: "):
        study.notebook(SHORT.replace("show start", "show startt"), SHOW)


# ----- the page ----------------------------------------------------------------------------------


def test_what_the_page_makes_of_markdown():
    page = study.page(SHORT)
    assert "<title>A title</title>" in page and '<a href="../docs/use.md">a link</a>' in page
    assert 'Words with <code class="short">code</code> &amp; <b>bold</b>' in page
    assert '<pre class="run">python -m scripts.show start\n</pre>' in page
    assert '<pre class="out">out &lt; 1\n</pre>' in page
    assert '<td><code class="short">&lt;2&gt;</code></td>' in page
    with pytest.raises(ValueError, match="lora/layer.py has no line 'return self.scale"):
        study.page(SHORT.replace("self.scaling *", "self.scale *"))


@pytest.mark.parametrize("file", ["lora/layer.py", "dataset.py", "scripts/study.py"])
def test_colours_change_no_character(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    coloured = study.coloured(source)
    assert html.unescape(re.sub("<[^>]+>", "", "\n".join(coloured))) == source.rstrip("\n")
    assert '<i class="k">def</i>' in "".join(coloured)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page in a folder reports beside the project's files, as a link."""
    place = tmp_path_factory.mktemp("study")
    for path in ROOT.iterdir():
        if path.name != "reports":
            (place / path.name).symlink_to(path)
    (place / "reports").mkdir()
    (place / "reports/maths.html").write_text(study.page(TEXT), encoding="utf-8")
    return (place / "reports/maths.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_in_a_browser(browser, address, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:"))
            or messages.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    over = page.evaluate("""() => [...document.querySelectorAll("main *, nav *")].filter(e =>
        !e.closest("pre, .wide") && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert not over
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == scheme
    text, code = page.locator("section").first.locator("> div").all()
    beside = text.bounding_box()["x"] < code.bounding_box()["x"]
    assert beside == (width == 1400)
    assert not messages
    page.close()


def test_the_links_lead_somewhere_and_the_lines_are_the_ones_named():
    page = study.page(TEXT)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    targets = re.findall(r'href="([^"]+)"', page)
    assert {t[1:] for t in targets if t.startswith("#")} <= {*ids}
    for target in targets:
        if not target.startswith(("#", "http", "data:")):
            assert (ROOT / "reports" / target.partition("#")[0]).resolve().exists(), target
    pointers = re.findall(r'<li><a href="#([^"]+)">[^<]+</a> <code>(.+?)</code></li>', page)
    assert len(pointers) == len(re.findall(study.POINTER.pattern, TEXT)) >= 12
    for name, code in pointers:
        line = re.search(rf'id="{name}" data-n="\d+">(.*?)</span>', page)[1]
        assert code in re.sub("<[^>]+>", "", line)


# ----- the Chinese text --------------------------------------------------------------------------


def shape(block: str) -> tuple:
    """What a translation keeps of a block: its kind, numbers, code, links and pictures; all of a
    fenced block and of a list of pointers."""
    if block.startswith("```") or study.POINTER.match(block):
        return ("verbatim", block)
    kind = re.match(r"#+ |\||- |\d+\. |<picture>|", block)[0]
    code = Counter(re.findall(r"`([^`]+)`", block))
    links = Counter(re.findall(r'\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', block))
    words = re.sub(r"`[^`]+`|\]\([^)]+\)", "", block)
    bold = len(re.findall(r"\*\*", block))
    return kind, block.count("\n") if kind == "|" else None, code, links, bold, Counter(
        re.findall(r"\d+(?:[.,]\d+)*", words))


def test_the_chinese_text_has_the_structure_of_the_english():
    chinese = (ROOT / "docs/maths.zh.md").read_text(encoding="utf-8")
    ours, theirs = (study.blocks(text) for text in (TEXT, chinese))
    for one, other in zip(ours, theirs, strict=False):
        assert shape(one) == shape(other), f"{one}\n--- and ---\n{other}"
    assert len(ours) == len(theirs)
