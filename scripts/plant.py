"""
Plant a mistake of docs/exercises.md in a copy of this project; the project itself stays as it is.

    python -m scripts.plant mean-of-means ../broken

The mistakes are the ```diff blocks of that page, so what it shows is what is planted.
"""

import contextlib
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from lora.run import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "exercises.md"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "model", "runs", "reports", "exports",
                                  "merged")


class Change(NamedTuple):
    file: str
    old: str
    new: str


def mistakes() -> dict[str, tuple[list[Change], str]]:
    """Return {name: (changes, the command of the test that catches them)} as the page has them."""
    found = {}
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.M):
        blocks = "".join(re.findall(r"^```diff\n(.*?)^```", part, re.S | re.M))
        changes = []
        for hunk in re.split(r"^--- ", blocks, flags=re.M)[1:]:
            file, *lines = hunk.splitlines()
            changes.append(Change(file, *("\n".join(line[1:] for line in lines if line[0] in kept)
                                          for kept in (" -", " +"))))
        if changes:
            name = re.match(r".*`([\w-]+)`", part)[1]
            found[name] = changes, re.search(r"\*\*Caught by\*\* `(.+?)`", part)[1]
    return found


def changed(change: Change, text: str) -> str:
    """Return a file's text with the change. Raises ValueError where it does not apply once."""
    if text.count(change.old) != 1:
        raise ValueError(f"plant: {change.file} has the lines of docs/exercises.md "
                         f"{text.count(change.old)} times; expected once")
    return text.replace(change.old, change.new)


def plant(name: str, folder: Path) -> None:
    """Copy the project to a new folder, with a mistake in it."""
    if folder.exists() or ROOT in [folder.resolve(), *folder.resolve().parents]:
        raise ValueError(f"plant: {folder} exists or lies inside this project; expected a new "
                         "folder outside")
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    with contextlib.suppress(OSError):           # without the right to link, the copy fetches it
        (folder / "model").symlink_to(ROOT / "model", target_is_directory=True)
    for change in mistakes()[name][0]:
        file = folder / change.file
        file.write_text(changed(change, file.read_text("utf-8")), encoding="utf-8")


def main(argv: list[str]) -> None:
    known = mistakes()
    parser = cli.Parser(__doc__)
    parser.add_argument("mistake", choices=list(known), help="its name on the page")
    parser.add_argument("folder", type=Path, help="a new folder, for the copy")
    options = parser.parse_args(argv)
    plant(options.mistake, options.folder)
    print(f"plant: {options.mistake} is in {options.folder}. There, the test that catches it is\n"
          f"  {known[options.mistake][1]}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
