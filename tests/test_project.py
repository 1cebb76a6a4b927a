"""The promises the project makes about itself: imports, the README, the docs, its size."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_type_hints

import jsonschema
import pytest
from conftest import make_model

from experiments.knowledge import report
from lora import adapter, config, surgery
from lora.run import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = {"lora.fast", "lora.base", "lora.run", "lora.use", "lora.read"}
LOW = {"lora", *ROOMS}                                # the core and the rooms
CHAPTERS = {"inject": LOW, "data": {"lora", "lora.read"}, "dataset": LOW | {"data"},
            "measure": LOW | {"data", "dataset"}, "keep": LOW | {"data"}}
VERB = {*LOW, *CHAPTERS, "plots"}
MAY_IMPORT = {  # who may import whom: design.md's table; a room imports the core, no other room
    "lora": {"lora"}, **{room: {"lora", room} for room in ROOMS}, **CHAPTERS, "plots": {"plots"},
    "train": VERB, "scripts": {*VERB, "scripts.voices"},
    "experiments": {*VERB, "experiments", "train"}, "benchmarks": {*VERB, "benchmarks"}}
OURS = {*MAY_IMPORT, "scripts.voices"}
STUDIED = [Path(f"{name}.py") for name in ("train", "inject", "data", "keep", "dataset", "measure")]
STUDIED += sorted(p.relative_to(ROOT) for p in (ROOT / "lora").glob("*.py"))
RIVALS = {"benchmarks/arms.py", "benchmarks/peers.py"}
ONLY_IN = {"transformers": {"lora/base/load.py"} | RIVALS,
           "bitsandbytes": {"lora/base/quant.py"},
           "matplotlib": {"plots/figures.py"}, "peft": RIVALS, "trl": RIVALS, "datasets": RIVALS}


def sources():
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT,
                           capture_output=True, text=True).stdout.split("\n")
    return [Path(n) for n in names if n and not n.startswith("tests/")]


def room_of(module: str) -> str:
    """lora.fast.flat -> lora.fast; lora.layer -> lora; scripts.voices stays; a.b -> a."""
    if module.startswith("scripts."):
        return module
    parts = module.split(".")
    room = ".".join(parts[:2])
    return room if room in ROOMS else parts[0]


def imported(path: Path) -> list[str]:
    """The rooms, chapters and packages that a file imports."""
    package, names = path.with_suffix("").parts[:-1], []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names += [module if module not in ("lora", "scripts") else f"{module}.{alias.name}"
                      for alias in node.names]
    return [room_of(name) for name in names]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_down(path):
    own = room_of(".".join(path.with_suffix("").parts))
    for name in imported(path):
        assert name not in OURS or name in MAY_IMPORT[own.split(".")[0] if own.startswith(
            "scripts") else own], f"{path} imports {name}"
        assert path.as_posix() in ONLY_IN.get(name, {path.as_posix()}), f"{path} imports {name}"


def test_data_needs_the_standard_library_alone():
    """And lora/read and lora/files.py, which need no more."""
    for path in (Path("data.py"), *(p.relative_to(ROOT) for p in (ROOT / "lora/read").glob("*"))):
        if path.suffix == ".py":
            assert set(imported(path)) <= {*sys.stdlib_module_names, "lora", "lora.read"}, path
    assert set(imported(Path("lora/files.py"))) <= sys.stdlib_module_names


def functions(path: Path) -> list[ast.FunctionDef]:
    """Every function of a file, methods and inner ones too."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def n_lines(paths: list[Path]) -> int:
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_line_budget():
    """Root chapters and core: what a reader must know to trust the method."""
    assert n_lines(STUDIED) <= 2800
    assert n_lines(sources()) <= 17_400


@pytest.mark.parametrize("path", STUDIED, ids=str)
def test_functions_are_short(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)
            if f.end_lineno - f.lineno >= 60}
    assert not long, f"{path}: these functions have more than 60 lines: {long}"


def test_fit_has_seven_parameters_at_most():
    (fit,) = [f for f in functions(Path("train.py")) if f.name == "fit"]
    args = [*fit.args.posonlyargs, *fit.args.args, *fit.args.kwonlyargs]
    assert len(args) <= 7 and not (fit.args.vararg or fit.args.kwarg)


@pytest.mark.parametrize("path", STUDIED, ids=str)
def test_public_functions_say_what_they_return(path):
    """Functions and methods without a leading underscore; an inner function is not public."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    silent = [f.name for scope in scopes for f in scope.body if isinstance(f, ast.FunctionDef)
              and not f.name.startswith("_") and f.returns is None]
    assert not silent, f"{path}: no return annotation: {', '.join(silent)}"


TRICKS = {  # what stops a reader, and what says the same plainly
    r"""[^\s"']["'] \* [a-z_(]""": "text times a truth value: use a conditional expression",
    r"\] \* (bool\b|not\b|\(not\b)": "a list times a truth value: use if",
    r"\[:0\]": "an empty slice: name the empty value",
    r"::-\(-": "a slice with a rounded-up negative step: compute the step first",
    r"map\(f?[\"'].*[\"']\.format": "map over a bound format: use a comprehension"}


