"""train.py on a tiny model: as a process where that matters, else by its main()."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from lora import adapter, base, config

ROOT = Path(__file__).resolve().parents[1]


def facts(n=6):
    return "".join(json.dumps({"questions": [f"Where is {c * 3}?", f"Tell me where {c * 3} is.",
                                             f"In what place is {c * 3}?", f"{c * 3} is where?"],
                               "answer": f"In {c.upper() * 2}.", "value": c.upper() * 2}) + "\n"
                   for c in "abcdefgh"[:n])


@pytest.fixture
def home(tmp_path, tiny_folder):
    """A folder to run train.py in, with its config and data."""
    (tmp_path / "facts.jsonl").write_text(facts())
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": str(tiny_folder), "device": "cpu"}, "data": {"path": "facts.jsonl"},
        "train": {"run": "t", "epochs": 3, "batch_size": 4, "lr": 0.02, "max_new_tokens": 8}}))
    return tmp_path


def process(home, *args):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *args], cwd=home, text=True,
                          capture_output=True)


def run(home, *args):
    """The same in this process: importing torch again takes longer than a tiny run."""
    out, error = io.StringIO(), ""
    with contextlib.chdir(home), contextlib.redirect_stdout(out):
        try:
            train.main(list(args))
        except ValueError as raised:
            error = f"error: {raised}"
    return SimpleNamespace(returncode=int(bool(error)), stdout=out.getvalue(), stderr=error)


def metrics(home, run="t"):
    return [json.loads(x) for x in (home / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_all_it_promises_and_learns(home):
    done = process(home)
    assert done.returncode == 0, done.stderr
    folder = home / "runs" / "t"
    assert {"adapter", "last", "loss.png", "loss-dark.png", "samples.md", "metrics.jsonl",
            "config.json", "run.json"} == {p.name for p in folder.iterdir()}
    lines = metrics(home)
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 16))    # 18 examples: 5 steps x 3 epochs
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert [x["step"] for x in lines if "val_loss" in x] == [0, 5, 10, 15]
    assert [x["step"] for x in lines if "epoch_accuracy" in x] == [5, 10, 15]
    assert any(x.get("best") for x in lines) and "recall" in lines[0]
    info = json.loads((folder / "run.json").read_text())
    assert info["base_model"] == "tiny-llama" and info["examples"] == [18, 6]
    assert str(home) not in (folder / "adapter" / "adapter_config.json").read_text()
    assert "before: " in done.stdout and "best: step" in done.stdout
    assert "18 training examples" in done.stdout and "14 modules in 2 of 2" in done.stdout

    # again from its own config: the same numbers, and the first run is kept
    again = run(home, "--config", "runs/t/config.json")
    assert again.returncode == 0 and "kept the earlier runs/t as" in again.stdout
    keys = ("loss", "grad_norm", "val_loss", "recall", "lr")
    assert [[x.get(k) for k in keys] for x in metrics(home)] == [
        [x.get(k) for k in keys] for x in lines]
    assert len(list((home / "runs").iterdir())) == 2


def test_accumulation_changes_memory_not_the_result(home):
    (whole, split) = (run(home, "--train.max_steps=6", f"--train.grad_accum={n}",
                          f"--train.run=n{n}") for n in (1, 4))
    assert "in 1 micro-batches of 4" in whole.stdout and "in 4 micro-batches of 1" in split.stdout
    a, b = (adapter._read(home / "runs" / f"n{n}" / "last")[1] for n in (1, 4))
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], atol=1e-4, rtol=1e-3)


def test_the_kept_adapter_is_the_best_one_and_patience_stops(home):
    done = run(home, "--train.lr=0.5", "--train.epochs=40", "--train.patience=2",
               "--train.best_by=loss", "--train.warmup_steps=0")
    assert done.returncode == 0 and "2 evaluations without a better one" in done.stdout
    evaluations = [x for x in metrics(home) if "val_loss" in x and x["step"]]
    best = min(evaluations, key=lambda x: x["val_loss"])
    assert f"best: step {best['step']}:" in done.stdout and best["best"]
    assert not any(x["best"] for x in evaluations[-2:]) and evaluations[-1]["step"] < 200


def test_without_validation_the_last_adapter_is_the_best(home):
    done = run(home, "--data.val_fraction=0", "--train.max_steps=2")
    assert done.returncode == 0 and "best: step 2" in done.stdout
    assert "val_loss" not in (home / "runs/t/metrics.jsonl").read_text()


def test_going_on_from_an_adapter(home):
    run(home, "--train.max_steps=3")
    done = run(home, "--model.adapter=runs/t/last", "--train.run=more", "--train.max_steps=1")
    assert done.returncode == 0 and "the lora section is not used" in done.stdout
    assert metrics(home, "more")[0]["val_loss"] < metrics(home)[0]["val_loss"]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_examples(home, tiny_folder):
    model = base.load_model(str(tiny_folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("h") - ord("!") + 3] = float("nan")
    model.save_pretrained(tiny_folder)
    (home / "facts.jsonl").write_text(facts().replace('"aaa is where?"', '"hhh is where?"'))
    done = run(home, "--data.val_fraction=0", "--train.run=nan")
    assert done.returncode == 1
    assert "error: train: step" in done.stderr and "loss nan" in done.stderr
    assert "facts.jsonl:" in done.stderr and "Lower train.lr" in done.stderr
    tensors = adapter._read(home / "runs" / "nan" / "last")[1]
    assert all(t.isfinite().all() for t in tensors.values())


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--train.epochs=3000"],
                          cwd=home, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:
        log = home / "runs" / "t" / "metrics.jsonl"
        deadline = time.time() + 60
        while not (log.exists() and '"step": 3,' in log.read_text()) and time.time() < deadline:
            time.sleep(0.1)
        os.kill(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err
    (line,) = (x for x in out.splitlines() if x.startswith("  python train.py"))
    done = run(home, *line.split()[2:], "--train.max_steps=1")
    assert done.returncode == 0 and (home / "runs" / "t-more" / "adapter").is_dir()


@pytest.mark.parametrize("args, message", [
    (["--lora.rank=3"], "config.json: unknown key lora.rank"),
    (["--lora.target_modules=[\"q_prj\"]"], "inject: target_modules ['q_prj'] matched nothing"),
    (["--data.path=none.jsonl"], "data: none.jsonl: cannot be read"),
    (["--data.debate=true"], 'it needs path = "data.py"'),
    (["--model.name=no/such-model"], "model: could not load 'no/such-model'"),
    (["--model.adapter=nowhere"], "adapter: nowhere has no adapter_config.json"),
    (["--train.run=../x"], "expected a folder name, not a path"),
    (["--dataset.max_length=20"], "no example fits in max_length=20"),
    (["--fast"], "--fast: expected --config FILE or --section.key=value"),
])
def test_errors_are_one_readable_message(home, args, message):
    done = run(home, *args)
    assert done.returncode == 1 and message in done.stderr
    assert not (home / "runs").exists()


def test_the_command_line_shows_no_traceback(home):
    done = process(home, "--lora.rank=3")
    assert done.returncode == 1 and done.stderr.startswith("error: config.json: unknown key")


def test_best_by_recall_needs_facts(home):
    (home / "talk.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2 +
                                     '{"prompt": "c", "completion": "d"}\n')
    done = run(home, "--data.path=talk.jsonl", "--train.best_by=recall")
    assert done.returncode == 1 and 'no validation example has a "value"' in done.stderr
    assert "1 examples occur more than once" in done.stdout


def test_windows_hold_every_example_once_an_epoch_and_keep_the_short_last_one():
    plan = train.windows(10, 4, 2, None, seed=0)
    assert [len(rows) for _, rows in plan] == [4, 4, 2, 4, 4, 2]
    for epoch in (0, 1):
        assert sorted(i for e, rows in plan for i in rows if e == epoch) == list(range(10))
    assert plan[:3] == train.windows(10, 4, 1, None, seed=0)    # an epoch depends on nothing else
    assert plan != train.windows(10, 4, 2, None, seed=1)
    assert len(train.windows(10, 4, 0.5, None, 0)) == 2 and len(train.windows(3, 4, 1, 7, 0)) == 7


def test_the_default_config_is_valid():
    assert config.load(ROOT / "config.json").train.run == "demo"


@pytest.fixture
def plain_run(home):
    """The losses of a run with every lever off."""
    run(home, "--train.run=plain", "--train.layout=padded", *OFF)
    return [x["loss"] for x in metrics(home, "plain") if "loss" in x]


OFF = ("--train.lean_head=false", "--train.fused_lora=false", "--train.fused_leaves=false")


@pytest.mark.parametrize("args", [
    (), ("--train.layout=flat",), ("--train.layout=padded",), OFF, ("--train.checkpointing=true",),
    ("--train.grad_accum=2",)], ids=str)
def test_no_lever_changes_the_losses(home, plain_run, args):
    done = run(home, *args)
    assert done.returncode == 0, done.stderr
    assert "memory: a step of " in done.stdout
    losses = [x["loss"] for x in metrics(home) if "loss" in x]
    assert losses == pytest.approx(plain_run, rel=1e-3)       # after 15 steps that add up rounding
    assert losses[:3] == pytest.approx(plain_run[:3], rel=1e-5)


def test_with_dropout_no_prompt_is_shared_and_the_run_says_so(home):
    done = run(home, "--lora.lora_dropout=0.1", "--train.epochs=1")
    assert done.returncode == 0 and "with dropout no prompt is shared" in done.stdout


def test_a_model_that_cannot_take_flat_batches_is_trained_on_padded_ones(home, monkeypatch):
    monkeypatch.setattr(train.flat, "enable", lambda model: "it has none")
    done = run(home, "--train.epochs=1")
    assert done.returncode == 0 and "train: batches are padded: it has none" in done.stdout
