"""
Compare the training speed of this project, a plain transformers + PEFT loop, and TRL on equal work.

    pip install -r requirements-bench.txt
    python -m benchmarks.train_speed                                # four arms, SmolLM2, 10 minutes
    python -m benchmarks.train_speed --arms trl-grid                  # which TRL settings are best?
    python -m benchmarks.train_speed --model gemma-3-270m --prefix 300 --arms trl-default,ours
    python -m benchmarks.train_speed --steps 60 --reps 1 --out curves.json      # loss curves
    python -m benchmarks.train_speed --turns 6 --arms ours,litgpt-{d}-1x24     # each answer is one

benchmarks/RESULTS.md says what every arm is, which rules hold, and what the columns mean.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

from lora.run import cli

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("litgpt", "llamafactory")                     # each in an environment of its own
WARMUP = 1                                             # steps before the clock counts
DEFAULT = "trl-{d}-{q}x4-lengthgrouped,trl-{d}-{q}x4-lengthgrouped-fulllogits,peft-loop-{q}x4,ours"
GRID = ("trl-default,trl-{d}-{b}x1,trl-{d}-{h}x2,trl-{d}-{q}x4,trl-{d}-{h}x2-checkpointing,"
        "trl-{d}-{h}x2-lengthgrouped,trl-{d}-{q}x4-lengthgrouped,trl-{d}-{b}x1-paddingfree,"
        "trl-{d}-{q}x4-paddingfree,trl-{d}-{b}x1-fulllogits,"
        "trl-{d}-{q}x4-lengthgrouped-fulllogits,trl-{other}-{q}x4,trl-autocast-{b}x1")
ARM = (r"trl-default|trl-(fp32|bf16|autocast)-\d+x\d+(-paddingfree|-lengthgrouped|-fulllogits"
       r"|-checkpointing)*|peft-loop(-\d+x\d+)?"
       r"|litgpt-(fp32|bf16|autocast)-\d+x\d+(-head\d+|-lengthgrouped)*"
       r"|llamafactory-(fp32|bf16|autocast)-\d+x\d+(-lengthgrouped|-checkpointing)*"
       r"|ours(-no-prefix|-padded|-no-lean-head|-no-fused-lora|-no-fused-leaves|-plain|-checkpointing)?")


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name or a folder")
    parser.add_argument("--arms", default=DEFAULT, help="names with commas; trl-grid for GRID; {d} "
                        "stands for fp32, or for bf16 where --dtype is bfloat16")
    for name, value, meaning in (("prefix", 100, "tokens that all samples share"),
                                 ("turns", 0, "of a dialogue, each answer a sample; or 0"),
                                 ("batch", None, "samples per step: 16, or 4 dialogues"),
                                 ("steps", 1, "timed steps"), ("reps", 3, "processes per arm")):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--dtype", default="auto", help="of peft-loop and ours")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--out", help="a file for the JSON line, too")
    options = parser.parse_args(argv)
    options.batch = options.batch or 4 * options.turns or 16
    if options.turns and options.batch % options.turns:
        parser.error(f"--batch {options.batch} splits a dialogue of {options.turns} --turns")
    host = run("machine", options)
    if "error" in host:
        parser.error(host["error"])
    # opponents compute in the dtype that ours computes in
    dtypes = ("bf16", "fp32") if host["dtype"] == "bfloat16" else ("fp32", "bf16")
    names = options.arms.replace("trl-grid", GRID).format(
        b=options.batch, h=options.batch // 2, q=options.batch // 4, d=dtypes[0], other=dtypes[1]
    ).split(",")
    unknown = [name for name in names if not re.fullmatch(ARM, name)]
    if unknown:
        parser.error(f"unknown arms {unknown}; benchmarks/RESULTS.md lists them")
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        if any(name.startswith(PEERS) for name in names):
            work = run("work", options)
            if "error" in work:
                parser.error(work["error"])
            json.dump(work, file)
            file.flush()
        options.work = file.name
        measure(names, host, options)


def measure(names: list[str], host: dict, options: argparse.Namespace) -> None:
    """Run the arms in turns; prints the table, the ratios and the JSON line."""
    print(json.dumps({k: v for k, v in host.items() if k not in ("hashes", "tokens")}, indent=2))
    runs = {name: [] for name in names}
    bar = tqdm([name for _ in range(options.reps) for name in runs], unit="run", dynamic_ncols=True)
    for name in bar:
        bar.set_postfix_str(name)
        if not any("error" in result for result in runs[name]):
            runs[name].append(run(name, options))

    arms = {name: summary(results, host, options) for name, results in runs.items()}
    compare(arms)
    print("\n".join(table(arms)))
    speed = {name: arm["samples_per_s"] for name, arm in arms.items() if "error" not in arm}
    if "ours" in speed:
        for name in speed:
            print(f"{speed['ours'] / speed[name]:6.2f} times {name}")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "work")}
    line = json.dumps({**settings, "machine": host, "results": arms})
    if options.out:
        Path(options.out).write_text(line + "\n", encoding="utf-8")
    print(line)


def run(name: str, options: argparse.Namespace) -> dict:
    """Run an arm once in a process of its own; returns its result, or {"error": why}."""
    work = {key: getattr(options, key) for key in (
        "model", "prefix", "turns", "batch", "dtype", "device")}
    work["steps"] = WARMUP + options.steps
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "0"}
    command = [sys.executable, "-m", "benchmarks.arms", name, json.dumps(work)]
    if name.startswith(PEERS):
        command = [python_of(name.partition("-")[0]), "-m", "benchmarks.peers", name, options.work]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    except OSError as error:
        return {"error": f"{error}; make bench-peers makes it"}
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode} (9: no memory was left)"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return {**json.loads(done.stdout.splitlines()[-1]),
            "process_seconds": time.perf_counter() - start}


def python_of(peer: str) -> str:
    """Return a peer's Python: .venv-PEER/bin/python, or what PEER_PYTHON names (LITGPT_PYTHON)."""
    return os.environ.get(f"{peer.upper()}_PYTHON", str(ROOT / f".venv-{peer}" / "bin" / "python"))


