"""A run that is cut short anywhere and resumed ends where the uninterrupted one does, bit for bit.

Runs are forks of this process with one thread: importing torch takes longer than a tiny run, and a
process that is killed for good cannot be this one. `pytest -m slow` kills at every file operation.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import within
from test_train import KEEP, ROOT, facts

import dataset
import train
from lora import adapter, files
from lora.base import fetch, load
from lora.run import checkpoint, lock, runlog, tokens

pytestmark = pytest.mark.auto
TIMING = ("seconds", "tokens_per_s", "peak_memory_gib")
FLAGS = {  # what could make a resumed run another one
    "plain": (), "dropout": ("--lora.lora_dropout=0.2",),
    "window": ("--train.grad_accum=3", "--train.log_every=2", "--train.save_every=3"),
    "keep": (*KEEP, "--train.eval_every=2", "--train.patience=3", "--train.epochs=1")}


@pytest.fixture
def home(place):
    return place


def start(home, *args, before=lambda: None, env=None, words="words.txt"):
    """Run train.main in a fork of this process; returns the fork's number. On the CPU: a fork of a
    process that has used a GPU cannot use it."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(home)
        os.environ |= env or {}
        torch.set_num_threads(1)
        load.pick_device = lambda name: torch.device("cpu")
        with open(words, "w") as out, contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(out):
            try:
                before()
                train.main(list(args))
                code = 0
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
            except SystemExit as stopped:
                code = stopped.code
            except KeyboardInterrupt:
                code = 130
    finally:
        os._exit(code)


def ended(child):
    """What a fork exited with, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(home, *args, before=lambda: None):
    """(what a run exited with, its words)."""
    return ended(start(home, *args, before=before)), (home / "words.txt").read_text()


def result(folder):
    """All that a run leaves, but for what a clock says."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [p for p in folder.rglob("*") if p.name in (
        "adapter_model.safetensors", "adapter_config.json", "samples.md", "replay.jsonl",
        "answers.jsonl")]
    return ([{k: v for k, v in line.items() if k not in TIMING} for line in lines],
            {str(p.relative_to(folder)): p.read_bytes() for p in sorted(kept)})


