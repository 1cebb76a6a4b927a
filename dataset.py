"""
HOW an example becomes labels: render a conversation, mask what the user said, batch.

    python dataset.py                       # two examples of the configured run, in colour:
    python dataset.py --html mask.html 20   # supervised tokens stand out, special ones are visible

The loss covers what the assistant says and the token that ends its turn, nothing else:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    labels: -100 ...                                         Hello!<|im_end|> -100
"""

import argparse
import html
import sys
from array import array
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from os.path import commonprefix
from pathlib import Path

import lora.waiting  # noqa: F401

import torch
from tqdm import tqdm

import data
from lora import base, config, fetch
from lora.flat import flatten
from lora.generate import Stop, generate
from lora.loss import IGNORE_INDEX, Batch

# ----- a conversation in pieces ------------------------------------------------------------------
# A format turns messages into [(text, supervised)]. The pieces joined are the text the model sees.
# With reply=True the pieces end where the assistant's next answer begins: what chat sends.


def chatml(messages, tokenizer, reply=False):
    """ChatML written out by hand: the format to study. Supervised: answer and <|im_end|>."""
    pieces = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces + [("<|im_start|>assistant\n", False)] * reply


def gemma(messages, tokenizer, reply=False):
    """Gemma's turns, for a base model that comes without a template. It has no system turn: that
    text begins the first user's."""
    pieces, before = [], ""
    for message in messages:
        if message["role"] == "system":
            before = message["content"] + "\n\n"
            continue
        answers = message["role"] == "assistant"
        pieces += [(f"<start_of_turn>{'model' if answers else 'user'}\n", False),
                   (f"{before}{message['content']}<end_of_turn>", answers), ("\n", False)]
        before = ""
    return pieces + [("<start_of_turn>model\n", False)] * reply


def plain(messages, tokenizer, reply=False):
    """Questions and answers as a base model may have read them; the end-of-text token ends an
    answer. A prompt ends in Answer:\\n anyway, so reply adds nothing."""
    pieces = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [(content + tokenizer.eos_token, True), ("\n", False)]
        else:
            text = f"{content}\n\n" if role == "system" else f"Question: {content}\nAnswer:\n"
            pieces.append((text, False))
    return pieces


def template(messages, tokenizer, reply=False):
    """The tokenizer's own chat template, so that training renders what vLLM and chat will send.

    Where an answer begins and ends in the rendered text is known by rendering the conversation up
    to it. A template that rewrites earlier turns (Qwen3 drops their thinking) leaves nothing to
    find there: such a turn is not supervised.
    """
    def text(n, prompt):
        try:
            return tokenizer.apply_chat_template(messages[:n], tokenize=False,
                                                 add_generation_prompt=prompt)
        except Exception as error:          # transformers' sandbox, or an error of the template
            raise ValueError(f"the chat template refuses it: {error}") from error

    whole, done, pieces = text(len(messages), reply), 0, []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = text(i, True), text(i + 1, False).rstrip()     # up to "...<|im_end|>"
        if whole.startswith(start) and whole.startswith(end):
            pieces += [(whole[done:len(start)], False), (whole[len(start):len(end)], True)]
            done = len(end)
    return pieces + [(whole[done:], False)]


FORMATS = {"template": template, "chatml": chatml, "gemma": gemma, "plain": plain}


def choose_format(tokenizer, wanted="auto"):
    """The name of the format to use: the model's own template where it has one, else plain."""
    if wanted == "auto":
        wanted = "template" if tokenizer.chat_template else "plain"
    needs = {"template": ("chat_template", "chat template"), "plain": ("eos_token", "eos token")}
    if wanted in needs and not getattr(tokenizer, needs[wanted][0]):
        raise ValueError(f'dataset: format is "{wanted}", but this model has no {needs[wanted][1]}')
    return wanted


def render(messages, tokenizer, format, loss_on="all", reply=False):
    """(ids, mask): token ids and, for each, whether it is supervised. They grow together, a
    piece at a time; nothing is searched for afterwards. Raises ValueError if a message contains
    the text of a special token, or if there would be two BOS tokens."""
    for i, message in enumerate(messages, 1):
        for token in tokenizer.encode(message["content"], add_special_tokens=False):
            if token in special_ids(tokenizer):
                raise ValueError(f"message {i} contains {tokenizer.decode([token])}, a special "
                                 "token of this model")
    pieces = FORMATS[format](messages, tokenizer, reply)
    spoken = [i for i, (_, supervised) in enumerate(pieces) if supervised]
    keep = {"last": spoken[-1:], "text": range(len(pieces))}.get(loss_on, spoken)

    bos, ids, mask, text = tokenizer.bos_token_id, [], [], ""
    if format != "template" and bos in tokenizer("a").input_ids[:1]:
        ids, mask = [bos], [False]                         # a template writes its own BOS
    for i, (piece, _) in enumerate(pieces):
        text += piece
        if i not in spoken and i + 1 < len(pieces) and i + 1 not in spoken:
            continue                                       # what lies between answers is one text
        new = tokenizer.encode(text, add_special_tokens=False)
        ids += new
        mask += [i in keep] * len(new)
        text = ""
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError("the text starts with two BOS tokens: the chat template adds one more")
    return ids, mask


