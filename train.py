"""
Fine-tune a causal language model with LoRA on question/answer pairs or dialogues.

    python train.py                                    # config.json: facts into a chat model
    python train.py --lora.r=16 --train.run=r16        # any key of config.json
    python train.py --config runs/demo/config.json     # a run again, from its own folder
    python train.py --resume runs/demo                 # a run that was cut short, to its end
    torchrun --standalone --nproc_per_node=2 train.py  # the same run on two GPUs

The story, top to bottom: config, model, data, adapters, loop, best adapter, answers, plots.
A run writes everything into runs/NAME: adapter/ (the best one, in PEFT's layout), last/,
metrics.jsonl, answers.jsonl, loss.png, samples.md, config.json (complete), run.json, checkpoints/.
"""

import math
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from functools import partial

import lora.fast.waiting  # noqa: F401

import torch

import data
import dataset
import keep
from inject import find_blocks, inject, report
from lora import adapter, config, loss, surgery
from lora.base import fetch, load, quant, templates
from lora.fast import levers, memory
from lora.optim import AdamW, epochs_of, lr_at
from lora.read.messages import conversations
from lora.run import advice, card, checkpoint, cli, parallel, runlog, tokens
from lora.run.state import Progress
from measure import Exam, Voice, chooses_by_recall, held_out_facts, sample_prompts


@runlog.noting()
def main(argv: list[str]) -> None:
    settings, resume, force = parse(argv)
    s = settings.train

    # ----- model, data, adapters; data first, for its errors come at once
    device = parallel.start(load.pick_device(settings.model.device))
    folder_or_id = parallel.from_first(
        fetch.find(settings.model.name) if parallel.rank() == 0 else None)
    base_name = fetch.public_name(settings.model.name)
    tokenizer, settings = load_tokenizer(folder_or_id, settings)
    examples = data.load(**asdict(settings.data), seed=s.seed)
    train_set = tokenise(examples[0], tokenizer, settings.dataset, "training", resume)
    val_set = tokenise(examples[1], tokenizer, settings.dataset, "validation", resume)
    for note in advice.about_format(dataset.FORMATS, train_set.format, tokenizer, examples[0]):
        print(f"dataset: {note}")
    extras, per_epoch = keep.extra_examples(examples[0], settings)
    retained = data.with_system(keep.read_facts(settings.keep.retain), settings.data.system, s.seed)
    model, info = load_base(folder_or_id, settings, device, train_set.format)
    adapted = add_adapters(model, settings)

    # ----- the run's folder: a new one, or the one to go on in
    info |= runlog.data_identity(examples, tokenizer, train_set.format)
    identity = {**config.flat(settings), **info, "keep": runlog.digest(
        [e["messages"] for e in [*extras, *retained]])}
    with runlog.opened(s.run, resume, parallel.rank()) as folder:
        saved = checkpoint.resume_from(folder, identity, force) if resume else None
        for sentence in advice.sentences(settings, model, adapted, *examples):
            print(f"advice: {sentence}")
        if not saved:
            runlog.start(folder, asdict(settings), device=str(device), adapted=adapted,
                         base_model=base_name, examples=[len(part) for part in examples], **info)
            tokens.save(folder, (train_set, val_set), examples)
        voice = Voice(model, tokenizer, train_set.format)
        with runlog.reused(folder / "replay.jsonl", identity, parallel.rank()):
            extras = extras and keep.answer_replay(extras, voice, folder)
        if extras:
            train_set.items += tokenise(extras, tokenizer, settings.dataset, "mixed-in").items

        # ----- the loop; then the best adapter answers
        plan, batches, eval_every = plan_steps(model, train_set, per_epoch, settings, device,
                                               tokenizer.pad_token_id or 0)
        chooses_by_recall(s.best_by, len(held_out_facts(val_set)))
        asked = val_set or train_set
        n_asked = len(held_out_facts(asked)) + len(sample_prompts(settings, asked))
        print(memory.report(model, batches(memory.two_ends(train_set.items))[0],
                            batches([train_set[i] for i in plan[0][1]])[-1], batches.lean,
                            *memory.questions_at_once(asked.items, n_asked, len(retained), s)))
        exam = Exam(voice, train_set, val_set, retained, settings, batches)
        run = Progress(folder, plan, s, batches=batches, rank=exam.rank, identity=identity,
                       save=lambda name: adapter.save(model, folder / name, base_name),
                       eval_every=eval_every if val_set else 0)
        fit(model, train_set, batches, exam, run, s, saved)
        adapter.load(model, folder / "adapter")
        card.write(folder / "adapter", info, settings, run.best, run.first)
        after = run.after if run.is_best(surgery.adapter_parameters(model)) else exam.answers()
        card.write_samples(folder / "samples.md", exam.prompts, run.before, after)
        from plots.figures import draw
        draw(folder)
    print(f"\n{run.summary(len(exam.facts))}\nrun: {folder}/ holds adapter/ (the best), last/, "
          "loss.png, samples.md, metrics.jsonl, config.json, run.json")


