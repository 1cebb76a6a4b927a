"""
Make of docs/maths.md a notebook to run, and a page that has the code beside the text.

    python -m scripts.study                  # docs/maths.ipynb and reports/maths.html

A code cell of the notebook is a part of scripts/show.py, and its stored output is the one in the
text. The page shows the functions that a section points at; study.html is its template.
"""

import ast
import base64
import io
import json
import keyword
import os
import re
import sys
import tokenize
from html import escape
from pathlib import Path

from lora import files
from lora.run import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT, SHOW = ROOT / "docs" / "maths.md", ROOT / "scripts" / "show.py"
BOOK, PAGE = ROOT / "docs" / "maths.ipynb", ROOT / "reports" / "maths.html"
COMMAND = re.compile(r"```sh\npython -m scripts\.show (\w+)\n```")
POINTER = re.compile(r"- `([\w/]+\.py)`: `(.+)`")
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="(.+?)">\s*'
                     r'<img alt="(.+?)" src="(.+?)"[^>]*>\s*</picture>')
ABOUT = """This notebook is [maths.md](maths.md) with the code that prints its numbers. Run the
cells in order; then change a number and run one again. `python -m scripts.study` writes it anew."""
SETUP = """import os
import sys
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "scripts/show.py").exists())
os.chdir(ROOT)                                 # the project's root, also from docs/
sys.path.insert(0, str(ROOT))
"""


def main(argv: list[str]) -> None:
    cli.Parser(__doc__).parse_args(argv)
    text, show = (path.read_text(encoding="utf-8") for path in (TEXT, SHOW))
    for path, content in ((BOOK, notebook(text, show)), (PAGE, page(text))):
        path.parent.mkdir(exist_ok=True)
        files.write(path, content)
        print(f"study: {path.relative_to(ROOT)}")


def blocks(text: str) -> list[str]:
    """Split Markdown at empty lines; a fenced block stays whole."""
    found = []
    for part in re.split(r"(^```.*?^```$)", text, flags=re.M | re.S):
        found += [part] if part.startswith("```") else re.split(r"\n\s*\n", part.strip())
    return [block for block in found if block]


def inside(block: str) -> str:
    """The text of a fenced block."""
    return block.partition("\n")[2].removesuffix("```")


# ----- the notebook ------------------------------------------------------------------------------


def notebook(text: str, show: str) -> str:
    """Build the notebook, JSON of nbformat 4.5: text, the code of each command, its output."""
    shared, code = cut(show, COMMAND.findall(text))
    cells, prose, label, command = [], [], "introduction", None

    def close():
        """Make a cell of the text so far; behind the introduction, of the imports too."""
        if prose:
            cells.append(markdown(label, "\n\n".join(prose)))
            prose.clear()
        if label == "introduction":
            cells.extend([markdown("about", ABOUT), code_cell("setup", shared)])
    for block in blocks(text):
        printed_by, command = command, COMMAND.fullmatch(block)
        if block.startswith("## ") or command:
            close()
            label = f"after-{command[1]}" if command else f"section-{block[3]}"
        if printed_by:
            cells.append(code_cell(printed_by[1], code[printed_by[1]], inside(block)))
        elif not command:
            prose.append(PICTURE.sub(r"![\2](\3)", block))
    close()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


def markdown(name: str, text: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {},
            "source": text.splitlines(keepends=True)}


def code_cell(name: str, code: str, output: str = "") -> dict:
    """A cell that has not been run, with an output if there is one to show."""
    outputs = [{"name": "stdout", "output_type": "stream",
                "text": output.splitlines(keepends=True)}] if output else []
    return {"cell_type": "code", "execution_count": None, "id": name, "metadata": {},
            "outputs": outputs, "source": code.splitlines(keepends=True)}


