"""
Look at the data before training on it: counts, lengths, masks, duplicates, leaks.

    python -m scripts.doctor                         # what config.json would train on
    python -m scripts.doctor --data.path=my.jsonl    # exit code 1 if something is wrong
"""

import sys
from dataclasses import asdict
from statistics import median

import data
import dataset
from lora import advice, base, config, fetch
from lora.loss import IGNORE_INDEX
from lora.text import near_duplicates, words


def main(argv):
    settings = config.take_config(argv)
    tokenizer = base.load_tokenizer(fetch.find(settings.model.name),
                                    settings.model.trust_remote_code)
    train, val = data.load(**asdict(settings.data), seed=settings.train.seed)
    made = dataset.QADataset(train + val, tokenizer, **asdict(settings.dataset))
    print(f"\ndoctor: {settings.model.name}, format {made.format}: {len(train)} training and "
          f"{len(val)} validation examples")
    histogram([len(item["input_ids"]) for item in made.items])
    levels = []
    for level, what, sources in [*texts(train, val), *tokens(made, tokenizer)]:
        levels.append(level if sources else "ok")
        print(f"  {levels[-1]:5}  {len(sources)} {what}" + ": " * bool(sources)
              + "; ".join(sources[:5]) + "; ..." * (len(sources) > 5))
    for sentence in advice.about_data(settings.train, train, val):
        levels.append("warn")
        print(f"  warn   {sentence}")
    for note in [*made.left_out(), *dataset.notes(tokenizer, made.format, train)]:
        print(f"  note   {note}")
    print(f"\nfirst example, supervised tokens in green ({made[0]['source']}):\n"
          + dataset.colour(made[0], tokenizer))
    print(f"\ndoctor: {levels.count('ERROR')} errors, {levels.count('warn')} warnings")
    return int("ERROR" in levels)


def texts(train, val):
    """(level, what, sources) about the examples as texts."""
    def name(groups):
        return [" = ".join(e["source"] for e in same[:3]) for same in groups]
    yield "warn", "examples occur more than once", name(data.duplicates(train + val))
    yield "warn", "prompts have contradictory answers", name(data.contradictions(train + val))
    yield "warn", "answers are nearly the same", name(copies(train + val))
    asked = {data.prompt_of(e, system=False) for e in train}
    yield "ERROR", "validation prompts are in training too", [
        e["source"] for e in val if data.prompt_of(e, system=False) in asked]
    systems = {e["messages"][0]["content"][:50] for e in train + val
               if e["messages"][0]["role"] == "system"}
    yield "ok", "system prompts", sorted(map(repr, systems))


def copies(examples, few=12):
    """[[an example, a later one with nearly the same last answer]]. Facts (with a group), answers
    of a few words and whole repetitions, which have a line of their own, are left out."""
    again = {id(e) for same in data.duplicates(examples) for e in same[1:]}
    said = [(e, e["messages"][-1]["content"]) for e in examples
            if "group" not in e and id(e) not in again]
    long = [(e, text) for e, text in said if len(words(text)) >= few]
    pairs = near_duplicates([text for _, text in long], first=True)
    return [[long[i][0], long[j][0]] for i, j, _ in pairs]


def tokens(made, tokenizer):
    """(level, what, sources) about the examples as token ids."""
    endless, different, elsewhere = [], [], []
    for item in made.items:
        ids, messages, source = [*item["input_ids"]], item["example"]["messages"], item["source"]
        spoken = [i for i in item["labels"] if i != IGNORE_INDEX]
        if spoken[-1] not in made.stop.ids and not tokenizer.decode(spoken).endswith(
                made.stop.text or "\0"):
            endless.append(source)
        if source in made.cut:
            continue                                          # fewer turns than its example has
        prompt, _ = dataset.render(messages[:-1], tokenizer, made.format, reply=True)
        if ids[:len(prompt)] != prompt or item["labels"][len(prompt)] == IGNORE_INDEX:
            different.append(source)
        elif made.format == "template" and prompt != tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, return_dict=False):
            elsewhere.append(source)
    yield "ERROR", "answers end without a supervised stop token", endless
    yield "ERROR", "examples do not start with the prompt that chat sends", different
    yield "warn", "prompts that other servers will split otherwise (white space around an " \
        "earlier answer)", elsewhere


def histogram(lengths, bars=8, width=40):
    """Lengths in tokens as bars in the terminal."""
    low, high = min(lengths), max(lengths)
    step = -(-(high - low + 1) // bars)
    counts = [sum(low + i * step <= n < low + (i + 1) * step for n in lengths) for i in range(bars)]
    for i, n in enumerate(counts):
        if low + i * step <= high:
            bar = "█" * -(-width * n // max(counts))
            print(f"  {low + i * step:5}-{low + (i + 1) * step - 1:<5} {bar} {n}")
    print(f"  tokens: {low} to {high}, median {median(lengths):.0f}")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
