"""
HOW an example becomes labels: render a conversation, mask what the user said, batch.

    python dataset.py                             # two examples of the configured run, in colour
    python dataset.py my.jsonl --n 20 --html mask.html  # supervised tokens stand out in a browser

The loss covers what the assistant says and the token that ends its turn, nothing else:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    labels: -100 ...                                         Hello!<|im_end|> -100
"""

import math
import random
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import lora.fast.waiting  # noqa: F401

import torch
from tqdm import tqdm

import data
from lora import config
from lora.base import fetch, formats, load, templates
from lora.base.formats import FORMATS, choose_format, stop_of
from lora.fast.flat import SHORTEST, flatten
from lora.loss import IGNORE_INDEX, Batch
from lora.read.messages import listed, unwritten
from lora.run import cli, parallel, runlog, tokens
from lora.use import show

# ----- a conversation in tokens ------------------------------------------------------------------


def render(messages: list[dict], tokenizer, format: str, loss_on: str = "all",
           reply: bool = False) -> tuple[list[int], list[bool]]:
    """Return (ids, mask) of samples(), the last one; with reply, the ids that chat sends.

    >>> class Letters:                    # a tokenizer: a character is a token, "." ends an answer
    ...     added_tokens_decoder, bos_token_id, eos_token = {}, None, "."
    ...     def __call__(self, texts, add_special_tokens):
    ...         self.input_ids = [[ord(letter) for letter in text] for text in texts]
    ...         return self
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> ids, mask = render(messages, Letters(), "plain")
    >>> "".join(chr(i) for i in ids), "".join("x" if on else "-" for on in mask)
    ('Question: Hi\\nAnswer:\\nYo.\\n', '---------------------xxx-')
    """
    if not reply:
        return samples(messages, tokenizer, format, loss_on)[-1]
    formats.check(messages, tokenizer, format)
    text = "".join(text for text, _ in FORMATS[format](messages, tokenizer, reply=True))
    (ids,) = formats.encode([text], tokenizer)
    return formats.with_bos(ids, [False] * len(ids), tokenizer, format)


def samples(messages: list[dict], tokenizer, format: str, loss_on: str = "all"
            ) -> list[tuple[list[int], list[bool]]]:
    """Return [(ids, mask)]: the token ids and, for each, whether it is supervised: "all" answers,
    the "last" one or the whole "text". A conversation is one sample; where the template rewrites
    earlier answers, each has a sample of its own behind exactly the prompt that chat sends there.
    A plain text (one message of the role text) is supervised whole, in any format.
    Raises ValueError if a message contains the text of a special token, or if there would be two
    BOS tokens."""
    formats.check(messages, tokenizer, format)
    if messages[0]["role"] == "text":
        return [formats.continuation(messages[0]["content"], tokenizer)]
    if loss_on == "text":
        whole = "".join(text for text, _ in FORMATS[format](messages, tokenizer))
        encoded = _encode([(whole, True)], tokenizer)
    else:
        conversations = (templates.samples(messages, tokenizer) if format == "template"
                         else [FORMATS[format](messages, tokenizer)])
        encoded = [sample for pieces in conversations for sample in _encode(pieces, tokenizer)]
    if loss_on == "last":
        ids, mask = encoded[-1]
        end = max((t + 1 for t, on in enumerate(mask) if on), default=0)
        start = max((t + 1 for t, on in enumerate(mask[:end]) if not on), default=0)
        encoded = [(ids, [start <= t < end for t in range(len(ids))])]
    return [formats.with_bos(ids, mask, tokenizer, format) for ids, mask in encoded]


def _pieces(ids, mask, max_length):
    """Cut a plain text into samples; each begins, unlabelled, with the last token before it."""
    step = max(1, max_length - 1)
    return [(ids[at:at + step + 1], [False, *mask[at + 1:at + step + 1]])
            for at in range(0, len(ids) - 1, step)]


