"""lora/generate.py against transformers' own generate."""

import pytest
import torch
import zoo
from conftest import make_model
from transformers import MistralConfig, MistralForCausalLM, RepetitionPenaltyLogitsProcessor

from lora.base import load
from lora.fast import flat
from lora.generate import Stop, choose_tokens, generate, traits

PROMPTS = [[7, 8, 9], [11], [12, 13, 14, 15, 16, 17]]


def test_greedy_equals_transformers_and_a_batch_equals_single_prompts():
    model = make_model()
    ours = generate(model, PROMPTS, Stop(frozenset()), max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                                attention_mask=torch.ones(1, len(prompt)), eos_token_id=None,
                                pad_token_id=0)
        assert answer == theirs[0, len(prompt):].tolist()
        assert generate(model, [prompt], Stop(frozenset()), 12) == [answer]


def make_mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=24, initializer_range=0.3))


@pytest.mark.parametrize(("make", "fast", "head", "shared"), [
    (make_model, False, 12, True), (make_model, True, 12, True), (make_model, False, 5, False),
    (make_mistral, False, 12, True), (make_mistral, False, 40, False)])
def test_what_prompts_begin_with_is_computed_once_and_the_answers_are_the_same(
        make, fast, head, shared):
    model, seen = make(), []
    prompts = [[*range(20, 20 + head), *prompt] for prompt in PROMPTS]
    wanted = [generate(model, [prompt], Stop(frozenset()), 6)[0] for prompt in prompts]
    if fast:
        flat.enable(model, load.use_attention)
    assert traits(model)[:2] == (True, True)
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    assert generate(model, prompts, Stop(frozenset()), 6) == wanted
    assert seen[:2] == ([(1, head), (3, 6)] if shared else [(3, head + 6), (3, 1)])


def test_stops_at_the_stop_token_and_leaves_it_out():
    model = make_model()
    (free,) = generate(model, [PROMPTS[0]], Stop(frozenset()), 12)
    stop = free[5]
    assert generate(model, [PROMPTS[0]], Stop(frozenset({stop})), 12) == [free[:free.index(stop)]]


def test_stops_at_a_text_for_models_without_the_token():
    model = make_model()
    (free,) = generate(model, [PROMPTS[0]], Stop(frozenset()), 12)

    def decode(ids):
        return "".join(chr(0x100 + i) for i in ids)
    stop = Stop(frozenset(), decode(free[4:6]), decode)
    (answer,) = generate(model, [PROMPTS[0]], stop, 12)
    assert decode(answer) == decode(free).partition(stop.text)[0]


def test_sampling_repeats_with_its_seed():
    model = make_model()
    draws = [generate(model, PROMPTS, Stop(frozenset()), 8, temperature=1.0, seed=s)
             for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_what_is_drawn_does_not_depend_on_the_batch():
    model = make_model()
    whole = generate(model, PROMPTS, Stop(frozenset()), 8, temperature=1.0, top_p=0.9)
    assert whole == generate(model, PROMPTS, Stop(frozenset()), 8, 1.0, 0.9, batch_size=2)


def test_rows_that_ended_leave_the_batch_and_the_others_do_not_notice():
    model = make_model()
    free = generate(model, PROMPTS, Stop(frozenset()), 16)
    stop = Stop(frozenset(next(t for t in answer[2:] if t not in free[0]) for answer in free[1:]))
    wanted = [answer[:next((i for i, t in enumerate(answer) if t in stop.ids), 16)]
              for answer in free]
    assert len(wanted[0]) == 16 and max(map(len, wanted[1:])) < 16
    assert generate(model, PROMPTS, stop, 16) == wanted


def test_each_token_is_told_as_it_comes():
    model, told = make_model(), []
    answers = generate(model, PROMPTS, Stop(frozenset()), 4, batch_size=2,
                       on_token=lambda i, answer: told.append((i, list(answer))))
    assert told[:2] == [(0, answers[0][:1]), (1, answers[1][:1])] and (2, answers[2]) in told


@pytest.mark.parametrize("top_p, allowed", [(0.5, {0}), (0.7, {0, 1}), (1.0, {0, 1, 2})])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, allowed):
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().repeat(300, 1)
    chosen = choose_tokens(logits, 1.0, top_p, [i / 300 for i in range(300)])
    assert set(chosen.tolist()) == allowed


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    chosen = choose_tokens(p.log().repeat(1000, 1), 1.0, 1.0, [i / 1000 for i in range(1000)])
    assert (chosen.bincount(minlength=4) - 1000 * p[0]).abs().max() <= 1


