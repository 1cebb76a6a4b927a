"""experiments/knowledge/full.py: the arm that trains the whole model."""

import contextlib
import json

import pytest
import torch
from conftest import make_model

import data
import dataset
from experiments.knowledge import full, run
from lora import config, loss
from lora.base import load
from measure import drift


def batch_of(model):
    ids = torch.arange(3, 15)
    return loss.Batch({"input_ids": ids[None]}, torch.arange(6, 11), ids[7:12])


@pytest.fixture
def trained(place):
    """The folder of a run on facts, replay and questions about nobody."""
    replay = [{"messages": [{"role": "user", "content": f"{word}?"},
                            {"role": "assistant", "content": "hm so"}]} for word in ("so", "no")]
    (place / "replay.jsonl").write_text("\n".join(map(json.dumps, replay)))
    with contextlib.chdir(place):
        full.main(["--train.run=whole", "--train.max_steps=12", "--train.lr=0.003",
                   "--keep.replay=replay.jsonl", "--keep.replay_share=0.3",
                   "--keep.unknown_share=0.2"])
    return place / "runs/whole"


def test_all_of_the_model_learns_and_is_a_plain_model_folder(trained, tiny_folder):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    before, after = (dict(load.load_model(folder, torch.device("cpu"), torch.float32)
                          .named_parameters()) for folder in (tiny_folder, trained / "model"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(p, after[name]) for name, p in before.items())
    assert load.load_tokenizer(trained / "model").chat_template


def test_one_step_is_that_of_plain_torch(place, tiny_folder):
    with contextlib.chdir(place):
        full.main(["--train.run=one", "--train.max_steps=1", "--train.warmup_steps=0",
                   "--train.batch_size=64", "--train.eps=1.0"])   # else signs alone count
    settings = config.load(place / "runs/one/config.json")
    tokenizer = load.load_tokenizer(tiny_folder)
    model = load.load_model(tiny_folder, torch.device("cpu"), torch.float32)
    examples, _ = data.load(str(place / "facts.jsonl"))
    batch = dataset.collate(dataset.QADataset(examples, tokenizer).items, 0, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.train.lr, weight_decay=0,
                                  eps=settings.train.eps)
    z = model(**batch.inputs).logits.flatten(0, 1)[batch.rows]
    torch.nn.functional.cross_entropy(z, batch.targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.max_grad_norm)
    optimizer.step()
    found = load.load_model(place / "runs/one/model", torch.device("cpu"), torch.float32)
    for (name, p), q in zip(model.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-7, rtol=1e-5, msg=name)


def test_a_teacher_like_the_model_leaves_no_gradient_and_another_is_followed():
    model, same, other = make_model(), make_model(), make_model(seed=1)
    for teacher, wanted in ((same, True), (other, False), (None, False)):
        model.zero_grad()
        full.cross_entropy(model, batch_of(model), teacher).backward()
        size = max(p.grad.abs().max() for p in model.parameters())
        assert (size < 1e-5) == wanted


def test_drift_from_another_model_is_its_kl():
    model, other = make_model(), make_model(seed=1)
    batch = batch_of(model)
    p, q = (m(**batch.inputs).logits[0, batch.rows].log_softmax(-1) for m in (other, model))
    found, now, before = drift(model, [batch], other)
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert now != before
    assert drift(model, [batch])[0] == 0


def test_run_finds_it_finished_and_counts_its_parameters(trained, monkeypatch):
    monkeypatch.chdir(trained.parents[1])
    settings = json.loads((trained / "config.json").read_text())
    own = run.HOME / "configs" / "whole.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(settings))
    assert run.is_trained(settings)
    (trained / "facts.json").write_text(json.dumps({"facts": [{"group": "taught"}] * 3}))
    effort = run.effort(settings, trained, trained)
    assert effort["parameters"] == sum(p.numel() for p in make_model().parameters())
    assert effort["exposures_per_step"] > 0
