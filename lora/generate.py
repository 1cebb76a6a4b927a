"""
Generation with a key/value cache: greedy or sampled, a batch of prompts at a time.

    generate(model, [prompt_ids], stop=Stop({2}), max_new_tokens=40)   # [[ids of the answer]]
"""

import inspect
import random
from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor, nn

SHORTEST = 8                      # a shorter common beginning of prompts is not computed apart
PREFILL = 4096                    # prompt tokens in one forward pass: this bounds its memory
NUCLEUS = 512                     # tokens sorted first; all of them only where these do not suffice


class Stop(NamedTuple):
    """What ends an answer: one of these ids, or a text where the end marker is many tokens."""

    ids: frozenset[int]
    text: str = ""
    decode: Callable[[list[int]], str] | None = None           # ids -> text


def generate(model: nn.Module, prompts: list[list[int]], stop: Stop, max_new_tokens: int = 40,
             temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, batch_size: int = 64,
             on_token: Callable | None = None, repetition_penalty: float = 1.0) -> list[list[int]]:
    """Answer prompts (lists of token ids); return lists of token ids without the stop. An answer of
    max_new_tokens tokens did not end. temperature 0 is greedy; above 0 is nucleus sampling
    (Holtzman et al. 2019, arXiv:1904.09751, section 3.1): prompt i draws from a generator seeded
    with seed and i. on_token(i, answer) is called after each token. repetition_penalty divides the
    positive logits of every token seen, in the prompt too (Keskar et al. 2019, arXiv:1909.05858,
    section 4.1), and multiplies the negative ones."""
    model.eval()
    draws = [random.Random(f"{seed} {i}") for i in range(len(prompts))]

    def choose(logits, rows, seen):                            # rows: the prompts' indices
        if repetition_penalty != 1:
            for line, ids in zip(logits, seen, strict=True):
                ids = torch.tensor(sorted(ids), device=line.device)
                line[ids] = torch.where(line[ids] > 0, line[ids] / repetition_penalty,
                                        line[ids] * repetition_penalty)
        return choose_tokens(logits, temperature, top_p, [draws[i].random() for i in rows])
    answers = []
    with model.get_output_embeddings().register_forward_pre_hook(_as_one_matrix):
        for start in range(0, len(prompts), batch_size):
            answers += _batch(model, prompts[start:start + batch_size], start, stop, max_new_tokens,
                              choose, on_token)
    return answers


def _as_one_matrix(head, inputs):
    """Give the head its rows as one contiguous matrix. A model passes it a slice, the last position
    of each row; torch multiplies such a slice by a copy of a frozen weight for each row, and oneDNN
    makes those copies in bfloat16: 2.5 GiB for 48 rows and SmolLM2's head."""
    return (inputs[0].contiguous(),)


@torch.no_grad()
def _batch(model, prompts, start, stop, max_new_tokens, choose, on_token):
    """Answer the prompts number start, start + 1, ... in one batch. Rows that have ended leave the
    batch when they are half of it."""
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}
    ids, positions, mask, cache = _prefill(model, prompts, max_new_tokens, options)
    t = mask.shape[1] - max_new_tokens
    answers, rows, open_rows = [[] for _ in prompts], [*range(len(prompts))], {*range(len(prompts))}
    for n in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask[:, :t + n], position_ids=positions,
                    past_key_values=cache, **options)
        cache = out.past_key_values
        seen = [{*prompts[row], *answers[row]} for row in rows]
        chosen = choose(out.logits[:, -1].float(), [start + row for row in rows], seen)   # (rows,)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in open_rows:
                continue
            if token in stop.ids:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if stop.text and stop.text in (text := stop.decode(answers[row])):
                while not text.partition(stop.text)[0].startswith(stop.decode(answers[row])):
                    answers[row].pop()                         # the tokens of the stop text
                open_rows.discard(row)
            if on_token:
                on_token(start + row, answers[row])
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


def _prefill(model, prompts, max_new_tokens, options):
    """Run the prompts through the model but for their last columns; return these columns' ids and
    positions, the mask of all columns to come, and the cache. The p tokens that all prompts begin
    with are computed once. The rest is padded on the left: every row's next token is at the end."""
    b, t = len(prompts), max(map(len, prompts))
    p = _shared(model, prompts, t + max_new_tokens)
    ids = torch.zeros(b, t, dtype=torch.long)
    mask = torch.zeros(b, t + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = t - len(prompt) + p                            # padding from p to start
        ids[row, :p], ids[row, start:] = torch.tensor(prompt[:p]), torch.tensor(prompt[p:])
        mask[row, :p] = mask[row, start:] = 1
    ids, mask, cache = ids.to(model.device), mask.to(model.device), None
    positions = (mask[:, :t].cumsum(1) - 1).clamp(min=0)       # (b, t): padding is not counted
    if p:
        cache = model(input_ids=ids[:1, :p], **options).past_key_values
        cache.batch_repeat_interleave(b)
        ids, positions = ids[:, p:], positions[:, p:]
    columns = max(1, PREFILL // b)
    while ids.shape[1] > columns:
        seen = t - ids.shape[1] + columns
        cache = model(input_ids=ids[:, :columns], attention_mask=mask[:, :seen],
                      position_ids=positions[:, :columns], past_key_values=cache,
                      **options).past_key_values
        ids, positions = ids[:, columns:], positions[:, columns:]
    return ids, positions, mask, cache


def _shared(model, prompts, length):
    """Count the tokens that all prompts begin with; 0 where sharing does not pay, or where a
    sliding window would count the padding between them and the rest."""
    p = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or length
    return p if len(prompts) > 1 and p >= SHORTEST and length <= window else 0


def choose_tokens(logits: Tensor, temperature: float, top_p: float, draws: list[float]) -> Tensor:
    """Choose a token for each row, (b, v) -> (b,): the likeliest at temperature 0; else the one at
    which the probabilities, summed over the smallest set that reaches top_p, pass draws[row] of
    their sum."""
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