def fit(model, train_set, batches, exam, run, s, saved=None) -> None:
    """Train: the loop over run.plan. Leaves last/ and adapter/, the best one, in the run's folder.

    Args:
        batches: how a window of examples becomes batches (dataset.Batches).
        exam: measures the model at an evaluation (measure.Exam).
        run: records, and says what is due (lora/run/state.py).
        s: the train section of the configuration.
        saved: (tensors, state) of a checkpoint to go on from, or None.
    """
    parameters = surgery.adapter_parameters(model)
    build = AdamW if s.optimizer == "ours" else partial(quant.adamw_8bit, s.optimizer)
    optimizer = build(parameters, s.betas, s.eps, s.weight_decay)
    run.begin(exam, optimizer, saved)                 # step 0 is measured, or a checkpoint restored

    with runlog.stoppable() as stops:
        while not run.ended:
            # 1) the window of this step, and what its loss is divided by
            began = time.perf_counter()
            window = [train_set[i] for i in run.plan[run.step][1]]
            n_tokens = sum(x != loss.IGNORE_INDEX for item in window for x in item["labels"][1:])

            # 2) gradients, a micro-batch at a time
            model.train()
            step_gradients = partial(accumulate, model, batches, window, n_tokens,
                                     parallel.step_seed(s.seed, run.step))
            ce, hits = memory.retry_smaller(step_gradients, batches, parameters, run.step + 1)
            ce, hits, stop = parallel.add_up([ce, hits, len(stops)], parameters)

            # 3) clip, refuse what is no number, update
            grad_norm = torch.nn.utils.clip_grad_norm_(
                parameters, s.max_grad_norm or math.inf).item()
            run.must_be_finite(ce / n_tokens, grad_norm, window)
            lr = lr_at(run.step, peak=s.lr, warmup=s.warmup_steps, total=len(run.plan),
                       schedule=s.schedule)
            optimizer.step(lr)
            optimizer.zero_grad()

            # 4) write down, measure, keep
            run.log(ce, hits, n_tokens, lr, grad_norm,
                    n_read=sum(len(item["input_ids"]) for item in window),
                    seconds=time.perf_counter() - began, device=batches.device)
            if run.evaluation_due:
                run.keep_if_best(exam(run.step), exam, parameters)
            if stop or run.checkpoint_due:
                run.checkpoint(optimizer)
            if stop:
                run.exit_stopped()
    run.finish()


def accumulate(model, batches, window: list[dict], n_tokens: int, seed: int) -> tuple[float, int]:
    """Add up the gradients of a step's window, one micro-batch after the other: memory holds one.

    Returns (summed cross-entropy in nats, number of right tokens) of this process's share; the
    adapters' .grad holds the gradient of the mean over n_tokens, the supervised tokens of the
    *whole* window. A mean of micro-batch means would weigh tokens unequally (docs/maths.md, 3).
    """
    torch.manual_seed(seed)                           # of dropout
    total_ce = total_hits = 0
    for batch, taught_by_base, weight in batches.of_step(window):
        ce, hits = loss.ce_sum(model, batch, batches.lean, taught_by_base)
        (weight * ce / n_tokens).backward()
        total_ce, total_hits = total_ce + weight * ce.item(), total_hits + weight * hits
    return total_ce, total_hits


# ----- the parts of main() -----------------------------------------------------------------------


def parse(argv: list[str]) -> tuple:
    """(settings, folder of the run to resume or None, whether to resume a changed run)."""
    parser = cli.Parser(__doc__, settings=True, file=True)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was cut short")
    parser.add_argument("--force", action="store_true", help="resume although settings differ")
    options = parser.parse_args(argv)
    resume = runlog.resumable(options.resume) if options.resume else None
    if resume:
        options.config = resume / "config.json"
    return cli.settings_of(options), resume, options.force


