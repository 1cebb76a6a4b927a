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

from ..generate import traits
from ..loss import IGNORE_INDEX, Batch, logits_at
from ..surgery import find_blocks, text_ids

GROUP_COST = 16                   # in tokens: a group's own attention calls
ROUNDINGS = 2                     # logits may differ by this many roundings of the embeddings


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
    """Let model take flat batches; padded ones work as before. Raises Unsupported, and changes
    nothing, where something beside attention with a plan looks across tokens, or where a few
    tokens tried at once do not get the logits they have alone. use_attention is that of
    lora/base/load.py: one room does not import another."""
    if reason := _structure(model):
        raise Unsupported(reason)
    random = text_ids(model, 160)
    n = len(random) // 4
    ids = random[:4 * n].view(4, n)
    ids[1:3, :n // 2] = ids[0, :n // 2]                       # three share half, the last nothing
    items = [{key: row[:n - 2 * i] for key in ("input_ids", "labels")}
             for i, row in enumerate(ids.tolist())]
    alone, windows = _alone(model, items), set()

    def noted(*args, **kwargs):
        windows.add(kwargs.get("sliding_window"))
        return attend(*args, **kwargs)
    try:
        use_attention(model, noted)
        batch = flatten(items, model.device)
        together = logits_at(model, batch)
    except Exception as error:                                # whatever its forward cannot take
        reason = f"its forward takes no plan ({type(error).__name__}: {error})"
    else:
        labels = torch.tensor([label for item in items for label in item["labels"][1:]])
        order = batch.targets.argsort(stable=True), labels.argsort(stable=True)   # same labels
        reason = _unplanned(model, windows) or _apart(
            together[order[0]], alone[order[1]], _rounding(model, items, alone))
    use_attention(model, None if reason else attend)
    if reason:
        raise Unsupported(reason)


def _structure(model):
    """Say what in a model looks across tokens beside full and sliding attention; "" if nothing."""
    config, blocks = model.config.get_text_config(), find_blocks(model)[1]
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention",
                                                               "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    convolutions = {type(m).__name__ for m in blocks.modules()
                    if "conv" in type(m).__name__.lower()} - {"Conv1D"}
    if convolutions:
        return f"its blocks have convolutions: {', '.join(sorted(convolutions))}"
    if not traits(model).attends:
        return "its cache is not one of keys and values alone"
    name = config._attn_implementation
    return "" if name == "sdpa" else f"its attention is {name}, not sdpa"


def _alone(model, items):
    """The logits of all positions that have a label, each item run by itself."""
    return torch.cat([logits_at(model, Batch(
        {"input_ids": torch.tensor([item["input_ids"][:-1]], device=model.device)},
        torch.arange(len(item["labels"]) - 1, device=model.device), None)) for item in items])


def _unplanned(model, windows):
    """Say what kept the plan, or a window, from the attention; "" if nothing did. windows: what
    attend() was given; the model's cache has those it should be given."""
    if not windows:
        return f"{type(find_blocks(model)[1][0]).__name__} does not give the plan to its attention"
    wanted = traits(model).windows
    return "" if wanted == windows - {None} else \
        f"its attention is not told its window of {', '.join(map(str, wanted))} tokens"


def _rounding(model, items, alone):
    """How far logits move when the embeddings are rounded otherwise, in their own dtype."""
    random = torch.Generator().manual_seed(0)

    def jitter(_, given, hidden):
        by = torch.rand(hidden.shape, generator=random).to(hidden.device) - 0.5
        return (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * by)).to(hidden.dtype)
    with model.get_input_embeddings().register_forward_hook(jitter):
        return float((_alone(model, items) - alone).float().abs().mean())


def _apart(one, other, rounding):
    """Say by how much logits differ, where rounding does not explain it; "" where it does."""
    apart = float((one - other).float().abs().mean())
    return "" if apart <= ROUNDINGS * rounding else \
        f"its logits differ by {apart / float(other.float().std()):.1e} standard deviations"


def drops(model) -> bool:
    """Whether the model has dropout anywhere, in the adapter or in the base."""
    return bool(getattr(model.config.get_text_config(), "attention_dropout", 0)) or any(
        isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())


def _cell(prefix, start, lengths, device):
    """Build the Cell of samples whose own tokens are the rows from start on."""
    s, grid, real = max(lengths), [], []
    for line, n in enumerate(lengths):
        grid.append([*range(start, start + n)] + [start] * (s - n))
        real += range(line * s, line * s + n)
        start += n
    return Cell(prefix, torch.tensor(grid, device=device), torch.tensor(real, device=device))
