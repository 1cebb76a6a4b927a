"""
Run one arm of train_speed.py: one trainer on the common work, in a process of its own.

    python -m benchmarks.arms peft-loop '{"model": "smollm2-135m-instruct", "prefix": 100,
        "turns": 0, "batch": 16, "steps": 3, "dtype": "auto", "device": "auto"}'

The last line printed is the result as JSON. Two arms measure no trainer: "machine" describes the
machine and the work that every arm must receive; "work" prints that work for benchmarks/peers.py.
"""

import json
import math
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

import data
import dataset
from benchmarks import common
from inject import inject
from lora import config, loss, surgery
from lora.base import fetch, load
from lora.fast import levers, memory
from lora.optim import AdamW
from lora.run import runlog

R, ALPHA, LR, CLIP, BETAS, EPS, DECAY, SEED = 16, 32, 1e-3, 1.0, (0.9, 0.999), 1e-8, 0.0, 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEVERS = {"ours-no-prefix": {"layout": "flat"}, "ours-padded": {"layout": "padded"},
          "ours-no-lean-head": {"lean_head": False}, "ours-no-fused-lora": {"fused_lora": False},
          "ours-no-fused-leaves": {"fused_leaves": False},
          "ours-plain": {"layout": "padded", "lean_head": False, "fused_lora": False,
                         "fused_leaves": False}, "ours-checkpointing": {"checkpointing": True}}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")

# ----- the same work for everybody ---------------------------------------------------------------


