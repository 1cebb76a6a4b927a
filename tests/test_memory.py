"""lora/fast/memory.py: what a step keeps, counted on a small one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_flat import samples
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

import dataset
from inject import inject
from lora import loss
from lora.base import load
from lora.config import TrainConfig
from lora.fast import flat, levers, memory
from lora.surgery import adapter_parameters


def parts(model, lean=True, n=7):
    batch = dataset.collate(samples(20)[:n], 0)
    return memory.estimate(model, dataset.collate(samples(20)[:2], 0), batch, lean)


def test_the_parts_of_a_step():
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    found = parts(model)
    trained = sum(p.numel() for p in adapter_parameters(model))
    assert found["gradients and moments"] == 12 * trained     # a gradient and two moments, 4 bytes
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert parts(model, lean=False)["logits"] == 3 * found["logits"] > 0
    assert not model.training                                  # as it was


def test_activations_grow_with_tokens_and_checkpointing_keeps_less():
    model = make_model(num_hidden_layers=12)
    inject(model, r=4, lora_alpha=8)
    two, seven = parts(model, n=2)["activations"], parts(model)["activations"]
    assert seven == two / 100 * 7 * 50                        # 2 and 7 rows of 50 tokens
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert parts(model)["activations"] < seven / 4   # two blocks of twelve, inputs of all


def test_the_estimate_of_flat_batches_counts_their_tokens():
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    flat.enable(model, load.use_attention)
    small, large = flat.flatten(samples(20)[:2]), flat.flatten(samples(20))
    text = memory.report(model, small, large)
    assert text.startswith(f"memory: a step of {large.inputs['input_ids'].numel()} tokens needs")


def test_an_evaluation_holds_keys_and_values_of_all_questions():
    model = make_model()                             # 2 blocks, 2 heads of 8, 272 words
    one, two = (memory.evaluation(model, rows, 2000) for rows in (4, 8))
    keys_and_values = 2 * 2 * 2 * 8 * 4 * 4 * 2000
    assert two - one == keys_and_values + 8 * 4 * 272          # one forward takes PREFILL tokens
    assert "an evaluation 0.0, beside" in memory.report(
        model, *2 * [dataset.collate(samples(20)[:2], 0)], True, 4, 20)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and something still holds."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, n) for key, (ref, n) in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.held.values()))
        return made


def qwen3(**size):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=272, num_attention_heads=4, head_dim=32,
                                        num_key_value_heads=2, **size)).eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_model, qwen3])
def test_the_estimate_is_what_a_step_holds(make, dtype, checkpointing):
    """Within a quarter, for a model of a 7B's proportions."""
    model = make(hidden_size=128, intermediate_size=448, num_hidden_layers=8,
                 max_position_embeddings=1024).to(dtype)
    inject(model, r=8, lora_alpha=16)
    s = TrainConfig(checkpointing=checkpointing)
    levers.fuse(model, s)
    layout, lean = levers.choose_layout(model, s, load.use_attention)
    batches = dataset.Batches(0, "cpu", layout, lean, 8, lambda item: False)
    ids = torch.randint(5, 200, (8, 128), generator=torch.Generator().manual_seed(0)).tolist()
    items = [{"input_ids": row, "labels": [-100] * 64 + row[64:]} for row in ids]
    probe, (batch,) = batches(items[:2])[0], batches(items)
    parts = memory.estimate(model, probe, batch, lean)
    expected = parts["activations"] + parts["logits"] + parts["gradients and moments"] / 3
    with Live() as live:
        loss.ce_sum(model.train(), batch, lean)[0].backward()
    assert expected == pytest.approx(live.peak, rel=0.25)


def test_micro_batches_are_as_large_as_memory_allows(monkeypatch, capsys):
    model, items = make_model(), samples(20)
    inject(model, r=4, lora_alpha=8)
    probe, t = dataset.collate(items[:2], 0), memory.longest(items)

    def size(room, **settings):
        monkeypatch.setattr(memory, "free", lambda device: room)
        return memory.micro_batch_size(items, TrainConfig(batch_size=16, **settings), model, probe)
    parts = memory.estimate(model, probe, probe)
    a_token = parts["activations"] / probe.inputs["input_ids"].numel()

    def room_for(tokens):
        fixed = parts["gradients and moments"] + memory.CHUNK
        return int((fixed + a_token * tokens + 1) / (1 - memory.SPARE)) + 1
    assert size(None) == size(2**40) == size(room_for(16 * t)) == 16
    assert size(room_for(5 * t + 1), token_budget=8192) == 16         # a number is obeyed
    assert size(room_for(5 * t + 1), grad_accum=2) == 8
    assert not capsys.readouterr().out
    assert size(room_for(5 * t + 1)) == 5
    assert "micro-batches of 5, not 16" in capsys.readouterr().out
    assert size(room_for(t - 2)) == size(0) == 1
    assert "train.checkpointing=true" in capsys.readouterr().out


def test_free_memory_is_that_of_this_machine():
    room = memory.free(torch.device("cpu"))
    assert room is None or 0 < room < 2**50


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_the_process_takes(tmp_path, dtype):
    """Within 30 % of the peak of the default run, loading and evaluations and all."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run([sys.executable, ROOT / "train.py", "--config", ROOT / "config.json",
                           f"--model.dtype={dtype}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step, evaluation, python = map(float, re.search(
        r"needs about ([\d.]+) GiB, an evaluation ([\d.]+), beside ([\d.]+) of Python",
        done.stdout).groups())
    lines = map(json.loads, (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines())
    peak = max(line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line)
    print(dtype, max(step, evaluation) + python, peak)
    assert max(step, evaluation) + python == pytest.approx(peak, rel=0.3)
    assert dtype == "float32" or peak < 1.3