def cut(show: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """Cut scripts/show.py into what its parts share, and {name: the part and a call of it}. A
    helper behind a part belongs to that part."""
    lines, tree = show.splitlines(), ast.parse(show)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    missing = [name for name in names if name not in functions]
    if missing:
        raise ValueError(f"study: docs/maths.md runs {', '.join(missing)}; expected functions of "
                         f"scripts/show.py: {', '.join(functions)}")
    main_line = functions.pop("main").lineno
    imports = [line for line in lines[tree.body[0].end_lineno:main_line - 1]
               if line not in ("import sys", "from lora.run import cli")]
    shared = [SETUP + "\n" + "\n".join(imports).strip() + "\n\n"
              "torch.set_num_threads(1)                       # more threads add in another order"]
    found, current = {}, shared
    for name, node in functions.items():
        first = min(x.lineno for x in (node, *node.decorator_list))
        current = found.setdefault(name, []) if name in names else current
        current.append("\n".join(lines[first - 1:node.end_lineno]))
    return "\n\n\n".join(shared), {name: "\n\n\n".join(
        [*code, f"torch.manual_seed(0)\n{name}()"]) for name, code in found.items()}


# ----- the page ----------------------------------------------------------------------------------


def page(text: str) -> str:
    """Build the page. A row ends before the first heading or bold opening behind a list of
    pointers, and has the code they lead to on its right."""
    title, *parts = blocks(text)
    rows, left, right, names, command = [], [], "", [], None
    for n, block in enumerate(parts):
        if right and block.startswith(("## ", "**")):
            rows.append(row(left, right))
            left, right = [], ""
        pointers = [POINTER.fullmatch(line) for line in block.splitlines()]
        printed_by, command = command, COMMAND.fullmatch(block)
        if block.startswith("## "):
            names.append(inline(block[3:]))
            left.append(f'<h2 id="section-{len(names)}">{names[-1]}</h2>')
        elif command:
            left.append(f'<pre class="run">{escape(inside(block))}</pre>')
        elif printed_by:
            left.append(f'<pre class="out">{escape(inside(block))}</pre>{part(printed_by[1])}')
        elif all(pointers):
            links, code = pointed([found.groups() for found in pointers], f"code-{n}")
            left.append(links)
            right += code
        else:
            left.append(html(block))
    nav = "".join(f'<a href="#section-{i}">{name}</a>' for i, name in enumerate(names, 1))
    slots = {"title": escape(title.removeprefix("# ")), "nav": nav,
             "rows": "\n".join([*rows, row(left, right)])}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], template)


def row(left: list[str], right: str) -> str:
    return (f'<section><div class="text">{"".join(left)}</div><div class="code">{right}</div>'
            "</section>")


def html(block: str) -> str:
    """Write one block of Markdown as HTML: what docs/maths.md uses, no more."""
    if block.startswith("```"):
        return f"<pre>{escape(inside(block))}</pre>"
    if picture := PICTURE.fullmatch(block):
        dark, light = (data_url(TEXT.parent / picture[i]) for i in (1, 3))
        return ('<div class="wide"><picture><source media="(prefers-color-scheme: dark)" '
                f'srcset="{dark}"><img alt="{picture[2]}" src="{light}"></picture></div>')
    if block.startswith("|"):
        head, _, *body = ([inline(cell.strip()) for cell in line.strip("|").split("|")]
                          for line in block.splitlines())
        rows = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        return (f'<div class="wide"><table><tr><th>{"</th><th>".join(head)}</th></tr>'
                f'<tr>{"</tr><tr>".join(rows)}</tr></table></div>')
    if block.startswith("- "):
        items = re.split(r"^- ", block, flags=re.M)[1:]
        return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>"
    return f"<p>{inline(block)}</p>"


def inline(text: str) -> str:
    """Write code, bold, italics and links of a line as HTML; a link starts at docs/."""
    def link(match):
        target = match[2]
        if not re.match(r"https?:|#", target):
            target = from_page(TEXT.parent / target)
        return f'<a href="{target}">{match[1]}</a>'
    code = []

    def keep(match):
        look = ' class="short"' if len(match[1]) < 25 else ""
        code.append(f"<code{look}>{escape(match[1])}</code>")
        return f"\0{len(code) - 1}\0"
    text = escape(re.sub(r"`([^`]+)`", keep, text), quote=False)
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", link, text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text, flags=re.S)
    text = re.sub(r"(?<![\w*])\*([^\s*][^*]*)\*(?![\w*])", r"<em>\1</em>", text)
    return re.sub(r"\0(\d+)\0", lambda m: code[int(m[1])], text)


