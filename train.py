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
from lora import (
    adapter,
    advice,
    base,
    config,
    fetch,
    flat,
    leaves,
    loss,
    memory,
    meter,
    runlog,
    surgery,
)
from lora.optim import AdamW, lr_at


def main(argv):
    settings = config.take_config(argv)

    # ----- model and data
    device = base.pick_device(settings.model.device)
    dtype = base.pick_dtype(settings.model.dtype, device)
    folder_or_id = fetch.find(settings.model.name)
    tokenizer = base.load_tokenizer(folder_or_id, settings.model.trust_remote_code)
    examples = data.load(**asdict(settings.data), seed=settings.train.seed)
    train_set = tokenise(examples[0], tokenizer, settings.dataset, "training")
    val_set = tokenise(examples[1], tokenizer, settings.dataset, "validation")
    for note in dataset.notes(tokenizer, train_set.format, examples[0]):
        print(f"dataset: {note}")
    extras, per_epoch = extra_examples(examples[0], settings)
    retain = data.with_system(data.read_facts(settings.keep.retain), settings.data.system,
                              settings.train.seed)
    model = base.load_model(folder_or_id, device, dtype, settings.model.trust_remote_code)
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
    for sentence in advice.sentences(settings, model, adapted, *examples):
        print(f"advice: {sentence}")
    system, systems = data.system_of(examples[0])
    runlog.write_json(folder / "run.json", runlog.run_info(
        base_model=fetch.public_name(settings.model.name), base_weights=base_weights,
        device=str(device), dtype=str(dtype), system=system, systems=systems,
        format=train_set.format, template=runlog.digest(tokenizer.chat_template or ""),
        data=runlog.digest([e["messages"] for part in examples for e in part]),
        examples=[len(part) for part in examples], adapted=adapted))

    # ----- what is mixed in: replay, answered by the model itself, and questions about nobody
    if extras:
        extras = complete(extras, model, tokenizer, train_set.format, folder)
        train_set.add(tokenise(extras, tokenizer, settings.dataset, "mixed-in"))

    result = fit(model, tokenizer, train_set, val_set, settings, folder, per_epoch, retain)
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


def extra_examples(examples, settings):
    """(examples to mix in, {kind: how many of them an epoch has}), as the keep section asks."""
    s, seed = settings.keep, settings.train.seed
    shares = {"replay": s.replay_share * bool(s.replay), "unknown": s.unknown_share}
    if sum(shares.values()) > 0.9:
        raise ValueError("keep: replay_share and unknown_share leave less than a tenth to the data")
    total = len(examples) / (1 - sum(shares.values()))
    per_epoch = {kind: round(share * total) for kind, share in shares.items() if share}
    steps = settings.train.max_steps
    epochs = math.ceil(steps * settings.train.batch_size / total if steps
                       else settings.train.epochs)
    extras = data.with_system(data.read_replay(s.replay), settings.data.system, seed) if \
        "replay" in per_epoch else []
    return extras + data.unknown_examples(
        examples, min(1000, epochs * per_epoch.get("unknown", 0)), seed, s.close_names), per_epoch


def complete(examples, model, tokenizer, format, folder):
    """The examples, those that end with the user's message answered by the base. What it said is
    kept in replay.jsonl, which keep.replay takes too; what it had no answer to is left out."""
    bare = [e for e in examples if e["messages"][-1]["role"] == "user"]
    for n in range(0, len(bare), 64):
        part = bare[n:n + 64]
        with surgery.disabled(model):
            given = dataset.answer(model, tokenizer, [e["messages"] for e in part], format,
                                   max_new_tokens=REPLAY_TOKENS)
        for example, (text, ended) in zip(part, given, strict=True):
            if text:
                said = [*example["messages"], {"role": "assistant", "content": text}]
                example |= {"messages": said, "open": not ended}
                runlog.append(folder / "replay.jsonl", {"messages": said, "open": not ended})
        print(f"keep: the model has answered {n + len(part)} of {len(bare)} replay prompts")
    return [e for e in examples if e["messages"][-1]["role"] == "assistant"]


REPLAY_TOKENS = 24                # an answer is broken off there; its end is then no label


