"""lora/loss.py and the accumulation rule: how a step is split never changes it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

import dataset
import train
from inject import inject
from lora import loss, surgery
from lora.base import load
from lora.fast import flat, levers
from lora.surgery import adapter_parameters, lora_layers
from measure import drift


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


def step(model, batches, lean=True):
    """(loss, gradients) of one accumulation window."""
    model.zero_grad()
    n_tokens, total = sum(len(b.targets) for b in batches), 0.0
    for batch in batches:
        ce, _ = loss.ce_sum(model, batch, lean)
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
    """Loss and each gradient differ by 1e-5 at most, relative to their length: one entry near zero
    has no digits of its own."""
    assert abs(one[0] - other[0]) < 1e-6 * max(1, abs(other[0]))
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_any_split_into_micro_batches_gives_the_same_step(adapted, size):
    whole = step(adapted, dataset.micro_batches(items(), 8, pad_id=0))
    assert_same_step(step(adapted, dataset.micro_batches(items(), size, pad_id=0)), whole)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_accumulate_gives_the_gradient_of_the_mean_over_all_tokens(adapted, size):
    batches = dataset.Batches(0, "cpu", "padded", True, size, from_base=lambda item: False)
    n_tokens = sum(x != loss.IGNORE_INDEX for item in items() for x in item["labels"][1:])
    whole = step(adapted, dataset.micro_batches(items(), 8, pad_id=0))
    adapted.zero_grad()
    ce, hits = train.accumulate(adapted, batches, items(), n_tokens, seed=0)
    assert_same_step((ce / n_tokens, [p.grad for p in adapter_parameters(adapted)]), whole)
    assert hits == loss.evaluate(adapted, batches(items()))[1]


@pytest.mark.parametrize("pad_id", [0, 2, 199])
@pytest.mark.parametrize("extra", [0, 17])
def test_padding_changes_nothing(adapted, pad_id, extra):
    alone = step(adapted, [dataset.collate([item], 0) for item in items()])
    longest = {"input_ids": [7] * (27 + extra), "labels": [loss.IGNORE_INDEX] * (27 + extra)}
    batch = dataset.collate([*items(), longest], pad_id)     # a row that only makes the rest wider
    assert_same_step(step(adapted, [batch]), alone)


def test_a_mean_of_means_would_be_another_number(adapted):
    batches = dataset.micro_batches(items(), 4, pad_id=0)
    right, _ = step(adapted, batches)
    means = [loss.ce_sum(adapted, b)[0].item() / len(b.targets) for b in batches]
    assert abs(sum(means) / len(means) - right) > 1e-4


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_equals_transformers_own(family, lean):
    model = make_model() if family == "llama" else GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=200, bos_token_id=1, eos_token_id=1)).eval()
    batch = dataset.collate(items(), 0)
    ours, hits = loss.ce_sum(model, batch, lean)
    labels = F.pad(torch.full_like(batch.inputs["input_ids"], -100), (0, 1), value=-100)
    for row, item in enumerate(items()):
        labels[row, :len(item["labels"])] = torch.tensor(item["labels"])
    out = model(**batch.inputs, labels=labels[:, :-1])
    torch.testing.assert_close(ours / len(batch.targets), out.loss)
    wanted = labels[:, 1:-1]
    assert hits == int((out.logits[:, :-1].argmax(-1) == wanted)[wanted != -100].sum())


@pytest.mark.parametrize("lean", [True, False])
def test_the_head_sees_supervised_positions_alone_and_the_hook_is_gone_afterwards(lean):
    model, batch, seen = make_model(), dataset.collate(items(), 0), []
    model.lm_head.register_forward_hook(lambda head, inputs, out: seen.append(out.shape))
    loss.ce_sum(model, batch, lean)
    model(batch.inputs["input_ids"])
    rows = [] if lean else [(1, len(batch.targets), 272)]  # lean: LabelledCE is the head
    assert seen == [*rows, (*batch.inputs["input_ids"].shape, 272)]


@pytest.mark.parametrize("layout", ["padded", "flat", "shared"])
def test_a_label_in_the_first_column_counts_nowhere(layout):
    labels = [7, 8, 9]
    [batch] = dataset.micro_batches([{"input_ids": labels, "labels": labels}], 1, 0, layout=layout)
    assert batch.targets.tolist() == [8, 9]
    if layout == "padded":
        torch.testing.assert_close(loss.ce_sum(make_model(), batch)[0] / 2, make_model()(
            input_ids=torch.tensor([labels]), labels=torch.tensor([labels])).loss)


@pytest.mark.parametrize("chunk", [2**26, 4 * 272 * 5, 1])
def test_the_lean_head_is_plain_autograd_in_chunks(adapted, monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)              # all rows at once, five, one
    batches = dataset.micro_batches(items(), 3, 0)
    assert_same_step(step(adapted, batches, lean=True), step(adapted, batches, lean=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_labelled_ce_gives_the_gradient_of_cross_entropy(dtype, bias):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16).to(dtype).requires_grad_()
    weight, targets = (3 * torch.randn(50, 16)).to(dtype), torch.randint(50, (7,))
    offset = torch.randn(50).to(dtype) if bias else None
    ce, hits = loss.LabelledCE.apply(hidden, weight, offset, targets, True)
    (ce / 3).backward()
    got, hidden.grad = hidden.grad, None
    logits = F.linear(hidden, weight, offset).float()
    (F.cross_entropy(logits, targets, reduction="sum") / 3).backward()
    torch.testing.assert_close(got, hidden.grad, atol=1e-5 if dtype == torch.float32 else 0.1,
                               rtol=0)
    assert hits == int((logits.argmax(-1) == targets).sum())


def test_a_head_with_a_softcap_is_found_out():
    size = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert levers.head_is_linear(make_model())
    assert levers.head_is_linear(Gemma2ForCausalLM(Gemma2Config(
        **size, final_logit_softcapping=None)))
    assert not levers.head_is_linear(Gemma2ForCausalLM(Gemma2Config(
        **size, final_logit_softcapping=30.0, initializer_range=1.0)))


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_hidden_states_are_what_the_head_gets(adapted, layout, lean):
    """hidden_at() leaves the head out; a hook on the head sees the same numbers, bit for bit."""
    if layout != "padded":
        flat.enable(adapted, load.use_attention)
    (batch,), entered = dataset.micro_batches(items(), 8, 0, layout=layout), []
    with adapted.lm_head.register_forward_pre_hook(lambda head, inputs: entered.append(inputs[0])):
        logits = loss.logits_at(adapted, batch)
    hidden = loss.hidden_at(adapted, batch)
    assert torch.equal(entered[0].flatten(0, 1)[batch.rows], hidden)
    assert torch.equal(adapted.lm_head(hidden[None])[0], logits)


def test_evaluation_is_weighted_by_token(adapted):
    one = loss.evaluate(adapted, dataset.micro_batches(items(), 8, 0))
    many = loss.evaluate(adapted, dataset.micro_batches(items(), 3, 0))
    assert one == pytest.approx(many, rel=1e-6) and one[2] == many[2]


def test_an_evaluation_drops_nothing():
    model = make_model()
    inject(model, r=4, lora_alpha=8, lora_dropout=0.5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    batches = dataset.micro_batches(items(), 3, 0)
    model.train()                                          # as a step leaves it
    one = loss.evaluate(model, batches)
    model.train()
    assert loss.evaluate(model, batches) == one


@pytest.mark.parametrize("lean", [True, False])
def test_a_taught_batch_has_the_gradient_of_the_kl_to_the_base(adapted, lean):
    (batch,) = dataset.micro_batches(items(), 8, 0)
    with surgery.disabled(adapted), torch.no_grad():
        base = F.log_softmax(loss.logits_at(adapted, batch).float(), -1)
    adapted.zero_grad()
    tuned = F.log_softmax(loss.logits_at(adapted, batch).float(), -1)
    kl = F.kl_div(tuned, base, reduction="sum", log_target=True)
    kl.backward()
    wanted = [p.grad.clone() for p in adapter_parameters(adapted)]
    adapted.zero_grad()
    ce, _ = loss.ce_sum(adapted, batch, lean, teacher=True)
    ce.backward()
    entropy = -(base.exp() * base).sum()
    torch.testing.assert_close(ce, kl + entropy, rtol=1e-5, atol=0)
    for p, grad in zip(adapter_parameters(adapted), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_has_nothing_to_learn_from_its_base():
    model = make_model()
    inject(model, r=2, lora_alpha=4)
    (batch,) = dataset.micro_batches(items(), 8, 0)
    loss.ce_sum(model, batch, teacher=True)[0].backward()
    assert all(p.grad.abs().max() < 1e-5 for p in adapter_parameters(model))


def test_the_teacher_has_the_softcap_of_its_model():
    """The teacher's logits were computed without the softcap, the student's with it."""
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
        initializer_range=1.0)).eval()
    inject(model, r=2, lora_alpha=4)
    (batch,) = dataset.micro_batches(items(), 8, 0)
    loss.ce_sum(model, batch, lean=False, teacher=True)[0].backward()
    assert all(p.grad.abs().max() < 1e-4 for p in adapter_parameters(model))


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_the_forgetting_meter_is_the_kl_of_both_models_own_logits(adapted, layout):
    if layout != "padded":
        flat.enable(adapted, load.use_attention)
    batches = dataset.micro_batches(items(), 3, 0, layout=layout)
    kl, now, before = drift(adapted, batches)
    p, q = [], []
    for item in items():                                   # one at a time, and the slow formula
        ids = torch.tensor([item["input_ids"]])
        on = [t for t, x in enumerate(item["labels"][1:]) if x != loss.IGNORE_INDEX]
        with torch.no_grad():
            q.append(adapted(ids).logits[0, on].double().softmax(-1))
            with surgery.disabled(adapted):
                p.append(adapted(ids).logits[0, on].double().softmax(-1))
    p, q = torch.cat(p), torch.cat(q)
    targets = torch.cat([torch.tensor(i["labels"])[1:][torch.tensor(i["labels"])[1:] >= 0]
                         for i in items()])
    assert kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    for value, probabilities in ((now, q), (before, p)):
        gold = probabilities.gather(1, targets[:, None]).log()
        assert value == pytest.approx(-float(gold.mean()), rel=1e-4)


def test_at_rest_nothing_is_forgotten():
    model = make_model()
    inject(model, r=2, lora_alpha=4)
    kl, now, before = drift(model, dataset.micro_batches(items(), 3, 0))
    assert kl == pytest.approx(0, abs=1e-7) and now == before