@lru_cache
def special_ids(tokenizer):
    """The ids of all control tokens, named (eos, ...) or not."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def stop_of(tokenizer, format):
    """What ends an answer in this format, for generate(): read off a rendered probe."""
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    pieces = FORMATS[format](probe, tokenizer)
    end = next(text for text, supervised in pieces if supervised).rpartition("ANSWER")[2]
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) == 1:
        return Stop(frozenset({*ids, tokenizer.eos_token_id}))
    if not end:
        raise ValueError("dataset: the chat template ends an answer with nothing the model could "
                         'learn to stop at; set dataset.format to "plain".')
    return Stop(frozenset({tokenizer.eos_token_id}), end, tokenizer.decode)


def end_of_answer(messages, tokenizer, format):
    """Where in the rendered ids the last answer's text ends and what stops it begins."""
    said = render(messages, tokenizer, format, "last")[1]
    stop = tokenizer.encode(stop_of(tokenizer, format).text, add_special_tokens=False)
    return max((t for t, on in enumerate(said) if on), default=-1) + 1 - (len(stop) or 1)


def answer(model, tokenizer, prompts, format, **decoding):
    """[(text, whether it ended)]: the model's answers to prompts (messages, the user's last), in
    the format it was trained in; decoding goes to generate()."""
    made = generate(model, [render(p, tokenizer, format, reply=True)[0] for p in prompts],
                    stop_of(tokenizer, format), **decoding)
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(),
             len(ids) < decoding["max_new_tokens"]) for ids in made]


def notes(tokenizer, format, examples):
    """What a user should know about how this model's text is made, as sentences."""
    sizes = [len(tokenizer.encode(mark, add_special_tokens=False))
             for mark in ("<|im_start|>", "<|im_end|>")]
    if format == "chatml" and sizes != [1, 1]:
        return ['format is "chatml", but this model has no ChatML tokens: <|im_end|> is '
                f'{sizes[1]} tokens it never saw end a turn. "plain" suits a base model better.']
    found, bare = [], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    if format == "template" and sizes == [1, 1]:
        for label, messages in (("the first example", examples[0]["messages"]),
                                ("a dialogue without system prompt", bare)):
            ours, own = ("".join(text for text, _ in write(messages, tokenizer))
                         for write in (chatml, template))
            at = max(0, len(commonprefix([ours, own])) - 12)
            if ours != own:
                found.append(f"the model's template differs from plain ChatML for {label}: it "
                             f"renders {own[at:at + 90]!r}, ChatML {ours[at:at + 40]!r}")
    return found


# ----- examples in tensors -----------------------------------------------------------------------


class QADataset:
    """Tokenised examples: dataset[i] is a dict with input_ids and labels, arrays of t numbers.

    labels repeats input_ids where the loss counts and holds IGNORE_INDEX elsewhere. An example
    longer than max_length tokens is dropped, or with too_long="cut" loses its oldest turns (never
    its system prompt, never a part of an answer). .dropped, .cut and .rewritten (by the template)
    hold sources. An example with "open" was broken off: what ends its last answer is no label.
    Raises ValueError that names every example without anything to learn from.
    """

    def __init__(self, examples, tokenizer, format="auto", *, max_length=512, too_long="drop",
                 loss_on="all"):
        self.format = format = choose_format(tokenizer, format)
        self.items, self.dropped, self.cut, self.rewritten = [], [], [], []
        problems = []
        for example in tqdm(examples, "tokenising", unit="example", disable=len(examples) < 2000):
            messages, source = example["messages"], example["source"]
            try:
                ids, mask = render(messages, tokenizer, format, loss_on)
                while len(ids) > max_length and too_long == "cut":
                    first = int(messages[0]["role"] == "system")
                    if len(messages) < first + 4:              # only one exchange is left
                        break
                    messages = messages[:first] + messages[first + 2:]
                    ids, mask = render(messages, tokenizer, format, loss_on)
            except ValueError as error:
                problems.append(f"{source}: {error}")
                continue
            if len(ids) > max_length:
                self.dropped.append(source)
                continue
            if messages is not example["messages"]:
                self.cut.append(source)
            if example.get("open"):                            # its end was never said: no label
                end = end_of_answer(messages, tokenizer, format)
                mask[end:] = [False] * (len(mask) - end)
            if not any(mask[1:]):
                problems.append(f"{source}: no supervised token: nothing to learn from")
                continue
            turns = {"last": 1, "text": 0}.get(loss_on, sum(m["role"] == "assistant"
                                                            for m in messages))
            if sum(b > a for a, b in zip(mask, mask[1:], strict=False)) < turns:
                self.rewritten.append(source)
            labels = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]
            self.items.append({"input_ids": array("i", ids), "labels": array("i", labels),
                               "source": source, "example": example})
        if not self.items and not problems:
            problems.append(f"no example fits in max_length={max_length}; raise dataset.max_length")
        if problems:
            raise ValueError("\n".join(f"dataset: {p}" for p in problems))
        self.stop = stop_of(tokenizer, format)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def add(self, other):
        """The examples of another QADataset after these."""
        self.items += other.items

    def left_out(self):
        """Sentences about the examples that were dropped, cut, or only partly supervised."""
        kinds = (("dropped: longer than max_length", self.dropped),
                 ("cut to max_length, oldest turns first", self.cut),
                 ("with answers the template rewrites: not supervised", self.rewritten))
        return [f"{len(sources)} {what}: {', '.join(sources[:5])}{', ...' * (len(sources) > 5)}"
                for what, sources in kinds if sources]


