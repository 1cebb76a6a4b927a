"""
The command line of every command.

    options = cli.Parser(__doc__, settings=True).parse_args(argv)   # --help, --n=2, --train.lr=1e-4
    settings = cli.settings_of(options)
    cli.run(main, sys.argv[1:])                                     # errors without a traceback
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import NoReturn, get_type_hints

from .. import config


class Parser(argparse.ArgumentParser):
    """The command line of a command. --help shows the module's docstring and every default; a
    wrong option is a ValueError that names it first. With settings, it also takes --config FILE
    and --section.key=value (see settings_of); with file, a plain argument is data.path."""

    def __init__(self, doc: str | None, settings: bool = False, file: bool = False):
        self.known, self.settings = [], settings               # the names of all options
        command = re.search(r"^ {4}(python (-m )?[\w./]+)", doc or "", re.M)    # the first example
        super().__init__(prog=command and command[1], description=doc and doc.strip(),
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        if settings:
            self.add_argument("--config", default="config.json", metavar="FILE",
                              help="what differs from the settings below")
            for key in config.flat(config.Config()):
                self.add_argument(f"--{key}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if file:
            self.add_argument("data.path", nargs="?", metavar="FILE", default=argparse.SUPPRESS,
                              help="the data, as --data.path=FILE")

    def add_argument(self, *names: str, **details) -> argparse.Action:
        """Add an argument as argparse does, and its default to its help."""
        if details.get("default") not in (None, argparse.SUPPRESS, []):
            details["help"] = f"{details.get('help', '')} (default: {details['default']})".lstrip()
        self.known += names
        return super().add_argument(*names, **details)

    def format_help(self) -> str:
        rows = [f"  {f'--{key}={default}':36} {comment}" + (f"; {values}" if '"' in values else "")
                for key, default, values, comment in described()]
        head = "\nsettings, as --section.key=value, with their defaults:\n"
        return super().format_help() + (head + "\n".join(rows) + "\n" if self.settings else "")

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        names = [word.partition("=")[0] for word in argv]
        wrong = [name for name in names if re.match("--?[a-zA-Z]", name) and " " not in name
                 and name not in self.known]
        options, rest = (None, wrong) if wrong else self.parse_known_args(argv)
        if not rest:
            return options
        name = rest[0].partition("=")[0]
        leaves = {_leaf(option): option[2:] for option in self.known if option[:2] == "--"}
        guess = config.nearest(_leaf(name), leaves) if wrong or "=" in rest[0] else None
        raise ValueError(f"{name}: unknown {'option' if wrong else 'argument'}; " + (
            f"did you mean --{guess}?" if guess else f"{self.prog} --help lists all"))

    def error(self, message: str) -> NoReturn:
        message = re.sub("^argument |^the following arguments are ", "", message)
        raise ValueError(f"{message}; {self.prog} --help lists all")


def _leaf(option):
    """--train.max-steps -> max_steps"""
    return option.lstrip("-").rpartition(".")[2].replace("-", "_")


def described() -> Iterator[tuple[str, str, str, str]]:
    """(key, default, values, comment) of every setting, as texts."""
    for section in fields(config.Config):
        source = inspect.getsource(section.default_factory)
        for name, hint in get_type_hints(section.default_factory).items():
            default = json.dumps(getattr(section.default_factory, name))
            comment = re.search(rf"^    {name}: .*?  # (.+)$", source, re.M)[1]
            yield f"{section.name}.{name}", default, config.type_in_words(hint), comment


def overrides(options: argparse.Namespace) -> list[str]:
    """The settings among a Parser's options, as --section.key=value."""
    return [f"--{key}={text}" for key, text in vars(options).items()
            if "." in key and text is not None]


def settings_of(options: argparse.Namespace) -> config.Config:
    """The Config that a Parser's options choose."""
    return config.load(options.config, overrides(options))


def take_config(argv: list[str], doc: str | None = None, file: bool = False) -> config.Config:
    """The Config of a command that takes nothing but settings, and with file the data's name."""
    return settings_of(Parser(doc, settings=True, file=file).parse_args(argv))


def run(main: Callable[[list[str]], int | None], argv: list[str]) -> NoReturn:
    """Run a command line with UTF-8 output. A ValueError is the user's to fix: it is printed
    without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                     # not the stand-in of a notebook
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        sys.exit(main(argv))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
