"""
How long OpenMP's threads spin while they wait for each other, and what that costs.

    python -m benchmarks.waiting                          # 2 repetitions of 5 settings, 15 minutes
    python -m benchmarks.waiting --reps 1 --only "300000 turns" "3000 turns"

A step of the default run is timed under each setting, quiet and beside a busy loop, each run in its
own process, in turns. 300,000 turns is what libgomp does by itself; lora/waiting.py sets 3,000.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {f"{n} turns": {"GOMP_SPINCOUNT": n} for n in ("300000", "30000", "3000", "300")} | {
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "300000"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first is not "
                        "counted (default 8)")
    parser.add_argument("--reps", type=int, default=2, help="runs of each setting (default 2)")
    parser.add_argument("--busy", type=int, default=1, help="busy loops beside it (default 1)")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME",
                        help=f"settings to time: {', '.join(map(repr, SETTINGS))}")
    asked = parser.parse_args()
    times = {(name, n): [] for name in asked.only for n in (0, asked.busy)}
    for _ in range(asked.reps):
        for name, n in times:
            with busy(n):
                times[name, n] += step_times(SETTINGS[name], asked.steps)
            print(f"{name:14} {n} busy: {summary(times[name, n])}", flush=True)
    base = median(times[asked.only[0], 0])
    print(f"\nseconds a step: median (least to most); quiet {asked.only[0]} is 1.00")
    for (name, n), seconds in times.items():
        print(f"| {name} | {n} busy loops | {summary(seconds)} | {median(seconds) / base:.2f} |")


def step_times(environment, steps):
    """Seconds of each step after the first, of a run of the default config in a new process."""
    kept = {k: v for k, v in os.environ.items()
            if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(
            [sys.executable, ROOT / "train.py", "--config", ROOT / "config.json",
             f"--train.max_steps={steps}", "--data.val_fraction=0", "--train.max_new_tokens=1",
             "--train.checkpoint_every=0"],
            cwd=home, check=True, capture_output=True, env=kept | environment)
        lines = [json.loads(line) for line in
                 Path(home, "runs/demo/metrics.jsonl").read_text().splitlines()]
    return [b - a for a, b in pairwise(line["seconds"] for line in lines if "seconds" in line)]


@contextlib.contextmanager
def busy(n):
    """n processes that count for nothing, ended with the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def summary(seconds):
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