def collate(items, pad_id, device="cpu"):
    """A Batch padded on the right to (b, t). The pad token may be any token, the stop token too:
    what is padding is said by the mask, and padding is never a label."""
    t = max(len(item["input_ids"]) for item in items)

    def padded(rows, filler):
        return torch.tensor([[*row, *[filler] * (t - len(row))] for row in rows], device=device)
    mask = padded([[1] * len(item["input_ids"]) for item in items], 0)
    labels = padded([item["labels"][1:] for item in items], IGNORE_INDEX)   # of the next token
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return Batch({"input_ids": padded([item["input_ids"] for item in items], pad_id),
                  "attention_mask": mask}, rows, labels.flatten()[rows])


def micro_batches(items, size, pad_id, device="cpu", layout="padded"):
    """The examples of one step in batches of at most size, sorted by length, so that little is
    padded; or flat, with or without shared prefixes (lora/flat.py). How they are split changes
    memory and speed, never the step's loss."""
    rows = sorted(items, key=lambda item: len(item["input_ids"]))
    parts = [rows[i:i + size] for i in range(0, len(rows), size)]
    if layout == "padded":
        return [collate(part, pad_id, device) for part in parts]
    return [flatten(part, device, share=layout == "shared") for part in parts]


# ----- looking at the mask -----------------------------------------------------------------------


def runs(item, tokenizer):
    """[(text, supervised, special)]: neighbours of one kind are decoded together, for one
    character may be several tokens."""
    pairs = zip(item["input_ids"], item["labels"], strict=True)
    return [(tokenizer.decode([i for i, _ in group]).replace("\n", "⏎\n"), *kind)
            for kind, group in groupby(
                pairs, key=lambda p: (p[1] != IGNORE_INDEX, p[0] in special_ids(tokenizer)))]


def colour(item, tokenizer):
    """One example for a terminal: supervised tokens green, special tokens underlined."""
    return "".join(f"\033[{'1;32' if on else '90'}{';4' * special}m{text}\033[0m"
                   for text, on, special in runs(item, tokenizer))


def page(dataset, tokenizer):
    """The same for a browser, self-contained; every text is escaped."""
    rows = []
    for item in dataset.items:
        spans = "".join(f'<span class="{"on " * on}{"special" * sp}">{html.escape(text)}</span>'
                        for text, on, sp in runs(item, tokenizer))
        supervised = sum(label != IGNORE_INDEX for label in item["labels"])
        rows.append(f"<h2>{html.escape(item['source'])} <small>{supervised} of "
                    f"{len(item['labels'])} tokens supervised</small></h2><pre>{spans}</pre>")
    return PAGE + "\n".join(rows)


PAGE = """<!doctype html><meta charset="utf-8"><title>Supervised tokens</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui; max-width: 60rem; margin: 2rem auto }
body { padding: 0 1rem } h2 { font-size: 1rem } small { font-weight: 400; opacity: .7 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; border: 1px solid #8886 }
.on { background: #2e9d5a40; box-shadow: inset 0 -2px #2e9d5a }
.special { border: 1px dotted #888; font-size: .85em; margin: 0 1px }
</style>
<h1>Supervised tokens</h1>
<p><span class="on">The loss covers these</span> and no others; <span class="special">special
tokens</span> are framed; ⏎ is a line break.</p>
"""


def main(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("n", nargs="?", type=int, default=2)
    parser.add_argument("--html")
    asked, rest = parser.parse_known_args(argv)
    settings = config.take_config(rest)
    tokenizer = base.load_tokenizer(fetch.find(settings.model.name),
                                    settings.model.trust_remote_code)
    examples, _ = data.load(**asdict(settings.data), seed=settings.train.seed)
    dataset = QADataset(examples[:asked.n], tokenizer, **asdict(settings.dataset))
    if asked.html:
        Path(asked.html).write_text(page(dataset, tokenizer), encoding="utf-8")
        print(f"dataset: {len(dataset)} examples -> {asked.html}")
    for item in [] if asked.html else dataset.items:
        print(f"--- {item['source']} ({dataset.format})\n{colour(item, tokenizer)}")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