def from_page(path: Path) -> str:
    """The link to a file from the page's folder."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def pointed(items: list[tuple[str, str]], anchor: str) -> tuple[str, str]:
    """Write a list of pointers as links, and the code that they lead to, by file and function."""
    links, wanted = [], {}
    for file, code in items:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        n = next((n for n, line in enumerate(lines, 1) if code in line), None)
        if n is None:
            raise ValueError(f"study: {file} has no line {code!r}; mend the list in docs/maths.md")
        wanted.setdefault(file, []).append(n)
        links.append(f'<li><a href="#{anchor}-{slug(file)}-{n}">{file}:{n}</a> '
                     f"<code>{escape(code)}</code></li>")
    shown = []
    for file, numbers in wanted.items():
        for name, group in by_function(ROOT / file, numbers).items():
            shown.append(f'<figure><figcaption><a href="{from_page(ROOT / file)}">{file}</a> {name}'
                         "</figcaption>"
                         + listing(ROOT / file, group, numbers, f"{anchor}-{slug(file)}")
                         + "</figure>")
    return f'<ul class="pointers">{"".join(links)}</ul>', "".join(shown)


def slug(file: str) -> str:
    return re.sub(r"\W", "-", file.removesuffix(".py"))


def by_function(path: Path, numbers: list[int], most: int = 34) -> dict[str, list[int]]:
    """Return {function: line numbers to show}: all of a short function, else a window around each
    number."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    scopes = [(f"{c.name}.{f.name}", f) for c in tree.body if isinstance(c, ast.ClassDef)
              for f in c.body if isinstance(f, ast.FunctionDef)]
    scopes += [(f.name, f) for f in tree.body if isinstance(f, ast.FunctionDef)]
    for n in numbers:
        name, scope = next(((name, f) for name, f in scopes if f.lineno <= n <= f.end_lineno),
                           ("", None))
        first, last = (scope.lineno, scope.end_lineno) if scope else (n, n)
        near = range(max(first, n - 4), min(last, n + 4) + 1)
        short = scope and last - first < most
        found.setdefault(name, set()).update(range(first, last + 1) if short else (first, *near))
    return {name: sorted(lines) for name, lines in found.items()}


def part(name: str) -> str:
    """The source of a part of scripts/show.py, folded."""
    (f,) = (f for f in ast.parse(SHOW.read_text(encoding="utf-8")).body
            if isinstance(f, ast.FunctionDef) and f.name == name)
    numbers = range(f.lineno, f.end_lineno + 1)
    return (f"<details><summary>the {len(numbers)} lines that print it</summary>"
            f"{listing(SHOW, numbers, [], name)}</details>")


def listing(path: Path, numbers, marked: list[int], anchor: str) -> str:
    """Write lines of a file, coloured; a gap between them is a line with three dots."""
    lines = coloured(path.read_text(encoding="utf-8"))
    indent = min(len(lines[n - 1]) - len(lines[n - 1].lstrip()) for n in numbers if lines[n - 1])
    rows, before = [], None
    for n in numbers:
        if before and n != before + 1:
            rows.append('<span class="gap">⋯</span>')
        mark = f' class="on" id="{anchor}-{n}"' if n in marked else ""
        rows.append(f'<span{mark} data-n="{n}">{lines[n - 1][indent:]}</span>')
        before = n
    return f'<pre class="listing"><code>{"".join(rows)}</code></pre>'


def coloured(source: str) -> list[str]:
    """Return the lines of Python source as HTML: keywords, texts, numbers and comments marked."""
    kinds = {tokenize.COMMENT: "c", tokenize.STRING: "s", tokenize.NUMBER: "n"}
    lines, marks = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = kinds.get(token.type)
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "k"
        (first, start), (last, end) = token.start, token.end
        for n in range(first, last + 1) if kind else ():
            line = lines[n - 1]
            indent = len(line) - len(line.lstrip())
            marks.setdefault(n, []).append((start if n == first else indent,
                                            end if n == last else len(line), kind))
    done = []
    for n, line in enumerate(lines, 1):
        text, at = "", 0
        for start, end, kind in marks.get(n, []):
            text += f'{escape(line[at:start])}<i class="{kind}">{escape(line[start:end])}</i>'
            at = end
        done.append(text + escape(line[at:]))
    return done


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
