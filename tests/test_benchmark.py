"""The benchmark's common work, and how an arm that did other work is seen."""

import argparse
from os.path import commonprefix

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import arms, common, peers, train_speed

IGNORE = common.IGNORE


def labelled(sample: dict) -> int:
    return sum(y != IGNORE for y in sample["labels"])


def test_each_answer_of_a_dialogue_is_a_sample(tokenizer):
    samples = arms.make_samples(tokenizer, 30, 12, turns=3)
    assert samples == arms.make_samples(tokenizer, 30, 12, turns=3)
    rows = [s["input_ids"] for s in samples]
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        before = rows[0][:30]
        if i % 3:                                             # what came before, without a thought
            n = labelled(samples[i - 1])
            before = rows[i - 1][:-n] + rows[i - 1][-n + n // 3:]
        assert row[:len(before)] == before and 20 <= len(row) - len(before) <= 180
        n = round(0.45 * (len(row) - len(before)))
        assert sample["labels"] == [IGNORE] * (len(row) - n) + row[-n:]
    assert len(commonprefix([rows[0], rows[3]])) < len(rows[0])      # another dialogue
    beginnings = {tuple(row[:i + 1]) for row in rows for i in range(len(row))}
    assert arms.distinct(rows) == len(beginnings) < sum(map(len, rows)) / 1.4


def test_without_turns_a_sample_has_the_prefix_and_its_own(tokenizer):
    samples = arms.make_samples(tokenizer, 30, 8)
    assert len(commonprefix([s["input_ids"] for s in samples])) >= 30
    for s in samples:
        own = len(s["input_ids"]) - 30
        assert 20 <= own <= 180 and labelled(s) == round(0.45 * own)


def padded(samples: list[dict], pad: int = 0) -> dict:
    """A batch as the trainers make it: padded on the right."""
    fills = {"input_ids": pad, "labels": IGNORE, "attention_mask": 0}
    rows = [s | {"attention_mask": [1] * len(s["input_ids"])} for s in samples]
    return {key: pad_sequence([torch.tensor(row[key]) for row in rows], True, fill)
            for key, fill in fills.items()}


@pytest.fixture
def step(tokenizer):
    return arms.make_samples(tokenizer, 10, 6, turns=3)


def test_a_step_is_known_by_what_the_model_received(step):
    expected = common.step_hash((s["input_ids"], s["labels"]) for s in step)
    batches = [padded(step[4:]), padded(step[:4])]
    assert common.step_hash(common.received(batches)) == expected
    unused = max(i for s in step for i in s["input_ids"]) + 1
    rows = [row for part in (step[:2], step[2:]) for row in peers.unpad(
        *(padded(part, unused)[key] for key in ("input_ids", "labels")), unused)]
    assert common.step_hash(rows) == expected
    for key in ("input_ids", "labels"):
        changed = padded(step)
        changed[key][2, 3] += 1
        assert common.step_hash(common.received([changed])) != expected
    assert common.step_hash(common.received(batches[:1])) != expected
    assert common.step_hash(common.received([padded(step[:5] + step[:1])])) != expected


def test_unpad_refuses_a_pad_inside_or_with_a_label():
    ids, labels = torch.tensor([[5, 9, 6], [5, 6, 9]]), torch.full((2, 3), IGNORE)
    with pytest.raises(AssertionError, match="not at the end"):
        peers.unpad(ids, labels, 9)
    labels[1, 2] = 6
    with pytest.raises(AssertionError, match="has a label"):
        peers.unpad(ids[1:], labels[1:], 9)


def test_a_fused_a_and_one_of_bfloat16_start_like_the_others():
    single = [torch.empty(4, 24) for _ in range(3)] + [torch.empty(4, 40)]
    fused, other = torch.empty(12, 24), torch.empty(4, 40, dtype=torch.bfloat16)
    drawn = common.fill_a(single, 0)
    assert common.fill_a([*fused.split(4), other], 0) == drawn != common.fill_a(single[:3], 0)
    assert torch.equal(fused, torch.cat(single[:3]))
    assert torch.equal(other, single[3].bfloat16())


def test_the_weights_of_a_step_make_one(step):
    record = peers.Record("litgpt-fp32-2x3-lengthgrouped", {"steps": [step, step]})
    assert [len(s["input_ids"]) for s in record.samples[:6]] == sorted(
        len(s["input_ids"]) for s in step)
    total = 0.0
    for i in (0, 2, 4):
        first, second = record.samples[i:i + 2]
        total += record.weight(torch.tensor(first["labels"] + second["labels"]))
        record.losses.append(0)
    assert total == pytest.approx(1)


def result(**changes) -> dict:
    return {"losses": [2.0, 1.0], "seconds": [1.0, 1.0], "hashes": ["a", "b"], "initial_a": "x",
            "flops": [1, 1], "dtype": "float32", "loaded_gib": 1, "peak_gib": 2,
            "process_seconds": 3} | changes


def test_an_arm_that_did_other_work_fails():
    host = {"hashes": ["a", "b"], "tokens": [5, 5], "peak_flops": {"float32": 1e9}}
    options = argparse.Namespace(batch=2, steps=1)
    sums = {name: train_speed.summary([r], host, options) for name, r in {
        "peft-loop": result(), "ours": result(losses=[2.0, 1.5]),
        "litgpt-fp32-2x1": result(hashes=["a", "c"]),
        "llamafactory-fp32-2x1": result(initial_a="y")}.items()}
    train_speed.compare(sums)
    assert sums["ours"]["loss_differs"] == 0.5
    assert "same token ids" in sums["litgpt-fp32-2x1"]["error"]
    assert "same A" in sums["llamafactory-fp32-2x1"]["error"]


def test_a_step_keeps_its_dialogues_whole():
    with pytest.raises(ValueError, match="--batch 16 splits a dialogue of 6 --turns"):
        train_speed.main(["--turns", "6", "--batch", "16"])


def test_a_peer_without_its_environment_says_how_to_make_it(monkeypatch):
    monkeypatch.setenv("LITGPT_PYTHON", "/nowhere/python")
    options = argparse.Namespace(model="m", prefix=1, turns=0, batch=2, dtype="auto", device="cpu",
                                 steps=1, work="none.json")
    assert "make bench-peers" in train_speed.run("litgpt-fp32-2x1", options)["error"]
