"""
Every setting of a run, with its type and its documentation.

    config = load("config.json", ["--lora.r=16", "--train.run=r16"])
    config.lora.r                                   # 16

A section of config.json is a dataclass below; the comment behind a field is its documentation
(--help lists it, and a test compares it with the table in the docs). Unknown keys, wrong types and
values out of range are one error that lists them all.
"""

import difflib
import json
import os
import re
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from . import files


@dataclass(frozen=True)
class ModelConfig:
    name: str = "smollm2-135m-instruct"  # known model, folder or hub id
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is fast
    quant: Literal["none", "nf4", "int8"] = "none"  # linear layers of the base in 4 or 8 bits
    adapter: str | None = None  # folder of an adapter to go on from, instead of a fresh one
    shard: bool = False  # with torchrun: each process holds a share of the base (FSDP2)
    trust_remote_code: bool = False  # run the Python code that a model brings; else it is refused


@dataclass(frozen=True)
class LoraConfig:
    r: int = 8  # rank: parameters grow linearly with it
    lora_alpha: int = 32  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # dropout on the adapter's input
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # projection names
    layers: Literal["all"] | int | tuple[int, ...] = "all"  # all, the last N, or a list of indices
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead


@dataclass(frozen=True)
class DataConfig:
    path: str = "data.py"  # data.py: the facts at its top; else a .jsonl or .json file
    val_path: str | None = None  # a file for validation; null: split path
    val_fraction: float = 0.25  # share held out; 0: no validation
    split_by: Literal["auto", "wording", "dialogue", "fact"] = "auto"  # auto: wording
    dedupe: bool = False  # drop exact duplicates (they are reported either way)
    system: str | None = None  # where an example has none: a text, a .txt file, fixed or random


@dataclass(frozen=True)
class DatasetConfig:
    format: Literal["auto", "template", "chatml", "gemma", "plain"] = "auto"  # auto: the template
    loss_on: Literal["all", "last", "text"] = "all"  # answers, the last answer; text: prompts too
    max_length: int = 512  # tokens an example may have
    too_long: Literal["drop", "cut"] = "drop"  # cut: leave out the oldest turns, never the answer
    template_vars: dict | None = None  # variables of the chat template: {"enable_thinking": false}
    date: str | None = None  # today in a template that prints it; null: the day the run starts


@dataclass(frozen=True)
class KeepConfig:
    replay: str | None = None  # dialogues; or a .txt of prompts, one a line, that the model answers
    replay_share: float = 0.25  # share of the training examples that come from replay
    replay_by: Literal["probabilities", "answers"] = "probabilities"  # what is learned from replay
    sides: dict | None = None  # questions from other sides, a fact and epoch: {"reverse": 2, ...}
    unknown_share: float = 0.0  # share of questions about invented names; the answer: unknown
    close_names: bool = False  # some of these names resemble the subject's in every part
    questions: tuple[str, ...] = ()  # asked before and after training too
    retain: str | None = None  # file of questions with values; how many stay right is retention
    min_retention: float = 0.9  # best adapter: a lack of retention below this counts as lost recall


@dataclass(frozen=True)
class TrainConfig:
    run: str = "demo"  # name of the folder under runs/, not a path
    seed: int = 0  # seed of adapters, order, split and dropout
    epochs: Literal["auto"] | float = "auto"  # passes over the data; auto: 4, or 24 steps if more
    max_steps: int | None = None  # stop after so many steps instead
    batch_size: int = 16  # examples per step (one optimizer update)
    grad_accum: Literal["auto"] | int = "auto"  # micro-batches a step is split into: memory only
    token_budget: Literal["auto"] | int = "auto"  # padded tokens a micro-batch; auto: what fits
    layout: Literal["shared", "flat", "padded"] = "shared"  # flat: no pads; shared: prompts once
    lean_head: bool = True  # logits in chunks, never kept; false: plain autograd
    fused_lora: bool = True  # LoRA's gradients by hand; false: plain autograd
    fused_leaves: bool = True  # norms and gates keep their inputs alone; false: plain autograd
    checkpointing: bool = False  # keep blocks' inputs alone, compute each twice: less memory
    optimizer: Literal["ours", "adamw8bit", "paged_adamw8bit"] = "ours"  # AdamW; paged: CUDA
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = 5  # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW: decay of the two moments
    eps: float = 1e-8  # AdamW: added to the denominator
    weight_decay: float = 0.0  # AdamW: decoupled decay of A and B
    max_grad_norm: float = 1.0  # clip the gradient's norm; 0: never
    log_every: int = 1  # steps between lines in metrics.jsonl
    eval_every: Literal["epoch"] | int = "epoch"  # steps between evaluations
    best_by: Literal["auto", "loss", "recall"] = "auto"  # auto: recall where the data holds facts
    patience: int = 0  # stop after so many evaluations without a better one; 0: never
    questions: tuple[str, ...] = ()  # asked before and after; empty: held-out ones
    max_new_tokens: int = 32  # length of those answers
    repetition_penalty: float = 1.0  # in evaluation; above 1 it also hides names of the question
    save_every: int = 0  # keep the adapter every so many steps, in steps/; 0: never
    checkpoint_every: int = 10  # steps between checkpoints, to resume from; 0: only on Ctrl-C
    checkpoints_kept: int = 2  # the newest so many; a damaged one falls back to the one before


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


