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
import sys
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import lora.fast.waiting  # noqa: F401

import torch
from tqdm import tqdm

import data
from lora.base import fetch, load
from lora.fast.flat import flatten
from lora.generate import Stop
from lora.loss import IGNORE_INDEX, Batch
from lora.run import cli, parallel
from lora.use import show

# ----- a conversation in pieces ------------------------------------------------------------------
# A format turns messages into pieces [(text, supervised)]; joined they are what the model reads.
# With reply=True the pieces end where the assistant's next answer begins: what chat sends.


def chatml(messages: list[dict], tokenizer, reply: bool = False) -> list[tuple[str, bool]]:
    """Write ChatML by hand: the format to study. Supervised: the answer and <|im_end|>."""
    pieces = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces + ([("<|im_start|>assistant\n", False)] if reply else [])


def gemma(messages: list[dict], tokenizer, reply: bool = False) -> list[tuple[str, bool]]:
    """Write Gemma's turns, for a base model that comes without a template. Gemma has no system
    turn: its text begins the first user's."""
    pieces, before = [], ""
    for message in messages:
        if message["role"] == "system":
            before = message["content"] + "\n\n"
            continue
        is_answer = message["role"] == "assistant"
        pieces += [(f"<start_of_turn>{'model' if is_answer else 'user'}\n", False),
                   (f"{before}{message['content']}<end_of_turn>", is_answer), ("\n", False)]
        before = ""
    return pieces + ([("<start_of_turn>model\n", False)] if reply else [])


def plain(messages: list[dict], tokenizer, reply: bool = False) -> list[tuple[str, bool]]:
    """Write questions and answers as a base model may have read them; the end-of-text token ends
    an answer. A prompt ends in Answer:\\n anyway, so reply adds nothing."""
    pieces = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [(content + tokenizer.eos_token, True), ("\n", False)]
        else:
            text = f"{content}\n\n" if role == "system" else f"Question: {content}\nAnswer:\n"
            pieces.append((text, False))
    return pieces


def template(messages: list[dict], tokenizer, reply: bool = False) -> list[tuple[str, bool]]:
    """Render with the tokenizer's chat template, so that training reads what vLLM and chat send.

    The conversation rendered up to an answer shows where that answer begins. A turn that the
    template rewrites later (Qwen3 drops its thinking) is not supervised. Raises ValueError if the
    template refuses the messages."""
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


def choose_format(tokenizer, format: str = "auto") -> str:
    """Return the format to use; "auto" is the model's template where it has one, else plain."""
    if format == "auto":
        format = "template" if tokenizer.chat_template else "plain"
    needs = {"template": ("chat_template", "chat template"), "plain": ("eos_token", "eos token")}
    if format in needs and not getattr(tokenizer, needs[format][0]):
        raise ValueError(f'dataset: format is "{format}", but this model has no {needs[format][1]}')
    return format


