"""lora/fast/memory.py: what a step keeps, counted on a small one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model
from test_flat import samples

import dataset
from inject import inject
from lora.base import load
from lora.fast import flat, memory
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
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    two, seven = parts(model, n=2)["activations"], parts(model)["activations"]
    assert seven == two / 100 * 7 * 50                        # 2 and 7 rows of 50 tokens
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert parts(model)["activations"] < seven / 5


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


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_the_process_takes(tmp_path, dtype):
    """Within 30 % of the peak of the default run, loading and evaluations and all."""
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
