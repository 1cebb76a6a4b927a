"""
Run the experiment: arms of arms.json on models and seeds, each trained by python train.py.

    python -m experiments.knowledge.run                              # the flagship
    python -m experiments.knowledge.run --grid full                  # hours
    python -m experiments.knowledge.run --cells chat/r7 chat/no-replay --seeds 0 1 2

A cell is one arm on one model with one seed. A finished cell is not run again unless its settings
have changed, so you may stop at any time and start again. Everything is in runs/: the scores in
knowledge/cells/, runs of train.py (full.py for the arm full) in knowledge-MODEL-ARM-sN.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import group_by
from experiments.knowledge import hops, make_facts
from experiments.knowledge.make_facts import HERE
from lora import config, files
from lora.run import cli, runlog

HOME = Path("runs/knowledge")


def read_arms() -> dict:
    """Read {"models", "arms", "grids"}; an arm inherits from the arm in its "from"."""
    content = files.read_json(HERE / "arms.json")

    def inherited(name):
        arm = content["arms"][name]
        above = inherited(arm["from"]) if "from" in arm else {}
        return {**above, **arm, "train": {**above.get("train", {}), **arm.get("train", {})}}
    return {**content, "arms": {name: inherited(name) for name in content["arms"]}}


def world_of(arms: dict, arm: str, seed: int) -> Path:
    """The folder of a cell's world: of make_facts, or of hops."""
    return HOME / f"{arms['arms'][arm].get('world', 'world')}-{seed}"


def settings_of(arms: dict, model: str, arm: str, seed: int) -> dict[str, dict]:
    """Build the sections of a cell's config.json: {slots} are filled for its model and world."""
    slots = {**arms["models"][model], "world": str(world_of(arms, arm, seed)),
             "replay": str(HOME / f"replay-{model}.jsonl"),
             "replay_more": str(HOME / f"replay-more-{model}.jsonl")}
    sections = {"model": {"name": slots["name"]}, "lora": {}, "data": {}, "dataset": {}, "keep": {},
                "train": {"seed": seed, "run": f"knowledge-{model}-{arm}-s{seed}"}}
    for key, value in arms["arms"][arm]["train"].items():
        section, _, name = key.partition(".")
        if isinstance(value, str) and "{" in value:
            slot = value[1:-1]                                # "{lr}" alone stays a number
            value = slots[slot] if slot in slots else value.format(**slots)
        sections[section][name] = value
    return sections


def cells_of(arms: dict, grid: str, names: list[str] | None, seeds: list[int]) -> list[tuple]:
    """List the (model, arm, seed) of a grid, or of names MODEL/ARM with all seeds."""
    seeds_of = dict.fromkeys(names, seeds) if names else arms["grids"][grid]
    cells = [(*name.split("/", 1), seed) for name, own in seeds_of.items() for seed in own]
    for model, arm, _ in cells:
        for name, kind in ((model, "models"), (arm, "arms")):
            if name not in arms[kind]:
                raise ValueError(f"arms.json: no {kind[:-1]} {name!r}; there are "
                                 f"{', '.join(arms[kind])}")
    return cells


def call(log: Path, threads: int, *command) -> None:
    """Run a module or a file of this project with so many threads; its output goes to a log.
    ValueError with the log's last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        done = subprocess.run([sys.executable, *map(str, command)], stdout=out, stderr=out,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        end = log.read_text(encoding="utf-8").splitlines()[-5:]
        raise ValueError(f"{' '.join(map(str, command))}\nfailed ({log}):\n" + "\n".join(end))


SCORE = "-m", "experiments.knowledge.score"
BEFORE = "test,card,reverse,nobody,multi,verify,premise,unanswerable,unknown,everyday,real"


def prepare(model: str, arms: dict, cells: list[tuple], threads: int) -> None:
    """Score the untouched model and let it answer the prompts that the cells' arms replay, if that
    is not done yet. replay-more holds the prompts of replay and more."""
    name, log = arms["models"][model]["name"], HOME / "logs" / f"base-{model}.log"
    scores, world = HOME / f"base-{model}.json", HOME / "world-0"
    if not scores.exists():
        call(log, threads, *SCORE, "--model", name, "--world", world, "--out", scores,
             "--sets", BEFORE)
    trained = {arms["arms"][arm].get("trained", arm) for m, arm, _ in cells if m == model}
    replayed = {settings_of(arms, model, arm, 0)["keep"].get("replay") for arm in trained}
    for kind, more in (("replay", []), ("replay-more", [HERE / "replay_more.txt"])):
        file = HOME / f"{kind}-{model}.jsonl"
        if str(file) in replayed and not file.exists():
            call(log, threads, "-m", "experiments.knowledge.replay", "--model", name, "--out", file,
                 "--prompts", world / "replay.txt", *more)


def is_trained(sections: dict) -> bool:
    """Whether runs/ has this run with these settings, finished: its last file is samples.md, or the
    whole model's tokenizer."""
    folder = Path("runs") / sections["train"]["run"]
    if not any((folder / last).exists() for last in ("samples.md", "model/tokenizer.json")):
        return False
    settings = config.load(HOME / "configs" / f"{folder.name}.json")
    return settings == config.load(folder / "config.json")


