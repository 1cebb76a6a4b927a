"""
The fast path: no padding, and what samples begin with in common is computed once. The same loss.

Two samples, "s t a b c" and "s t d", begin with the same tokens s t. A hidden state of a causal
model depends on the tokens before it alone, so s and t are the same in both. Flat, T = 6 tokens:

    token    s t d a b c            keys  s t d a b c       a chain: the tokens of a sample that no
    depth    0 1 2 2 3 4      query s     x                 other has laid out before. Its path: the
                                    t     x x               rows of the tokens before it.
    position is depth:              d     x x x
    a follows t, not d              a     x x   x           chain 0  rows 0-2  path: none
                                    b     x x   x x         chain 1  rows 3-5  path: rows 0-1
                                    c     x x   x x x

Norms, projections, MLP and head work token by token and see (1, T, d). Only attention looks
across tokens: a chain attends to its path and to itself. Autograd adds up what the chains send back
to a path. So loss and gradients are those of the padded batch; arXiv:2506.05433 section 3 has the
proof for one common beginning, and every fork of a tree is one.

Beginnings make a tree: a system prompt, below it conversations, below them their answers. Sorted,
a sample's neighbour has most in common with it. With dropout nothing is shared: one mask on a
shared token would tie its samples together.
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
from . import pieces

SHORTEST = 8                      # fewer tokens in common are not worth calls of their own
ROUNDINGS = 2                     # logits may differ by this many roundings of the embeddings

Path = tuple[tuple[int, int], ...]        # rows [start, stop) before a chain, in order


class Cell(NamedTuple):
    """Chains with one path, of similar length: they attend in one call."""

    path: Path                    # P rows in all; may be empty
    grid: torch.Tensor            # (b, s) rows of own tokens, a chain a line; pads repeat one
    real: torch.Tensor            # (n,) which of grid.flatten() are no pads


class Plan:
    """Which rows attend to which, for attend(). chains: (first row, stop, path) of each, in the
    order of their rows. Cells and masks are built once a batch, where they are used."""

    def __init__(self, chains: list[tuple[int, int, Path]], device) -> None:
        self.chains, self.masks, self.device = chains, {}, device
        self.depth = max(stop - start + _size(path) for start, stop, path in chains)
        self.calls = pieces.calls(chains)
        self._cells = None

    @property
    def cells(self) -> list[Cell]:
        """The chains in cells: of one path at most four, by length, so that few rows are pads."""
        if self._cells is None:
            self._cells, groups = [], {}
            for chain in self.chains:
                groups.setdefault(chain[2], []).append(chain)
            for path, group in groups.items():
                group = sorted(group, key=lambda chain: chain[1] - chain[0])
                n = min(4, math.ceil(len(group) / 4))
                for c in range(n):
                    part = group[c * len(group) // n:(c + 1) * len(group) // n]
                    self._cells.append(_cell(path, part, self.device))
            laid = torch.cat([grid.flatten()[real] for _, grid, real in self._cells])
            self.order = laid.argsort()                       # of the cells' rows, to flat order
        return self._cells

    def mask(self, i: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Build the additive (s, P + s) mask of cell i, in the dtype of like: a query sees keys no
        deeper than itself, and within the window."""
        if (i, window) not in self.masks:
            path, grid, _ = self.cells[i]
            p, s = _size(path), grid.shape[1]
            query = torch.arange(p, p + s, device=like.device)[:, None]
            key = torch.arange(p + s, device=like.device)
            hidden = key > query
            if window:
                hidden |= key <= query - window
            zeros = torch.zeros(s, p + s, dtype=like.dtype, device=like.device)
            self.masks[i, window] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[i, window]