def summary(results: list[dict], host: dict, options: argparse.Namespace) -> dict:
    """Summarise an arm's repetitions; {"error": why} if one failed or did other work."""
    errors = [result["error"] for result in results if "error" in result]
    if not errors and any(result["hashes"] != host["hashes"] for result in results):
        errors = ["it did not get the same token ids and labels in the same steps"]
    if errors:
        return {"error": errors[0]}
    first, timed = results[0], [sum(result["seconds"][WARMUP:]) for result in results]
    rates, dtype = [options.batch * options.steps / seconds for seconds in timed], first["dtype"]
    work_rate = sum(first["flops"][WARMUP:]) / median(timed)
    return {"samples_per_s": options.batch * options.steps / median(timed),
            "slowest": min(rates), "fastest": max(rates),
            "tokens_per_s": sum(host["tokens"][WARMUP:]) / median(timed),
            "step_seconds": median(timed) / options.steps,
            "warmup_seconds": median(sum(result["seconds"][:WARMUP]) for result in results),
            "train_seconds": median(sum(result["seconds"]) for result in results),
            "process_seconds": median(result["process_seconds"] for result in results),
            "peak_gib": max(result["peak_gib"] for result in results),
            "loaded_gib": max(result["loaded_gib"] for result in results),
            "estimate_gib": first.get("estimate_gib"),     # what train.py prints
            "of_peak": work_rate / host["peak_flops"][dtype], "dtype": dtype,
            "initial_a": first["initial_a"], "losses": first["losses"],
            "seconds": [result["seconds"] for result in results]}


def compare(arms: dict[str, dict]) -> None:
    """Write into each arm how far its losses are from those of peft-loop, or else of the first;
    an arm that started from another A becomes an error."""
    good = {name: arm for name, arm in arms.items() if "error" not in arm}
    if not good:
        return
    reference = good.get("peft-loop", next(iter(good.values())))
    for name, arm in good.items():
        pairs = zip(arm["losses"], reference["losses"], strict=True)
        arm["loss_differs"] = max(abs(a - b) for a, b in pairs)
        if arm["initial_a"] != reference["initial_a"]:
            arms[name] = {"error": "its adapters did not start from the same A"}


def table(arms: dict[str, dict]) -> list[str]:
    """Return the lines of a Markdown table, the fastest arm first, failures last."""
    lines = ["| arm | samples/s | range | tokens/s | s/step | first step | peak GiB (loaded) "
             "| of peak matmul | loss differs by |", "|---|" + "--:|" * 8]
    row = ("| {samples_per_s:.3g} | {slowest:.3g} to {fastest:.3g} | {tokens_per_s:.0f} "
           "| {step_seconds:.2f} | {warmup_seconds:.2f} | {peak_gib:.2f} ({loaded_gib:.2f}) "
           "| {of_peak:.0%} {dtype} | {loss_differs:.1e} |")
    for name, arm in sorted(arms.items(), key=lambda item: -item[1].get("samples_per_s", 0)):
        lines.append(f"| {name} " + (f"| failed: {arm['error']} |" if "error" in arm
                                     else row.format(**arm)))
    return lines


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