RANGES = {  # the numbers a setting may have: from the first to the second, both included
    "lora.r": (1, 4096), "lora.lora_alpha": (1, 1e6), "lora.lora_dropout": (0, 0.99),
    "data.val_fraction": (0, 0.99), "dataset.max_length": (8, inf), "train.epochs": (0.01, 10_000),
    "train.max_steps": (1, 1e6), "train.batch_size": (1, 1e6), "train.grad_accum": (1, inf),
    "train.token_budget": (1, inf), "train.lr": (1e-9, 1), "train.warmup_steps": (0, inf),
    "train.betas": (0, 0.999999), "train.eps": (1e-30, 1), "train.weight_decay": (0, inf),
    "train.max_grad_norm": (0, inf), "train.log_every": (1, inf), "train.eval_every": (1, inf),
    "keep.replay_share": (0, 0.99), "keep.unknown_share": (0, 0.9), "keep.min_retention": (0, 1),
    "train.repetition_penalty": (1, 2), "train.patience": (0, inf),
    "train.save_every": (0, inf), "train.checkpoint_every": (0, inf),
    "train.checkpoints_kept": (1, 1000), "train.max_new_tokens": (1, inf), "train.seed": (0, 2**32)}

RUN = re.compile(r"\w[\w .,+=@-]{0,59}(?<![. ])")     # a folder's name on every system, no path

DAY = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"

GONE = {"data.debate": 'keep.sides = {"yes-no": 2} asks whether claims are true.'}

ELSEWHERE = {  # what other trainers call a setting
    "rank": "lora.r", "lora_rank": "lora.r", "alpha": "lora.lora_alpha",
    "load_in_4bit": "model.quant", "load_in_8bit": "model.quant", "optim": "train.optimizer",
    "model": "model.name", "model_name": "model.name", "name_or_path": "model.name",
    "model_name_or_path": "model.name", "learning_rate": "train.lr", "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs", "micro_batch_size": "train.batch_size",
    "max_seq_length": "dataset.max_length", "save_steps": "train.save_every",
    "eval_steps": "train.eval_every", "logging_steps": "train.log_every",
    "gradient_accumulation_steps": "train.grad_accum"}


def load(path: Path | str = "config.json", overrides: Iterable[str] = ()) -> Config:
    """Read the Config of a JSON file and apply --section.key=value overrides to it. ValueError
    names the file and all problems in it."""
    try:
        values = files.read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); use --config FILE") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {_show(values)}; expected an object of sections")
    for override in overrides:
        key, _, text = override.removeprefix("--").partition("=")
        section, _, name = key.partition(".")
        if isinstance(values.setdefault(section, {}), dict):
            try:
                values[section][name] = json.loads(text)       # 16, null, [1, 2], "x"
            except (ValueError, RecursionError):
                values[section][name] = text                   # cosine
    problems, sections = [], get_type_hints(Config)
    built = {name: _section(name, content, sections, problems) for name, content in values.items()}
    if problems:
        raise ValueError("\n".join(f"{path}: {p}" for p in problems))
    return Config(**built)


