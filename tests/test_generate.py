"""lora/generate.py against transformers' own generate."""

import pytest
import torch
from conftest import make_model

from lora.generate import Stop, _choose, generate

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


@pytest.mark.parametrize("top_p, allowed", [(0.5, {0}), (0.7, {0, 1}), (1.0, {0, 1, 2})])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, allowed):
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().repeat(300, 1)
    chosen = _choose(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    assert set(chosen.tolist()) == allowed