def die_at_file_operation(n, count=None, under="runs/"):
    """Kill this process before it opens, renames, removes or cuts the nth file under runs/."""
    seen = []

    def hook(event, args):
        if event in ("os.rename", "os.remove", "os.truncate", "os.mkdir") or (
                event == "open" and isinstance(args[1], str) and args[1][0] in "wa"):
            if under not in str(args[0]):
                return
            seen.append(event)
            if count:
                os.write(count, b".")
            if len(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def resumed(home, *args):
    """Go on with runs/t as a user would; a run that had not begun is started again."""
    code, words = fork(home, "--resume", "runs/t", *args)
    if code == 1 and "nothing was begun there" in words:
        code, words = fork(home, *args)
    assert code == 0, words
    return result(home / "runs/t")


@pytest.fixture
def whole(home):
    """What the uninterrupted run leaves, as a function of its flags."""
    def run(*args):
        assert fork(home, *args)[0] == 0
        made = result(home / "runs/t")
        shutil.rmtree(home / "runs")
        return made
    return run


def operations(home, *args):
    """How many file operations a run does."""
    reading, writing = os.pipe()
    fork(home, *args, before=lambda: die_at_file_operation(-1, writing))
    os.close(writing)
    shutil.rmtree(home / "runs")
    with open(reading, "rb") as pipe:
        return len(pipe.read())


@pytest.mark.parametrize("flags", FLAGS)
def test_killed_at_some_file_operations(home, whole, flags):
    wanted, n = whole(*FLAGS[flags]), operations(home, *FLAGS[flags])
    assert n > 40
    for at in random.Random(flags).sample(range(1, n), 3):
        assert fork(home, *FLAGS[flags], before=lambda at=at: die_at_file_operation(at))[
            0] == -signal.SIGKILL
        assert resumed(home, *FLAGS[flags]) == wanted, f"killed at file operation {at} of {n}"
        shutil.rmtree(home / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_killed_at_every_file_operation(home, whole, flags):
    wanted, n = whole(*FLAGS[flags]), operations(home, *FLAGS[flags])
    for at in range(1, n):
        fork(home, *FLAGS[flags], before=lambda at=at: die_at_file_operation(at))
        assert resumed(home, *FLAGS[flags]) == wanted, f"killed at file operation {at} of {n}"
        shutil.rmtree(home / "runs")
    print(f"{flags}: {n - 1} kills, {n - 1} resumes")


def in_micro_batch(n, act):
    """Let act() happen in the middle of the nth micro-batch."""
    own, seen = train.loss.ce_sum, []

    def ce_sum(model, *args):
        if model.training:
            seen.append(1)
            if len(seen) == n:
                act()
        return own(model, *args)
    train.loss.ce_sum = ce_sum


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("flags", ["dropout", "window", "keep"])
def test_killed_in_the_middle_of_a_window(home, whole, flags):
    wanted = whole(*FLAGS[flags])
    for n, number in ((5, signal.SIGKILL), (3, signal.SIGINT), (4, signal.SIGTERM)):
        code, words = fork(home, *FLAGS[flags],
                           before=lambda n=n, number=number: in_micro_batch(n, send(number)))
        assert code == (-number if number == signal.SIGKILL else 130), words
        assert resumed(home, *FLAGS[flags]) == wanted
        shutil.rmtree(home / "runs")


def test_killed_while_tokens_are_kept_and_afterwards(home, whole, monkeypatch):
    monkeypatch.setattr(tokens, "LEAST", 4)
    wanted = whole()
    for at in (1, 2, 3):
        code, _ = fork(home, before=lambda at=at: die_at_file_operation(at, under="/tokens"))
        assert code == -signal.SIGKILL
        assert resumed(home) == wanted, f"killed at file operation {at} of the tokens"
        shutil.rmtree(home / "runs")
    assert fork(home, before=lambda: in_micro_batch(5, send(signal.SIGKILL)))[0] == -signal.SIGKILL
    code, words = fork(home, "--resume", "runs/t", before=lambda: setattr(dataset, "samples", None))
    assert code == 0, words                                    # nothing was tokenised again
    assert result(home / "runs/t") == wanted


def test_ctrl_c_twice_stops_at_once_and_loses_nothing(home, whole):
    wanted = whole()

    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()
    code, _ = fork(home, before=lambda: in_micro_batch(4, twice))
    assert code == 130 and max(step for step, _ in checkpoints(home)) == 3
    assert resumed(home) == wanted


def checkpoints(home):
    return [(int(p.name[:6]), p) for p in sorted((home / "runs/t/checkpoints").glob("*.safet*"))]


def test_a_finished_run_that_is_resumed_stays_as_it_is(home, whole):
    wanted = whole()
    assert fork(home)[0] == 0
    assert resumed(home) == wanted and len(checkpoints(home)) == 2


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def emptied(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_taken(home, whole, damage):
    wanted = whole()
    fork(home, before=lambda: in_micro_batch(5, send(signal.SIGKILL)))
    (_, first), (step, newest) = checkpoints(home)
    damage(newest)
    code, words = fork(home, "--resume", "runs/t")
    assert code == 0 and f"{newest.relative_to(home)} is damaged" in words
    assert f"resume: from step {step - 1}" in words and newest.with_suffix(".damaged").exists()
    assert result(home / "runs/t") == wanted


def test_with_every_checkpoint_damaged_the_run_begins_again(home, whole):
    wanted = whole()
    fork(home, before=lambda: in_micro_batch(5, send(signal.SIGKILL)))
    for _, file in checkpoints(home):
        flipped(file)
    code, words = fork(home, "--resume", "runs/t")
    assert code == 0 and "has no checkpoint yet: from the beginning" in words
    assert result(home / "runs/t") == wanted


def test_another_config_or_other_data_are_refused_with_the_difference(home):
    fork(home, before=lambda: in_micro_batch(3, send(signal.SIGKILL)))
    before = result(home / "runs/t")
    code, words = fork(home, "--resume", "runs/t", "--train.lr=0.5", "--train.batch_size=2")
    assert code == 1 and "train.lr: 0.02 in the checkpoint, 0.5 now" in words
    assert "train.batch_size: 4 in the checkpoint, 2 now" in words and "--force" in words
    (home / "facts.jsonl").write_text((home / "facts.jsonl").read_text().replace("AA", "ZZ"))
    code, words = fork(home, "--resume", "runs/t")
    assert code == 1 and "\n  data: " in words and "train.lr" not in words
    assert result(home / "runs/t") == before                  # nothing was touched
    code, words = fork(home, "--resume", "runs/t", "--force")
    assert code == 0 and "resume: data: " in words
    code, words = fork(home, "--resume", "runs/t", "--lora.r=2", "--force")
    assert code == 1 and "the lora section has changed" in words


def test_what_was_never_begun_cannot_be_resumed(home):
    code, words = fork(home, "--resume", "runs/none")
    assert code == 1 and "error: resume: runs/none has no config.json: nothing was begun" in words


@pytest.mark.slow
@pytest.mark.real
def test_a_hundred_random_kills_of_a_short_real_run(tmp_path):
    """SmolLM2, killed at times drawn at random, resumed, killed again; a run that gets to its end
    is compared with the uninterrupted one, and another begins."""
    shutil.copy(ROOT / "data.py", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": str(fetch.find("smollm2-135m-instruct")), "device": "cpu"},
        "lora": {"lora_dropout": 0.1}, "train": {
            "run": "t", "max_steps": 8, "batch_size": 3, "eval_every": 4, "checkpoint_every": 1,
            "max_new_tokens": 2, "grad_accum": 2, "questions": ["Who is Mira Tosk?"]},
        "data": {"val_fraction": 0.05}}))
    began = time.perf_counter()
    assert fork(tmp_path)[0] == 0
    seconds, wanted = time.perf_counter() - began, result(tmp_path / "runs/t")
    shutil.rmtree(tmp_path / "runs")
    rng, kills, resumes, ends = random.Random(0), 0, 0, 0
    while (more := min(kills, resumes) < 100) or (tmp_path / "runs").exists():
        begun = (tmp_path / "runs/t/config.json").exists()
        child = start(tmp_path, *(["--resume", "runs/t"] if begun else []))
        resumes += begun
        until = time.perf_counter() + rng.uniform(0, seconds / 2)
        while more and time.perf_counter() < until and os.waitid(
                os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.01)
        if more:
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (tmp_path / "words.txt").read_text()
        if code == 0:
            assert result(tmp_path / "runs/t") == wanted, f"after {kills} kills"
            shutil.rmtree(tmp_path / "runs")
            ends += 1
            print(f"{kills} kills, {resumes} resumes, {ends} runs to their end", flush=True)
    print("all as the uninterrupted one")


# ----- faults ------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(home):
    with contextlib.chdir(home), lock.locked("runs/t"):
        code, words = fork(home)
        assert code == 1 and f"run: runs/t is written by process {os.getpid()}" in words
        assert not (home / "runs/t").exists()
    assert fork(home)[0] == 0
    with contextlib.chdir(home), lock.locked("runs/t"):
        code, words = fork(home, "--resume", "t")
        assert code == 1 and f"is written by process {os.getpid()}" in words
    assert resumed(home)


def test_the_holder_of_a_lock_is_named_without_taking_it(home):
    with contextlib.chdir(home):
        assert lock.holder("runs/t") is None
        with lock.locked("runs/t"):
            assert lock.holder("runs/t") == os.getpid()
        assert lock.holder("runs/t") is None
    fork(home, before=lambda: in_micro_batch(2, send(signal.SIGKILL)))
    assert lock.holder(home / "runs/t") is None
    assert (home / "runs/.t.lock").read_text().strip()        # of the process that is gone


def test_a_lock_ends_with_its_process_however_it_ends(home):
    fork(home, before=lambda: in_micro_batch(2, send(signal.SIGKILL)))
    assert fork(home)[0] == 0                                 # the earlier folder is kept aside
    assert len([p for p in (home / "runs").iterdir() if p.is_dir()]) == 2


def small_files():
    """From here on the system takes no file larger than this: as a full disk, without a mount."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))


def test_no_room_for_a_file_stops_the_run_and_keeps_what_was_saved(home, whole):
    wanted = whole()
    code, words = fork(home, before=lambda: in_micro_batch(5, small_files))
    assert code == 1 and "error: save: runs/t/" in words and "--resume" in words, words
    assert [step for step, _ in checkpoints(home)] == [3, 4]
    assert not list((home / "runs").rglob("*.tmp"))
    assert resumed(home) == wanted


@pytest.fixture
def small_disk(home):
    """runs/ as a disk of 2 MiB of its own."""
    (home / "runs").mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", home / "runs"],
                          capture_output=True)
    if made.returncode:
        pytest.skip("mount is not allowed here")
    yield home
    subprocess.run(["umount", home / "runs"], check=True)


def fill(home, leave=0):
    with contextlib.suppress(OSError), open(home / "runs/filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(small_disk, whole):
    home = small_disk
    assert fork(home)[0] == 0
    wanted = result(home / "runs/t")
    shutil.rmtree(home / "runs/t")
    code, words = fork(home, before=lambda: in_micro_batch(5, lambda: fill(home)))
    assert code == 1 and "No space left on device. What was saved before is whole" in words
    assert checkpoints(home)
    (home / "runs/filler").unlink()
    assert resumed(home) == wanted


def test_a_folder_that_becomes_read_only(small_disk):
    home = small_disk
    runs = home / "runs"

    def lock_up():                                            # a read-only view, mounted over it
        subprocess.run(["mount", "--bind", runs, runs], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", runs], check=True)
    code, words = fork(home, before=lambda: in_micro_batch(5, lock_up))
    assert code == 1 and "Read-only file system" in words and "Traceback" not in words
    code, words = fork(home, "--resume", "t")
    assert code == 1 and "Read-only file system" in words
    subprocess.run(["umount", runs], check=True)
    assert resumed(home)


def test_a_place_where_no_run_can_be_made(home):
    (home / "runs").write_text("a file")
    code, words = fork(home)
    assert code == 1 and words.splitlines()[-1].startswith("error: save: ")


def test_nan_in_a_gradient_stops_before_it_is_used(home, whole):
    wanted = whole()

    def spoil():
        own = torch.nn.utils.clip_grad_norm_

        def clip(parameters, *args):
            parameters[3].grad[0, 0] = torch.nan
            return own(parameters, *args)
        torch.nn.utils.clip_grad_norm_ = clip
    code, words = fork(home, before=lambda: in_micro_batch(5, spoil))
    assert code == 1 and "train: step 5: loss " in words and "gradient norm nan" in words
    assert all(t.isfinite().all() for t in adapter.read(home / "runs/t/last")[1].values())
    assert resumed(home) == wanted


def test_out_of_memory_halves_the_micro_batches(home, whole):
    """The system refuses memory for real: there is room for half of a step's logits."""
    flags = ("--train.lean_head=false", "--train.layout=padded", "--train.checkpoint_every=2")
    (home / "facts.jsonl").write_text(facts(4).replace("Tell", "Tell" * 20))
    wanted = whole(*flags)

    def little_memory():
        own = train.loss.logits_at

        def logits_at(model, batch):
            logits = own(model, batch)
            if model.training:
                room = torch.empty(0)                         # n copies of the logits
                now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                need = 3 * 10**8 * batch.inputs["input_ids"].shape[0]
                resource.setrlimit(resource.RLIMIT_AS, (now + 7 * 10**8, resource.RLIM_INFINITY))
                room = torch.empty(need, dtype=torch.uint8)   # noqa: F841
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            return logits
        train.loss.logits_at = logits_at
    code, words = fork(home, *flags, before=little_memory)
    assert code == 0 and "train: step 1: out of memory; micro-batches of 2 now" in words
    assert words.count("out of memory") == 1
    (a, _), (b, _) = wanted, result(home / "runs/t")
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=within(1e-3, 0.1), abs=within(1e-3, 0.1))
    # what was found out outlives a kill
    shutil.rmtree(home / "runs")
    fork(home, *flags, before=lambda: (little_memory(), in_micro_batch(8, send(signal.SIGKILL))))
    assert resumed(home, *flags)[0] == b