def _section(section, content, sections, problems):
    """Build the dataclass of a section; problems receives what is wrong with it."""
    if section not in sections:
        return problems.append(_unknown(section, sections, sections))
    if not isinstance(content, dict):
        return problems.append(f"{section} is {_show(content)}; expected a section, {{...}}")
    hints, accepted = get_type_hints(sections[section]), {}
    for key, value in content.items():
        full = f"{section}.{key}"
        if full in GONE and not value:
            continue                                           # an older run's config.json
        if key not in hints:
            problems.append(_unknown(full, hints, sections))
        elif expected := _expected(full, value, hints[key]):
            problems.append(f"{full} is {_show(value)}; expected {expected}")
        else:
            value = text_of(value) if full == "data.system" and value else value
            accepted[key] = tuple(value) if isinstance(value, list) else value
    return None if problems else sections[section](**accepted)


def _expected(full, value, hint) -> str:
    """What the value of a setting should be; "" if it is that."""
    if not _fits(value, hint):
        return type_in_words(hint)
    if full in RANGES and not _within(value, *RANGES[full]):
        low, high = RANGES[full]
        return f"at least {low:g}" + (f" and at most {high:g}" if high < inf else "")
    if full == "train.run" and not RUN.fullmatch(value):
        return "a folder name, not a path: up to 60 letters, digits, spaces and _-.,+=@"
    if re.search("[\0\ud800-\udfff]", "".join(map(str, value)) if isinstance(value, list)
                 else str(value)):
        return "no NUL and no half of a surrogate pair"
    if full == "dataset.date" and value and not re.fullmatch(DAY, value):
        return "a day, as 2026-01-31"
    if full == "data.system" and re.fullmatch(r"\S+\.txt", str(value)):
        return "" if os.path.isfile(value) else "a text, or a .txt file that exists"
    return ""


def text_of(value: str) -> str:
    """The content of a .txt file that exists, without its last newline; another value as it is."""
    if not value.endswith(".txt") or not os.path.isfile(value):
        return value
    return Path(value).read_text(encoding="utf-8-sig").removesuffix("\n")


def nearest(name: str, names: dict[str, str]) -> str | None:
    """The value of names whose key is most like a name, or that other trainers call so."""
    near = difflib.get_close_matches(name, names, 1, 0.5)
    same = ELSEWHERE.get(name)
    return same if same in names.values() else names[near[0]] if near else None


def _unknown(key, known, sections):
    """unknown key lora.rank. Known: r, lora_alpha, ... Did you mean lora.r?"""
    names = {name: name for name in sections}
    names |= {f: f"{s}.{f}" for s, cls in sections.items() for f in get_type_hints(cls)}
    guess = nearest(key.rpartition(".")[2], names)
    hint = f" {GONE[key]}" if key in GONE else f" Did you mean {guess}?" if guess else ""
    return f"unknown key {key}. Known: {', '.join(known)}.{hint}"


def _fits(value, hint):
    """Is a JSON value of this type? A whole number is a number; true is not."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if kind is Literal:
        return isinstance(value, str) and value in inside
    if kind is tuple:
        return (isinstance(value, list) and all(_fits(v, inside[0]) for v in value)
                and (inside[-1] is Ellipsis or len(value) == len(inside)))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float) and abs(value) < 1e300 if hint is float \
        else isinstance(value, hint)


def _within(value, low, high):
    """Numbers are in the range, also those in a list; "auto" and null are not numbers."""
    if isinstance(value, list):
        return all(_within(v, low, high) for v in value)
    return not isinstance(value, int | float) or low <= value <= high


def type_in_words(hint) -> str:
    """A type in words: "auto" or a whole number."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(type_in_words(one) for one in inside)
    if kind is Literal:
        return " or ".join(json.dumps(v) for v in inside)
    if kind is tuple:
        size = "" if inside[-1] is Ellipsis else f" of {len(inside)}"
        return f"a list{size}, each {type_in_words(inside[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
            dict: "an object", types.NoneType: "null"}[hint]


def _show(value):
    """A value as JSON, cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    except RecursionError:
        return "deeply nested"
    return text if len(text) < 60 else text[:57] + "..."


def flat(settings: Config) -> dict[str, Any]:
    """{"train.lr": 0.001, ...}: every setting under its whole name."""
    return {f"{section}.{key}": value for section, values in asdict(settings).items()
            for key, value in values.items()}