def load_tokenizer(folder_or_id: str, settings) -> tuple:
    """(the tokenizer, the settings): a chat template that prints today's date prints the run's."""
    tokenizer = load.configured_tokenizer(folder_or_id, settings)
    if templates.prints_date(tokenizer):
        day = parallel.from_first(str(date.today()))
        templates.pin_date(tokenizer, day)
        settings = replace(settings, dataset=replace(settings.dataset, date=day))
    return tokenizer, settings


def tokenise(examples: list[dict], tokenizer, s, label: str, run=None) -> dataset.QADataset | None:
    """The QADataset of some examples, with a line about what was left out; None without any. run:
    the folder of a run to resume, which may have kept it."""
    if not examples:
        return None
    tokenised = dataset.tokenise(examples, tokenizer, s, partial(tokens.load, run, label, examples))
    n_tokens = sum(len(item["input_ids"]) for item in tokenised.items)
    n_supervised = n_tokens - sum(item["labels"].count(loss.IGNORE_INDEX)
                                  for item in tokenised.items)
    print(f"dataset: {len(tokenised)} {label} examples, {n_tokens:,} tokens, "
          f"{n_supervised / n_tokens:.0%} supervised")
    for note in tokenised.notes():
        print(f"dataset: {note}")
    return tokenised


def load_base(folder_or_id: str, settings, device, format: str) -> tuple:
    """(the base model on the device, {"base_weights": its fingerprint, "dtype": ...})."""
    dtype = load.pick_dtype(settings.model.dtype, device)
    model = load.load_model(folder_or_id, "cpu", dtype, settings.model.trust_remote_code)
    base_weights = load.fingerprint(model)            # of the dense base, before it is quantised
    sharded = settings.model.shard and parallel.world() > 1
    packed = quant.quantise(model, settings.model.quant, "cpu" if sharded else device)
    quantised = f", {len(packed)} linear layers in {settings.model.quant}" if packed else ""
    print(f"model: {settings.model.name} in {str(dtype).removeprefix('torch.')} on {device}"
          f"{quantised}; format: {format}")
    return model, {"base_weights": base_weights, "dtype": str(dtype)}


def add_adapters(model, settings) -> list[str]:
    """Inject fresh adapters, or load those of model.adapter, and print which; their paths. The
    seed comes first, so that A is the same in every run and process."""
    torch.manual_seed(settings.train.seed)
    if settings.model.adapter:
        adapted = adapter.load(model, settings.model.adapter)
        surgery.freeze_base(model)
        print(f"adapter: going on from {settings.model.adapter}; the lora section is not used")
    else:
        adapted = inject(model, **asdict(settings.lora))
    print(report(model, adapted))
    return adapted


def plan_steps(model, train_set, per_epoch: dict, settings, device, pad_id: int) -> tuple:
    """(plan, batches, eval_every): which examples each step takes, how they become batches, steps
    between evaluations. Switches the speed levers on."""
    s = settings.train
    pools = keep.pools_of(train_set.items, per_epoch, s.seed)
    an_epoch = sum(count for _, count in pools)
    plan = dataset.windows(pools, s.batch_size, epochs_of(s, an_epoch), s.max_steps, s.seed,
                           conversations(train_set.items))
    levers.fuse(model, s)
    if settings.model.shard and parallel.world() > 1:
        print(parallel.shard(model, find_blocks(model)[1], device))
    layout, lean = levers.choose_layout(model, s, load.use_attention)
    batches = dataset.Batches(
        pad_id, device, layout, lean, size=2,
        from_base=lambda item: (settings.keep.replay_by == "probabilities"
                                and item["example"].get("kind") in ("replay", "famous")),
        can_halve=not settings.model.shard)
    batches.size = parallel.from_first(memory.micro_batch_size(
        train_set.items, s, model, batches(memory.two_ends(train_set.items))[0], lean))
    eval_every = -(-an_epoch // s.batch_size) if s.eval_every == "epoch" else s.eval_every
    processes = f", {parallel.world()} processes" if parallel.world() > 1 else ""
    print(f"train: {len(plan)} steps of {s.batch_size} examples in "
          f"{-(-s.batch_size // batches.size)} micro-batches of {batches.size}, an evaluation "
          f"every {eval_every} steps{processes}"
          f"{levers.shares(batches, [train_set[i] for i in plan[0][1]])}")
    return plan, batches, eval_every


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
