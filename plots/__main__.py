"""
python -m plots runs/demo ...: draw loss.png and loss-dark.png from each run's metrics.jsonl.
"""

import sys

from .figures import draw

if __name__ == "__main__":
    try:
        for run in sys.argv[1:] or ["runs/demo"]:
            print(draw(run))
    except ValueError as error:
        sys.exit(f"error: {error}")
