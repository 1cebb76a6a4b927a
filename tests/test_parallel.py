"""Two and three processes over gloo are one process: gradients, adapters, metrics, resume."""

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import AUTO, within
from safetensors.torch import load_file
from test_resume import TIMING, ended, fork, start
from test_train import DTYPE, KEEP, ROOT

import measure
from lora.run import parallel

pytestmark = pytest.mark.auto


@pytest.fixture
def home(place):
    return place


def together(home, n, *args, before=lambda: None):
    """train.main in n processes, as torchrun starts them; returns the first one's words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    forks = [start(home, *args, before=before, words=f"words-{i}.txt",
                   env={**world, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]
    codes = [ended(child) for child in forks]
    words = [(home / f"words-{i}.txt").read_text() for i in range(n)]
    assert codes == [0] * n, "\n".join(words)
    return words[0]


def outcome(home, run):
    lines = [json.loads(x) for x in (
        home / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return ([{k: v for k, v in line.items() if k not in TIMING} for line in lines],
            {part: load_file(home / "runs" / run / part / "adapter_model.safetensors")
             for part in ("adapter", "last")})


def assert_same(one, many):
    """Metrics and adapters are the same. In bfloat16 gradients are rounded before they are summed,
    and AdamW turns a gradient near zero into a whole step: there adapters are close as vectors."""
    assert len(one[0]) == len(many[0])
    for x, y in zip(one[0], many[0], strict=True):
        assert x == pytest.approx(y, rel=within(1e-4, 0.02), abs=within(1e-5, 0.01))
    for part, tensors in one[1].items():
        for key, tensor in tensors.items():
            apart = tensor - many[1][part][key]
            if AUTO == "float32":
                assert apart.abs().max() < 1e-6, f"{part}: {key}"
            else:
                assert apart.norm() < 0.2 * tensor.norm(), f"{part}: {key}"


# a step that is too small to add up rounding: adapters stay comparable after some steps
FLAGS = ("--train.lr=0.001", "--train.max_steps=4", "--train.eval_every=2")


@pytest.mark.parametrize("n, flags", [
    (2, ()), (3, ("--train.batch_size=5",)), (3, KEEP),
    (2, ("--train.grad_accum=4", "--train.layout=padded")),
    (3, ("--model.shard=true", "--train.batch_size=4", *KEEP)),
], ids=["2", "3-uneven", "3-keep", "2-window", "3-sharded"])
def test_several_processes_are_one(home, n, flags):
    fork(home, *FLAGS, *(f for f in flags if "shard" not in f), "--train.run=one")
    words = together(home, n, *FLAGS, *flags, "--train.run=many")
    assert f"{n} processes" in words and words.count("best: step") == 1
    assert ("GiB here instead of" in words) == ("--model.shard=true" in flags)
    assert_same(outcome(home, "one"), outcome(home, "many"))
    assert sorted(p.name for p in (home / "runs").glob("[a-z]*") if p.is_dir()) == ["many", "one"]


def test_a_last_window_with_fewer_samples_than_processes(home):
    flags = ("--train.lr=0.001", "--train.batch_size=11", "--train.epochs=1")   # 12 examples
    fork(home, *flags, "--train.run=one")
    together(home, 3, *flags, "--train.run=many")
    assert_same(outcome(home, "one"), outcome(home, "many"))


def test_a_killed_process_ends_the_job_and_any_number_resumes_it(home):
    """With torchrun itself: its second process dies at the end of the third step."""
    fork(home, DTYPE, *FLAGS, "--train.run=one")
    (home / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    def hook(event, args, seen=[]):\n"
        "        if event == 'open' and 'metrics.jsonl' in str(args[0]) and args[1] == 'a':\n"
        "            seen.append(1)\n"
        "            len(seen) == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sys.addaudithook(hook)\n")
    killed = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"), DTYPE, *FLAGS, "--train.run=many", "--train.checkpoint_every=1"],
        cwd=home, text=True, capture_output=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(home)})
    assert killed.returncode != 0
    assert "error: parallel: another process of this job is gone" in killed.stderr
    words = together(home, 3, "--resume", "runs/many")
    assert "resume: from step 2" in words or "resume: from step 3" in words
    assert_same(outcome(home, "one"), outcome(home, "many"))


def test_one_process_does_nothing():
    assert parallel.add_up([1.5, 2]) == [1.5, 2] and parallel.mine([1, 2]) == [1, 2]
    assert parallel.from_first({"a": None}) == {"a": None}
    assert (parallel.rank(), parallel.world()) == (0, 1)
    assert measure.held_out_facts(None) == []