def test_a_flat_distribution_is_sorted_whole(monkeypatch):
    monkeypatch.setattr("lora.generate.NUCLEUS", 2)
    logits = torch.zeros(100, 10)
    assert len(set(choose_tokens(logits, 1.0, 0.9, [i / 100 for i in range(100)]).tolist())) == 9


@pytest.mark.parametrize("penalty", [1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    model, free = make_model(), Stop(frozenset())
    prompts = [[7, 8, 9, 8], [11], [12, 13, 14, 15, 16, 17, 12]]
    ours = generate(model, prompts, free, 16, repetition_penalty=penalty)
    assert ours != generate(model, prompts, free, 16)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False,
                                repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
                                attention_mask=torch.ones(1, len(prompt)))
        assert answer == theirs[0, len(prompt):].tolist()


def test_the_repetition_penalty_lowers_every_token_seen_and_no_other(monkeypatch):
    seen = []
    monkeypatch.setattr("lora.generate.choose_tokens", lambda logits, *_: (
        seen.append(logits.clone()), logits.argmax(-1))[1])
    model, free, processor = make_model(), Stop(frozenset()), RepetitionPenaltyLogitsProcessor(1.5)
    generate(model, [[7, 8, 9, 7]], free, 1)
    generate(model, [[7, 8, 9, 7]], free, 1, repetition_penalty=1.5)
    assert torch.equal(processor(torch.tensor([[7, 8, 9, 7]]), seen[0].clone()), seen[1])
    assert (seen[0] != seen[1]).nonzero()[:, 1].tolist() == [7, 8, 9]


LONG = [[*range(20, 32), *prompt] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "granitemoehybrid", "lfm2", "rwkv",
                                  "recurrent_gemma", "mpt", "openai-gpt"])
def test_whatever_a_model_remembers_a_batch_equals_single_prompts(name):
    """A hybrid cache has no batch_repeat_interleave; recurrent states may take padding in."""
    model = zoo.make(name)
    alone = [generate(model, [prompt], Stop(frozenset()), 6)[0] for prompt in LONG]
    assert generate(model, LONG, Stop(frozenset()), 6) == alone
    stop = Stop(frozenset({alone[0][1], alone[1][0]}))
    ends = [next((i for i, t in enumerate(answer) if t in stop.ids), 6) for answer in alone]
    assert generate(model, LONG, stop, 6) == [a[:n] for a, n in zip(alone, ends, strict=True)]


@pytest.mark.parametrize("name, padding, attends", [
    ("llama", True, True), ("qwen3_5_text", True, False), ("recurrent_gemma", False, False),
    ("rwkv", False, False)])
def test_what_a_model_can_do_with_a_batch_is_tried(name, padding, attends):
    assert traits(zoo.make(name))[:2] == (padding, attends)


def test_a_hybrid_takes_its_prompts_whole_and_no_more_than_fit(monkeypatch):
    model, seen = zoo.make("qwen3_5_text"), []
    traits(model)
    monkeypatch.setattr("lora.generate.PREFILL", 40)
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    generate(model, LONG, Stop(frozenset()), 2)
    assert seen == [(2, 15), (2, 1), (1, 18), (1, 1)]
