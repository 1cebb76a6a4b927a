"""
Measure what it costs that OpenMP's threads spin while they wait for each other.

    python -m benchmarks.waiting                          # 2 repetitions of 5 settings, 15 minutes
    python -m benchmarks.waiting --reps 1 --only "300000 turns" "1000 turns"

A step of the default run is timed under each setting, quiet and beside a busy loop, each run in its
own process, in turns. libgomp does 300,000 turns by itself; lora/fast/waiting.py sets 1,000.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from lora.run import cli

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {f"{n} turns": {"GOMP_SPINCOUNT": n} for n in ("300000", "3000", "1000", "300")} | {
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "300000"}}


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--reps", type=int, default=2, help="runs of each setting")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME",
                        help="settings to time")
    options = parser.parse_args(argv)
    times = {(name, n): [] for name in options.only for n in (0, 1)}
    for _ in range(options.reps):
        for name, n in times:
            with busy(n):
                times[name, n] += step_times(SETTINGS[name])
            print(f"{name:14} {n} busy: {summary(times[name, n])}", flush=True)
    base = median(times[options.only[0], 0])
    print(f"\nseconds a step: median (least to most); quiet {options.only[0]} is 1.00")
    for (name, n), seconds in times.items():
        print(f"| {name} | {n} busy loops | {summary(seconds)} | {median(seconds) / base:.2f} |")


def step_times(environment: dict[str, str]) -> list[float]:
    """Run the default config in a new process; returns the seconds of each step after the first."""
    kept = {k: v for k, v in os.environ.items()
            if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(
            [sys.executable, ROOT / "train.py", "--config", ROOT / "config.json",
             "--train.max_steps=8", "--data.val_fraction=0", "--train.max_new_tokens=1",
             "--train.checkpoint_every=0"],
            cwd=home, check=True, capture_output=True, env=kept | environment)
        lines = [json.loads(line) for line in
                 Path(home, "runs/demo/metrics.jsonl").read_text().splitlines()]
    return [b - a for a, b in pairwise(line["seconds"] for line in lines if "seconds" in line)]


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    """Keep n processes busy until the block ends."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def summary(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
