"""
Generation with a key/value cache: greedy or sampled, a batch of prompts at a time.

    generate(model, [prompt_ids], stop=Stop({2}), max_new_tokens=40)   # [[ids of the answer]]
"""

import inspect
import random
import weakref
from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import surgery

SHORTEST = 8                      # a shorter common beginning of prompts is not computed apart
PREFILL = 4096                    # prompt tokens in one forward pass: this bounds its memory
CACHES = "past_key_values", "cache_params", "state"           # what models call their cache
PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}       # keys and values alone
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
    answers = {}
    with model.get_output_embeddings().register_forward_pre_hook(_as_one_matrix):
        for rows in _batches(model, prompts, batch_size):
            answers |= _batch(model, {i: prompts[i] for i in rows}, stop, max_new_tokens, choose,
                              on_token)
    return [answers[i] for i in range(len(prompts))]


def _as_one_matrix(head, inputs):
    """Give the head its rows as one contiguous matrix, a single row too, whose strides contiguous()
    keeps. A slice, the last position of each row, torch multiplies by a copy of a frozen weight for
    each row, and oneDNN makes them in bfloat16: 2.5 GiB for 48 rows and SmolLM2's head."""
    return (inputs[0].flatten().view(inputs[0].shape),)


class Traits(NamedTuple):
    """What a model can do with a batch."""

    padding: bool                 # a prompt gets the same logits with padding on its left
    attends: bool                 # keys and values are all that it remembers of earlier tokens
    windows: frozenset[int]       # of its sliding attention


TRAITS = weakref.WeakKeyDictionary()          # {model: Traits}


@torch.no_grad()
def traits(model: nn.Module) -> Traits:
    """Try 4 tokens alone, and behind 12 of padding with the last token apart: a recurrent state may
    take padding in, and cannot go on from a prefix in every model. Tried once a model. Raises
    ValueError if the model cannot go on from its cache."""
    if model not in TRAITS:
        ids = surgery.text_ids(model, 16)[None]
        mask = (torch.arange(16, device=model.device) > 11).long()[None]
        alone = _runner(model, False)(ids[:, 12:], mask[:, 12:], None, None)[0][:, -1].float()
        try:
            padded, cache = _last(_runner(model, True), ids.repeat(2, 1),
                                  torch.cat([mask, torch.ones_like(mask)]))
        except (RuntimeError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"generate: {type(model).__name__} cannot go on from its cache: "
                             f"{error}") from error
        apart, layers = (padded - alone).abs().mean() / alone.std(), getattr(cache, "layers", [0])
        TRAITS[model] = Traits(
            bool(apart < 10 * torch.finfo(model.dtype).eps ** 0.75),
            {type(x).__name__ for x in layers} <= PLAIN and type(cache).__name__ == "DynamicCache",
            frozenset(x.sliding_window for x in layers if hasattr(x, "sliding_window")))
    return TRAITS[model]


def _last(run, ids, mask):
    """The first row's logits of the last token, computed apart where the model has a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = run(ids[:, :-1], mask[:, :-1], positions[:, :-1], None)[1]
    if cache is None:
        return run(ids, mask, positions, None)[0][:1, -1].float(), None
    return run(ids[:, -1:], mask, positions[:, -1:], cache)[0][:1, -1].float(), cache


def _runner(model, positioned):
    """Return run(ids, mask, positions, cache) -> (logits, cache), whatever the model calls them.
    The model counts positions itself unless positioned."""
    known = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in known), None)
    options = {"use_cache": True} if "use_cache" in known or "kwargs" in known else {}
    options |= {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def run(ids, mask, positions, cache):
        given = {"attention_mask": mask, name: cache}
        if positioned and positions is not None:
            given["position_ids"] = positions.contiguous()
        given = {key: x for key, x in given.items() if key in known and x is not None}
        out = model(input_ids=ids, **given, **options)
        return out.logits, getattr(out, name, None) if name else None
    return run


def _batches(model, prompts, batch_size):
    """Split the prompts' indices into batches: of one length where a model cannot take padding,
    of PREFILL tokens where a cache cannot be filled in parts."""
    longest, groups = max(map(len, prompts), default=1), [[*range(len(prompts))]]
    if prompts and not traits(model).attends:
        batch_size = max(1, min(batch_size, PREFILL // longest))
    if prompts and not traits(model).padding:
        groups = [[i for i in groups[0] if len(prompts[i]) == n]
                  for n in dict.fromkeys(map(len, prompts))]
    return [group[i:i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


@torch.no_grad()
def _batch(model, prompts, stop, max_new_tokens, choose, on_token):
    """Answer prompts, {index: ids}, in one batch; return {index: answer}. Rows that have ended
    leave the batch when they are half of it."""
    run, answers = _runner(model, traits(model).padding), {i: [] for i in prompts}
    ids, positions, mask, cache = _prefill(model, run, [*prompts.values()], max_new_tokens)
    t = mask.shape[1] - max_new_tokens
    rows, open_rows = [*prompts], {*prompts}
    for n in range(max_new_tokens):
        logits, cache = run(ids, mask[:, :t + n], positions, cache)
        seen = [{*prompts[row], *answers[row]} for row in rows]
        chosen = choose(logits[:, -1].float(), rows, seen)     # (rows,)
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
                on_token(row, answers[row])
        if not open_rows:
            break
        next_ids, next_positions = chosen[:, None], positions[:, -1:] + 1
        if cache is None:                                      # the model keeps none: all again
            next_ids = torch.cat([ids, next_ids], 1)
            next_positions = torch.cat([positions, next_positions], 1)
        ids, positions = next_ids, next_positions
        if len(open_rows) <= len(rows) // 2 and traits(model).attends:
            keep = torch.tensor([i for i, row in enumerate(rows) if row in open_rows],
                                device=model.device)
            rows = [row for row in rows if row in open_rows]
            cache.batch_select_indices(keep)
            ids, positions, mask = ids[keep], positions[keep], mask[keep]
    return answers


def _prefill(model, run, prompts, max_new_tokens):
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
        cache = run(ids[:1, :p], None, None, None)[1]
        cache.batch_repeat_interleave(b)
        ids, positions = ids[:, p:], positions[:, p:]
    columns = max(1, PREFILL // b)
    while ids.shape[1] > columns and traits(model).attends:
        seen = t - ids.shape[1] + columns
        cache = run(ids[:, :columns], mask[:, :seen], positions[:, :columns], cache)[1]
        ids, positions = ids[:, columns:], positions[:, columns:]
    return ids, positions, mask, cache


def _shared(model, prompts, length):
    """Count the tokens that all prompts begin with; 0 where sharing does not pay, or where padding
    between them and the rest would count: in a sliding window, or in a model that is not told the
    positions."""
    p = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or length
    fits = (len(prompts) > 1 and p >= SHORTEST and length <= window
            and "position_ids" in inspect.signature(model.forward).parameters)
    return p if fits and traits(model).attends else 0


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
