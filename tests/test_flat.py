"""lora/fast/flat.py against every sample computed alone: the same loss, gradients and logits."""

import random

import pytest
import torch
import zoo
from conftest import make_model
from test_loss import assert_same_step, step
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dataset
from inject import inject
from lora import loss
from lora.base import load
from lora.fast import flat, pieces
from lora.generate import Stop, generate
from lora.loss import IGNORE_INDEX
from lora.optim import AdamW
from lora.surgery import adapter_parameters, lora_layers

SIZE = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: make_model(max_position_embeddings=512),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=272, n_positions=512, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, initializer_range=0.3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
    "mistral, window 8": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)),
    "gemma3, window 8": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **SIZE, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"])),
}


def adapted(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def item(ids, spans):
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels, "source": ""}


def samples(p, seed=0):
    """Seven that share p tokens: one and several answers, one of them inside the shared part, an
    answer of one token, the same sample twice, one that is another's beginning."""
    rng = random.Random(seed)
    some = lambda n: [rng.randrange(3, 270) for _ in range(n)]                # noqa: E731
    prefix = some(p)
    long = prefix + some(30)
    made = [item(long, [(p + 3, p + 7), (p + 20, p + 29)]),
            item(prefix + some(9), [(p + 8, p + 9)]),
            item(prefix + some(14), [(p + 1, p + 14)]), item(long, [(p + 3, p + 7)]),
            item(prefix + some(21), [(max(1, p // 2), max(2, p // 2 + 3)), (p + 18, p + 20)]),
            item(long[:p + 12], [(p + 3, p + 12)])]
    return [*made, made[2]]


def assert_same_gradients(one, other):
    assert abs(one[0] / other[0] - 1) < 1e-5
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("p", [0, 30, 300])
def test_loss_and_every_gradient_equal_those_of_the_samples_alone(name, p):
    model, items = adapted(name), samples(p)
    for layer in lora_layers(model).values():
        layer.fused = False
    alone = step(model, [dataset.collate([one], 0) for one in items], lean=False)
    padded = step(model, dataset.micro_batches(items, 7, 0), lean=False)
    assert_same_gradients(padded, alone)
    flat.enable(model, load.use_attention)
    assert model.config._attn_implementation == "flat"
    for layer in lora_layers(model).values():
        layer.fused = True
    for layout in ("shared", "flat"):
        for size in (7, 3):
            batches = dataset.micro_batches(items, size, 0, layout=layout)
            assert_same_gradients(step(model, batches), alone)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("p", [0, 30])
@pytest.mark.parametrize("kernel", [True, False])
def test_no_sample_sees_another(name, p, kernel, monkeypatch):
    monkeypatch.setattr(pieces, "fits", lambda *_: kernel)
    model, items = adapted(name), samples(p)
    flat.enable(model, load.use_attention)
    changed, ids = [dict(one) for one in items], items[4]["input_ids"]
    changed[4] = item([*ids[:p + 2], 5, *ids[p + 3:]],
                      [(max(1, p // 2), max(2, p // 2 + 3)), (p + 18, p + 20)])
    one, other = flat.flatten(items), flat.flatten(changed)
    before, after = loss.logits_at(model, one), loss.logits_at(model, other)
    differs = (before != after).any(1)
    assert differs.sum() == 2                             # all that sample 4 predicts, no other bit
    assert one.rows.tolist() == other.rows.tolist()


def test_the_tree_of_the_docstring():
    s, t, a, b, c, d = range(3, 9)
    items = [item([s, t, a, b, c, 9], [(5, 6)]), item([s, t, d, 9], [(3, 4)])]
    batch = flat.flatten(items, share=2)
    assert batch.inputs["input_ids"].tolist() == [[s, t, d, a, b, c]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 4]]
    plan = batch.inputs["plan"]
    assert plan.chains == [(0, 3, ()), (3, 6, ((0, 2),))]
    assert plan.calls == [(slice(0, 3), slice(0, 3), True), (slice(3, 6), slice(3, 6), True),
                          (slice(3, 6), slice(0, 2), False)]
    assert [cell.grid.tolist() for cell in plan.cells] == [[[0, 1, 2]], [[3, 4, 5]]]
    mask = plan.mask(1, None, torch.zeros(1))
    assert (mask == 0).tolist() == [[True, True, True, False, False],
                                    [True, True, True, True, False], [True] * 5]
    assert batch.rows.tolist() == [5, 2] and batch.targets.tolist() == [9, 9]


def test_tokens_without_a_label_after_them_are_left_out():
    batch = flat.flatten([item([5, 6, 7, 8, 9], [(1, 3)])])
    assert batch.inputs["input_ids"].tolist() == [[5, 6]] and batch.targets.tolist() == [6, 7]


def test_several_prompts_make_several_groups():
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 270) for _ in range(40)] for _ in range(3)]
    items = [item([*prompts[i % 3], 7 + i, 8, 9], [(41, 43)]) for i in range(9)]
    items.append(item([200, 201, 202, 203], [(2, 4)]))        # and one without a prompt
    batch = flat.flatten(items)
    assert batch.inputs["input_ids"].numel() == 3 * 40 + 9 * 2 + 3
    model = adapted("llama")
    alone = step(model, [dataset.collate([one], 0) for one in items])
    flat.enable(model, load.use_attention)
    assert_same_step(step(model, [batch]), alone)


def tree_of(rng, size=12, longest=50):
    """Samples that leave one another anywhere: each begins as a part of an earlier one."""
    made = []
    for _ in range(size):
        start = rng.choice(made)["input_ids"] if made and rng.random() < 0.85 else []
        start = start[:rng.randrange(len(start) + 1)]
        ids = start + [rng.randrange(3, 270) for _ in range(rng.randrange(2, longest))]
        spans = [(at, at + rng.randrange(1, 5)) for at in rng.sample(range(1, len(ids)), 1)]
        made.append(item(ids, spans))
    return made


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3, window 8"])
@pytest.mark.parametrize("share", [1, 5, flat.SHORTEST])
def test_random_trees_equal_the_samples_alone(name, share, kernel, monkeypatch):
    """Loss and all gradients, and each token is seen by those that come after it in a sample."""
    monkeypatch.setattr(pieces, "fits", lambda *_: kernel)
    model = adapted(name)
    flat.enable(model, load.use_attention)
    for seed in range(4):
        items = tree_of(random.Random(seed))
        batch = flat.flatten(items, share=share)
        plan = batch.inputs["plan"]
        ids, depth = (batch.inputs[key][0].tolist() for key in ("input_ids", "position_ids"))
        texts = set()
        for start, stop, path in plan.chains:
            rows = [row for part in path for row in range(*part)] + [*range(start, stop)]
            assert [depth[row] for row in rows] == [*range(len(rows))]
            texts.add(tuple(ids[row] for row in rows))
        for one in items:                                 # every sample is one, or begins one
            wanted = tuple(one["input_ids"][:max(
                t for t, y in enumerate(one["labels"]) if y != IGNORE_INDEX)])
            assert any(text[:len(wanted)] == wanted for text in texts)
        alone = step(model, [dataset.collate([one], 0) for one in items], lean=False)
        assert_same_gradients(step(model, [batch]), alone)


def test_with_share_1_every_beginning_is_computed_once():
    items = tree_of(random.Random(7), size=40)
    beginnings = {tuple(one["input_ids"][:n]) for one in items for n in range(1, 1 + max(
        t for t, y in enumerate(one["labels"]) if y != IGNORE_INDEX))}
    assert flat.flatten(items, share=1).inputs["input_ids"].numel() == len(beginnings)
    few = flat.flatten(items).inputs["input_ids"].numel()
    none = flat.flatten(items, share=0).inputs["input_ids"].numel()
    assert len(beginnings) < few < none


def test_a_call_reads_a_path_for_all_chains_below_it():
    system, talk = [*range(3, 43)], [*range(50, 90)]
    answers = [system + talk + [100 + i] * 20 for i in range(4)]
    batch = flat.flatten([item(ids, [(85, 100)]) for ids in answers])
    assert batch.inputs["input_ids"].numel() == 80 + 4 * 19
    assert [call for call in batch.inputs["plan"].calls if not call[2]] == [
        (slice(99, 99 + 3 * 19), slice(0, 80), False)]


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                          (torch.bfloat16, 0.02)])
def test_pieces_are_attention(dtype, bound):
    """Out and gradients are those of one softmax over a path of two parts and the own tokens."""
    torch.manual_seed(0)
    chains = [(0, 40, ()), (40, 70, ((0, 20),)), (70, 95, ((0, 20), (40, 60)))]
    q, k, v = (torch.randn(1, heads, 95, 8, dtype=torch.float64, requires_grad=True)
               for heads in (4, 2, 2))
    hidden = torch.ones(95, 95, dtype=torch.bool)
    for start, stop, path in chains:
        for part in path:
            hidden[start:stop, slice(*part)] = False
        hidden[start:stop, start:stop] = torch.ones(stop - start, stop - start).triu(1) > 0
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=~hidden, enable_gqa=True).transpose(1, 2)
    dy = torch.randn_like(wanted)
    wanted = wanted, *torch.autograd.grad(wanted, (q, k, v), dy)
    given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = pieces.Attention.apply(*given, pieces.calls(chains), None)
    for one, other in zip((out, *torch.autograd.grad(out, given, dy.to(dtype))), wanted,
                          strict=True):
        assert one.dtype == dtype and (one - other).norm() <= bound * other.norm()


def test_a_model_that_cannot_says_why_and_works_as_before():
    torch.manual_seed(0)
    for model, why in (
            (make_model(attn_implementation="eager"), "its attention is eager, not sdpa"),
            (BloomForCausalLM(BloomConfig(vocab_size=272, hidden_size=32, n_layer=1, n_head=4)),
             "")):
        model.eval()
        before = model.config._attn_implementation
        with pytest.raises(flat.Unsupported, match=why or "."):
            flat.enable(model, load.use_attention)
        assert model.config._attn_implementation == before


def test_padded_batches_and_generation_are_untouched():
    model, items = adapted("llama"), samples(5)
    batch, prompts = dataset.collate(items, 0), [one["input_ids"] for one in items]
    before = loss.logits_at(model, batch), generate(model, prompts, Stop(frozenset()), 8)
    flat.enable(model, load.use_attention)
    after = loss.logits_at(model, batch), generate(model, prompts, Stop(frozenset()), 8)
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


def test_checkpointing_changes_no_gradient():
    model, items = adapted("llama"), samples(30)
    flat.enable(model, load.use_attention)
    model.train()
    plain = step(model, [flat.flatten(items)])
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, [flat.flatten(items)]), plain)


