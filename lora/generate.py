"""
Generation with a key/value cache: greedy or sampled, a batch of prompts at a time.

    generate(model, [prompt_ids], stop=Stop({2}), max_new_tokens=40)   # [[ids of the answer]]
"""

import inspect
from typing import NamedTuple

import torch


class Stop(NamedTuple):
    """What ends an answer: one of these ids or, where the end-of-turn marker is many tokens, this
    text, for which decode turns ids into text."""

    ids: frozenset
    text: str = ""
    decode: object = None


@torch.no_grad()
def generate(model, prompts, stop, max_new_tokens=40, temperature=0.0, top_p=1.0, seed=0,
             batch_size=64):
    """The answers to prompts (lists of token ids) as lists of token ids, without what stopped
    them. temperature 0 is greedy; above, nucleus sampling (Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1) with a generator of its own seed."""
    model.eval()
    random = torch.Generator(model.device).manual_seed(seed)
    answers = []
    for start in range(0, len(prompts), batch_size):
        answers += _batch(model, prompts[start:start + batch_size], stop, max_new_tokens,
                          lambda logits: _choose(logits, temperature, top_p, random))
    return answers


def _batch(model, prompts, stop, max_new_tokens, choose):
    """Left padding: every row's next token is then at the same, last, position."""
    b, t = len(prompts), max(map(len, prompts))
    ids = torch.zeros(b, t, dtype=torch.long)
    mask = torch.zeros(b, t + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, t - len(prompt):] = torch.tensor(prompt)
        mask[row, t - len(prompt):] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask[:, :t].cumsum(1) - 1).clamp(min=0)            # (b, t): padding is no place
    answers, open_rows, cache = [[] for _ in prompts], set(range(b)), None
    may = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in may else {}
    for n in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask[:, :t + n], position_ids=positions,
                    past_key_values=cache, use_cache=True, **last_only)
        cache = out.past_key_values
        chosen = choose(out.logits[:, -1].float())                  # (b,)
        for row in list(open_rows):
            token = chosen[row].item()
            if token in stop.ids:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if stop.text and stop.text in (text := stop.decode(answers[row])):
                while not text.partition(stop.text)[0].startswith(stop.decode(answers[row])):
                    answers[row].pop()
                open_rows.discard(row)
        if not open_rows:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
    return answers


def _choose(logits, temperature, top_p, random):
    """(b, v) -> (b,): the likeliest token, or one drawn from the smallest set of tokens whose
    probability reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0                                # the first always stays
    return token.gather(1, torch.multinomial(p, 1, generator=random)).squeeze(1)