def render(messages: list[dict], tokenizer, format: str, loss_on: str = "all",
           reply: bool = False) -> tuple[list[int], list[bool]]:
    """Return (ids, mask): the token ids and, for each, whether it is supervised. They grow
    together, a piece at a time; nothing is searched for afterwards. loss_on is "all" answers, the
    "last" one or the whole "text". Raises ValueError if a message contains the text of a special
    token, or if there would be two BOS tokens.

    >>> class Letters:                    # a tokenizer: a character is a token, "." ends an answer
    ...     added_tokens_decoder, bos_token_id, eos_token = {}, None, "."
    ...     def encode(self, text, add_special_tokens): return [ord(letter) for letter in text]
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> ids, mask = render(messages, Letters(), "plain")
    >>> "".join(chr(i) for i in ids), "".join("x" if on else "-" for on in mask)
    ('Question: Hi\\nAnswer:\\nYo.\\n', '---------------------xxx-')
    """
    for i, message in enumerate(messages, 1):
        for token in tokenizer.encode(message["content"], add_special_tokens=False):
            if token in special_ids(tokenizer):
                raise ValueError(f"message {i} contains {tokenizer.decode([token])}, a special "
                                 "token of this model")
    pieces = FORMATS[format](messages, tokenizer, reply)
    spoken = [i for i, (_, supervised) in enumerate(pieces) if supervised]
    keep = {"last": spoken[-1:], "text": range(len(pieces))}.get(loss_on, spoken)

    bos, ids, mask, text = tokenizer.bos_token_id, [], [], ""
    if format != "template" and bos is not None and bos in tokenizer("a").input_ids[:1]:
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
def special_ids(tokenizer) -> set[int]:
    """Return the ids of all control tokens, named (eos, ...) or not."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def stop_of(tokenizer, format: str) -> Stop:
    """Return what ends an answer in this format, for generate(), as a rendered probe shows it.
    Raises ValueError if nothing does."""
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


def end_of_answer(messages: list[dict], tokenizer, format: str) -> int:
    """Return the index in the rendered ids where the last answer ends and its stop begins."""
    _, mask = render(messages, tokenizer, format, "last")
    stop = tokenizer.encode(stop_of(tokenizer, format).text, add_special_tokens=False)
    return max([t + 1 for t, on in enumerate(mask) if on], default=0) - max(1, len(stop))


# ----- examples in tensors -----------------------------------------------------------------------


class QADataset:
    """Tokenised examples: dataset[i] is a dict with input_ids and labels, arrays of t numbers.

    labels repeats input_ids where the loss counts and holds IGNORE_INDEX elsewhere. An example
    longer than max_length tokens is dropped, or with too_long="cut" loses its oldest turns (never
    its system prompt, never a part of an answer). .dropped, .cut and .rewritten (by the template)
    hold sources. An example with "open" was broken off: what ends its last answer is no label.
    Raises ValueError that names every example without anything to learn from."""

    def __init__(self, examples: list[dict], tokenizer, format: str = "auto", *,
                 max_length: int = 512, too_long: str = "drop", loss_on: str = "all"):
        self.tokenizer, self.format = tokenizer, choose_format(tokenizer, format)
        self.max_length, self.too_long, self.loss_on = max_length, too_long, loss_on
        self.items, self.dropped, self.cut, self.rewritten = [], [], [], []
        problems = []
        for example in tqdm(examples, "tokenising", unit="example", disable=len(examples) < 2000):
            try:
                messages, ids, mask = self._shortened(example["messages"])
            except ValueError as error:
                problems.append(f"{example['source']}: {error}")
                continue
            if len(ids) > max_length:
                self.dropped.append(example["source"])
            elif not self._add(example, messages, ids, mask):
                problems.append(f"{example['source']}: no supervised token: nothing to learn from")
        if not self.items and not problems:
            problems.append(f"no example fits in max_length={max_length}; raise dataset.max_length")
        if problems:
            raise ValueError("\n".join(f"dataset: {p}" for p in problems))
        self.stop = stop_of(tokenizer, self.format)

    def _shortened(self, messages):
        """Return (messages, ids, mask), with too_long="cut" without the oldest turns."""
        first, can_cut = int(messages[0]["role"] == "system"), self.too_long == "cut"
        ids, mask = render(messages, self.tokenizer, self.format, self.loss_on)
        while can_cut and len(ids) > self.max_length and len(messages) >= first + 4:
            messages = messages[:first] + messages[first + 2:]
            ids, mask = render(messages, self.tokenizer, self.format, self.loss_on)
        return messages, ids, mask

    def _add(self, example, messages, ids, mask):
        """Append an item; return whether it has any label to learn from."""
        if messages is not example["messages"]:
            self.cut.append(example["source"])
        if example.get("open"):                                # its end is unknown: no label
            end = end_of_answer(messages, self.tokenizer, self.format)
            mask = [on and t < end for t, on in enumerate(mask)]
        n_answers = sum(message["role"] == "assistant" for message in messages)
        n_starts = sum(on and not before for before, on in pairwise(mask))
        if n_starts < {"last": 1, "text": 0}.get(self.loss_on, n_answers):
            self.rewritten.append(example["source"])
        labels = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]
        self.items.append({"input_ids": array("i", ids), "labels": array("i", labels),
                           "source": example["source"], "example": example})
        return any(mask[1:])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.items[i]

    def left_out(self) -> list[str]:
        """Return sentences about the examples that were dropped, cut, or only partly supervised."""
        kinds = (("dropped: longer than max_length", self.dropped),
                 ("cut to max_length, oldest turns first", self.cut),
                 ("with answers the template rewrites: not supervised", self.rewritten))
        return [f"{len(sources)} {what}: {', '.join(sources[:5])}"
                + (", ..." if len(sources) > 5 else "") for what, sources in kinds if sources]


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
    is padded; or flat, with or without shared prefixes (lora/fast/flat.py). The split changes
    memory and speed, never the step's loss."""
    rows = sorted(items, key=lambda item: len(item["input_ids"]))
    parts = [rows[i:i + size] for i in range(0, len(rows), size)]
    if layout == "padded":
        return [collate(part, pad_id, device) for part in parts]
    return [flatten(part, device, share=layout == "shared") for part in parts]


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
            max_steps: int | None, seed: int) -> list[tuple[int, list[int]]]:
    """Return [(epoch, indices of examples)], one for each step.

    pools are (indices, how many of them an epoch takes); a pool that is not taken whole goes on
    where the last epoch left it. An epoch's order depends on seed and epoch alone. Its last,
    shorter, window is a step like the others.

    >>> windows([([0, 1, 2], 3)], batch_size=2, epochs=2, max_steps=None, seed=0)
    [(0, [0, 1]), (0, [2]), (1, [2, 1]), (1, [0])]
    """
    n = sum(count for _, count in pools)
    per_epoch = math.ceil(n / batch_size)
    total, plan = max_steps or max(1, round(epochs * per_epoch)), []
    for epoch in range(math.ceil(total / per_epoch)):
        order = [indices[(epoch * count + i) % len(indices)]
                 for indices, count in pools for i in range(count)]
        random.Random(f"{seed} epoch {epoch}").shuffle(order)
        plan += [(epoch, order[i:i + batch_size]) for i in range(0, n, batch_size)]
    return plan[:total]


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__, settings=True, file=True)
    parser.add_argument("--n", type=int, default=2, help="examples to show")
    parser.add_argument("--html", metavar="PAGE", help="write them to an HTML page")
    options = parser.parse_args(argv)
    settings = cli.settings_of(options)
    tokenizer = load.load_tokenizer(fetch.find(settings.model.name),
                                    settings.model.trust_remote_code)
    examples, _ = data.load(**asdict(settings.data), seed=settings.train.seed)
    dataset = QADataset(examples[:options.n], tokenizer, **asdict(settings.dataset))
    if options.html:
        Path(options.html).write_text(show.page(dataset.items, tokenizer), encoding="utf-8")
        print(f"dataset: {len(dataset)} examples -> {options.html}")
    for item in [] if options.html else dataset.items:
        print(f"--- {item['source']} ({dataset.format})\n{show.colour(item, tokenizer)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
