"""
A step's gradient: this process's samples of the window, in micro-batches that fit in memory.

    gradients = Gradients(model, batches, lean=True, from_base=lambda item: False, seed=0)
    ce, hits = gradients(items, n_tokens, at)         # at: .step, and .size, which memory may halve
"""

import random

import torch
from tqdm import tqdm

from . import loss, memory, parallel, surgery


class Gradients:
    """Leaves them in the adapters' .grad; parallel.add_up() sums those of all processes.

    batches(items, size) makes micro-batches of at most size samples. from_base(item) says which
    samples are learned from the base's own probabilities (lora/loss.py). can_halve: whether a step
    that memory did not suffice for is done again in smaller micro-batches.
    """

    def __init__(self, model, batches, lean, from_base, seed, can_halve=True):
        self.model, self.batches, self.lean = model, batches, lean
        self.from_base, self.seed, self.can_halve = from_base, seed, can_halve

    def __call__(self, items, n_tokens, at):
        """(summed cross-entropy, hits) of this process's share. Each micro-batch's sum is divided
        by n_tokens, the supervised tokens of the whole window: no mean of means."""
        while True:
            try:
                return self._add_up(items, n_tokens, at)
            except (RuntimeError, MemoryError) as error:
                if not memory.exhausted(error):
                    raise
                if at.size == 1 or not self.can_halve:
                    raise ValueError(f"train: step {at.step + 1}: out of memory in micro-batches of"
                                     f" {at.size}; lower dataset.max_length, or set "
                                     "train.checkpointing=true or model.quant=nf4") from error
            for p in surgery.adapter_parameters(self.model):
                p.grad = None
            at.size = -(-at.size // 2)
            tqdm.write(f"train: step {at.step + 1}: out of memory; micro-batches of {at.size} now")

    def _add_up(self, items, n_tokens, at):
        # what is random in a step, dropout, depends on seed, step and process alone
        name = f"{self.seed} {at.step} {parallel.rank()}"
        torch.manual_seed(random.Random(name).getrandbits(63))
        step_ce = step_hits = 0
        for teacher in (False, True):
            own = [item for item in items if self.from_base(item) == teacher]
            for batch, weight in self._share(own, at.size):
                ce, hits = loss.ce_sum(self.model, batch, self.lean, teacher)
                (weight * ce / n_tokens).backward()
                step_ce, step_hits = step_ce + weight * ce.item(), step_hits + weight * hits
        return step_ce, step_hits

    def _share(self, items, size):
        """[(batch, weight)]: this process's samples in as many micro-batches as the first process
        has, which has the most; a sharded base wants the same steps of all. Weight 0 changes
        nothing."""
        made = self.batches(parallel.mine(items), size)
        rounds = -(-len(items[::parallel.world()]) // size)
        spare = self.batches(items[:1], size) * (rounds - len(made))
        return [(batch, 1) for batch in made] + [(batch, 0) for batch in spare]
