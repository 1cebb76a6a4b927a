"""
Draw loss.png and loss-dark.png of runs from their metrics.jsonl.

    python -m plots runs/demo
"""

import argparse
import sys

from .figures import draw


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["runs/demo"], metavar="RUN",
                        help="folders of runs (default: runs/demo)")
    for run in parser.parse_args(argv).runs:
        print(draw(run))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