def flatten(items: list[dict], device="cpu", share: int = SHORTEST) -> Batch:
    """Lay items with input_ids and labels, lists of numbers, out as one flat Batch. What comes
    after a sample's last label is left out: it has no loss. share: how many tokens samples must
    have in common to share them; 0: none does.

    >>> batch = flatten([{"input_ids": [3, 4, 5, 6, 9], "labels": [-100, -100, -100, -100, 9]},
    ...                  {"input_ids": [3, 4, 7, 9], "labels": [-100, -100, -100, 9]}], share=2)
    >>> [batch.inputs[name].tolist() for name in ("input_ids", "position_ids")]
    [[[3, 4, 7, 5, 6]], [[0, 1, 2, 2, 3]]]
    >>> batch.rows.tolist(), batch.targets.tolist()    # 9 is predicted at 6 and at 7
    ([4, 2], [9, 9])
    """
    samples = []
    for item in items:
        last = max(t for t, label in enumerate(item["labels"]) if label != IGNORE_INDEX)
        samples.append(list(item["input_ids"][:last]))
    ids, depth, chains, rows_of = [], [], [], {}
    for i, (p, path) in _tree(samples, share).items():
        start, n = len(ids), len(samples[i])
        if n > p:
            chains.append((start, start + n - p, path))
        ids, depth = ids + samples[i][p:], depth + [*range(p, n)]
        shared = [row for piece in path for row in range(*piece)]
        rows_of[i] = [*shared, *range(start, start + n - p)]
    rows, targets = [], []
    for i, item in enumerate(items):
        for t, label in enumerate(item["labels"][1:]):
            if label != IGNORE_INDEX:
                rows.append(rows_of[i][t])
                targets.append(label)
    ids, depth, rows, targets = (torch.tensor(x, device=device)
                                 for x in ([ids], [depth], rows, targets))
    no_mask = torch.zeros(1, 1, 1, 1, device=device)          # 4-D: the model builds none itself
    return Batch({"input_ids": ids, "position_ids": depth, "attention_mask": no_mask,
                  "plan": Plan(chains, device)}, rows, targets)


def _tree(samples, share):
    """Return {sample: (tokens that are laid out already, their path)}, in the order to lay out.
    From the last sample to the first, sorted, so that a sample comes after those it begins."""
    order, found = range(len(samples)), {}
    if share:
        order = sorted(order, key=lambda i: samples[i], reverse=True)
    common = [0, *(len(commonprefix([samples[a], samples[b]])) if share else 0
                   for a, b in pairwise(order))]
    for i in range(len(order) - 2, 0, -1):                    # forks that are close become one
        if common[i + 1] < common[i] < min(common[i + 1] + share, len(samples[order[i]])):
            common[i] = common[i + 1]
    above, row = [], 0                                        # (depth, first row, path) of chains
    for i, p in zip(order, common, strict=True):
        while above and above[-1][0] >= p:
            above.pop()
        whole = p == len(samples[i])                          # nothing of its own
        while above and p - above[-1][0] < share and not whole:
            p = above.pop()[0]                                # as far as the chain above it goes
        depth, start, path = above[-1] if above else (0, row, ())
        path += ((start, start + p - depth),) if p else ()
        found[i] = p, path
        if not whole:
            above.append((p, row, path))
            row += len(samples[i]) - p
    return found


def attend(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, *,
           plan: Plan, scaling: float | None = None, dropout: float = 0.0,
           sliding_window: int | None = None, softcap=None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attend over a Plan, with transformers' attention interface: query (1, heads, T, d), key and
    value (1, kv heads, T, d) -> (1, T, heads, d), None."""
    if softcap is not None:
        raise ValueError("attention with a softcap")
    sees_all = not dropout and plan.depth <= (sliding_window or math.inf)
    if sees_all and pieces.fits(query, key, value):
        return pieces.Attention.apply(query, key, value, plan.calls, scaling), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))             # (T, heads, d)
    out = []
    for i, (path, grid, real) in enumerate(plan.cells):
        b, s = grid.shape
        qs, ks, vs = (x.index_select(0, grid.view(-1)).view(b, s, *x.shape[1:])
                      for x in (q, k, v))                                     # (b, s, heads, d)
        if path:
            ks, vs = (torch.cat([*(x[start:stop].expand(b, -1, *x.shape[1:])
                                   for start, stop in path), own], 1)
                      for x, own in ((k, ks), (v, vs)))                       # (b, P + s, ...)
        rows = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (qs, ks, vs)), scale=scaling, dropout_p=dropout,
            attn_mask=plan.mask(i, sliding_window, q), enable_gqa=k.shape[1] != q.shape[1])
        out.append(rows.transpose(1, 2).flatten(0, 1).index_select(0, real))  # (n, heads, d)
    return torch.cat(out).index_select(0, plan.order)[None], None


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


def _size(path):
    """How many rows a path has."""
    return sum(stop - start for start, stop in path)


def _cell(path, chains, device):
    """Build the Cell of some chains with this path."""
    s, grid, real = max(stop - start for start, stop, _ in chains), [], []
    for line, (start, stop, _) in enumerate(chains):
        grid.append([*range(start, stop)] + [start] * (s - stop + start))
        real += range(line * s, line * s + stop - start)
    return Cell(path, torch.tensor(grid, device=device), torch.tensor(real, device=device))
