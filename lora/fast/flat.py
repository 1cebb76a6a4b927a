"""
The fast path: no padding, and a prompt that samples share is computed once. The same loss.

Two samples, "s t a b c" and "s t d", begin with the same tokens s t. A hidden state of a causal
model depends on the tokens before it alone, so s and t are the same in both. Flat, T = 6 tokens:

    token    s t a b c d            keys  s t a b c d       the grid: a row of queries a sample,
    depth    0 1 2 3 4 2      query s     x                 over [the prefix ; its own tokens]
                                    t     x x
    position is depth:              a     x x x             a b c    over  s t | a b c
    d follows t, not c              b     x x x x           d . .    over  s t | d . .
                                    c     x x x x x         one mask for all rows: causal
                                    d     x x       x       by depth; no query reads a pad

Norms, projections, MLP and head work token by token and see (1, T, d). Only attention looks
across tokens: the prefix attends to itself, then every sample to prefix and itself. Autograd adds
up what the samples send back to the prefix. So loss and gradients are those of the padded batch
(b (P + S) tokens) from P + b S tokens; arXiv:2506.05433 section 3 has the proof.

Several prompts in one batch make several such groups; none at all (P = 0) is plain padding-free
training. With dropout nothing is shared: one mask on a shared token would tie its samples together.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from os.path import commonprefix
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..loss import IGNORE_INDEX, Batch, logits_at

GROUP_COST = 16                   # in tokens: a group's own attention calls


class Cell(NamedTuple):
    """Samples of similar length that attend in one call."""

    prefix: slice                 # rows of the shared prefix, P of them; may be empty
    grid: torch.Tensor            # (b, s) rows of own tokens, a sample a line; pads repeat one
    real: torch.Tensor            # (n,) which of grid.flatten() are no pads: rows in flat order


class Plan:
    """Which rows attend to which, for attend(). Its masks are built once a batch."""

    def __init__(self, cells: list[Cell]):
        self.cells, self.masks = cells, {}

    def mask(self, i: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Build the additive (s, P + s) mask of cell i, in the dtype of like: a query sees keys no
        deeper than itself, and within the window."""
        if (i, window) not in self.masks:
            prefix, grid, _ = self.cells[i]
            p, s = prefix.stop - prefix.start, grid.shape[1]
            query = torch.arange(p, p + s, device=like.device)[:, None]
            key = torch.arange(p + s, device=like.device)
            hidden = key > query
            if window:
                hidden |= key <= query - window
            zeros = torch.zeros(s, p + s, dtype=like.dtype, device=like.device)
            self.masks[i, window] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[i, window]


