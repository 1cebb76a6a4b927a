"""
Is a run of yours that is killed and resumed the run that was never killed? Proof, with your config:

    python -m scripts.verify_resume --kills 3 --train.max_steps=12      # about five runs' time
    python -m scripts.verify_resume --config examples/companion/config.json

Trains once without a break, then again, killed (SIGKILL) after times drawn at random and resumed,
and compares adapters bit by bit and every line of metrics.jsonl, but for what a clock says. Works
in runs/verify-whole and runs/verify-killed.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from lora import config

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
TIMING = {"seconds", "tokens_per_s", "peak_memory_gib"}


def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked, rest = parser.parse_known_args(argv)
    config.take_config(rest)                                   # a wrong key is said at once
    started = time.perf_counter()
    train([*rest, "--train.run=verify-whole"])
    seconds = time.perf_counter() - started
    print(f"the whole run took {seconds:.0f} seconds; now with {asked.kills} kills")

    rng, kills = random.Random(asked.seed), 0
    again = [*rest, "--train.run=verify-killed", "--train.checkpoint_every=1"]
    words = again
    while kills < asked.kills:
        if train(words, rng.uniform(0, seconds)) is not None:
            words = again                                      # it was faster: another run
            continue
        kills += 1
        begun = Path("runs/verify-killed/config.json").exists()
        words = ["--resume", "runs/verify-killed"] if begun else again
        print(f"kill {kills} of {asked.kills}: {last_line('runs/verify-killed')}")
    train(words)
    wrong = differences("runs/verify-whole", "runs/verify-killed")
    print("\n".join(wrong) or f"{kills} kills, {kills} resumes: adapters and metrics are the same, "
          "bit for bit")
    return int(bool(wrong))


def train(words, seconds=None):
    """python train.py as a process; killed after so many seconds. Returns its exit code, None if it
    was killed. Raises ValueError with its last words if it failed."""
    with subprocess.Popen([sys.executable, TRAIN, *words], text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        try:
            error = running.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            running.kill()
            return None
    if running.returncode:
        raise ValueError(f"verify_resume: python train.py {' '.join(words)} failed:\n"
                         + "\n".join(error.splitlines()[-3:]))
    return 0


def last_line(folder):
    """How far a run has come, in words."""
    try:
        return Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1][:60]
    except (OSError, IndexError):
        return "nothing yet"


def differences(a, b):
    """What differs between two runs' results, a line each."""
    found = [f"{a}/{part} and {b}/{part} differ" for part in (
        "adapter/adapter_model.safetensors", "last/adapter_model.safetensors", "samples.md")
        if Path(a, part).read_bytes() != Path(b, part).read_bytes()]
    lines = [[json.loads(line) for line in Path(run, "metrics.jsonl").read_text(
        encoding="utf-8").splitlines()] for run in (a, b)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"metrics.jsonl: {len(lines[0])} lines, {len(lines[1])} lines")
    for n, (x, y) in enumerate(zip(*lines, strict=False), 1):
        found += [f"metrics.jsonl:{n}: {key}: {x.get(key)} and {y.get(key)}"
                  for key in x.keys() | y.keys() if key not in TIMING and x.get(key) != y.get(key)]
    return found


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