def _encode(pieces, tokenizer):
    """Return [(ids, mask)] of a text in pieces: the ids of the whole text, if the text up to each
    answer's start and end has the same alone. SentencePiece writes another first token for a piece
    than inside a text. Where the ids differ, every answer is a sample behind the prompt's ids."""
    texts = ["".join(text for text, _ in group)
             for _, group in groupby(pieces, key=lambda piece: piece[1])]
    marks = [on for on, _ in groupby(pieces, key=lambda piece: piece[1])]
    whole, *alone = formats.encode(["".join(texts), *texts], tokenizer)
    if [token for ids in alone for token in ids] == whole:
        return [(whole, [on for ids, on in zip(alone, marks, strict=True) for _ in ids])]
    mask, apart, whole_fits, start = [], [], True, []
    upto = formats.encode(["".join(texts[:n]) for n in range(1, len(texts) + 1)], tokenizer)
    for ids, part, on in zip(upto, alone, marks, strict=True):
        if on:
            answer = ids[len(start):] if ids[:len(start)] == start else part
            apart.append((start + answer, [False] * len(start) + [True] * len(answer)))
        whole_fits = whole_fits and ids == whole[:len(ids)]
        mask += [on] * (len(ids) - len(mask))
        start = ids
    return [(whole, mask)] if whole_fits else apart


# ----- examples in tensors -----------------------------------------------------------------------

QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""       # repr() of a text: problems differ there


