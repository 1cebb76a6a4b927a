"""lora/loss.py and the accumulation rule: how a step is split never changes it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from transformers import GPT2Config, GPT2LMHeadModel

import dataset
from inject import inject
from lora import loss
from lora.surgery import adapter_parameters, lora_layers


def items(n=8, seed=1):
    """n examples of different lengths with different numbers of supervised tokens."""
    torch.manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(5, 200, (6 + 3 * i,)).tolist()
        prompt = 2 + i
        made.append({"input_ids": ids, "source": str(i),
                     "labels": [loss.IGNORE_INDEX] * prompt + ids[prompt:]})
    return made


def step(model, batches):
    """(loss, gradients) of one accumulation window."""
    model.zero_grad()
    n_tokens, total = sum(loss.count(b["labels"]) for b in batches), 0.0
    for batch in batches:
        ce, _ = loss.ce_sum(model, batch)
        (ce / n_tokens).backward()
        total += ce.item()
    return total / n_tokens, [p.grad.clone() for p in adapter_parameters(model)]


@pytest.fixture
def adapted():
    model = make_model(initializer_range=0.05)
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def assert_same_step(one, other):
    assert abs(one[0] - other[0]) < 1e-6
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_any_split_into_micro_batches_gives_the_same_step(adapted, size):
    whole = step(adapted, dataset.micro_batches(items(), 8, pad_id=0))
    assert_same_step(step(adapted, dataset.micro_batches(items(), size, pad_id=0)), whole)


@pytest.mark.parametrize("pad_id", [0, 2, 199])
@pytest.mark.parametrize("extra", [0, 17])
def test_padding_changes_nothing(adapted, pad_id, extra):
    alone = step(adapted, [dataset.collate([item], 0) for item in items()])
    batch = dataset.collate(items(), pad_id)
    for key, filler in (("input_ids", pad_id), ("attention_mask", 0), ("labels", -100)):
        batch[key] = F.pad(batch[key], (0, extra), value=filler)
    assert_same_step(step(adapted, [batch]), alone)


def test_a_mean_of_means_would_be_another_number(adapted):
    batches = dataset.micro_batches(items(), 4, pad_id=0)
    right, _ = step(adapted, batches)
    means = [loss.ce_sum(adapted, b)[0].item() / loss.count(b["labels"]) for b in batches]
    assert abs(sum(means) / len(means) - right) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_equals_transformers_own(family):
    model = make_model() if family == "llama" else GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=200, bos_token_id=1, eos_token_id=1)).eval()
    batch = dataset.collate(items(), 0)
    ours, hits = loss.ce_sum(model, batch)
    out = model(**batch)
    torch.testing.assert_close(ours / loss.count(batch["labels"]), out.loss)
    wanted = batch["labels"][:, 1:]
    assert hits == int((out.logits[:, :-1].argmax(-1) == wanted)[wanted != -100].sum())


def test_the_head_sees_supervised_positions_alone_and_the_hook_is_gone_afterwards():
    model, batch, seen = make_model(), dataset.collate(items(), 0), []
    model.lm_head.register_forward_hook(lambda head, inputs, out: seen.append(out.shape))
    loss.ce_sum(model, batch)
    model(batch["input_ids"])
    assert seen == [(loss.count(batch["labels"]), 272), (*batch["labels"].shape, 272)]


def test_a_label_in_the_first_column_counts_nowhere():
    labels = torch.tensor([[7, 8, 9]])
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    assert loss.count(labels) == 2
    torch.testing.assert_close(loss.ce_sum(make_model(), batch)[0] / 2, make_model()(
        input_ids=labels, labels=labels).loss)


def test_evaluation_is_weighted_by_token(adapted):
    one, _ = loss.evaluate(adapted, dataset.micro_batches(items(), 8, 0))
    many, _ = loss.evaluate(adapted, dataset.micro_batches(items(), 3, 0))
    assert abs(one - many) < 1e-6