def make_samples(tokenizer, prefix: int, n: int, turns: int = 0) -> list[dict]:
    """Make n samples of English text, the same in every process. Each has prefix tokens that all
    share, then 20 to 180 of its own (log-normal, mean near 66), the last 45 % of them labelled.

    With turns, what follows the prefix is a dialogue of so many pieces of that size, and each of
    its answers is a sample: all pieces up to that answer, of which the last 45 % are labelled. As
    in the template of a thinking model, the first third of an answer, its thought, is dropped in
    later samples: no sample begins another, and no one row holds them all.
    """
    rng = random.Random(SEED)
    sentences = [f"{question} {fact.answer.format(fact.value)}"
                 for fact in data.FACTS for question in fact.questions]
    rng.shuffle(sentences)
    text = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]

    def piece(length):
        start = rng.randrange(len(text) - length)
        return text[start:start + length]

    shared, samples = piece(prefix), []
    for i in range(n):
        if not turns or i % turns == 0:
            before = shared
        length = round(rng.lognormvariate(math.log(66) - 0.5**2 / 2, 0.5))
        ids = before + piece(min(180, max(20, length)))
        silent = len(ids) - round(0.45 * (len(ids) - len(before)))
        samples.append({"input_ids": ids, "source": f"sample {i}",
                        "labels": [loss.IGNORE_INDEX] * silent + ids[silent:]})
        before = ids[:silent] + ids[silent + (len(ids) - silent) // 3:]
    return samples


def same_start(model: torch.nn.Module) -> str:
    """Fill every A from one seed, as nn.Linear starts. Returns a hash of all A."""
    return common.fill_a((parameter.data for name, parameter in model.named_parameters()
                          if "lora_A" in name), SEED)


def useful_flops(model: torch.nn.Module, steps: list[list[dict]]) -> list[int]:
    """Count the useful FLOPs of each step; the formula is at the end of RESULTS.md."""
    body = sum(module.weight.numel() for name, module in model.named_modules()
               if name.rpartition(".")[2] in TARGETS)
    head = model.get_output_embeddings().weight.numel()
    return [4 * body * distinct([s["input_ids"] for s in step])
            + 4 * head * sum(y != loss.IGNORE_INDEX for s in step for y in s["labels"])
            for step in steps]


def distinct(rows: list[list[int]]) -> int:
    """Count the tokens of rows of ids, one that has the same tokens before it once."""
    rows = sorted(rows)
    return sum(len(row) for row in rows) - sum(len(commonprefix(pair)) for pair in pairwise(rows))


# ----- the arms: each takes the steps and returns (losses, seconds, received samples, hash of A) --


def run_trl(arm: str, model: torch.nn.Module, tokenizer, steps: list[list[dict]]) -> tuple:
    import datasets
    from peft import LoraConfig
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    batch, settings = len(steps[0]), {}
    size = common.micro_size(arm, batch) or min(8, batch)
    if arm != "trl-default":
        settings = {"gradient_checkpointing": "-checkpointing" in arm, "bf16": "-autocast" in arm}
    if "-paddingfree" in arm:
        settings["padding_free"] = True
    if "-lengthgrouped" in arm:
        steps = [sorted(step, key=lambda s: len(s["input_ids"])) for step in steps]
    rows = [{key: s[key] for key in ("input_ids", "labels")} for step in steps for s in step]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, per_device_train_batch_size=size, gradient_accumulation_steps=batch // size,
            max_steps=len(steps), learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=DECAY,
            max_grad_norm=CLIP, max_length=None, train_sampling_strategy="sequential", seed=SEED,
            use_cpu=model.device.type == "cpu", report_to="none", save_strategy="no",
            disable_tqdm=True, **settings)
        trainer = SFTTrainer(
            model, arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            peft_config=LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS))
        initial_a, batches, losses, ends = same_start(trainer.model), [], [], []
        training_step = trainer.training_step

        def keep_loss(*args):                          # of a micro-batch, over the step's tokens
            losses.append(training_step(*args))
            return losses[-1]

        class Clock(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                ends.append(time.perf_counter())

        trainer.training_step = keep_loss
        trainer.add_callback(Clock())
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
        if "-fulllogits" in arm:
            trainer.compute_loss = Trainer.compute_loss.__get__(trainer)
        ends.append(time.perf_counter())
        trainer.train()
    n = batch // size
    assert len(batches) == len(losses) == n * len(steps) and len(ends) == 1 + len(steps)
    windows = [slice(i, i + n) for i in range(0, len(losses), n)]
    return ([sum(x.item() for x in losses[w]) for w in windows],
            [end - start for start, end in pairwise(ends)],
            [common.received(batches[w]) for w in windows], initial_a)


def run_peft(arm: str, model: torch.nn.Module, tokenizer, steps: list[list[dict]]) -> tuple:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    initial_a, size = same_start(model), common.micro_size(arm, len(steps[0])) or len(steps[0])
    parameters, seen = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def padded(samples):
        rows = [s | {"attention_mask": [1] * len(s["input_ids"])} for s in samples]
        fills = {"input_ids": 0, "labels": loss.IGNORE_INDEX, "attention_mask": 0}
        return {key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True,
                                  padding_value=fill).to(model.device)
                for key, fill in fills.items()}

    def batches_of(step):
        seen.append([padded(step[i:i + size]) for i in range(0, len(step), size)])
        return seen[-1]

    def ce_of(batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       use_cache=False).logits.float()
        target = F.pad(batch["labels"][:, 1:], (0, 1), value=loss.IGNORE_INDEX)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")

    losses, seconds = clocked(steps, batches_of, ce_of, parameters, optimizer.step)
    return losses, seconds, [common.received(batches) for batches in seen], initial_a


def run_ours(arm: str, model: torch.nn.Module, tokenizer, steps: list[list[dict]]) -> tuple:
    s = config.TrainConfig(**LEVERS.get(arm, {}))
    inject(model, target_modules=TARGETS, r=R, lora_alpha=ALPHA)
    levers.fuse(model, s)
    layout, lean = levers.choose_layout(model, s, load.use_attention)
    initial_a, parameters = same_start(model), surgery.adapter_parameters(model.train())
    optimizer = AdamW(parameters, BETAS, EPS, DECAY)

    def batches_of(samples):
        return dataset.micro_batches(samples, len(samples), tokenizer.pad_token_id or 0,
                                     model.device, layout)
    parts = memory.estimate(model, *batches_of(steps[0][:2]), *batches_of(steps[0]), lean)

    def ce_of(batch):
        return loss.ce_sum(model, batch, lean)[0]
    losses, seconds = clocked(steps, batches_of, ce_of, parameters, partial(optimizer.step, LR))
    samples = [[(s["input_ids"], s["labels"]) for s in step] for step in steps]
    return losses, seconds, samples, initial_a, {"estimate_gib": sum(parts.values()) / 2**30}


