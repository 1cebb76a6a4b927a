"""
The whole model trained, on what an arm trains its adapter on: what LoRA is compared with.

    python -m experiments.knowledge.full --config runs/knowledge/configs/knowledge-chat-full-s0.json

The same examples, order, schedule and AdamW as train.py, no adapter; replay is learned from a
second copy, untouched. Makes runs/NAME/model, a plain model folder; no evaluations on the way.
"""

import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import dataset
import train
from lora import base, config, fetch, flat, loss, runlog
from lora.optim import AdamW, lr_at

ROWS = 8                          # of a micro-batch: memory only


def main(argv):
    settings = config.take_config(argv)
    s, source = settings.train, fetch.find(settings.model.name)
    tokenizer, device = base.load_tokenizer(source), base.pick_device(settings.model.device)
    model, teacher = (base.load_model(source, device, base.pick_dtype("float32", device))
                      for _ in range(2))
    model.requires_grad_(True)
    layout = "padded" if flat.enable(model) or flat.enable(teacher) else "shared"
    examples, _ = data.load(**asdict(settings.data), seed=s.seed)
    train_set = train.tokenise(examples, tokenizer, settings.dataset, "training")
    extras, per_epoch = train.extra_examples(examples, settings)
    if extras:
        train_set.add(train.tokenise(extras, tokenizer, settings.dataset, "mixed-in"))
    plan, _ = train.plan_of(train_set, per_epoch, s)
    optimizer = AdamW(model.parameters(), s.betas, s.eps, s.weight_decay)
    with runlog.opened(s.run) as folder:
        runlog.write_json(folder / "config.json", asdict(settings))
        seconds = time.perf_counter()
        for step, (epoch, rows) in enumerate(tqdm(plan, unit="step", disable=None)):
            items = [train_set[i] for i in rows]
            n = sum(x != loss.IGNORE_INDEX for item in items for x in item["labels"][1:])
            lr = lr_at(step, peak=s.lr, warmup=s.warmup_steps, total=len(plan),
                       schedule=s.schedule)
            total = 0.0
            for replays in (False, True):
                own = [x for x in items if (x["example"].get("kind") == "replay") == replays]
                for batch in dataset.micro_batches(own, ROWS, tokenizer.pad_token_id or 0, device,
                                                   layout):
                    ce = cross_entropy(model, batch, teacher if replays else None)
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


def cross_entropy(model, batch, teacher):
    """Summed, towards the labels or a teacher's probabilities; the head trains too."""
    logits, wanted = loss.logits_at(model, batch).float(), batch.targets
    if teacher:
        with torch.no_grad():
            wanted = loss.logits_at(teacher, batch).float().softmax(-1)
    return F.cross_entropy(logits, wanted, reduction="sum")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
