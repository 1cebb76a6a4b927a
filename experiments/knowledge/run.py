"""
Run the experiment: arms of arms.json on models and seeds, each trained by python train.py.

    python -m experiments.knowledge.run                              # the flagship
    python -m experiments.knowledge.run --grid full                  # hours
    python -m experiments.knowledge.run --cells chat/r7 chat/no-replay --seeds 0 1 2

A cell is one arm on one model with one seed. What is finished is not run again, unless its settings
have changed; stop it at any time and call it again. Everything is in runs/: knowledge-MODEL-ARM-sN
is an ordinary run of train.py (of full.py, for the arm full), knowledge/cells/ has the scores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from experiments.knowledge import make_facts
from lora import config, runlog

HERE, HOME = Path(__file__).parent, Path("runs/knowledge")


def read_arms(path=HERE / "arms.json"):
    """{"models", "arms", "grids"}; an arm has all that it takes from the arm it is made from."""
    made = json.loads(Path(path).read_text(encoding="utf-8"))

    def whole(name):
        arm = made["arms"][name]
        above = whole(arm["from"]) if "from" in arm else {}
        return {**above, **arm, "train": {**above.get("train", {}), **arm.get("train", {})}}
    return {**made, "arms": {name: whole(name) for name in made["arms"]}}


def settings_of(arms, model, arm, seed):
    """The sections of config.json for a cell: {placeholders} are the model's and the world's."""
    known = {**arms["models"][model], "world": str(HOME / f"world-{seed}"),
             **{slot: str(replay_file(slot, model)) for slot in ("replay", "replay_more")}}
    made = {"model": {"name": known["name"]}, "lora": {}, "data": {}, "dataset": {}, "keep": {},
            "train": {"seed": seed, "run": run_name(model, arm, seed)}}
    for key, value in arms["arms"][arm]["train"].items():
        section, _, name = key.partition(".")
        if isinstance(value, str) and "{" in value:
            whole = value[1:-1]                               # "{lr}" is a number
            value = known[whole] if whole in known else value.format(**known)
        made[section][name] = value
    return made


def run_name(model, arm, seed):
    return f"knowledge-{model}-{arm}-s{seed}"


def cells_of(arms, grid, given, seeds):
    """[(model, arm, seed)]: what is asked for, of a grid or by hand."""
    if given:
        wanted = [(*cell.split("/", 1), seed) for cell in given for seed in seeds]
    else:
        wanted = [(*cell.split("/", 1), seed) for cell, own in arms["grids"][grid].items()
                  for seed in own]
    for model, arm, _ in wanted:
        for name, kind in ((model, "models"), (arm, "arms")):
            if name not in arms[kind]:
                raise ValueError(f"arms.json: no {kind[:-1]} {name!r}; there are "
                                 f"{', '.join(arms[kind])}")
    return wanted


def call(log, threads, *command):
    """Run a module or a file of this project with so many threads, its output to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        done = subprocess.run([sys.executable, *map(str, command)], stdout=out, stderr=out,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        end = log.read_text(encoding="utf-8").splitlines()[-5:]
        raise ValueError(f"{' '.join(map(str, command))}\nfailed ({log}):\n" + "\n".join(end))


SCORE = "-m", "experiments.knowledge.score"
BEFORE = "test,card,reverse,multi,unknown,unanswerable,neighbours,general"


def prepare(model, arms, wanted, threads):
    """The untouched model's scores and its answers to the prompts that the wanted arms replay, once
    a model. replay_more has the prompts of replay and more."""
    name, log = arms["models"][model]["name"], HOME / "logs" / f"base-{model}.log"
    scores, prompts = HOME / f"base-{model}.json", [HOME / "world-0" / "replay.txt"]
    if not scores.exists():
        call(log, threads, *SCORE, "--model", name, "--world", HOME / "world-0", "--out", scores,
             "--sets", BEFORE)
    for slot, files in (("replay", prompts), ("replay_more", [*prompts, HERE / "replay_more.txt"])):
        file = replay_file(slot, model)
        trained = {arms["arms"][arm].get("trained", arm) for own, arm, _ in wanted if own == model}
        if not file.exists() and any(f"{{{slot}}}" in arms["arms"][arm]["train"].values()
                                     for arm in trained):
            call(log, threads, "-m", "experiments.knowledge.replay", "--model", name, "--out", file,
                 "--prompts", *files)


def replay_file(slot, model):
    return HOME / f"{slot.replace('_', '-')}-{model}.jsonl"


def is_trained(sections):
    """Whether runs/ has this very run, finished: samples.md, or a whole model, is its last file."""
    folder = Path("runs") / sections["train"]["run"]
    if not any((folder / last).exists() for last in ("samples.md", "model/tokenizer.json")):
        return False
    own = HOME / "configs" / f"{folder.name}.json"
    return config.load(own) == config.load(folder / "config.json")


def cell(arms, model, arm, seed, threads):
    """Train, if need be, and score one cell; returns the seconds it took, 0 if it was finished."""
    what, started = arms["arms"][arm], time.perf_counter()
    trained = what.get("trained", arm) if what["train"] or "trained" in what else None
    file = HOME / "cells" / f"{model}-{arm}-s{seed}.json"
    sections = settings_of(arms, model, trained or arm, seed)
    score = [*what.get("score", []), "--adapter", what.get("adapter", "adapter")]
    trainer = ["-m", what["trainer"]] if "trainer" in what else ["train.py"]
    key = runlog.digest([sections, score, (HOME / f"world-{seed}/manifest.json").read_text()])
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("key") == key:
        return 0
    folder = Path("runs") / sections["train"]["run"]
    own = HOME / "configs" / f"{folder.name}.json"
    own.parent.mkdir(parents=True, exist_ok=True)
    runlog.write_json(own, sections)
    if trained and not is_trained(sections):
        call(HOME / "logs" / f"{folder.name}.log", threads, *trainer, "--config", own)
    subject = ["--model", sections["model"]["name"]]
    if trained:
        subject = [*subject, "--whole", folder / "model"] if (folder / "model").exists() else [
            "--run", folder]
    made = file.with_suffix(".part")
    made.parent.mkdir(parents=True, exist_ok=True)
    call(HOME / "logs" / f"{file.stem}.log", threads, *SCORE, *subject, *score, "--world",
         HOME / f"world-{seed}", "--base", HOME / f"base-{model}.json", "--out", made)
    scores = json.loads(made.read_text(encoding="utf-8"))
    metrics = folder / "metrics.jsonl"
    runlog.write_json(file, {
        "key": key, "model": model, "arm": arm, "seed": seed, "what": what["what"],
        "settings": sections if trained else None, "cell_seconds": time.perf_counter() - started,
        "log": [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        if trained else [], **(effort(sections, folder) if trained else {}), **scores})
    made.unlink()
    return time.perf_counter() - started


def effort(sections, folder):
    """How often a step shows each fact, and how many numbers train."""
    keep, data, facts = sections["keep"], sections["data"], 24
    if data.get("split_by") == "fact":
        facts -= round(facts * data["val_fraction"])
    own = 1 - keep.get("replay_share", 0) - keep.get("unknown_share", 0)
    file = next(f for f in (folder / "adapter/adapter_model.safetensors",
                            folder / "model/model.safetensors") if f.exists())
    with open(file, "rb") as weights:
        header = 8 + int.from_bytes(weights.read(8), "little")
    return {"exposures_per_step": sections["train"].get("batch_size", 16) * own / facts,
            "parameters": (file.stat().st_size - header) // 4}     # float32


def main(argv):
    parser = argparse.ArgumentParser(description="Run cells of the knowledge experiment.")
    parser.add_argument("--grid", default="flagship")
    parser.add_argument("--cells", nargs="+", help="MODEL/ARM ..., instead of a grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    asked = parser.parse_args(argv)
    arms = read_arms()
    wanted = cells_of(arms, asked.grid, asked.cells, asked.seeds)
    if asked.list:
        for model, arm, seed in wanted:
            print(f"{model}/{arm} seed {seed}: {arms['arms'][arm]['what']}")
        return
    threads = max(1, (os.cpu_count() or 1) // asked.jobs)
    for seed in {0, *(seed for _, _, seed in wanted)}:
        make_facts.write(seed, HOME / f"world-{seed}")
    chains = {}                                               # arms that share a run, in order
    for model, arm, seed in wanted:
        trained = arms["arms"][arm].get("trained", arm)
        chains.setdefault((model, trained, seed), []).append((model, arm, seed))
    bar = tqdm(total=len(wanted), unit="cell", dynamic_ncols=True)

    def work(chain):
        ready[chain[0][0]].result()
        for one in chain:
            seconds = cell(arms, *one, threads)
            bar.write(f"{one[0]}/{one[1]} seed {one[2]}: "
                      + (f"{seconds / 60:.1f} minutes" if seconds else "was finished"))
            bar.update()
    with ThreadPoolExecutor(asked.jobs) as pool:
        ready = {model: pool.submit(prepare, model, arms, wanted, threads)
                 for model in dict.fromkeys(model for model, _, _ in wanted)}
        list(pool.map(work, chains.values()))
    bar.close()


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
