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
from conftest import AUTO, within

import data
import dataset
import keep
import measure
import train
from lora import adapter, config
from lora.base import load
from lora.fast import flat
from lora.run import state
from measure import Voice

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DTYPE = f"--model.dtype={AUTO}"                                # for processes: theirs is not pinned
pytestmark = pytest.mark.auto


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
    return subprocess.run([sys.executable, str(ROOT / "train.py"), DTYPE, *args], cwd=home,
                          text=True, capture_output=True)


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
            "config.json", "run.json", "checkpoints", "answers.jsonl", "status.json",
            "messages.txt"} == {p.name for p in folder.iterdir()}
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
    assert len(list((home / "runs").glob("t*"))) == 2


def test_every_evaluation_keeps_its_answers(home):
    done = run(home, "--train.questions=[\"say aaa\"]", "--keep.questions=[\"who?\"]")
    folder = home / "runs/t"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10, 15]
    questions = [[answer["question"] for answer in line["answers"]] for line in lines]
    assert questions[0][-2:] == ["say aaa", "who?"] and len(questions[0]) == 6 + 2
    assert all(asked == questions[0] for asked in questions)
    for line, measured in zip(lines, (x for x in metrics(home) if "recall" in x), strict=True):
        marks = [answer["right"] for answer in line["answers"] if "value" in answer]
        assert len(marks) == 6 and sum(marks) / 6 == measured["recall"]
    assert (folder / "messages.txt").read_text() == done.stdout


def test_samples_are_the_answers_of_the_adapter_in_the_file(home, monkeypatch):
    """Those of the best evaluation, if the file has its bits; else the file's adapter is asked."""
    asked, answers = [], measure.Exam.answers
    monkeypatch.setattr(measure.Exam, "answers", lambda self: (asked.append(1), answers(self))[1])
    flags = ("--train.questions=[\"say aaa\", \"who?\"]", "--train.max_steps=5")
    run(home, *flags)
    table = (home / "runs/t/samples.md").read_text()
    said = [json.loads(x) for x in (home / "runs/t/answers.jsonl").read_text().splitlines()]
    best = min((x for x in metrics(home) if "best" in x), key=lambda x: not x["best"])["step"]
    wanted = [[" ".join(answer["answer"].split()).replace("|", "\\|") for answer in line["answers"]
               if "value" not in answer] for line in said if line["step"] in (0, best)]
    assert not asked and [row[2:-2] for row in table.splitlines()[2:]] == [
        " | ".join(cells) for cells in zip(["say aaa", "who?"], *wanted, strict=True)]
    monkeypatch.setattr(state.Progress, "is_best", lambda self, parameters: False)
    run(home, *flags)
    assert asked == [1] and "| who? |" in (home / "runs/t/samples.md").read_text()


def test_an_adapter_is_the_best_only_with_its_bits():
    weights = [torch.ones(2), torch.ones(3)]
    run = SimpleNamespace(after=[], best_weights=[w.clone() for w in weights])
    assert state.Progress.is_best(run, weights)
    weights[1][2] += 1e-6
    assert not state.Progress.is_best(run, weights)
    assert not state.Progress.is_best(SimpleNamespace(after=None, best_weights=[]), [])


