"""
Prove with your config that a run which is killed and resumed equals one that is never killed.

    python -m scripts.verify_resume --kills 3 --train.max_steps=12      # about five runs' time
    python -m scripts.verify_resume --config examples/companion/config.json

It trains once without a break, then again, killed (SIGKILL) after random times and resumed. It
compares adapters bit by bit and every line of metrics.jsonl, timing aside. It writes
runs/verify-whole and runs/verify-killed.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from lora.run import cli

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
TIMING = {"seconds", "tokens_per_s", "peak_memory_gib"}


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__, settings=True, file=True)
    parser.add_argument("--kills", type=int, default=3, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    options = parser.parse_args(argv)
    cli.settings_of(options)                                # a wrong value ends it here
    words = ["--config", options.config, *cli.overrides(options)]
    started = time.perf_counter()
    train([*words, "--train.run=verify-whole"])
    seconds = time.perf_counter() - started
    print(f"the whole run took {seconds:.0f} seconds; now with {options.kills} kills")

    rng, kills = random.Random(options.seed), 0
    anew = [*words, "--train.run=verify-killed", "--train.checkpoint_every=1"]
    words = anew
    while kills < options.kills:
        if train(words, rng.uniform(0, seconds)) is not None:
            words = anew                                       # it ended first: another run
            continue
        kills += 1
        begun = Path("runs/verify-killed/config.json").exists()
        words = ["--resume", "runs/verify-killed"] if begun else anew
        print(f"kill {kills} of {options.kills}: {last_line('runs/verify-killed')}")
    train(words)
    problems = differences("runs/verify-whole", "runs/verify-killed")
    print("\n".join(problems) or f"{kills} kills, {kills} resumes: adapters and metrics are the "
          "same, bit for bit")
    return int(bool(problems))


def train(words: list[str], seconds: float | None = None) -> int | None:
    """Run python train.py as a process and kill it after so many seconds. Returns its exit code, or
    None if it was killed; ValueError with the end of its output if it failed."""
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


def last_line(folder: str) -> str:
    """The newest line of a run's metrics.jsonl."""
    try:
        return Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1][:60]
    except (OSError, IndexError):
        return "nothing yet"


def differences(a: str, b: str) -> list[str]:
    """Compare the results of two runs; a sentence for each difference."""
    problems = [f"{a}/{part} and {b}/{part} differ" for part in (
        "adapter/adapter_model.safetensors", "last/adapter_model.safetensors", "samples.md",
        "answers.jsonl")
        if Path(a, part).read_bytes() != Path(b, part).read_bytes()]
    lines = [[json.loads(line) for line in Path(run, "metrics.jsonl").read_text(
        encoding="utf-8").splitlines()] for run in (a, b)]
    if len(lines[0]) != len(lines[1]):
        problems.append(f"metrics.jsonl: {len(lines[0])} lines, {len(lines[1])} lines")
    for n, (x, y) in enumerate(zip(*lines, strict=False), 1):
        problems += [f"metrics.jsonl:{n}: {key}: {x.get(key)} and {y.get(key)}" for key in
                     x.keys() | y.keys() if key not in TIMING and x.get(key) != y.get(key)]
    return problems


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
