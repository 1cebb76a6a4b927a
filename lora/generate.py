"""
Generation with a key/value cache: greedy or sampled, a batch of prompts at a time.

    generate(model, [prompt_ids], stop=Stop({2}), max_new_tokens=40)   # [[ids of the answer]]
"""

import contextlib
import inspect
import random
from os.path import commonprefix
from typing import NamedTuple

import torch

SHORTEST = 8                      # beginning of prompts that is computed once for all
PREFILL = 4096                    # tokens of prompts in one forward: what it needs is bounded
NUCLEUS = 512                     # tokens sorted first; all of them only where these do not suffice


class Stop(NamedTuple):
    """What ends an answer: one of these ids or, where the end-of-turn marker is many tokens, this
    text, for which decode turns ids into text."""

    ids: frozenset
    text: str = ""
    decode: object = None


def generate(model, prompts, stop, max_new_tokens=40, temperature=0.0, top_p=1.0, seed=0,
             batch_size=64, on_token=None, repetition_penalty=1.0):
    """The answers to prompts (lists of token ids) as lists of token ids, without what stopped
    them; an answer of max_new_tokens tokens did not end. temperature 0 is greedy; above, nucleus
    sampling (Holtzman et al. 2019, arXiv:1904.09751, section 3.1), where prompt i draws with a
    generator of its own, from seed and i. on_token(i, answer) is called after each token.
    repetition_penalty divides the positive logits of every token seen, the prompt's too (Keskar et
    al. 2019, arXiv:1909.05858, section 4.1)."""
    model.eval()
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start:start + batch_size]
        draws = [random.Random(f"{seed} {start + i}") for i in range(len(part))]

        def choose(logits, rows, seen, draws=draws):
            if repetition_penalty != 1:
                for line, ids in zip(logits, seen, strict=True):
                    ids = torch.tensor(sorted(ids), device=line.device)
                    line[ids] = torch.where(line[ids] > 0, line[ids] / repetition_penalty,
                                            line[ids] * repetition_penalty)
            return _choose(logits, temperature, top_p, [draws[i].random() for i in rows])

        def tell(row, answer, start=start):
            if on_token:
                on_token(start + row, answer)
        with _one_product(model.get_output_embeddings()):
            answers += _batch(model, part, stop, max_new_tokens, choose, tell)
    return answers


@contextlib.contextmanager
def _one_product(head):
    """The head sees its rows as one matrix. What a model gives it is a slice, the last position of
    each row; torch multiplies such a slice by a copy of a frozen weight for each row, and oneDNN
    makes those copies in bfloat16: 2.5 GiB for 48 rows and SmolLM2's head."""
    hook = head.register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _batch(model, prompts, stop, max_new_tokens, choose, tell):
    """What all prompts begin with, p tokens, is computed once. The rest has its padding before it:
    every row's next token is then at the same, last, position. Rows that have ended leave the batch
    when they are half of it."""
    b, t = len(prompts), max(map(len, prompts))
    p = _shared(model, prompts, t + max_new_tokens)
    ids = torch.zeros(b, t, dtype=torch.long)
    mask = torch.zeros(b, t + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, :p], ids[row, t - len(prompt) + p:] = map(torch.tensor, (prompt[:p], prompt[p:]))
        mask[row, :p] = mask[row, t - len(prompt) + p:] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask[:, :t].cumsum(1) - 1).clamp(min=0)            # (b, t): padding is no place
    answers, rows, open_rows, cache = [[] for _ in prompts], list(range(b)), set(range(b)), None
    may = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in may else {}
    if p:
        cache = model(input_ids=ids[:1, :p], use_cache=True, **last_only).past_key_values
        cache.batch_repeat_interleave(b)
        ids, positions = ids[:, p:], positions[:, p:]
    columns = max(1, PREFILL // b)
    while ids.shape[1] > columns:
        seen = t - ids.shape[1] + columns
        cache = model(input_ids=ids[:, :columns], attention_mask=mask[:, :seen],
                      position_ids=positions[:, :columns], past_key_values=cache, use_cache=True,
                      **last_only).past_key_values
        ids, positions = ids[:, columns:], positions[:, columns:]
    for n in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask[:, :t + n], position_ids=positions,
                    past_key_values=cache, use_cache=True, **last_only)
        cache = out.past_key_values
        seen = [{*prompts[row], *answers[row]} for row in rows]
        chosen = choose(out.logits[:, -1].float(), rows, seen)      # (rows,)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in open_rows:
                continue
            if token in stop.ids:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if stop.text and stop.text in (text := stop.decode(answers[row])):
                while not text.partition(stop.text)[0].startswith(stop.decode(answers[row])):
                    answers[row].pop()
                open_rows.discard(row)
            tell(row, answers[row])
        if not open_rows:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if len(open_rows) <= len(rows) // 2:
            keep = torch.tensor([i for i, row in enumerate(rows) if row in open_rows],
                                device=model.device)
            rows = [row for row in rows if row in open_rows]
            cache.batch_select_indices(keep)
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
    return answers


def _shared(model, prompts, length):
    """How many tokens all prompts begin with; 0 where it does not pay, or where a sliding window
    would count the padding between them and the rest."""
    p = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or length
    return p if len(prompts) > 1 and p >= SHORTEST and length <= window else 0


def _choose(logits, temperature, top_p, draws):
    """(b, v) -> (b,): the likeliest token, or the one at which the probabilities, summed over the
    smallest set of tokens that reaches top_p, pass draws[row] of their sum."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits / temperature, -1), None
    if top_p < 1:
        everything, (p, token) = p, p.topk(min(NUCLEUS, p.shape[1]))
        if (p.sum(-1) < top_p).any():
            p, token = everything.sort(descending=True)
        p[p.cumsum(-1) - p >= top_p] = 0                            # the first always stays
    mass = p.cumsum(-1)
    drawn = torch.tensor(draws, device=mass.device)[:, None] * mass[:, -1:]
    at = (mass <= drawn).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return (at if token is None else token.gather(1, at)).squeeze(1)