def flatten(items: list[dict], device="cpu", share: bool = True) -> Batch:
    """Lay items with input_ids and labels, lists of numbers, out as one flat Batch. What comes
    after a sample's last label is left out: it has no loss. share=False: no common prefixes.

    >>> batch = flatten([{"input_ids": [3, 4, 5, 6, 9], "labels": [-100, -100, -100, -100, 9]},
    ...                  {"input_ids": [3, 4, 7, 9], "labels": [-100, -100, -100, 9]}])
    >>> [batch.inputs[name].tolist() for name in ("input_ids", "position_ids")]
    [[[3, 4, 7, 5, 6]], [[0, 1, 2, 2, 3]]]
    >>> batch.rows.tolist(), batch.targets.tolist()    # 9 is predicted at 7 and at 6
    ([2, 4], [9, 9])
    """
    samples = []
    for item in items:
        last = max(t for t, label in enumerate(item["labels"]) if label != IGNORE_INDEX)
        samples.append(list(item["input_ids"][:last]))
    ids, depth, rows, targets, cells = [], [], [], [], []
    for p, group in groups(samples) if share else [(0, range(len(items)))]:
        start = len(ids)
        if p:
            ids, depth = ids + samples[group[0]][:p], depth + [*range(p)]
            cells.append(_cell(slice(0, 0), start, [p], device))
        prefix, group = slice(start, start + p), sorted(group, key=lambda i: (len(samples[i]), i))
        n_cells = min(4, math.ceil(len(group) / 4))           # similar lengths: few pads
        for c in range(n_cells):
            part = group[c * len(group) // n_cells:(c + 1) * len(group) // n_cells]
            cells.append(_cell(prefix, len(ids), [len(samples[i]) - p for i in part], device))
            for i in part:
                own = len(ids) - p                            # depth t is row own + t, from p on
                for t, label in enumerate(items[i]["labels"][1:]):
                    if label != IGNORE_INDEX:
                        rows.append(own + t if t >= p else start + t)
                        targets.append(label)
                ids, depth = ids + samples[i][p:], depth + [*range(p, len(samples[i]))]
    ids, depth, rows, targets = (torch.tensor(x, device=device)
                                 for x in ([ids], [depth], rows, targets))
    no_mask = torch.zeros(1, 1, 1, 1, device=device)          # 4-D: the model builds none itself
    return Batch({"input_ids": ids, "position_ids": depth, "attention_mask": no_mask,
                  "plan": Plan(cells)}, rows, targets)


def groups(samples: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Return [(p, indices)]: samples that share their first p tokens, p < the length of each. The
    groups are the best cuts of the sorted samples, by dynamic programming over tokens saved."""
    order = sorted(range(len(samples)), key=lambda i: samples[i])
    common = [min(len(commonprefix([samples[a], samples[b]])), len(samples[a]) - 1)
              for a, b in pairwise(order)]                    # sorted: a is the shorter if equal
    best = [(0, 0, 0)]                                        # of the first j: (saved, cut, p)
    for j in range(1, len(order) + 1):
        options, p = [(best[j - 1][0], j - 1, 0)], math.inf
        for i in range(j - 2, -1, -1):
            p = min(p, common[i])
            options.append((best[i][0] + (j - i - 1) * p, i, p))
        saved, cut, p = max(options)
        best.append((saved - GROUP_COST, cut, p))
    parts, j = [], len(order)
    while j:
        _, cut, p = best[j]
        parts.append((p, order[cut:j]))
        j = cut
    return parts[::-1]


def attend(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, *,
           plan: Plan, scaling: float | None = None, dropout: float = 0.0,
           sliding_window: int | None = None, softcap=None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attend over a Plan, with transformers' attention interface: query (1, heads, T, d), key and
    value (1, kv heads, T, d) -> (1, T, heads, d), None."""
    if softcap is not None:
        raise ValueError("attention with a softcap")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))             # (T, heads, d)
    out = []
    for i, (prefix, grid, real) in enumerate(plan.cells):
        b, s = grid.shape
        qs, ks, vs = (x.index_select(0, grid.view(-1)).view(b, s, *x.shape[1:])
                      for x in (q, k, v))                                     # (b, s, heads, d)
        if prefix.stop > prefix.start:
            ks, vs = (torch.cat([x[prefix].expand(b, *x[prefix].shape), own], 1)
                      for x, own in ((k, ks), (v, vs)))                       # (b, P + s, ...)
        rows = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (qs, ks, vs)), scale=scaling, dropout_p=dropout,
            attn_mask=plan.mask(i, sliding_window, q), enable_gqa=k.shape[1] != q.shape[1])
        out.append(rows.transpose(1, 2).flatten(0, 1).index_select(0, real))  # (n, heads, d)
    return torch.cat(out)[None], None


class Unsupported(ValueError):
    """A model cannot take flat batches; the text says why."""


@torch.no_grad()
def enable(model, use_attention: Callable) -> None:
    """Let model take flat batches; padded ones work as before. A few tokens are tried at once:
    raises Unsupported, and changes nothing, if a sample does not get the logits it has alone.
    use_attention is that of lora/base/load.py: one room does not import another."""
    before = model.config._attn_implementation
    if before != "sdpa":
        raise Unsupported(f"its attention is {before}, not sdpa")
    v = model.config.get_text_config().vocab_size
    n, random = min(40, v // 4), torch.Generator().manual_seed(0)
    ids = torch.randperm(v, generator=random)[:4 * n].view(4, n)
    ids[1:3, :n // 2] = ids[0, :n // 2]                       # three share half, the last nothing
    items = [{key: row[:n - 2 * i] for key in ("input_ids", "labels")}
             for i, row in enumerate(ids.tolist())]
    alone = torch.cat([logits_at(model, Batch(
        {"input_ids": torch.tensor([item["input_ids"][:-1]], device=model.device)},
        torch.arange(len(item["labels"]) - 1, device=model.device), None)) for item in items])
    use_attention(model, attend)
    try:
        batch = flatten(items, model.device)
        together = logits_at(model, batch)
    except Exception as error:                                # whatever its forward cannot take
        reason = f"{type(error).__name__}: {error}"
    else:
        labels = torch.tensor([label for item in items for label in item["labels"][1:]])
        order = batch.targets.argsort(stable=True), labels.argsort(stable=True)   # same labels
        apart = (together[order[0]] - alone[order[1]]).abs().mean() / alone.std()
        reason = "" if apart < 10 * torch.finfo(model.dtype).eps ** 0.75 else \
            f"its logits differ by {apart:.1e} standard deviations"
    if reason:
        model.set_attn_implementation(before)
        raise Unsupported(reason)


def drops(model) -> bool:
    """Whether the model has dropout anywhere, in the adapter or in the base."""
    return bool(getattr(model.config, "attention_dropout", 0)) or any(
        isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())


def _cell(prefix, start, lengths, device):
    """Build the Cell of samples whose own tokens are the rows from start on."""
    s, grid, real = max(lengths), [], []
    for line, n in enumerate(lengths):
        grid.append([*range(start, start + n)] + [start] * (s - n))
        real += range(line * s, line * s + n)
        start += n
    return Cell(prefix, torch.tensor(grid, device=device), torch.tensor(real, device=device))
