"""
Train the whole model on what an arm trains its adapter on, to compare LoRA with.

    python -m experiments.knowledge.full --config runs/knowledge/configs/knowledge-chat-full-s0.json

Examples, order, schedule and AdamW are those of train.py. There is no adapter and no evaluation;
replay is learned from a second, untouched copy. It writes runs/NAME/model, a plain model folder.
"""

import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import dataset
import keep
import train
from lora import loss
from lora.base import fetch, load
from lora.fast import levers
from lora.optim import AdamW, epochs_of, lr_at
from lora.run import cli, runlog

ROWS = 8                          # of a micro-batch: changes memory only


def main(argv: list[str]) -> None:
    settings = cli.take_config(argv, __doc__)
    s, source = settings.train, fetch.find(settings.model.name)
    tokenizer, device = load.load_tokenizer(source), load.pick_device(settings.model.device)
    model, teacher = (load.load_model(source, device, load.pick_dtype("float32", device))
                      for _ in range(2))
    model.requires_grad_(True)
    layout, _ = [levers.choose_layout(one, s, load.use_attention) for one in (model, teacher)][0]
    examples, _ = data.load(**asdict(settings.data), seed=s.seed)
    train_set = train.tokenise(examples, tokenizer, settings.dataset, "training")
    extras, per_epoch = keep.extra_examples(examples, settings)
    if extras:
        train_set.items += train.tokenise(
            extras, tokenizer, settings.dataset, "mixed-in").items
    pools = keep.pools_of(train_set.items, per_epoch, s.seed)
    plan = dataset.windows(pools, s.batch_size, epochs_of(s, sum(n for _, n in pools)),
                           s.max_steps, s.seed)
    batches = dataset.Batches(
        tokenizer.pad_token_id or 0, device, layout, lean=False, size=ROWS,
        from_base=lambda item: item["example"].get("kind") == "replay")
    optimizer = AdamW(model.parameters(), s.betas, s.eps, s.weight_decay)
    with runlog.opened(s.run) as folder:
        runlog.write_json(folder / "config.json", asdict(settings))
        runlog.write_json(folder / "run.json", {"examples": [len(examples), 0]})
        seconds = time.perf_counter()
        for step, (epoch, rows) in enumerate(tqdm(plan, unit="step", disable=None)):
            items = [train_set[i] for i in rows]
            n = sum(x != loss.IGNORE_INDEX for item in items for x in item["labels"][1:])
            lr = lr_at(step, peak=s.lr, warmup=s.warmup_steps, total=len(plan),
                       schedule=s.schedule)
            total = 0.0
            for batch, replayed, _ in batches.of_step(items):
                ce = cross_entropy(model, batch, teacher if replayed else None)
                (ce / n).backward()
                total += ce.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
            optimizer.step(lr)
            optimizer.zero_grad()
            runlog.append(folder / "metrics.jsonl", {
                "step": step + 1, "epoch": epoch + 1, "loss": total / n, "lr": lr,
                "grad_norm": norm.item(), "seconds": time.perf_counter() - seconds})
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def cross_entropy(model, batch: loss.Batch, teacher) -> torch.Tensor:
    """Sum the cross-entropy towards the labels, or with a teacher towards its probabilities. The
    head trains too."""
    logits, target = loss.logits_at(model, batch).float(), batch.targets
    if teacher:
        with torch.no_grad():
            target = loss.logits_at(teacher, batch).float().softmax(-1)
    return F.cross_entropy(logits, target, reduction="sum")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