def truth_times(path: Path) -> list[int]:
    """The lines where a text or a list is multiplied with a comparison, and, or, not, bool()."""
    def is_truth(node):
        return isinstance(node, ast.Compare | ast.BoolOp) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)) or (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") in
            ("bool", "any", "all", "isinstance"))

    def is_sequence(node):
        return isinstance(node, ast.List | ast.Tuple | ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str))
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
            and is_sequence(node.left) and is_truth(node.right)]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_tricks(path):
    """In rooms, chapters and core also a text times any name, which may be a truth value."""
    found = [f"{path}:{n}: a text or a list times a truth value: use if" for n in truth_times(path)]
    if path in STUDIED or path.parts[0] == "lora":
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        found += [f"{path}:{n}: {fix}" for n, line in enumerate(lines, 1)
                  for trick, fix in TRICKS.items() if re.search(trick, line)]
    assert not found, "\n".join(found)


def fields():
    """(key, default, values, comment) of every setting, from the dataclasses' own source."""
    for section in dataclasses.fields(config.Config):
        cls = section.default_factory
        text = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            comment = re.search(rf"^    {field.name}: .*?  # (.+)$", text, re.M)[1]
            values = config.type_in_words(get_type_hints(cls)[field.name])
            yield f"{section.name}.{field.name}", json.dumps(field.default), values, comment


def config_table() -> str:
    return "\n".join(f"| `{key}` | `{default}` | {values} | {comment} |"
                     for key, default, values, comment in fields())


def test_the_config_table_is_the_dataclasses():
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert config_table() in page, f"docs/config.md: the table should be\n{config_table()}"
    assert "](docs/config.md)" in README


def test_the_readme_says_about_facts_what_result_json_says():
    result = json.loads((ROOT / "experiments/knowledge/result.json").read_text(encoding="utf-8"))
    said = re.search("<!-- knowledge -->\n(.*?)\n\n?<!-- /knowledge -->", README, re.S)[1]
    assert said == report.readme(result)
    jsonschema.validate(result, json.loads(
        (ROOT / "experiments/knowledge/result.schema.json").read_text(encoding="utf-8")))


def test_the_commands_of_the_readme_exist():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.split("\n")]
    makefile = (ROOT / "Makefile").read_text()
    seen = set()
    for words in filter(None, commands):
        if words[:2] == ["python", "-m"]:
            module = ROOT.joinpath(*words[2].split("."))
            assert words[2] in ("venv", "pytest") or module.with_suffix(".py").exists() or (
                module / "__main__.py").exists(), words
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words
            cli.take_config([w for w in words[2:] if w.startswith("--") and "." in w])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        seen.add(words[0])
    assert {"python", "make", "pip", "git"} <= seen


def test_the_reading_order_names_files_with_their_line_counts():
    """The reading order is the chapters and the core, whole; the rest is named by room."""
    rows = re.findall(r"^\| \d+ \| \[`(.+?)`\]\((.+?)\) \| (\d+) \|", README, re.M)
    assert {Path(name) for name, _, _ in rows} == {p for p in STUDIED if p.name != "__init__.py"}
    for name, link, lines in rows:
        assert name == link
        actual = n_lines([Path(name)])
        assert abs(actual - int(lines)) <= 5, f"{name} has {actual} lines, the README says {lines}"
    order = README.partition("## Reading order")[2].partition("\n## ")[0]
    missing = [str(p) for p in sources() if not p.name.startswith("__") and f"[`{p.name}`]({p})"
               not in order and p not in STUDIED]
    assert not missing, f"README, reading order: these files are missing: {missing}"


def test_the_ten_lines_of_the_readme_train_and_save(tmp_path, tiny_folder):
    """As python -c from the root, on the tiny model."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    places = {"smollm2-135m-instruct": tiny_folder, "runs/three-steps": tmp_path / "a"}
    for text, path in places.items():
        assert code.count(f'"{text}"') == 1
        code = code.replace(f'"{text}"', repr(str(path)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    losses = [float(x) for x in re.findall(r"^step \d: loss (\d+\.\d+)$", done.stdout, re.M)]
    assert len(losses) == 3 and losses[2] < losses[0]
    model = make_model()
    assert len(adapter.load(model, tmp_path / "a")) == 14
    assert all(layer.lora_B.any() for layer in surgery.lora_layers(model).values())


def test_the_version_has_its_entry_and_the_project_is_not_installable():
    """Root names (data, train, ...) are too generic to install: a build must stay refused."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"## {project['project']['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "build-system" not in project and "setuptools" not in project["tool"]


def test_links_lead_to_files():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)|(?:src|srcset)=\"([^\"]+)\"", text):
            assert (page.parent / "".join(link)).exists(), f"{page.name}: {link}"


def test_the_maths_points_at_lines_that_exist():
    text = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
    pointers = re.findall(r"^- `([\w/]+\.py)`: `(.+?)`", text, re.M)
    assert len(pointers) >= 12
    for file, code in pointers:
        assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file}: {code}"