def test_dropout_is_noticed_in_the_adapter_and_in_the_model():
    model = make_model()
    assert not flat.drops(model)
    inject(model, r=2, lora_alpha=2, lora_dropout=0.1)
    assert flat.drops(model)
    assert flat.drops(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))


def test_only_the_adapter_gets_a_gradient():
    model = adapted("llama")
    flat.enable(model, load.use_attention)
    loss.ce_sum(model, flat.flatten(samples(30)))[0].backward()
    with_gradient = {p for p in model.parameters() if p.grad is not None}
    assert with_gradient == set(adapter_parameters(model))


def curve(seed, size, layout, lean):
    """Losses of 25 steps in bfloat16, 8 samples a step."""
    torch.manual_seed(seed)
    model = make_model(seed, max_position_embeddings=512).to(torch.bfloat16)
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        layer.fused = lean
    if layout != "padded":
        flat.enable(model, load.use_attention)
    optimizer, losses = AdamW(adapter_parameters(model)), []
    for number in range(25):
        items = samples(20, seed=100 * seed + number % 3)
        ce, gradients = step(model, dataset.micro_batches(items, size, 0, layout=layout), lean)
        for p, gradient in zip(optimizer.parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step(0.01)
        losses.append(ce)
    return torch.tensor(losses)


def test_in_bfloat16_the_curve_stays_inside_the_band_of_the_baseline_against_itself():
    band, ours = [], []
    for seed in range(3):
        baseline = curve(seed, 7, "padded", False)
        assert baseline[-3:].mean() < 0.8 * baseline[:3].mean()               # it learns
        band.append((curve(seed, 2, "padded", False) - baseline).abs())       # another order
        ours.append((curve(seed, 7, "shared", True) - baseline).abs())
    band, ours = torch.stack(band), torch.stack(ours)
    assert ours.mean() < 1.5 * band.mean() and ours.max() < 2 * band.max()


@pytest.mark.parametrize("name, why", [
    ("qwen3_5_text", "it has layers of linear_attention"), ("lfm2", "it has layers of conv"),
    ("llama4_text", "it has layers of chunked_attention"),
    ("stablelm", "StableLmDecoderLayer does not give the plan to its attention"),
    ("nemotron", "NemotronDecoderLayer does not give the plan to its attention"),
    ("gpt_oss", "its attention is eager, not sdpa")])
def test_a_model_is_refused_for_its_structure(name, why):
    model = zoo.make(name).to(torch.bfloat16)                 # where numbers say little
    with pytest.raises(flat.Unsupported, match=why):
        flat.enable(model, load.use_attention)
    assert model.config._attn_implementation != "flat"


@pytest.mark.parametrize("dtype, n", [(torch.float32, 1), (torch.bfloat16, 5)])
def test_wrong_attention_is_noticed_in_any_dtype(monkeypatch, dtype, n):
    """The bound is the model's own rounding, in its own dtype."""
    monkeypatch.setattr(pieces, "fits", lambda *_: False)
    real = flat.Plan.mask

    def leaky(self, i, window, like):
        mask = real(self, i, window, like).clone()
        if self.cells[i].path:
            mask[:, :n] = -torch.inf                          # n of the shared tokens are not seen
        return mask
    model = adapted("llama").to(dtype)
    flat.enable(model, load.use_attention)
    monkeypatch.setattr(flat.Plan, "mask", leaky)
    model = adapted("llama").to(dtype)
    with pytest.raises(flat.Unsupported, match="standard deviations"):
        flat.enable(model, load.use_attention)


def test_attention_that_is_not_told_its_window_is_refused():
    model = adapted("gemma3, window 8")
    for block in model.model.layers:
        block.self_attn.sliding_window = None
    model.config.sliding_window = 4096                        # beyond what a probe could see
    with pytest.raises(flat.Unsupported, match="is not told its window of 4096 tokens"):
        flat.enable(model, load.use_attention)