def windows(pools, batch_size, epochs, max_steps, seed):
    """[(epoch, [indices of examples])], one for each step. pools are [(indices, how many of them an
    epoch takes)]; one that is not taken whole goes on where the last epoch left it. An epoch's
    order depends on seed and epoch alone; its last, shorter, window is a step like the others."""
    n = sum(count for _, count in pools)
    per_epoch = -(-n // batch_size)
    total, made = max_steps or max(1, round(epochs * per_epoch)), []
    for epoch in range(-(-total // per_epoch)):
        order = [indices[(epoch * count + i) % len(indices)]
                 for indices, count in pools for i in range(count)]
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        made += [(epoch, order[i:i + batch_size]) for i in range(0, n, batch_size)]
    return made[:total]


def fit(model, tokenizer, train_set, val_set, settings, folder, per_epoch, retain):
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
    kinds = [item["example"].get("kind") for item in train_set.items]
    pools = [([i for i, kind in enumerate(kinds) if kind == wanted], count)
             for wanted, count in {None: kinds.count(None), **per_epoch}.items()]
    for indices, _ in pools[1:]:
        random.Random(f"{s.seed} pool").shuffle(indices)      # a file may be sorted by kind
    plan = windows(pools, s.batch_size, s.epochs, s.max_steps, s.seed)
    an_epoch = sum(count for _, count in pools)
    eval_every = -(-an_epoch // s.batch_size) if s.eval_every == "epoch" else s.eval_every

    def learns_from_base(item):
        return (item["example"].get("kind"), settings.keep.replay_by) == ("replay", "probabilities")
    mixed = ", ".join(f"{count} {kind}" for kind, count in per_epoch.items())
    if mixed:
        print(f"keep: an epoch has {kinds.count(None)} of your examples, {mixed}")
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
        return [text for text, _ in dataset.answer(
            model, tokenizer, prompts, train_set.format, max_new_tokens=s.max_new_tokens,
            repetition_penalty=s.repetition_penalty)]
    known, own = what_it_knows(model, tokenizer, retain, settings, train_set.format)

    def evaluate(step):
        line = {"step": step}
        if val_set:
            line["val_loss"], line["val_accuracy"] = loss.evaluate(
                model, batches(val_set.items), lean)
        if facts:
            given = answers([e["messages"][:-1] for e in facts])
            right = [data.contains(a, e["value"]) for a, e in zip(given, facts, strict=True)]
            line["recall"] = sum(right) / len(right)
        if known:
            given = answers([e["messages"][:-1] for e in known])
            right = [data.contains(a, e["value"]) for a, e in zip(given, known, strict=True)]
            line["retention"] = sum(right) / len(right)
            line["kl"], line["own_loss"], line["own_loss_before"] = meter.drift(
                model, [b for i in range(0, len(own), 8) for b in batches(own.items[i:i + 8])])
        return line

    def rank(line):
        """Smaller is better. Retention below keep.min_retention counts like recall lost: a hard
        bound would keep an adapter that forgot nothing because it learned nothing."""
        lost = max(0.0, settings.keep.min_retention - line.get("retention", 1.0))
        return (lost - line["recall"] if by_recall else lost + line["val_loss"], line["val_loss"])

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
            micro = [(batch, teacher) for teacher in (False, True) for batch in batches(
                [item for item in items if learns_from_base(item) == teacher])]
            n_tokens = sum(len(batch.targets) for batch, _ in micro)
            lr = lr_at(done, peak=s.lr, warmup=s.warmup_steps, total=len(plan), schedule=s.schedule)
            model.train()
            step_ce = hits = 0
            for batch, teacher in micro:
                ce, right = loss.ce_sum(model, batch, lean, teacher)
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

            if s.save_every and done % s.save_every == 0:
                adapter.save(model, folder / "steps" / f"{done:06d}", base_name)

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


def what_it_knows(model, tokenizer, asked, settings, format):
    """(the questions asked that the base gets right, its own answers to them as a QADataset): what
    evaluations hold the model to."""
    if not asked:
        return [], []
    with surgery.disabled(model):
        given = dataset.answer(model, tokenizer, [e["messages"][:-1] for e in asked], format,
                               max_new_tokens=settings.train.max_new_tokens,
                               repetition_penalty=settings.train.repetition_penalty)
    known = [(e, text, ended) for e, (text, ended) in zip(asked, given, strict=True)
             if data.contains(text, e["value"])]
    print(f"keep: {len(known)} of {len(asked)} questions of {settings.keep.retain} are right "
          "before training")
    own = [{"messages": [*e["messages"][:-1], {"role": "assistant", "content": text}],
            "source": e["source"], "open": not ended} for e, text, ended in known]
    return [e for e, _, _ in known], own and dataset.QADataset(own, tokenizer, format,
                                                               max_length=10**6)


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
    shares = "recall", "accuracy", "retention"
    return ", ".join(f"{k} {v:.0%}" if k.endswith(shares) else f"{k} {v:.4f}"
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
