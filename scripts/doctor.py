"""
Check the data before training on it: counts, lengths, masks, duplicates, leaks.

    python -m scripts.doctor                # what config.json would train on
    python -m scripts.doctor my.jsonl       # another file; exit code 1 if something is wrong
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import data
import dataset
from lora.base import fetch, load
from lora.loss import IGNORE_INDEX
from lora.run import advice, cli
from lora.use import show
from lora.use.text import near_duplicates, words

Finding = tuple[str, str, list[str]]         # level, what, sources of the examples concerned


class Read(NamedTuple):
    """What a run would train on, read and tokenised."""

    tokenizer: Any
    train: list[dict]
    val: list[dict]
    tokenised: dataset.QADataset             # of both


def main(argv: list[str]) -> int:
    settings = cli.take_config(argv, __doc__, file=True)
    read = read_data(settings)
    print(f"\ndoctor: {about(settings, read)}")
    histogram([len(item["input_ids"]) for item in read.tokenised.items])
    levels = []
    for level, what, sources in findings(settings, read):
        levels.append(level)
        shown = sources if len(sources) <= 5 else [*sources[:5], "..."]
        print(f"  {level:5}  {what}" + (": " if sources else "") + "; ".join(shown))
    for kind, items in data.group_by(lambda x: kind_of(x["example"]), read.tokenised.items).items():
        print(f"\nfirst {kind}, supervised tokens in green ({items[0]['source']}):\n"
              + show.colour(items[0], read.tokenizer))
    print(f"\ndoctor: {levels.count('ERROR')} errors, {levels.count('warn')} warnings")
    return int("ERROR" in levels)


def read_data(settings) -> Read:
    """Read and tokenise the data that settings name."""
    tokenizer = load.configured_tokenizer(fetch.find(settings.model.name), settings)
    train, val = data.load(**asdict(settings.data), seed=settings.train.seed)
    return Read(tokenizer, train, val, dataset.tokenise(train + val, tokenizer, settings.dataset))


def about(settings, read: Read) -> str:
    """One line: the model, the format and how many there are of what."""
    n_pieces = sum(data.is_text(item["example"]) for item in read.tokenised.items)
    return (f"{settings.model.name}, format {read.tokenised.format}: {len(read.train)} training "
            f"and {len(read.val)} validation examples, {count_answers(read.tokenised)} answers"
            + (f", {n_pieces} pieces of plain text" if n_pieces else ""))


def findings(settings, read: Read) -> Iterator[Finding]:
    """All that the doctor finds; "ERROR", "warn", "ok" and "note" are the levels."""
    for level, what, sources in [*check_texts(read.train, read.val),
                                 *check_tokens(read.tokenised, read.tokenizer)]:
        yield level if sources else "ok", f"{len(sources)} {what}", sources
    for sentence in advice.about_data(settings.train, read.train, read.val):
        yield "warn", sentence, []
    for note in [*read.tokenised.notes(), *advice.about_format(
            dataset.FORMATS, read.tokenised.format, read.tokenizer, read.train)]:
        yield "note", note, []


def kind_of(example: dict) -> str:
    """What an example is: "example" (a dialogue), "example with tools" or "piece of plain text"."""
    if data.is_text(example):
        return "piece of plain text"
    with_tools = any({"tools", "tool_calls"} & m.keys() for m in example["messages"])
    return "example with tools" if with_tools else "example"


def check_texts(train: list[dict], val: list[dict]) -> Iterator[Finding]:
    """Check the examples as texts: (level, what, sources)."""
    def name(groups):
        return [" = ".join(e["source"] for e in same[:3]) for same in groups]
    yield "warn", "examples occur more than once", name(data.duplicates(train + val))
    yield "warn", "prompts have contradictory answers", name(data.contradictions(train + val))
    yield "warn", "answers are nearly the same", name(near_copies(train + val))
    trained = {data.prompt_of(e, system=False) for e in train}
    yield "ERROR", "validation prompts are in training too", [
        e["source"] for e in val if data.prompt_of(e, system=False) in trained]
    systems = {e["messages"][0]["content"][:50] for e in train + val
               if e["messages"][0]["role"] == "system"}
    yield "ok", "system prompts", sorted(map(repr, systems))


def near_copies(examples: list[dict], few: int = 12) -> list[list[dict]]:
    """[[an example, a later one with nearly the same last answer]]. It leaves out facts (with a
    group), answers of fewer than few words, and whole repetitions, which have their own line."""
    again = {id(e) for same in data.duplicates(examples) for e in same[1:]}
    answers = [(e, e["messages"][-1]["content"]) for e in examples
               if "group" not in e and id(e) not in again]      # a tool call has no words
    long = [(e, text) for e, text in answers if len(words(text)) >= few]
    pairs = near_duplicates([text for _, text in long], first=True)
    return [[long[i][0], long[j][0]] for i, j, _ in pairs]


def check_tokens(tokenised: dataset.QADataset, tokenizer) -> Iterator[Finding]:
    """Check the examples as token ids: (level, what, sources)."""
    endless, different, elsewhere = [], [], []
    for item in tokenised.items:
        ids, messages, source = [*item["input_ids"]], item["example"]["messages"], item["source"]
        if data.is_text(item["example"]):
            continue                                          # no prompt, no stop token
        labels = [i for i in item["labels"] if i != IGNORE_INDEX]
        if labels[-1] not in tokenised.stop.ids and not tokenizer.decode(labels).endswith(
                tokenised.stop.text or "\0"):
            endless.append(source)
        if source in tokenised.cut:
            continue                                          # fewer turns than its example has
        start = max(t for t, label in enumerate(item["labels"]) if label != IGNORE_INDEX
                    and item["labels"][t - 1] == IGNORE_INDEX)            # of the last answer
        prompts = [dataset.render(messages[:i], tokenizer, tokenised.format, reply=True)[0]
                   for i, message in enumerate(messages) if message["role"] == "assistant"]
        if tokenised.loss_on != "text" and ids[:start] not in prompts:
            different.append(source)
        elif tokenised.format == "template" and prompts[-1] != tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, return_dict=False,
                tools=messages[-1].get("tools")):
            elsewhere.append(source)
    yield "ERROR", "answers end without a supervised stop token", endless
    yield "ERROR", "examples do not start with the prompt that chat sends", different
    yield "warn", ("prompts become other tokens on other servers (white space around an earlier "
                   "answer)"), elsewhere


def count_answers(tokenised: dataset.QADataset) -> int:
    """The answers that are trained: stretches of labels in dialogues."""
    return sum(label != IGNORE_INDEX and before == IGNORE_INDEX for item in tokenised.items
               if not data.is_text(item["example"])
               for before, label in pairwise([IGNORE_INDEX, *item["labels"]]))


def histogram(lengths: list[int], bars: int = 8, width: int = 40) -> None:
    """Print lengths in tokens as bars."""
    low, high = min(lengths), max(lengths)
    step = -(-(high - low + 1) // bars)
    counts = [sum(low + i * step <= n < low + (i + 1) * step for n in lengths) for i in range(bars)]
    for i, n in enumerate(counts):
        if low + i * step <= high:
            bar = "█" * -(-width * n // max(counts))
            print(f"  {low + i * step:5}-{low + (i + 1) * step - 1:<5} {bar} {n}")
    print(f"  tokens: {low} to {high}, median {median(lengths):.0f}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