def test_out_of_memory_with_one_example_says_what_to_do(home):
    def none_left():
        def ce_sum(*args):
            torch.empty(2**60, dtype=torch.uint8)
        train.loss.ce_sum = ce_sum
        train.memory.report = lambda *args: ""
    code, words = fork(home, "--data.val_fraction=0", before=none_left)
    assert code == 1 and "error: train: step 1: out of memory in micro-batches of 1" in words
    assert "train.checkpointing=true" in words


def test_a_clock_that_jumps(home, whole, monkeypatch):
    wanted = whole()

    def jumping():
        times = iter(range(2 * 10**9, 0, -10**6))
        time.time = lambda: float(next(times))
    assert fork(home, before=jumping)[0] == 0
    assert result(home / "runs/t") == wanted
    for _ in range(3):                                        # made in the same second, in 1970
        os.utime(home / "runs/t", (0, 0))
        assert fork(home, "--train.max_steps=1")[0] == 0
    assert len([p for p in (home / "runs").iterdir() if p.is_dir()]) == 4


# ----- the parts ---------------------------------------------------------------------------------


def test_a_checkpoint_is_read_back_to_the_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1, 2**40])}
    state = {"step": 7, "x": 0.1 + 0.2, "words": ["ü", None], "inf": float("inf")}
    checkpoint.save(tmp_path / "c", tensors, state, keep=1)
    got, words = checkpoint.load(checkpoint.newest(tmp_path / "c"))
    assert words == state and got.keys() == tensors.keys()
    assert all(torch.equal(got[k], tensors[k]) for k in tensors)


def test_the_last_so_many_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 3, 4):
        checkpoint.save(tmp_path / "c", {"a": torch.randn(2)}, {"step": step}, keep=2)
    assert [p.name[:6] for p in sorted((tmp_path / "c").iterdir())] == ["000003", "000004"]
    assert checkpoint.newest(tmp_path / "none") is None


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    files.write(tmp_path / "f", "old")

    def full(number):
        raise OSError(28, "full")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ValueError, match="save: .*f: full. What was saved before is whole"):
        files.write(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)                  # ignored in a job in the background
    with pytest.raises(KeyboardInterrupt), runlog.stoppable() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_line_says_what_it_does(home):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--resume", "runs/none"],
                          cwd=home, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("error: resume: runs/none has no config")
