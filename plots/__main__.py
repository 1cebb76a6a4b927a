"""
python -m plots runs/demo ...: draw loss.png and loss-dark.png from each run's metrics.jsonl; of a
folder with a result.json (reports/knowledge), the figures of plots/knowledge.py.
"""

import sys
from pathlib import Path

from . import knowledge
from .figures import draw

if __name__ == "__main__":
    try:
        for run in sys.argv[1:] or ["runs/demo"]:
            found = (Path(run) / "result.json").exists()
            print(*knowledge.draw(run) if found else [draw(run)], sep="\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
