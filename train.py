"""
Fine-tune a causal language model with LoRA on question/answer pairs or dialogues.

    python train.py                                    # config.json: facts into a chat model
    python train.py --lora.r=16 --train.run=r16        # any key of config.json
    python train.py --config runs/demo/config.json     # a run again, from its own folder

The story, top to bottom: config, model, data, adapters, loop, best adapter, answers, plots.
Everything a run makes is in runs/NAME: adapter/ (the best one, in PEFT's layout), last/,
metrics.jsonl, loss.png, samples.md, config.json (complete), run.json.
"""

import math
import random
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import data
import dataset
from inject import inject, report
from lora import adapter, base, config, fetch, flat, leaves, loss, memory, runlog, surgery
from lora.generate import generate
from lora.optim import AdamW, lr_at


def main(argv):
    settings = config.take_config(argv)

    # ----- model and data
    device = base.pick_device(settings.model.device)
    dtype = base.pick_dtype(settings.model.dtype, device)
    folder_or_id = fetch.find(settings.model.name)
    tokenizer = base.load_tokenizer(folder_or_id)
    examples = data.load(**asdict(settings.data), seed=settings.train.seed)
    train_set = tokenise(examples[0], tokenizer, settings.dataset, "training")
    val_set = tokenise(examples[1], tokenizer, settings.dataset, "validation")
    for note in dataset.notes(tokenizer, train_set.format, examples[0]):
        print(f"dataset: {note}")
    model = base.load_model(folder_or_id, device, dtype)
    base_weights = base.fingerprint(model)
    print(f"model: {settings.model.name} in {str(dtype).removeprefix('torch.')} on {device}; "
          f"format: {train_set.format}")

    # ----- adapters; the seed first, so that A is the same in every run
    torch.manual_seed(settings.train.seed)
    if settings.model.adapter:
        adapted = adapter.load(model, settings.model.adapter)
        surgery.freeze_base(model)
        print(f"adapter: going on from {settings.model.adapter}; the lora section is not used")
    else:
        adapted = inject(model, **asdict(settings.lora))
    print(report(model, adapted))

    # ----- the run's folder
    folder = runlog.open_folder(settings.train.run)
    runlog.write_json(folder / "config.json", asdict(settings))
    system, systems = data.system_of(examples[0])
    runlog.write_json(folder / "run.json", runlog.run_info(
        base_model=fetch.public_name(settings.model.name), base_weights=base_weights,
        device=str(device), dtype=str(dtype), system=system, systems=systems,
        format=train_set.format, template=runlog.digest(tokenizer.chat_template or ""),
        data=runlog.digest([e["messages"] for part in examples for e in part]),
        examples=[len(part) for part in examples], adapted=adapted))

    result = fit(model, tokenizer, train_set, val_set, settings, folder)
    from plots.figures import draw
    draw(folder)
    print(f"\n{result}\nrun: {folder}/ holds adapter/ (the best), last/, loss.png, samples.md, "
          "metrics.jsonl, config.json, run.json")


def tokenise(examples, tokenizer, wanted, label):
    """The QADataset of some examples, with a line about what was left out; None without any."""
    if not examples:
        return None
    made = dataset.QADataset(examples, tokenizer, **asdict(wanted))
    n_tokens = sum(len(item["input_ids"]) for item in made.items)
    n_supervised = sum(x != loss.IGNORE_INDEX for item in made.items for x in item["labels"])
    print(f"dataset: {len(made)} {label} examples, {n_tokens:,} tokens, "
          f"{n_supervised / n_tokens:.0%} supervised")
    for note in made.left_out():
        print(f"dataset: {note}")
    return made


