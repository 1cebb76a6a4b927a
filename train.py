"""
Fine-tune a causal language model with LoRA on question/answer pairs or dialogues.

    python train.py                                    # config.json: facts into a chat model
    python train.py --lora.r=16 --train.run=r16        # any key of config.json
    python train.py --config runs/demo/config.json     # a run again, from its own folder
    python train.py --resume runs/demo                 # a run that was cut short, to its end
    torchrun --standalone --nproc_per_node=2 train.py  # the same run on two GPUs

The story, top to bottom: config, model, data, adapters, loop, best adapter, answers, plots.
Everything a run makes is in runs/NAME: adapter/ (the best one, in PEFT's layout), last/,
metrics.jsonl, loss.png, samples.md, config.json (complete), run.json, checkpoints/.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict

import lora.waiting  # noqa: F401

import torch
from tqdm import tqdm

import data
import dataset
import measure
from inject import find_blocks, inject, report
from lora import (
    adapter,
    advice,
    base,
    checkpoint,
    config,
    fetch,
    files,
    flat,
    leaves,
    loss,
    memory,
    parallel,
    quant,
    runlog,
    surgery,
)
from lora.optim import epochs_of, lr_at
from lora.step import Gradients


def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", metavar="RUN")
    parser.add_argument("--force", action="store_true")
    asked, argv = parser.parse_known_args(argv)
    if asked.resume:
        asked.resume = runlog.resumable(asked.resume)
        argv = ["--config", str(asked.resume / "config.json"), *argv]
    settings = config.take_config(argv)

    # ----- model and data
    device = parallel.start(base.pick_device(settings.model.device))
    dtype = base.pick_dtype(settings.model.dtype, device)
    folder_or_id = parallel.from_first(
        fetch.find(settings.model.name) if parallel.rank() == 0 else None)
    tokenizer = base.load_tokenizer(folder_or_id, settings.model.trust_remote_code)
    examples = data.load(**asdict(settings.data), seed=settings.train.seed)
    train_set = tokenise(examples[0], tokenizer, settings.dataset, "training")
    val_set = tokenise(examples[1], tokenizer, settings.dataset, "validation")
    for note in dataset.notes(tokenizer, train_set.format, examples[0]):
        print(f"dataset: {note}")
    extras, per_epoch = extra_examples(examples[0], settings)
    retain = data.with_system(data.read_facts(settings.keep.retain), settings.data.system,
                              settings.train.seed)
    model = base.load_model(folder_or_id, "cpu", dtype, settings.model.trust_remote_code)
    base_weights = base.fingerprint(model)            # of the dense base, whatever quant says
    sharded = settings.model.shard and parallel.world() > 1
    quantised = quant.quantise(model, settings.model.quant, "cpu" if sharded else device)
    print(f"model: {settings.model.name} in {str(dtype).removeprefix('torch.')} on {device}"
          + f", {len(quantised)} linear layers in {settings.model.quant}" * bool(quantised)
          + f"; format: {train_set.format}")

    # ----- adapters; the seed first, so that A is the same in every run and process
    torch.manual_seed(settings.train.seed)
    if settings.model.adapter:
        adapted = adapter.load(model, settings.model.adapter)
        surgery.freeze_base(model)
        print(f"adapter: going on from {settings.model.adapter}; the lora section is not used")
    else:
        adapted = inject(model, **asdict(settings.lora))
    print(report(model, adapted))

    # ----- the run's folder: a new one, or the one to go on in
    system, systems = data.system_of(examples[0])
    info = {"base_weights": base_weights, "dtype": str(dtype), "system": system, "systems": systems,
            "format": train_set.format, "template": runlog.digest(tokenizer.chat_template or ""),
            "data": runlog.digest([e["messages"] for part in examples for e in part])}
    identity = {**config.flat(settings), **info,
                "keep": runlog.digest([e["messages"] for e in [*extras, *retain]])}
    with runlog.opened(settings.train.run, asked.resume, parallel.rank()) as folder:
        saved = newest_checkpoint(folder, identity, asked.force) if asked.resume else None
        for sentence in advice.sentences(settings, model, adapted, *examples):
            print(f"advice: {sentence}")
        if not saved:
            (folder / "replay.jsonl").unlink(missing_ok=True)
            runlog.write_json(folder / "config.json", asdict(settings))
            runlog.write_json(folder / "run.json", runlog.run_info(
                base_model=fetch.public_name(settings.model.name), device=str(device),
                examples=[len(part) for part in examples], adapted=adapted, **info))

        # ----- what is mixed in: replay, answered by the model itself, and questions about nobody
        if extras:
            extras = complete(extras, model, tokenizer, train_set.format, folder)
            train_set.add(tokenise(extras, tokenizer, settings.dataset, "mixed-in"))

        result = fit(model, tokenizer, train_set, val_set, settings, device, folder, per_epoch,
                     retain, identity, saved)
        from plots.figures import draw
        draw(folder)
    print(f"\n{result}\nrun: {folder}/ holds adapter/ (the best), last/, loss.png, samples.md, "
          "metrics.jsonl, config.json, run.json")


def newest_checkpoint(folder, identity, force):
    """(tensors, state) of the newest checkpoint of a run, for all processes; None if there is none
    yet. Raises ValueError if settings, data or model are not those it was made with."""
    file = checkpoint.newest(folder / "checkpoints") if parallel.rank() == 0 else None
    file = parallel.from_first(str(file) if file else None)
    if not file:
        print(f"resume: {folder} has no checkpoint yet: from the beginning")
        return None
    tensors, state = checkpoint.load(file)
    changed = checkpoint.differences(state["identity"], json.loads(json.dumps(identity)))
    if changed and not force:
        raise ValueError("resume: what was begun there was another run:\n  " + "\n  ".join(changed)
                         + "\nUndo that, start a new run, or go on all the same with --force.")
    for line in changed:
        print(f"resume: {line}")
    print(f"resume: from step {state['step']}")
    return tensors, state


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
                       else epochs_of(settings.train, total))
    extras = data.with_system(data.read_replay(s.replay), settings.data.system, seed) if \
        "replay" in per_epoch else []
    return extras + data.unknown_examples(
        examples, min(1000, epochs * per_epoch.get("unknown", 0)), seed, s.close_names), per_epoch


def complete(examples, model, tokenizer, format, folder):
    """The examples, those that end with the user's message answered by the base. What it said is
    kept in replay.jsonl, which keep.replay takes too; what it had no answer to is left out."""
    bare = [e for e in examples if e["messages"][-1]["role"] == "user"]
    file, said = folder / "replay.jsonl", []
    if file.exists():                                 # of a run that is resumed
        said = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    for n in range(0, 0 if said or parallel.rank() else len(bare), 64):
        part = [e["messages"] for e in bare[n:n + 64]]
        with surgery.disabled(model):
            given = dataset.answer(model, tokenizer, part, format, max_new_tokens=REPLAY_TOKENS)
        said += [{"messages": [*prompt, {"role": "assistant", "content": text}], "open": not ended}
                 for prompt, (text, ended) in zip(part, given, strict=True) if text]
        print(f"keep: the model has answered {n + len(part)} of {len(bare)} replay prompts")
    said = parallel.from_first(said)
    if bare:
        files.write(file, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in said))
    answered = {json.dumps(x["messages"][:-1]): x for x in said}
    for example in bare:
        example |= answered.get(json.dumps(example["messages"]), {})
    return [e for e in examples if e["messages"][-1]["role"] == "assistant"]


REPLAY_TOKENS = 24                # an answer is broken off there; its end is then no label


def plan_of(train_set, per_epoch, s):
    """(windows() of the training set's kinds of examples, how many examples an epoch has)."""
    kinds = [item["example"].get("kind") for item in train_set.items]
    pools = [([i for i, kind in enumerate(kinds) if kind == wanted], count)
             for wanted, count in {None: kinds.count(None), **per_epoch}.items()]
    for indices, _ in pools[1:]:
        random.Random(f"{s.seed} pool").shuffle(indices)      # a file may be sorted by kind
    if per_epoch:
        print(f"keep: an epoch has {kinds.count(None)} of your examples, "
              + ", ".join(f"{count} {kind}" for kind, count in per_epoch.items()))
    n = sum(count for _, count in pools)
    return windows(pools, s.batch_size, epochs_of(s, n), s.max_steps, s.seed), n


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


class Progress:
    """Where a run is. With the optimizer and the best adapter, this is what a checkpoint holds."""

    def __init__(self, size):
        self.step = self.seen = self.stale = 0        # stale: evaluations since the best one
        self.size, self.seconds = size, 0.0           # of micro-batches; of training alone
        self.sums, self.best = [], None               # (ce, hits, tokens) of the epoch's steps
        self.before = self.first = None               # answers and metrics of the untouched model
        self.best_weights = []

    def save(self, folder, optimizer, identity, newest):
        """Write a checkpoint and keep the newest so many."""
        metrics, state = folder / "metrics.jsonl", dict(vars(self))
        best = {f"best.{i}": p for i, p in enumerate(state.pop("best_weights"))}
        files.sync(metrics)
        checkpoint.save(folder / "checkpoints", {**optimizer.tensors(), **best},
                        {**state, "identity": identity, "metrics": metrics.stat().st_size}, newest)

    def restore(self, saved, folder, optimizer, save_best):
        """Be where the checkpoint was made, and put back what was written since: optimizer,
        metrics.jsonl, adapter/."""
        tensors, state = saved
        vars(self).update({key: state[key] for key in vars(self) if key in state},
                          size=min(self.size, state["size"]))
        files.cut(folder / "metrics.jsonl", state["metrics"])
        (folder / "metrics.jsonl").touch()
        self.best_weights = [tensors[key] for key in map("best.{}".format, range(len(tensors)))
                             if key in tensors]
        if self.best_weights:                         # the folder's may be newer than this
            optimizer.restore({f"p.{i}": p for i, p in enumerate(self.best_weights)})
            save_best()
        optimizer.restore(tensors, self.step)


def fit(model, tokenizer, train_set, val_set, settings, device, folder, per_epoch, retain, identity,
        saved):
    """The loop. Leaves the best adapter in the model and on disk; returns what it reached. saved:
    (tensors, state) of a checkpoint to go on from, or None."""
    s, metrics = settings.train, folder / "metrics.jsonl"
    layout, lean = speed_up(model, settings, device)
    plan, an_epoch = plan_of(train_set, per_epoch, s)
    eval_every = -(-an_epoch // s.batch_size) if s.eval_every == "epoch" else s.eval_every
    rank, at = ranking(val_set, settings), Progress(micro_batch_size(train_set, s))
    print(f"train: {len(plan)} steps of {s.batch_size} examples in {-(-s.batch_size // at.size)} "
          f"micro-batches of {at.size}, an evaluation every {eval_every} steps"
          + f", {parallel.world()} processes" * (parallel.world() > 1))

    def batches(items, size):
        return dataset.micro_batches(items, size, tokenizer.pad_token_id or 0, device, layout)
    print(memory.report(model, batches(train_set.items[:2], at.size)[0],
                        batches([train_set[i] for i in plan[0][1]], at.size)[-1], lean,
                        *questions_at_once(val_set or train_set, retain, s)))

    def from_base(item):
        return (item["example"].get("kind"), settings.keep.replay_by) == ("replay", "probabilities")
    gradients = Gradients(model, batches, lean, from_base, s.seed, not settings.model.shard)
    optimizer = quant.optimizer(s.optimizer, surgery.adapter_parameters(model), s.betas, s.eps,
                                s.weight_decay)
    evaluate = measure.exam(model, tokenizer, train_set.format, val_set, retain, settings,
                            lambda items: batches(items, at.size), lean)
    asked = measure.questions(s.questions, val_set or train_set, settings.data.system, s.seed)

    def answers():
        return [a for a, _ in measure.answerer(model, tokenizer, train_set.format, s)(asked)]

    def save(name):
        adapter.save(model, folder / name, fetch.public_name(settings.model.name))

    def keep():
        at.save(folder, optimizer, identity, s.checkpoints_kept)

    if saved:
        at.restore(saved, folder, optimizer, lambda: save("adapter"))
    else:
        metrics.unlink(missing_ok=True)
        at.before, at.first = answers(), evaluate(0)
        runlog.append(metrics, at.first)
        print(f"step 0: {measure.show(at.first)}")
        if s.checkpoint_every:
            keep()

    bar = tqdm(total=len(plan), initial=at.step, unit="step", dynamic_ncols=True,
               disable=True if parallel.rank() else None)
    with runlog.stoppable() as stops, bar:
        while at.step < len(plan) and not (s.patience and at.stale >= s.patience):
            began = time.perf_counter()
            epoch, rows = plan[at.step]
            items = [train_set[i] for i in rows]
            n_tokens = sum(x != loss.IGNORE_INDEX for item in items for x in item["labels"][1:])
            lr = lr_at(at.step, peak=s.lr, warmup=s.warmup_steps, total=len(plan),
                       schedule=s.schedule)
            model.train()
            ce, hits = gradients(items, n_tokens, at)
            ce, hits, stop = parallel.add_up([ce, hits, len(stops)], optimizer.parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                optimizer.parameters, s.max_grad_norm or math.inf).item()
            if not (math.isfinite(ce) and math.isfinite(grad_norm)):
                save("last")
                raise ValueError(diverged(at, ce / n_tokens, grad_norm, items, folder))
            optimizer.step(lr)
            optimizer.zero_grad()
            at.step += 1
            last = at.step == len(plan)

            # ----- what happened
            at.seen += sum(len(item["input_ids"]) for item in items)
            at.seconds += time.perf_counter() - began
            line = {"step": at.step, "epoch": epoch + 1, "loss": ce / n_tokens,
                    "accuracy": hits / n_tokens, "lr": lr, "grad_norm": grad_norm,
                    "tokens_per_s": at.seen / at.seconds, "seconds": at.seconds,
                    "peak_memory_gib": runlog.peak_memory_gib(device)}
            if at.step % s.log_every == 0 or last:
                runlog.append(metrics, line)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {lr:.1e}, "
                                f"{line['tokens_per_s']:.0f} tokens/s")
            bar.update()
            at.sums.append((ce, hits, n_tokens))
            if last or plan[at.step][0] != epoch:
                ce, hits, n_tokens = map(sum, zip(*at.sums, strict=True))
                line = {"step": at.step, "epoch": epoch + 1, "epoch_loss": ce / n_tokens,
                        "epoch_accuracy": hits / n_tokens}
                runlog.append(metrics, line)
                bar.write(f"epoch {epoch + 1}: {measure.show(line)}")
                at.sums = []
            if s.save_every and at.step % s.save_every == 0:
                save(f"steps/{at.step:06d}")

            # ----- is it the best so far?
            if val_set and (last or at.step % eval_every == 0):
                line = evaluate(at.step)
                improved, at.stale = at.best is None or rank(line) < rank(at.best), at.stale + 1
                if improved:
                    at.best, at.stale = line, 0
                    at.best_weights = [p.detach().cpu().clone() for p in optimizer.parameters]
                    save("adapter")
                runlog.append(metrics, {**line, "best": improved})
                bar.write(f"step {at.step}: {measure.show(line)}{', the best so far' * improved}")

            if stop or (s.checkpoint_every and (last or at.step % s.checkpoint_every == 0)):
                keep()
            if stop:
                save("last")
                bar.write(f"stopped after step {at.step}; go on with:\n"
                          f"  python train.py --resume {folder}")
                sys.exit(130)
    if at.step < len(plan):
        print(f"train: stopped, {at.stale} evaluations without a better one")

    # ----- the end: the best adapter answers
    save("last")
    if at.best is None:                               # no validation: the last one it is
        at.best = {"step": at.step}
        save("adapter")
    adapter.load(model, folder / "adapter")
    measure.write_samples(folder / "samples.md", asked, at.before, answers())
    n_facts = len(measure.held_out_facts(val_set))
    return (f"best: step {at.best['step']}: {measure.show(at.best)}"
            + f" on {n_facts} held-out questions" * bool(n_facts)
            + f" (before training: {measure.show(at.first)})" * bool(val_set))


def questions_at_once(asked_set, retain, s):
    """(prompts that an evaluation answers in one batch, tokens of the longest with its answer)."""
    rows = max(8, len(measure.held_out_facts(asked_set)), len(retain))
    longest = max(len(item["input_ids"]) for item in asked_set.items)
    return min(memory.ROWS, rows), longest + s.max_new_tokens


def micro_batch_size(train_set, s):
    """Samples a micro-batch: as many as train.token_budget takes, or what grad_accum leaves."""
    if s.grad_accum != "auto":
        return -(-s.batch_size // s.grad_accum)
    longest = max(len(item["input_ids"]) for item in train_set.items)
    return min(s.batch_size, max(1, s.token_budget // longest))


def ranking(val_set, settings):
    """A function of an evaluation's line: smaller is better. Retention below keep.min_retention
    counts like recall lost: a hard bound would keep an adapter that forgot nothing because it
    learned nothing."""
    n_facts, best_by = len(measure.held_out_facts(val_set)), settings.train.best_by
    if best_by == "recall" and not n_facts:
        raise ValueError('train: best_by is "recall", but no validation example has a "value".')
    by_recall = best_by == "recall" or (best_by == "auto" and n_facts > 0)

    def rank(line):
        lost = max(0.0, settings.keep.min_retention - line.get("retention", 1.0))
        return (lost - line["recall"] if by_recall else lost + line["val_loss"], line["val_loss"])
    return rank


def diverged(at, loss, grad_norm, items, folder):
    """What is said of a step whose loss or gradient is not a number."""
    return (f"train: step {at.step + 1}: loss {loss}, gradient norm {grad_norm}. It changed "
            f"nothing: {folder}/last is the adapter before it"
            + f", {folder}/adapter the best one" * bool(at.best)
            + ". Lower train.lr, or look at the step's examples:\n  "
            + "\n  ".join(item["source"] for item in items))


def speed_up(model, settings, device):
    """Switch on what train asks for and this model can do, and split the base over processes where
    model.shard says so; the loss is the same either way. Returns micro_batches' layout and ce_sum's
    lean."""
    s, layout = settings.train, settings.train.layout
    for layer in surgery.lora_layers(model).values():
        layer.fused = s.fused_lora
    if s.fused_leaves:
        leaves.fuse(model)
    if settings.model.shard and parallel.world() > 1:         # after fuse: it tries each module
        whole, here = parallel.shard(model, find_blocks(model)[1])
        model.to(device)
        print(f"model: its blocks are split, {here / 2**30:.2f} GiB here instead of "
              f"{whole / 2**30:.2f}")
    if s.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    reason = flat.enable(model) if layout != "padded" else None
    if reason:
        print(f"train: batches are padded: {reason}")
        layout = "padded"
    elif layout == "shared" and flat.drops(model):
        print("train: with dropout no prompt is shared: every sample needs a mask of its own")
        layout = "flat"
    lean = s.lean_head and loss.head_is_linear(model)
    return layout, lean


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
