"""The promises the project makes about itself: imports, the README, the docs, its size."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import get_type_hints

import jsonschema
import pytest

from experiments.knowledge import report
from lora import config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OURS = {"lora", "plots", "data", "inject", "dataset", "measure", "train", "scripts", "experiments",
        "benchmarks", "scripts.voices"}
VERBS = {"lora", "inject", "data", "dataset"}
MAY_IMPORT = {"lora": {"lora"}, "plots": {"plots"}, "data": set(), "inject": {"lora"},
              "dataset": {"lora", "data"}, "measure": {"lora", "data", "dataset"},
              "train": VERBS | {"measure", "plots"},
              "scripts": VERBS | {"scripts.voices", "plots"},
              "experiments": VERBS | {"experiments", "plots", "train"},
              "benchmarks": VERBS | {"benchmarks"}}
USE = {"bank.py", "conversation.py", "gguf.py", "readers.py", "report.py", "text.py"}
TRUST = {"checkpoint.py", "files.py", "parallel.py", "quant.py", "verify_resume.py", "selftest.py",
         "inspect.py"}
RIVALS = {"benchmarks/arms.py"}
ONLY_IN = {"transformers": {"lora/base.py"} | RIVALS, "bitsandbytes": {"lora/quant.py"},
           "matplotlib": {"plots/figures.py"}, "peft": RIVALS, "trl": RIVALS, "datasets": RIVALS}


def sources():
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT,
                           capture_output=True, text=True).stdout.split("\n")
    return [Path(n) for n in names if n and not n.startswith("tests/")]


def imported(path):
    """The top level of all modules a file imports; of scripts, whole: verbs share one of them."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [path.parts[0] if node.level else node.module]
        yield from (n if n.startswith("scripts.") else n.split(".")[0] for n in names)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_down(path):
    top = path.parts[0].removesuffix(".py")
    for name in imported(path):
        assert name not in OURS or name in MAY_IMPORT[top], f"{path} imports {name}"
        assert path.as_posix() in ONLY_IN.get(name, {path.as_posix()}), f"{path} imports {name}"


def test_data_needs_the_standard_library_alone():
    import sys
    assert set(imported(Path("data.py"))) <= sys.stdlib_module_names


def test_the_line_budget():
    """What it takes to train; to lose nothing and to look closely; to use, compare and serve what
    was trained; and the experiment."""
    lines = {"train": 0, "trust": 0, "use": 0, "experiment": 0}
    for path in sources():
        use = path.parts[0] in ("scripts", "benchmarks") or path.name in USE
        experiment = path.parts[0] == "experiments" or path.name == "knowledge.py"
        n = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        lines["experiment" if experiment else "trust" if path.name in TRUST else
              "use" if use else "train"] += n
    budget = {"train": 4000, "trust": 1100, "use": 3500, "experiment": 2200}
    assert all(lines[part] < budget[part] for part in lines), lines


def fields():
    """(key, default, values, comment) of every setting, from the dataclasses' own source."""
    for section in dataclasses.fields(config.Config):
        cls = section.default_factory
        text = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            comment = re.search(rf"^    {field.name}: .*?  # (.+)$", text, re.M)[1]
            values = config._name(get_type_hints(cls)[field.name])
            yield f"{section.name}.{field.name}", json.dumps(field.default), values, comment


def test_the_config_table_is_the_dataclasses():
    rows = [f"| `{key}` | `{default}` | {values} | {comment} |"
            for key, default, values, comment in fields()]
    assert "\n".join(rows) in README, "README: the config table should be\n" + "\n".join(rows)


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
            config.take_config([w for w in words[2:] if w.startswith("--") and "." in w])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        seen.add(words[0])
    assert {"python", "make", "pip", "git"} <= seen


def test_the_reading_order_names_files_with_their_line_counts():
    rows = re.findall(r"^\| \d+ \| \[`(.+?)`\]\((.+?)\) \| (\d+) \|", README, re.M)
    assert len(rows) >= 8
    for name, link, lines in rows:
        assert name == link
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(actual - int(lines)) <= 5, f"{name} has {actual} lines, the README says {lines}"


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)|(?:src|srcset)=\"([^\"]+)\"", text):
            assert (page.parent / "".join(link)).exists(), f"{page.name}: {link}"


def test_the_maths_points_at_lines_that_exist():
    text = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
    pointers = re.findall(r"^- `([\w/]+\.py)`: `(.+?)`", text, re.M)
    assert len(pointers) >= 12
    for file, code in pointers:
        assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file}: {code}"