def windows(n, batch_size, epochs, max_steps, seed):
    """[(epoch, [indices of examples])], one for each step. An epoch's order depends on seed and
    epoch alone; its last, shorter, window is a step like the others."""
    per_epoch = -(-n // batch_size)
    total, made = max_steps or max(1, round(epochs * per_epoch)), []
    for epoch in range(-(-total // per_epoch)):
        order = list(range(n))
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        made += [(epoch, order[i:i + batch_size]) for i in range(0, n, batch_size)]
    return made[:total]


def fit(model, tokenizer, train_set, val_set, settings, folder):
    """The loop. Leaves the best adapter in the model and on disk; returns what it reached."""
    s, device = settings.train, model.device
    base_name = fetch.public_name(settings.model.name)
    pad_id = tokenizer.pad_token_id or 0
    layout, lean = speed_up(model, settings)
    if s.grad_accum == "auto":                        # as many rows as the token budget takes
        longest = max(len(item["input_ids"]) for item in train_set.items)
        size = min(s.batch_size, max(1, s.token_budget // longest))
    else:
        size = -(-s.batch_size // s.grad_accum)
    plan = windows(len(train_set), s.batch_size, s.epochs, s.max_steps, s.seed)
    eval_every = -(-len(train_set) // s.batch_size) if s.eval_every == "epoch" else s.eval_every
    print(f"train: {len(plan)} steps of {s.batch_size} examples in {-(-s.batch_size // size)} "
          f"micro-batches of {size}, an evaluation every {eval_every} steps")

    def batches(items):
        return dataset.micro_batches(items, size, pad_id, device, layout)
    print(memory.report(model, batches(train_set.items[:2])[0],
                        batches([train_set[i] for i in plan[0][1]])[-1], lean))

    facts = [e for e in (item["example"] for item in val_set or ()) if "value" in e]
    by_recall = s.best_by == "recall" or (s.best_by == "auto" and bool(facts))
    if by_recall and not facts:
        raise ValueError('train: best_by is "recall", but no validation example has a "value".')

    def answers(prompts):
        ids = [dataset.render(p, tokenizer, train_set.format, reply=True)[0] for p in prompts]
        return [tokenizer.decode(answer, skip_special_tokens=True).strip()
                for answer in generate(model, ids, train_set.stop, s.max_new_tokens)]

    def evaluate(step):
        line = {"step": step}
        if val_set:
            line["val_loss"], line["val_accuracy"] = loss.evaluate(
                model, batches(val_set.items), lean)
        if facts:
            given = answers([e["messages"][:-1] for e in facts])
            right = [data.contains(a, e["value"]) for a, e in zip(given, facts, strict=True)]
            line["recall"] = sum(right) / len(right)
        return line

    def rank(line):
        """Smaller is better."""
        return (-line["recall"], line["val_loss"]) if by_recall else (line["val_loss"],)

    asked = questions(s.questions, val_set or train_set, settings.data.system, s.seed)
    metrics, before, first = folder / "metrics.jsonl", answers(asked), evaluate(0)
    runlog.append(metrics, first)
    print(f"step 0: {show(first)}")
    optimizer = AdamW(surgery.adapter_parameters(model), s.betas, s.eps, s.weight_decay)
    best, stale, done, seen, clock = None, 0, 0, 0, time.perf_counter()
    sums = []                                         # of this epoch: (loss, hits, tokens)
    bar = tqdm(plan, unit="step", dynamic_ncols=True, disable=None)
    try:
        for epoch, rows in bar:
            items = [train_set[i] for i in rows]
            micro = batches(items)
            n_tokens = sum(len(batch.targets) for batch in micro)
            lr = lr_at(done, peak=s.lr, warmup=s.warmup_steps, total=len(plan), schedule=s.schedule)
            model.train()
            step_ce = hits = 0
            for batch in micro:
                ce, right = loss.ce_sum(model, batch, lean)
                (ce / n_tokens).backward()            # the window's count: no mean of means
                step_ce, hits = step_ce + ce.item(), hits + right
            grad_norm = torch.nn.utils.clip_grad_norm_(
                optimizer.parameters, s.max_grad_norm or math.inf).item()
            if not (math.isfinite(step_ce) and math.isfinite(grad_norm)):
                adapter.save(model, folder / "last", base_name)
                raise ValueError(
                    f"train: step {done + 1}: loss {step_ce / n_tokens}, gradient norm {grad_norm}."
                    f" It changed nothing: {folder}/last is the adapter before it"
                    + f", {folder}/adapter the best one" * bool(best)
                    + ". Lower train.lr, or look at the step's examples:\n  "
                    + "\n  ".join(item["source"] for item in items))
            optimizer.step(lr)
            optimizer.zero_grad()
            done += 1

            # ----- what happened
            seen += sum(len(item["input_ids"]) for item in items)
            seconds = time.perf_counter() - clock
            line = {"step": done, "epoch": epoch + 1, "loss": step_ce / n_tokens,
                    "accuracy": hits / n_tokens, "lr": lr, "grad_norm": grad_norm,
                    "tokens_per_s": seen / seconds, "seconds": seconds,
                    "peak_memory_gib": runlog.peak_memory_gib(device)}
            if done % s.log_every == 0 or done == len(plan):
                runlog.append(metrics, line)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {lr:.1e}, "
                                f"{line['tokens_per_s']:.0f} tokens/s")
            sums.append((step_ce, hits, n_tokens))
            if done == len(plan) or plan[done][0] != epoch:
                ce, right, n = map(sum, zip(*sums, strict=True))
                line = {"step": done, "epoch": epoch + 1, "epoch_loss": ce / n,
                        "epoch_accuracy": right / n}
                runlog.append(metrics, line)
                bar.write(f"epoch {epoch + 1}: {show(line)}")
                sums = []

            # ----- is it the best so far?
            if val_set and (done == len(plan) or done % eval_every == 0):
                paused = time.perf_counter()
                line = evaluate(done)
                improved, stale = best is None or rank(line) < rank(best), stale + 1
                if improved:
                    best, stale = line, 0
                    adapter.save(model, folder / "adapter", base_name)
                runlog.append(metrics, {**line, "best": improved})
                bar.write(f"step {done}: {show(line)}{', the best so far' * improved}")
                clock += time.perf_counter() - paused  # tokens/s is of training alone
                if s.patience and stale >= s.patience:
                    bar.write(f"train: stopped, {stale} evaluations without a better one")
                    break
    except KeyboardInterrupt:
        adapter.save(model, folder / "last", base_name)
        print(f"\nstopped after step {done}; {folder}/last has the adapter. Go on from it with:\n"
              f"  python train.py --config {folder}/config.json --model.adapter={folder}/last "
              f"--train.run={s.run}-more")
        sys.exit(130)
    finally:
        bar.close()

    # ----- the end: the best adapter answers
    adapter.save(model, folder / "last", base_name)
    if best is None:                                  # no validation: the last one it is
        best = {"step": done}
        adapter.save(model, folder / "adapter", base_name)
    adapter.load(model, folder / "adapter")
    write_samples(folder / "samples.md", asked, before, answers(asked))
    return (f"best: step {best['step']}: {show(best)}" + f" on {len(facts)} held-out questions"
            * bool(facts) + f" (before training: {show(first)})" * bool(val_set))


def speed_up(model, settings):
    """Switch on what train asks for and this model can do; the loss is the same either way.
    Returns micro_batches' layout and ce_sum's lean."""
    s, layout = settings.train, settings.train.layout
    for layer in surgery.lora_layers(model).values():
        layer.fused = s.fused_lora
    if s.fused_leaves:
        leaves.fuse(model)
    if s.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reason = flat.enable(model) if layout != "padded" else None
    if reason:
        print(f"train: batches are padded: {reason}")
        layout = "padded"
    elif layout == "shared" and flat.drops(model):
        print("train: with dropout no prompt is shared: every sample needs a mask of its own")
        layout = "flat"
    lean = s.lean_head and loss.head_is_linear(model)
    return layout, lean


def questions(wanted, some_set, system, seed, n=8):
    """Prompts to answer before and after: the wanted questions, else about n of a set's own."""
    asked = [{"messages": [{"role": "user", "content": text}]} for text in wanted]
    own = [item["example"]["messages"][:-1] for item in some_set.items[::-(-len(some_set) // n)]]
    return [e["messages"] for e in data.with_system(asked, system, seed)] or own


def show(line):
    """A line of metrics in words: val_loss 0.1234, recall 98%."""
    return ", ".join(f"{k} {v:.0%}" if k.endswith(("recall", "accuracy")) else f"{k} {v:.4f}"
                     for k, v in line.items() if k not in ("step", "epoch"))


def write_samples(file, prompts, before, after):
    """Print the answers before and after, and write them as a table."""
    rows = ["| question | before | after |", "|---|---|---|"]
    for messages, *both in zip(prompts, before, after, strict=True):
        cells = [" ".join(text.split()) for text in (messages[-1]["content"], *both)]
        print("\n  {}\n    before: {:.100}\n    after:  {:.100}".format(*cells))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
