"""Two and three processes over gloo are one process: gradients, adapters, metrics, resume."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from test_resume import TIMING
from test_train import KEEP, ROOT

import measure
from lora import parallel


@pytest.fixture
def home(place):
    return place


def torchrun(home, n, *args, env=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", str(ROOT / "train.py"), *args]
    return subprocess.run(command if n > 1 else [sys.executable, str(ROOT / "train.py"), *args],
                          cwd=home, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def outcome(home, run):
    lines = [json.loads(x) for x in (
        home / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return ([{k: v for k, v in line.items() if k not in TIMING} for line in lines],
            {part: load_file(home / "runs" / run / part / "adapter_model.safetensors")
             for part in ("adapter", "last")})


def assert_same(one, many, atol=1e-6):
    assert len(one[0]) == len(many[0])
    for x, y in zip(one[0], many[0], strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    for part, tensors in one[1].items():
        for key, tensor in tensors.items():
            assert (tensor - many[1][part][key]).abs().max() < atol, f"{part}: {key}"


# a step that is too small to add up rounding: adapters stay comparable after some steps
FLAGS = ("--train.lr=0.001", "--train.max_steps=4", "--train.eval_every=2")


@pytest.mark.parametrize("n, flags", [
    (2, ()), (3, ("--train.batch_size=5",)), (3, KEEP),
    (2, ("--train.grad_accum=4", "--train.layout=padded")),
    (3, ("--model.shard=true", "--train.batch_size=4", *KEEP)),
], ids=["2", "3-uneven", "3-keep", "2-window", "3-sharded"])
def test_several_processes_are_one(home, n, flags):
    one = torchrun(home, 1, *FLAGS, *(f for f in flags if "shard" not in f), "--train.run=one")
    many = torchrun(home, n, *FLAGS, *flags, "--train.run=many")
    assert one.returncode == 0 and many.returncode == 0, one.stderr + many.stderr
    assert f"{n} processes" in many.stdout and many.stdout.count("best: step") == 1
    assert_same(outcome(home, "one"), outcome(home, "many"))


def test_a_last_window_with_fewer_samples_than_processes(home):
    flags = ("--train.lr=0.001", "--train.batch_size=11", "--train.epochs=1")   # 12 examples
    for n, run in ((1, "one"), (3, "many")):
        done = torchrun(home, n, *flags, f"--train.run={run}")
        assert done.returncode == 0, done.stderr
    assert_same(outcome(home, "one"), outcome(home, "many"))


def test_a_killed_process_ends_the_job_and_any_number_resumes_it(home):
    whole = torchrun(home, 1, *FLAGS, "--train.run=one")
    assert whole.returncode == 0
    (home / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    def hook(event, args, seen=[]):\n"
        "        if event == 'open' and 'metrics.jsonl' in str(args[0]):\n"
        "            seen.append(1)\n"
        "            len(seen) == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sys.addaudithook(hook)\n")
    args = (*FLAGS, "--train.run=many", "--train.checkpoint_every=1")
    killed = torchrun(home, 2, *args, env={"PYTHONPATH": str(home)})
    assert killed.returncode != 0
    assert "another process of this job is gone" in killed.stderr or "SIGKILL" in killed.stderr
    done = torchrun(home, 3, "--resume", "runs/many")
    assert done.returncode == 0, done.stderr
    assert "resume: from step" in done.stdout
    assert_same(outcome(home, "one"), outcome(home, "many"))


def test_one_process_does_nothing():
    assert parallel.add_up([1.5, 2]) == [1.5, 2] and parallel.mine([1, 2]) == [1, 2]
    assert parallel.from_first({"a": None}) == {"a": None}
    assert (parallel.rank(), parallel.world()) == (0, 1)
    assert measure.held_out_facts(None) == []