def test_the_terminal_shows_an_answer_that_flipped(tmp_path):
    shown = []
    run = SimpleNamespace(answers=tmp_path / "answers.jsonl", step=0, said=[],
                          bar=SimpleNamespace(write=shown.append))
    for marks in ((False, False, True), (True, True, True), (True, False, True)):
        state.Progress._keep_answers(run, [
            {"question": q, "answer": f"{q} {mark}", "value": "x", "right": mark}
            for q, mark in zip("abc", marks, strict=True)] + [{"question": "d", "answer": "e"}])
    assert shown == ["  2 turned right, such as: a a True", "  1 turned wrong, such as: b b False"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


def test_a_run_says_how_it_ended(home):
    def status():
        return json.loads((home / "runs/t/status.json").read_text())
    run(home, "--train.max_steps=2")
    assert status() == {"state": "finished", "message": "", "steps": 2}
    run(home, "--train.max_steps=2", "--keep.retain=none.jsonl", "--train.run=early")
    assert not (home / "runs/early").exists()                  # no run was begun
    run(home, "--train.best_by=recall", "--data.val_fraction=0")
    assert status()["state"] == "failed" and "recall" in status()["message"]


def test_accumulation_changes_memory_not_the_result(home):
    (whole, split) = (run(home, "--train.max_steps=6", f"--train.grad_accum={n}",
                          f"--train.run=n{n}") for n in (1, 4))
    assert "in 1 micro-batches of 4" in whole.stdout and "in 4 micro-batches of 1" in split.stdout
    a, b = (adapter.read(home / "runs" / f"n{n}" / "last")[1] for n in (1, 4))
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], atol=within(1e-4, 0.05), rtol=within(1e-3, 0.1))


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
    model = load.load_model(str(tiny_folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("h") - ord("!") + 3] = float("nan")
    model.save_pretrained(tiny_folder)
    (home / "facts.jsonl").write_text(facts().replace('"aaa is where?"', '"hhh is where?"'))
    done = run(home, "--data.val_fraction=0", "--train.run=nan")
    assert done.returncode == 1
    assert "error: train: step" in done.stderr and "loss nan" in done.stderr
    assert "facts.jsonl:" in done.stderr and "Lower train.lr" in done.stderr
    tensors = adapter.read(home / "runs" / "nan" / "last")[1]
    assert all(t.isfinite().all() for t in tensors.values())


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), DTYPE,
                           "--train.epochs=3000"], cwd=home, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:
        log = home / "runs" / "t" / "metrics.jsonl"
        deadline = time.time() + 60
        while not (log.exists() and '"step": 3,' in log.read_text()) and time.time() < deadline:
            time.sleep(0.1)
        os.kill(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err
    assert "python train.py --resume runs/t" in out + err
    done = run(home, "--resume", "runs/t", "--train.epochs=1")
    assert done.returncode == 1 and "train.epochs: 3000 in the checkpoint, 1 now" in done.stderr
    done = run(home, "--resume", "t", "--train.epochs=1", "--force")
    assert done.returncode == 0 and (home / "runs/t/adapter").is_dir()


@pytest.mark.parametrize("args, message", [
    (["--lora.rank=3"], "--lora.rank: unknown option; did you mean --lora.r?"),
    (["--lora.target_modules=[\"q_prj\"]"], "inject: target_modules ['q_prj'] matched nothing"),
    (["--data.path=none.jsonl"], "data: none.jsonl: cannot be read"),
    (["--keep.sides={\"back\": 1}"], "keep.sides: no side 'back'; there are reverse, nobody"),
    (["--model.name=no/such-model"], "model: could not load 'no/such-model'"),
    (["--model.adapter=nowhere"], "adapter: nowhere has no adapter_config.json"),
    (["--train.run=../x"], "expected a folder name, not a path"),
    (["--dataset.max_length=20"], "no example fits in max_length=20"),
    (["--fast"], "--fast: unknown option"),
    (["--model.name=smollm2"], "model 'smollm2' is not known and no folder here; did you mean "
                               "smollm2-135m-instruct?"),
])
def test_errors_are_one_readable_message(home, monkeypatch, args, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would try for long
    done = run(home, *args)
    assert done.returncode == 1 and message in done.stderr
    assert not (home / "runs").exists()


def test_the_command_line_shows_no_traceback(home):
    done = process(home, "--lora.rank=3")
    assert done.returncode == 1 and done.stderr.startswith("error: --lora.rank: unknown option")


def test_best_by_recall_needs_facts(home):
    (home / "talk.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2 +
                                     '{"prompt": "c", "completion": "d"}\n')
    done = run(home, "--data.path=talk.jsonl", "--train.best_by=recall")
    assert done.returncode == 1 and 'no validation example has a "value"' in done.stderr
    assert "1 examples occur more than once" in done.stdout


def test_windows_hold_every_example_once_an_epoch_and_keep_the_short_last_one():
    own = [(list(range(10)), 10)]
    plan = dataset.windows(own, 4, 2, None, seed=0)
    assert [len(rows) for _, rows in plan] == [4, 4, 2, 4, 4, 2]
    for epoch in (0, 1):
        assert sorted(i for e, rows in plan for i in rows if e == epoch) == list(range(10))
    assert plan[:3] == dataset.windows(own, 4, 1, None, seed=0)    # an epoch needs no other
    assert plan != dataset.windows(own, 4, 2, None, seed=1)
    assert len(dataset.windows(own, 4, 0.5, None, 0)) == 2
    assert len(dataset.windows([(range(3), 3)], 4, 1, 7, 0)) == 7


def test_windows_take_their_share_of_a_pool_and_go_on_where_they_stopped():
    plan = dataset.windows([([0, 1, 2, 3], 4), ([10, 11, 12, 13, 14], 2)], 4, 4, None, seed=0)
    drawn = [sorted(i for e, rows in plan for i in rows if e == epoch) for epoch in range(4)]
    assert [d[:4] for d in drawn] == [[0, 1, 2, 3]] * 4
    assert [d[4:] for d in drawn] == [[10, 11], [12, 13], [10, 14], [11, 12]]


def test_windows_keep_the_samples_of_a_conversation_together():
    of = [0, 0, 0, 3, 4, 4, 6, 7, 7, 7]
    plan = dataset.windows([(list(range(10)), 10)], 10, 3, None, 0, of)
    for _, rows in plan:
        assert sorted(rows) == list(range(10))
        for first in {*of}:
            at = [rows.index(i) for i in range(10) if of[i] == first]
            assert at == [*range(at[0], at[0] + len(at))]
    assert len({tuple(rows) for _, rows in plan}) == 3
    alone = dataset.windows([(list(range(10)), 10)], 4, 2, None, 0, list(range(10)))
    assert alone == dataset.windows([(list(range(10)), 10)], 4, 2, None, 0)


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
    assert losses[:3] == pytest.approx(plain_run[:3], rel=within(1e-5, 1e-2))
    if AUTO == "float32":                             # after 15 steps that add up rounding
        assert losses == pytest.approx(plain_run, rel=1e-3)
    assert sum(losses) == pytest.approx(sum(plain_run), rel=within(1e-3, 0.05))


def test_with_dropout_no_prompt_is_shared_and_the_run_says_so(home):
    done = run(home, "--lora.lora_dropout=0.1", "--train.epochs=1")
    assert done.returncode == 0 and "with dropout no prompt is shared" in done.stdout


def test_a_model_that_cannot_take_flat_batches_is_trained_on_padded_ones(home, monkeypatch):
    def refuse(model, use_attention):
        raise flat.Unsupported("it has none")
    monkeypatch.setattr(flat, "enable", refuse)
    done = run(home, "--train.epochs=1")
    assert done.returncode == 0 and "train: batches are padded: it has none" in done.stdout


# ----- what keeps the rest of the model ----------------------------------------------------------


def losses(home, run="t"):
    return [x["loss"] for x in metrics(home, run) if "loss" in x]


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def answers(home, questions, n):
    """[(answer, whether it ended)] of the tiny model before training."""
    model = load.load_model(str(home / "tiny-llama"), torch.device("cpu"), getattr(torch, AUTO))
    tokenizer = load.load_tokenizer(str(home / "tiny-llama"))
    voice = Voice(model, tokenizer, "template")
    return [(a.text, a.ended) for a in
            voice.ask([[{"role": "user", "content": q}] for q in questions], n)]


PROMPTS = ["Hi there", "How are you?", "What now", "Say it", "Who?", "Tell me more of it"]


@pytest.fixture
def keeping(home):
    """The same with a subject in every fact, prompts to replay, and questions to retain, of which
    the tiny model gets all but the last right: what it says is their value."""
    (home / "facts.jsonl").write_text("".join(
        json.dumps({**json.loads(line), "subject": 3 * "abcdefgh"[i]}) + "\n"
        for i, line in enumerate(facts().splitlines())))
    (home / "replay.txt").write_text("\n\n".join(PROMPTS) + "\n")
    asked = ["hello?", "and you?", "up or down?", "which?"]
    known = [(q, a) for q, (a, _) in zip(asked, answers(home, asked, 8), strict=True)
             if a and "|" not in a]
    assert len(known) >= 2
    (home / "retain.jsonl").write_text("".join(json.dumps(
        {"question": q, "answer": "so", "value": v}) + "\n" for q, v in [*known, ("why?", "zzz")]))
    return home


KEEP = ("--keep.replay=replay.txt", "--keep.unknown_share=0.2", "--keep.retain=retain.jsonl")


def test_a_run_that_keeps_replays_asks_about_nobody_and_measures(keeping):
    done = run(keeping, *KEEP, "--train.save_every=5", "--train.epochs=2")
    assert done.returncode == 0, done.stderr
    asked = len(lines(keeping / "retain.jsonl"))
    assert f"keep: {asked - 1} of {asked} questions of retain.jsonl are right" in done.stdout
    assert "keep: the model has answered 6 of 6 replay prompts" in done.stdout
    assert "keep: an epoch has 18 of your examples, 8 replay, 7 unknown" in done.stdout
    seen = [x for x in metrics(keeping) if "val_loss" in x]
    assert [x["step"] for x in seen] == [0, 9, 18]             # 33 examples an epoch
    assert seen[0]["retention"] == 1 and seen[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert seen[0]["own_loss"] == pytest.approx(seen[0]["own_loss_before"], abs=1e-5)
    for line in seen[1:]:
        assert line["kl"] > 1e-3 and 0 <= line["retention"] <= 1
        assert line["own_loss"] > line["own_loss_before"] == seen[0]["own_loss_before"]
    steps = sorted(p.name for p in (keeping / "runs/t/steps").iterdir())
    assert steps == ["000005", "000010", "000015"]
    first, last = (adapter.read(keeping / "runs/t" / p)[1] for p in ("steps/000005", "last"))
    assert first.keys() == last.keys() and any((first[k] != last[k]).any() for k in last)

    # what the base said is kept, and can be given back: the same run
    made = lines(keeping / "runs/t/replay.jsonl")
    assert [x["messages"][0]["content"] for x in made] == PROMPTS
    assert [(x["messages"][1]["content"], not x["open"]) for x in made] == answers(
        keeping, PROMPTS, keep.REPLAY_TOKENS)
    again = run(keeping, *KEEP[1:], "--keep.replay=runs/t/replay.jsonl", "--train.run=again",
                "--train.epochs=2")
    assert again.returncode == 0 and "replay prompts" not in again.stdout
    assert losses(keeping, "again") == losses(keeping)
    assert not (keeping / "runs/again/replay.jsonl").exists()


def test_replay_is_learned_by_probabilities_or_answers(keeping):
    for by in ("probabilities", "answers"):
        done = run(keeping, KEEP[0], "--keep.retain=retain.jsonl", f"--keep.replay_by={by}",
                   "--keep.replay_share=0.5", f"--train.run={by}", "--train.epochs=3")
        assert done.returncode == 0, done.stderr
    soft, hard = ([x for x in metrics(keeping, by) if "kl" in x] for by in ("probabilities",
                                                                            "answers"))
    assert soft[0]["kl"] == hard[0]["kl"] and soft[-1]["kl"] < hard[-1]["kl"]
    assert losses(keeping, "probabilities") != losses(keeping, "answers")


def test_with_nothing_to_keep_a_run_is_as_without_the_section(home):
    run(home)
    settings = json.loads((home / "config.json").read_text())
    keep = {"replay": None, "replay_share": 0.25, "replay_by": "probabilities", "retain": None,
            "unknown_share": 0.0, "min_retention": 0.9}
    (home / "config.json").write_text(json.dumps({**settings, "keep": keep}))
    run(home, "--train.run=keep", "--train.save_every=4")
    keys = ("loss", "grad_norm", "val_loss", "recall", "lr")
    whole, kept = ([[x.get(k) for k in keys] for x in metrics(home, r)] for r in ("t", "keep"))
    assert whole == kept and len(losses(home)) == 15
    assert not {"retention", "kl"} & {k for x in metrics(home, "keep") for k in x}
    assert not (home / "runs/t/steps").exists()


def no_value(home):
    (home / "retain.jsonl").write_text('{"question": "a?", "answer": "b", "value": "b"}\n'
                                       '{"question": "a?", "answer": "b"}\n')


@pytest.mark.parametrize("args, change, message", [
    (("--keep.retain=retain.jsonl",), no_value, 'data: retain.jsonl:2: has no "value"'),
    (("--keep.retain=none.jsonl",), None, "data: none.jsonl: cannot be read"),
    (("--keep.replay=none.txt",), None, "data: none.txt: cannot be read"),
    ((KEEP[0], "--keep.replay_share=0.6", "--keep.unknown_share=0.4"), None,
     "keep: replay_share and unknown_share leave nothing to the data"),
    (("--keep.unknown_share=0.91",), None, "keep.unknown_share is 0.91; expected at least 0 and"),
    (("--keep.replay_by=both",), None, 'keep.replay_by is "both"; expected "probabilities" or'),
    ((KEEP[0], "--dataset.max_length=8"), None, "no example fits in max_length=8"),
])
def test_errors_of_what_is_kept_are_one_readable_message(keeping, args, change, message):
    if change:
        change(keeping)
    done = run(keeping, *args)
    assert done.returncode == 1 and message in done.stderr and "\n" not in done.stderr


def settings_of(**sections):
    return config.Config(**{name: getattr(config, f"{name.title()}Config")(**values)
                            for name, values in sections.items()})


def test_shares_are_of_all_examples_and_only_of_what_is_asked_for(tmp_path):
    (tmp_path / "r.txt").write_text("\n".join(PROMPTS))
    known = data.fact_examples()[:60]

    def mixed(loop=None, **wanted):
        return keep.extra_examples(known, settings_of(keep=wanted, train=loop or {}))
    assert mixed() == mixed(replay_share=0.9) == ([], {})
    replay = {"replay": str(tmp_path / "r.txt")}
    extras, counts = mixed(**replay)
    assert counts == {"replay": 20} and [e["kind"] for e in extras] == ["replay"] * 6
    extras, counts = mixed(**replay, replay_share=0.2, unknown_share=0.2)
    assert counts == {"replay": 20, "unknown": 20}
    assert [e["kind"] for e in extras] == ["replay"] * 6 + ["unknown"] * 80    # of four epochs
    extras, counts = mixed(unknown_share=0.25, loop={"max_steps": 6, "batch_size": 16})
    assert counts == {"unknown": 20} and len(extras) == 40     # 96 of 80 an epoch
    assert len(mixed(unknown_share=0.9, loop={"epochs": 100.0})[0]) == 1000
    extras, counts = mixed(**replay, replay_share=0, unknown_share=0.001)
    assert (extras, counts) == ([], {"unknown": 0})
    assert len(dataset.windows([(range(3), 3), ([], 0)], 4, 1, None, 0)[0][1]) == 3


def test_other_sides_are_counted_a_fact_and_the_unknown_are_asked_them_too(capsys):
    known = data.with_system(data.fact_examples()[:64], "fixed")          # 8 facts
    wanted = {"sides": {"reverse": 2, "yes-no": 0.5}, "unknown_share": 0.2}
    extras, counts = keep.extra_examples(known, settings_of(
        data={"system": "fixed"}, keep=wanted, train={"epochs": 3}))
    assert counts == {"reverse": 16, "yes-no": 4, "unknown": 21}          # 21 of 84 + 21
    kinds = [e["kind"] for e in extras]
    assert [kinds.count(kind) for kind in counts] == [48, 12, 63]
    assert all(e["messages"][0]["role"] == "system" for e in extras[:60])
    assert any(e["source"].startswith("don't know, after yes-no") for e in extras)
    assert "no questions of the kinds" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [
    lambda e: {k: v for k, v in e.items() if k != "subject"},             # nobody is named
    lambda e: {**e, "subject": "nobody in the question"}])
def test_sides_that_cannot_be_made_are_named_and_the_run_goes_on(capsys, change):
    known = [change(e) for e in data.fact_examples()[:16]]
    extras, counts = keep.extra_examples(known, settings_of(
        keep={"sides": {"reverse": 2}, "unknown_share": 0.2}))
    assert (extras, counts) == ([], {})
    assert "keep: no questions of the kinds reverse, unknown: they are made of facts in English " \
        'with a "subject", named in the question' in capsys.readouterr().out


def test_only_prompts_without_an_answer_are_completed(tmp_path, monkeypatch):
    (tmp_path / "r.txt").write_text("\n".join(f"p{i}" for i in range(100)))
    examples = keep.read_replay(tmp_path / "r.txt")
    whole = data.new_example([("user", "a"), ("assistant", "b")], "x:1", kind="replay")
    asked = []

    class Scripted:
        model = torch.nn.Module()

        def ask(self, prompts, max_new_tokens, batch_size):
            assert batch_size >= len(prompts)
            asked.append(len(prompts))
            return [measure.Answer(p[-1]["content"] + "!", 2, p[-1]["content"] != "p3")
                    for p in prompts]
    whole, *examples = keep.answer_replay([whole, *examples], Scripted(), tmp_path)
    assert asked == [51, 49] and whole["messages"][-1]["content"] == "b" and "open" not in whole
    assert [e["messages"][-1]["content"] for e in examples] == [f"p{i}!" for i in range(100)]
    assert [i for i, e in enumerate(examples) if e["open"]] == [3]
    given = keep.read_replay(tmp_path / "replay.jsonl")
    assert [(e["messages"], e.get("open", False), e["kind"]) for e in given] == [
        (e["messages"], e["open"], e["kind"]) for e in examples]


def test_an_earlier_runs_replay_answers_serve_again_unless_the_code_changed(keeping, monkeypatch):
    flags = KEEP[0], "--train.max_steps=3"
    assert "has answered 6 of 6" in run(keeping, *flags).stdout
    before = losses(keeping)
    done = run(keeping, *flags)
    assert "has answered" not in done.stdout and "an earlier run's" in done.stdout
    assert losses(keeping) == before and len(lines(keeping / "runs/t/replay.jsonl")) == 6
    (keeping / "replay.txt").write_text("Another?\n")
    assert "has answered 1 of 1" in run(keeping, *flags).stdout
    monkeypatch.setattr("lora.run.runlog.digest_file", lambda file: "changed")
    assert "has answered 1 of 1" in run(keeping, *flags).stdout


@pytest.fixture
def silent(monkeypatch):
    """Let the model answer the first replay prompt with this text."""
    def say(text, ended):
        own = Voice.ask

        def ask(self, prompts, max_new_tokens=32, **decoding):
            answers = own(self, prompts, max_new_tokens, **decoding)
            return [measure.Answer(text, 0, ended), *answers[1:]] if \
                max_new_tokens == keep.REPLAY_TOKENS else answers
        monkeypatch.setattr(Voice, "ask", ask)
    return say


def test_a_model_that_replays_white_space_is_trained_all_the_same(keeping, silent):
    silent("", False)
    done = run(keeping, KEEP[0], "--train.max_steps=1")
    assert done.returncode == 0, done.stderr


def test_an_empty_replayed_answer_can_be_given_back(keeping, silent):
    silent("", True)
    assert run(keeping, KEEP[0], "--train.max_steps=1").returncode == 0
    done = run(keeping, "--keep.replay=runs/t/replay.jsonl", "--train.max_steps=1")
    assert done.returncode == 0, done.stderr


def test_a_replay_file_without_prompts_is_one_readable_message(keeping):
    (keeping / "replay.txt").write_text("\n\n")
    done = run(keeping, KEEP[0])
    assert done.returncode == 1 and "replay.txt" in done.stderr


def test_with_a_repetition_penalty_nothing_is_lost_before_training(keeping):
    run(keeping, KEEP[2], "--train.repetition_penalty=2.0", "--train.max_steps=1")
    assert metrics(keeping)[0]["retention"] == 1


def test_going_on_from_an_adapter_the_base_answers_replay(keeping):
    run(keeping, "--train.max_steps=8")
    done = run(keeping, "--model.adapter=runs/t/last", "--train.run=more", "--train.max_steps=1",
               KEEP[0])
    assert done.returncode == 0, done.stderr
    made = lines(keeping / "runs/more/replay.jsonl")
    assert [(x["messages"][1]["content"], not x["open"]) for x in made] == answers(
        keeping, PROMPTS, keep.REPLAY_TOKENS)


def test_what_it_knows_is_what_the_base_says_right(keeping):
    model = load.load_model(str(keeping / "tiny-llama"), CPU, getattr(torch, AUTO))
    tokenizer = load.load_tokenizer(str(keeping / "tiny-llama"))
    settings = settings_of(keep={"retain": str(keeping / "retain.jsonl")},
                           train={"max_new_tokens": 8, "questions": ("?",)})

    class AllRight(measure.Exam):
        def right(self, examples):
            return [1] * len(examples)

    def known_to_the_base():
        exam = AllRight(Voice(model, tokenizer), None, None, keep.read_facts(settings.keep.retain),
                        settings, None)
        return exam.known, exam.own_answers
    known, own = known_to_the_base()
    records = lines(keeping / "retain.jsonl")
    assert [e["messages"][0]["content"] for e in known] == [r["question"] for r in records[:-1]]
    said = answers(keeping, [r["question"] for r in records], 8)
    assert [(i["example"]["messages"][-1]["content"], not i["example"]["open"])
            for i in own.items] == said[:-1]                   # not what it got wrong
    (keeping / "retain.jsonl").write_text(json.dumps(records[-1]))
    assert known_to_the_base() == ([], [])


def test_a_question_that_the_base_gets_right_only_in_other_company_is_not_retained(keeping):
    model = load.load_model(str(keeping / "tiny-llama"), CPU, getattr(torch, AUTO))
    tokenizer = load.load_tokenizer(str(keeping / "tiny-llama"))
    settings = settings_of(keep={"retain": str(keeping / "retain.jsonl")},
                           train={"max_new_tokens": 8, "questions": ("?",)})
    asked = keep.read_facts(settings.keep.retain)
    rounds = []

    class FirstIsLost(measure.Exam):
        def right(self, examples):
            rounds.append(len(examples))
            return [int(e["source"] != asked[0]["source"]) for e in examples]
    exam = FirstIsLost(Voice(model, tokenizer), None, None, asked, settings, None)
    known, own = exam.known, exam.own_answers
    assert rounds == [len(asked) - 1, len(asked) - 2]          # the last was wrong from the start
    assert [e["source"] for e in known] == [e["source"] for e in asked[1:-1]]
    assert [i["source"] for i in own.items] == [e["source"] for e in known]