def clocked(steps: list[list[dict]], batches_of: Callable, ce_of: Callable, parameters: list,
            update: Callable) -> tuple[list[float], list[float]]:
    """Train on the steps; returns their losses and seconds. ce_of sums the cross-entropy of one of
    a step's batches."""
    losses, ends = [], [time.perf_counter()]
    for step in steps:
        n_tokens, total = sum(y != loss.IGNORE_INDEX for s in step for y in s["labels"]), 0.0
        for batch in batches_of(step):
            ce = ce_of(batch)
            (ce / n_tokens).backward()
            total += ce.item() / n_tokens
        clip_grad_norm_(parameters, CLIP)
        update()
        for parameter in parameters:
            parameter.grad = None
        losses.append(total)
        ends.append(time.perf_counter())
    return losses, [end - start for start, end in pairwise(ends)]


# ----- one process -------------------------------------------------------------------------------


def work(arm: str, model: str, prefix: int, turns: int, batch: int, steps: int, dtype: str,
         device: str) -> dict:
    """Run one arm and return its result; steps is their number."""
    device, folder = load.pick_device(device), fetch.find(model)
    tokenizer = load.load_tokenizer(folder)
    samples = make_samples(tokenizer, prefix, batch * steps, turns)
    steps = [samples[i:i + batch] for i in range(0, len(samples), batch)]
    if arm == "machine":
        return {**machine(device), "dtype": short(load.pick_dtype(dtype, device)),
                "tokens": [sum(len(s["input_ids"]) for s in st) for st in steps],
                "hashes": [common.step_hash((s["input_ids"], s["labels"]) for s in st)
                           for st in steps]}
    if arm == "work":
        flops = useful_flops(load.load_model(folder, device, torch.bfloat16), steps)
        return {"folder": str(folder), "steps": steps, "flops": flops, "settings": {
            "r": R, "alpha": ALPHA, "lr": LR, "clip": CLIP, "betas": BETAS, "eps": EPS,
            "decay": DECAY, "seed": SEED, "targets": TARGETS}}

    dtype = load.pick_dtype(dtype, device)
    if arm.startswith("trl-"):
        dtype = torch.bfloat16 if "-bf16" in arm else torch.float32
    computes_in = torch.bfloat16 if arm == "trl-default" or "-autocast" in arm else dtype
    model = load.load_model(folder, device, dtype)
    flops, loaded = useful_flops(model, steps), runlog.peak_memory_gib(device)
    run = {"trl": run_trl, "peft": run_peft, "ours": run_ours}[arm.partition("-")[0]]
    losses, seconds, samples, initial_a, *more = run(arm, model, tokenizer, steps)
    return {**dict(*more), "losses": losses, "seconds": seconds,
            "hashes": [common.step_hash(rows) for rows in samples],
            "initial_a": initial_a, "flops": flops, "loaded_gib": loaded,
            "peak_gib": runlog.peak_memory_gib(device), "dtype": short(computes_in)}


def machine(device: torch.device, n: int = 4096) -> dict:
    """Describe CPU, threads, versions, and the best FLOP/s of an n x n matmul in each dtype."""
    peak = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, seconds = torch.randn(n, n, device=device).to(dtype), []
        for _ in range(3):
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            seconds.append(time.perf_counter() - start)
        peak[short(dtype)] = 2 * n**3 / min(seconds)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    return {"cpu": name[1] if name else platform.processor(), "device": str(device),
            "flags": [flag for flag in CPU_FLAGS if re.search(rf"\b{flag}\b", text)],
            "threads": torch.get_num_threads(), "peak_flops": peak,
            "versions": {package: version(package) for package in PACKAGES}}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    common.end_first()
    result = work(sys.argv[1], **json.loads(sys.argv[2]))
    print("\n" + json.dumps(result))