class QADataset:
    """Tokenised examples: dataset[i] is a dict with input_ids and labels, arrays of t numbers.

    labels repeats input_ids where the loss counts and holds IGNORE_INDEX elsewhere. An example
    longer than max_length tokens is dropped, or with too_long="cut" loses its oldest turns (never
    its system prompt, never a part of an answer); a plain text is cut into pieces. examples are
    those with an item: one each, or one for each answer (see samples()). An example with "open" was
    broken off: what ends its last answer is no label. found: what lora/run/tokens.py has kept of
    them. Raises ValueError that names the examples with nothing to learn from."""

    def __init__(self, examples: list[dict], tokenizer, format: str = "auto", *,
                 max_length: int = 512, too_long: str = "drop", loss_on: str = "all",
                 found: tuple | None = None, key: str = ""):
        self.tokenizer, self.format = tokenizer, choose_format(tokenizer, format)
        self.max_length, self.too_long, self.loss_on, self.key = max_length, too_long, loss_on, key
        self.items, self.examples, notes = found or ([], [], {name: [] for name in tokens.NOTES})
        vars(self).update(notes)                               # self.dropped and so on
        problems, examples = {}, [] if found else examples
        for example in tqdm(examples, "tokenising", unit="example",
                            disable=len(examples) < tokens.LEAST):
            try:
                self._add(example)
            except ValueError as error:
                kind = re.sub(QUOTED, "", str(error))
                problems.setdefault(kind, (str(error), []))[1].append(example["source"])
        if not self.items and not problems:
            problems[""] = (f"no example fits in max_length={max_length}; raise "
                            "dataset.max_length", [])
        if problems:
            raise ValueError("\n".join(
                f"dataset: {listed(sources)}: {problem}" if sources else f"dataset: {problem}"
                for problem, sources in problems.values()))
        self.stop = stop_of(tokenizer, self.format)

    def _add(self, example):
        """Append the samples of an example that fit; note what does not, or is not trained."""
        messages, source = example["messages"], example["source"]
        first, can_cut = int(messages[0]["role"] == "system"), self.too_long == "cut"
        found = samples(messages, self.tokenizer, self.format, self.loss_on)
        turns = [i for i, m in enumerate(messages) if m["role"] == "user"]
        while can_cut and len(found[-1][0]) > self.max_length and len(turns) > 1:
            messages = example["messages"][:first] + example["messages"][turns[1]:]
            turns = turns[1:]
            found = samples(messages, self.tokenizer, self.format, self.loss_on)
        if data.is_text(example):
            found = _pieces(*found[0], self.max_length)
            self.in_pieces += [source] if len(found) > 1 else []
        else:
            self._look_for_texts(messages, found, source)
            self.split += [source] if len(found) > 1 else []
        if example.get("open"):                                # its end is unknown: no label
            found[-1] = self._without_end(messages, *found[-1])
        if not all(any(mask[1:]) for _, mask in found):
            raise ValueError("no supervised token: nothing to learn from")
        fits = [(ids, mask) for ids, mask in found if len(ids) <= self.max_length]
        self.dropped += [source] * (len(found) - len(fits))
        self.examples += [example] if fits else []
        if fits and messages is not example["messages"]:
            self.cut.append(source)
        for ids, mask in fits:
            labels = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]
            self.items.append({"input_ids": array("i", ids), "labels": array("i", labels),
                               "source": source, "example": example})

    def _look_for_texts(self, messages, found, source):
        """Note text and tools that the format does not write. Raises ValueError for tool calls."""
        pairs = [pair for ids, mask in found for pair in zip(ids, mask, strict=True)]
        calls = any("tool_calls" in message for message in messages)
        lost = unwritten(messages, self.tokenizer.decode([i for i, _ in pairs]),
                         self.tokenizer.decode([i for i, on in pairs if on and calls]))
        if lost.calls and self.loss_on == "all":
            raise ValueError(f"the chat template does not write the tool call {lost.calls[0]!r}; "
                             "take a model whose template does, or leave tool calls out")
        self.left_out += [source] if lost.texts else []
        self.no_tools += [source] if lost.tools else []

    def _without_end(self, messages, ids, mask):
        """A sample without labels from where its last answer's end begins."""
        _, last = render(messages, self.tokenizer, self.format, "last")
        end = self.tokenizer.encode(formats.end_of_answer(self.tokenizer, self.format),
                                    add_special_tokens=False)
        stop = max((t + 1 for t, on in enumerate(last) if on), default=0) - len(end)
        return ids, [on and t < stop for t, on in enumerate(mask)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.items[i]

    def notes(self) -> list[str]:
        """Return sentences about what was dropped, cut, split, or is not in the text."""
        with_system = [e["source"] for e in self.examples if e["messages"][0]["role"] == "system"]
        in_user = self.format == "template" and templates.has_no_system_turn(self.tokenizer)
        eos_ends = [e["source"] for e in self.examples if self.format == "template"
                    and not templates.frame(self.tokenizer).known]
        kinds = (("dropped: longer than max_length", self.dropped),
                 ("cut to max_length, oldest turns first", self.cut),
                 ("with a sample for each answer: the chat template rewrites earlier ones",
                  self.split),
                 ("with text that the chat template does not write", self.left_out),
                 (f'with tools that the format "{self.format}" does not write', self.no_tools),
                 ("cut into pieces of max_length tokens", self.in_pieces),
                 ("whose system prompt begins the first user's turn: the chat template has no turn "
                  "for it", with_system if in_user else []),
                 (f"whose answers end in {self.tokenizer.eos_token}, the end of text: the chat "
                  "template writes no other end", eos_ends))
        return [f"{len(sources)} {what}: {listed(sources)}" for what, sources in kinds if sources]


def tokenise(examples: list[dict], tokenizer, s: config.DatasetConfig,
             kept: Callable = lambda key: None) -> QADataset:
    """Return the QADataset that the dataset section of config.json describes. kept(key) returns
    what a run to resume has kept of it; the QADataset's key says what the tokens depend on."""
    key = "" if len(examples) < tokens.LEAST else runlog.digest(
        [[e["messages"] for e in examples], tokenizer.chat_template, tokenizer.get_vocab(),
         s.format, s.max_length, s.too_long, s.loss_on])
    return QADataset(examples, tokenizer, s.format, max_length=s.max_length, too_long=s.too_long,
                     loss_on=s.loss_on, found=kept(key) if key else None, key=key)


def collate(items: list[dict], pad_id: int, device="cpu") -> Batch:
    """Pad items on the right to one Batch of (b, t). The pad token may be any token, the stop token
    too: the attention mask says what is padding, and padding is never a label.

    >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    ...                  {"input_ids": [5, 8], "labels": [-100, 8]}], pad_id=0)
    >>> [batch.inputs[name].tolist() for name in ("input_ids", "attention_mask")]
    [[[5, 6, 7], [5, 8, 0]], [[1, 1, 1], [1, 1, 0]]]
    >>> batch.rows.tolist(), batch.targets.tolist()    # of six positions, 0, 1 and 3 predict
    ([0, 1, 3], [6, 7, 8])
    """
    t = max(len(item["input_ids"]) for item in items)

    def padded(rows, filler):
        return torch.tensor([[*row, *[filler] * (t - len(row))] for row in rows], device=device)
    mask = padded([[1] * len(item["input_ids"]) for item in items], 0)
    labels = padded([item["labels"][1:] for item in items], IGNORE_INDEX)   # of the next token
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return Batch({"input_ids": padded([item["input_ids"] for item in items], pad_id),
                  "attention_mask": mask}, rows, labels.flatten()[rows])


def micro_batches(items: list[dict], size: int, pad_id: int, device="cpu",
                  layout: str = "padded") -> list[Batch]:
    """Split the examples of one step into batches of at most size, sorted by length so that little
    is padded; or flat, with or without shared beginnings (lora/fast/flat.py), then sorted so that
    these are together. The split changes memory and speed, never the step's loss."""
    rows = sorted(items, key=lambda item: item["input_ids"] if layout == "shared"
                  else len(item["input_ids"]))
    parts = [rows[i:i + size] for i in range(0, len(rows), size)]
    if layout == "padded":
        return [collate(part, pad_id, device) for part in parts]
    return [flatten(part, device, SHORTEST if layout == "shared" else 0) for part in parts]


@dataclass
class Batches:
    """How a run turns examples into batches; pad_id, device and layout as in micro_batches()."""

    pad_id: int
    device: str | torch.device
    layout: str
    lean: bool                    # the head computes labelled positions only (lora/loss.py)
    size: int                     # examples per micro-batch; lack of memory halves it
    from_base: Callable           # whether an item is learned from the base's own probabilities
    can_halve: bool = True        # False: all processes must take equally many micro-batches

    def __call__(self, items: list[dict]) -> list[Batch]:
        return micro_batches(items, self.size, self.pad_id, self.device, self.layout)

    def of_step(self, window: list[dict]) -> list[tuple[Batch, bool, int]]:
        """Return [(batch, taught by the base, weight)]: this process's share of a step's examples.
        Every process runs equally many forwards, as a sharded base needs: one with fewer batches
        repeats a sample with weight 0, which changes nothing."""
        batches = []
        for taught in (False, True):
            items = [item for item in window if self.from_base(item) == taught]
            mine = self(parallel.mine(items))
            n_first = len(items[::parallel.world()])               # of the first process: the most
            batches += [(batch, taught, 1) for batch in mine]
            if n_spare := math.ceil(n_first / self.size) - len(mine):
                (spare,) = self(items[:1])
                batches += [(spare, taught, 0)] * n_spare
        return batches


def windows(pools: list[tuple[list[int], int]], batch_size: int, epochs: float,
            max_steps: int | None, seed: int, of: Sequence = range(2**63 - 1),
            ) -> list[tuple[int, list[int]]]:
    """Return [(epoch, indices of examples)], one for each step.

    pools are (indices, how many of them an epoch takes); a pool that is not taken whole goes on
    where the last epoch left it. An epoch's order depends on seed and epoch alone. Its last,
    shorter, window is a step like the others. Neighbours i, j with of[i] == of[j] stay together.

    >>> windows([([0, 1, 2], 3)], batch_size=2, epochs=2, max_steps=None, seed=0)
    [(0, [0, 1]), (0, [2]), (1, [2, 1]), (1, [0])]
    """
    n = sum(count for _, count in pools)
    per_epoch = math.ceil(n / batch_size)
    total, plan = max_steps or max(1, round(epochs * per_epoch)), []
    for epoch in range(math.ceil(total / per_epoch)):
        order = [indices[(epoch * count + i) % len(indices)]
                 for indices, count in pools for i in range(count)]
        units = [[*unit] for _, unit in groupby(order, of.__getitem__)]
        random.Random(f"{seed} epoch {epoch}").shuffle(units)
        order = [i for unit in units for i in unit]
        plan += [(epoch, order[i:i + batch_size]) for i in range(0, n, batch_size)]
    return plan[:total]


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__, settings=True, file=True)
    parser.add_argument("--n", type=int, default=2, help="examples to show")
    parser.add_argument("--html", metavar="PAGE", help="write them to an HTML page")
    options = parser.parse_args(argv)
    settings = cli.settings_of(options)
    tokenizer = load.configured_tokenizer(fetch.find(settings.model.name), settings)
    examples, _ = data.load(**asdict(settings.data), seed=settings.train.seed)
    dataset = tokenise(examples[:options.n], tokenizer, settings.dataset)
    if options.html:
        Path(options.html).write_text(show.page(dataset.items, tokenizer), encoding="utf-8")
        print(f"dataset: {len(dataset)} examples -> {options.html}")
    for item in [] if options.html else dataset.items:
        print(f"--- {item['source']} ({dataset.format})\n{show.colour(item, tokenizer)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
