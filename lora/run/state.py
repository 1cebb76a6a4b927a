"""
Track a run: its step, what it has logged, its best adapter, its checkpoints.

    run = Progress(folder, plan, settings.train, batches=batches, save=save, ...)
    run.begin(exam, optimizer, saved)            # step 0 is measured, or a checkpoint restored
    run.log(epoch, ce, hits, n_tokens, lr, grad_norm, seconds)
    run.keep_if_best(exam(run.step), exam, parameters)

Progress records and says what is due. It computes nothing.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from .. import config, files
from . import checkpoint, parallel, runlog

SAVED = ("step", "seen", "stale", "seconds", "sums", "best", "before", "after", "first", "said")


@dataclass
class Progress:
    """The state of a run. With the optimizer, what is SAVED is what a checkpoint holds."""

    folder: Path                  # the run's, runs/NAME
    plan: list                    # (epoch, indices of examples) of each step
    s: config.TrainConfig
    batches: Callable             # from examples to batches; its size is part of the state
    save: Callable                # writes the adapter to a folder of this name in the run's folder
    rank: Callable                # the sort key of an evaluation's line; smaller is better
    eval_every: int               # steps between evaluations; 0 for none
    identity: dict                # what a resumed run must have in common with this one
    step: int = 0
    seen: int = 0                 # tokens
    stale: int = 0                # evaluations since the best one
    seconds: float = 0.0          # training time without evaluations
    sums: list = field(default_factory=list)          # (ce, hits, tokens) of the epoch's steps
    best: dict | None = None      # the best evaluation's line
    best_weights: list = field(default_factory=list)
    before: list | None = None    # answers of the untouched model
    after: list | None = None     # answers of the best evaluation
    first: dict | None = None     # metrics of the untouched model
    said: list = field(default_factory=list)          # the answers of the last evaluation

    def __post_init__(self):
        self.metrics, self.answers = self.folder / "metrics.jsonl", self.folder / "answers.jsonl"
        self.bar = tqdm(total=len(self.plan), unit="step", dynamic_ncols=True,
                        disable=True if parallel.rank() else None)

    # ----- begin, go on, end

    def begin(self, exam, optimizer, saved: tuple | None) -> None:
        """Measure the untouched model, or restore a checkpoint: (tensors, state)."""
        runlog.write_status(self.folder, "training", steps=len(self.plan))
        if saved:
            self._restore(saved, optimizer)
        else:
            self.metrics.unlink(missing_ok=True)
            self.answers.unlink(missing_ok=True)
            self.first, self.before = exam(0), exam.samples
            runlog.append(self.metrics, self.first)
            self._keep_answers(exam.said)
            print(f"step 0: {runlog.show(self.first)}")
            if self.s.checkpoint_every:
                self.checkpoint(optimizer)
        self.bar.update(self.step)

    def checkpoint(self, optimizer) -> None:
        """Write a checkpoint and delete the oldest."""
        files.sync(self.metrics)
        files.sync(self.answers)
        best = {f"best.{i}": p for i, p in enumerate(self.best_weights)}
        state = {key: getattr(self, key) for key in SAVED}
        checkpoint.save(self.folder / "checkpoints", {**optimizer.tensors(), **best},
                        {**state, "size": self.batches.size, "identity": self.identity,
                         "metrics": self.metrics.stat().st_size,
                         "answers": self.answers.stat().st_size}, self.s.checkpoints_kept)

    def _restore(self, saved, optimizer):
        """Go back to a checkpoint: this object, optimizer, adapter/, metrics.jsonl and
        answers.jsonl."""
        tensors, state = saved
        for key in SAVED:
            setattr(self, key, state.get(key, getattr(self, key)))
        self.batches.size = (state["size"] if self.s.token_budget == "auto"
                             else min(self.batches.size, state["size"]))
        for file, size in (self.metrics, state["metrics"]), (self.answers, state.get("answers", 0)):
            with files.saving(file):
                file.touch()
                if file.stat().st_size > size:
                    os.truncate(file, size)
        n_best = sum(key.startswith("best.") for key in tensors)
        self.best_weights = [tensors[f"best.{i}"] for i in range(n_best)]
        if self.best_weights:                         # adapter/ may be newer than the checkpoint
            optimizer.restore({f"p.{i}": p for i, p in enumerate(self.best_weights)})
            self.save("adapter")
        optimizer.restore(tensors, self.step)

    def exit_stopped(self) -> None:
        """Save what there is and leave with the exit code of Ctrl-C."""
        self.save("last")
        self.bar.write(f"stopped after step {self.step}; go on with:\n"
                       f"  python train.py --resume {self.folder}")
        sys.exit(130)

    def finish(self) -> None:
        """Write last/, and adapter/ where no evaluation has chosen one."""
        self.bar.close()
        if self.step < len(self.plan):
            print(f"train: stopped, {self.stale} evaluations without a better one")
        self.save("last")
        if self.best is None:
            self.best = {"step": self.step}
            self.save("adapter")

    def summary(self, n_facts: int) -> str:
        """The best adapter's numbers beside those before training."""
        questions = f" on {n_facts} held-out questions" if n_facts else ""
        before = f" (before training: {runlog.show(self.first)})" if self.eval_every else ""
        return f"best: step {self.best['step']}: {runlog.show(self.best)}{questions}{before}"

    # ----- what is due

    @property
    def ended(self) -> bool:
        """All steps are done, or train.patience has run out."""
        return self._last or 0 < self.s.patience <= self.stale

    @property
    def _last(self):
        return self.step >= len(self.plan)

    def _due(self, every):
        """Whether what happens every so many steps (0: never), and at the last, happens now."""
        return every > 0 and (self._last or self.step % every == 0)

    @property
    def evaluation_due(self) -> bool:
        return self._due(self.eval_every)

    @property
    def checkpoint_due(self) -> bool:
        return self._due(self.s.checkpoint_every)

    # ----- record

    def must_be_finite(self, loss: float, grad_norm: float, window: list) -> None:
        """Raise ValueError with the step's examples if the loss or the gradient is not a number.
        The optimizer has not moved yet: last/ gets the adapter before the step."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.save("last")
        kept = f", {self.folder}/adapter the best one" if self.best else ""
        raise ValueError(
            f"train: step {self.step + 1}: loss {loss}, gradient norm {grad_norm}. It changed "
            f"nothing: {self.folder}/last is the adapter before it{kept}. Lower train.lr, or look "
            "at the step's examples:\n  " + "\n  ".join(item["source"] for item in window))

    def log(self, ce: float, hits: int, n_tokens: int, lr: float, grad_norm: float,
            n_read: int, seconds: float, device: torch.device) -> None:
        """Count a step and write its line; at the end of an epoch the epoch's line, too.

        Args:
            ce, hits, n_tokens: cross-entropy, right tokens and supervised tokens of the window.
            n_read: tokens of the window, supervised or not.
        """
        epoch = self.plan[self.step][0]
        self.step += 1
        self.seen += n_read
        self.seconds += seconds
        line = {"step": self.step, "epoch": epoch + 1, "loss": ce / n_tokens,
                "accuracy": hits / n_tokens, "lr": lr, "grad_norm": grad_norm,
                "tokens_per_s": self.seen / self.seconds, "seconds": self.seconds,
                "peak_memory_gib": runlog.peak_memory_gib(device)}
        if self._due(self.s.log_every):
            runlog.append(self.metrics, line)
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {lr:.1e}, "
                                 f"{line['tokens_per_s']:.0f} tokens/s")
        self.bar.update()
        self.sums.append((ce, hits, n_tokens))
        if self._last or self.plan[self.step][0] != epoch:
            ce, hits, n_tokens = map(sum, zip(*self.sums, strict=True))
            line = {"step": self.step, "epoch": epoch + 1, "epoch_loss": ce / n_tokens,
                    "epoch_accuracy": hits / n_tokens}
            runlog.append(self.metrics, line)
            self.bar.write(f"epoch {epoch + 1}: {runlog.show(line)}")
            self.sums = []
        if self.s.save_every and self.step % self.s.save_every == 0:
            self.save(f"steps/{self.step:06d}")

    def keep_if_best(self, line: dict, exam, parameters: list[torch.Tensor]) -> None:
        """Write an evaluation's line and answers; save the adapter if it ranks before the best
        one."""
        improved = self.best is None or self.rank(line) < self.rank(self.best)
        self.stale += 1
        if improved:
            self.best, self.stale, self.after = line, 0, exam.samples
            self.best_weights = [p.detach().cpu().clone() for p in parameters]
            self.save("adapter")
        runlog.append(self.metrics, {**line, "best": improved})
        mark = ", the best so far" if improved else ""
        self.bar.write(f"step {self.step}: {runlog.show(line)}{mark}")
        self._keep_answers(exam.said)

    def is_best(self, parameters: list[torch.Tensor]) -> bool:
        """Whether parameters are those that gave the answers in after, bit for bit."""
        return self.after is not None and all(
            torch.equal(p.detach().cpu(), best)
            for p, best in zip(parameters, self.best_weights, strict=True))

    def _keep_answers(self, said):
        """Write an evaluation's answers; show one that turned right, and one that turned wrong."""
        runlog.append(self.answers, {"step": self.step, "answers": said})
        before = {answer["question"]: answer.get("right") for answer in self.said}
        for right, turned in ((True, "right"), (False, "wrong")):
            flipped = [answer for answer in said if answer.get("right") is right
                       and before.get(answer["question"]) is (not right)]
            if flipped:
                self.bar.write(f"  {len(flipped)} turned {turned}, such as: "
                               f"{flipped[0]['question']} {flipped[0]['answer']:.100}")
        self.said = said