def run_cell(arms: dict, model: str, arm: str, seed: int, threads: int) -> float:
    """Train a cell unless that is done, and score it; returns the seconds, 0 if it was finished."""
    what, started = arms["arms"][arm], time.perf_counter()
    trained = what.get("trained", arm) if what["train"] or "trained" in what else None
    file = HOME / "cells" / f"{model}-{arm}-s{seed}.json"
    sections = settings_of(arms, model, trained or arm, seed)
    score = [part.format(model=model, seed=seed) for part in what.get("score", [])]
    score += ["--adapter", what.get("adapter", "adapter")]
    trainer = ["-m", what["trainer"]] if "trainer" in what else ["train.py"]
    world = world_of(arms, arm, seed)
    key = runlog.digest([sections, score, *(
        (world / name).read_text(encoding="utf-8") for name in ("facts.json", "test.json"))])
    if file.exists() and files.read_json(file).get("key") == key:
        return 0
    folder = Path("runs") / sections["train"]["run"]
    settings = HOME / "configs" / f"{folder.name}.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    runlog.write_json(settings, sections)
    if trained and not is_trained(sections):
        call(HOME / "logs" / f"{folder.name}.log", threads, *trainer, "--config", settings)
    subject = ["--model", sections["model"]["name"]]
    if trained:
        subject = [*subject, "--whole", folder / "model"] if (folder / "model").exists() else [
            "--run", folder]
    part = file.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    call(HOME / "logs" / f"{file.stem}.log", threads, *SCORE, *subject, *score, "--world", world,
         "--base", HOME / f"base-{model}.json", "--out", part)
    cell = {"key": key, "model": model, "arm": arm, "seed": seed, "what": what["what"],
            "settings": None, "cell_seconds": time.perf_counter() - started, "log": []}
    if trained:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        cell |= {"settings": sections, "log": [json.loads(line) for line in lines],
                 **effort(sections, folder, world)}
    runlog.write_json(file, {**cell, **files.read_json(part)})
    part.unlink()
    return cell["cell_seconds"]


def effort(sections: dict, folder: Path, world: Path) -> dict[str, float]:
    """How often a step asks for each fact as it was written, and how many parameters train."""
    keep, data = sections["keep"], sections["data"]
    facts = sum(f["group"] == "taught" for f in files.read_json(world / "facts.json")["facts"])
    questions = files.read_json(folder / "run.json")["examples"][0] / facts
    if data.get("split_by") == "fact":
        facts -= round(facts * data["val_fraction"])
    share = 1 - keep.get("replay_share", 0) - keep.get("unknown_share", 0)
    share *= questions / (questions + sum((keep.get("sides") or {}).values()))
    if data["path"] == keep.get("replay"):
        share = 0                                              # the placebo
    file = next(f for f in (folder / "adapter/adapter_model.safetensors",
                            folder / "model/model.safetensors") if f.exists())
    with open(file, "rb") as weights:
        header = 8 + int.from_bytes(weights.read(8), "little")
    return {"exposures_per_step": sections["train"].get("batch_size", 16) * share / facts,
            "parameters": (file.stat().st_size - header) // 4}     # float32


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--grid", default="flagship", help="a grid of arms.json")
    parser.add_argument("--cells", nargs="+", help="MODEL/ARM ..., instead of a grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of --cells")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="cells at a time")
    options = parser.parse_args(argv)
    arms = read_arms()
    cells = cells_of(arms, options.grid, options.cells, options.seeds)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    for seed in {0, *(seed for _, _, seed in cells)}:
        make_facts.write(seed, HOME / f"world-{seed}")
        hops.write(seed, HOME / f"hops-{seed}")

    def run_of(cell):
        model, arm, seed = cell
        return model, arms["arms"][arm].get("trained", arm), seed
    chains = group_by(run_of, cells)                          # cells that share a run, in order
    bar = tqdm(total=len(cells), unit="cell", dynamic_ncols=True)

    def work(chain):
        ready[chain[0][0]].result()
        for one in chain:
            seconds = run_cell(arms, *one, threads)
            took = f"{seconds / 60:.1f} minutes" if seconds else "was finished"
            bar.write(f"{one[0]}/{one[1]} seed {one[2]}: {took}")
            bar.update()
    with ThreadPoolExecutor(options.jobs) as pool:
        ready = {model: pool.submit(prepare, model, arms, cells, threads)
                 for model in dict.fromkeys(model for model, _, _ in cells)}
        list(pool.map(work, chains.values()))
    bar.close()


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
