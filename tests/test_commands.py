"""Every command explains itself with --help and names a wrong option; output is UTF-8."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in (
        "scripts", "experiments", "benchmarks", "plots")))
    for file in ROOT.glob(pattern) if "\ndef main(argv" in file.read_text(encoding="utf-8"))


def test_the_commands_are_found():
    assert len(COMMANDS) >= 19 and {"train", "plots.__main__", "scripts.export"} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_with_an_example_and_its_options(command, capsys):
    module = importlib.import_module(command)
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    out = capsys.readouterr().out
    name = f"{command}.py" if "." not in command else f"-m {command.removesuffix('.__main__')}"
    assert not caught.value.code and out.startswith(f"usage: python {name} ")
    assert module.__doc__.strip() in out and f"    python {name}" in out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "plots.__main__"])
def test_an_unknown_option_is_named_first(command):
    module = importlib.import_module(command)
    with pytest.raises(ValueError, match="^--no-such-thing: unknown option; "):
        module.main(["--no-such-thing=1"])


def test_output_is_utf_8_on_a_console_that_is_not():
    code = "from lora.run import cli; cli.run(lambda argv: print(argv[0]), ['é █ \\ud800'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout.decode()) == (0, "é █ ?\n"), done.stderr


@pytest.mark.parametrize("words", [
    "data.py", "keep.py", "measure.py", "-m lora", "-m lora.layer", "-m lora.run.cli",
    "-m scripts.voices", "-m experiments.knowledge.figures"])
def test_a_file_that_is_no_command_says_so(words):
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and " is no command; " in done.stderr.splitlines()[-1]
