"""
The formats: how messages become the text that a model reads, and what ends an answer.

    FORMATS["chatml"](messages, tokenizer)   # [("<|im_start|>user\\n", False), ("Hi", False), ...]

A format turns messages into pieces [(text, supervised)]; joined they are what the model reads.
With reply=True the pieces end where the assistant's next answer begins: what chat sends.
"""

import re
from functools import lru_cache

from ..generate import Stop
from . import templates


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
    Where the template rewrites earlier answers, only those that it does not are supervised."""
    if reply:
        return [(templates.write(messages, tokenizer, prompt=True), False)]
    return templates.samples(messages, tokenizer)[-1]


FORMATS = {"template": template, "chatml": chatml, "gemma": gemma, "plain": plain}


def choose_format(tokenizer, format: str = "auto") -> str:
    """Return the format to use; "auto" is the model's template where it has one, else plain."""
    if format == "auto":
        format = "template" if tokenizer.chat_template else "plain"
    needs = {"template": ("chat_template", "chat template"), "plain": ("eos_token", "eos token")}
    if format in needs and not getattr(tokenizer, needs[format][0]):
        raise ValueError(f'dataset: format is "{format}", but this model has no {needs[format][1]}')
    return format


@lru_cache
def special_ids(tokenizer) -> set[int]:
    """Return the ids of all control tokens, named (eos, ...) or not."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@lru_cache
def _special_text(tokenizer):
    """A pattern that finds every text in which the tokenizer may see a special token."""
    tokens = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
    if any(token.normalized for token in tokens):      # "<S>" may be read as "<s>": look at all
        return re.compile("")
    return re.compile("|".join(re.escape(token.content) for token in tokens) or r"(?!)")


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Return the token ids of each text, without what a tokenizer adds at its ends. Many texts at
    once take less time, and so do ids without their places in the text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or core.truncation or core.padding:
        return tokenizer(texts, add_special_tokens=False).input_ids
    return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=False)]


def end_of_answer(tokenizer, format: str) -> str:
    """Return the text that ends an answer in this format. Raises ValueError if nothing does."""
    if format == "template":
        return templates.frame(tokenizer).end
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    pieces = FORMATS[format](probe, tokenizer)
    return next(text for text, supervised in pieces if supervised).rpartition("ANSWER")[2]


def stop_of(tokenizer, format: str) -> Stop:
    """Return what ends an answer in this format, for generate()."""
    end, eos = end_of_answer(tokenizer, format), {tokenizer.eos_token_id} - {None}
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) == 1 or ids[-1] in special_ids(tokenizer):
        return Stop(frozenset({ids[-1], *eos}))
    return Stop(frozenset(eos), end, tokenizer.decode)


def check(messages: list[dict], tokenizer, format: str) -> None:
    """Raise ValueError for a special token in a message, and for tool calls without a template."""
    specials = special_ids(tokenizer)
    texts = [f"{m.get('content') or ''}{m.get('tool_calls') or ''}" for m in messages]
    looks = any(map(_special_text(tokenizer).search, texts))
    encoded = encode(texts, tokenizer) if looks else [[] for _ in texts]
    for i, (message, ids) in enumerate(zip(messages, encoded, strict=True), 1):
        for token in filter(specials.__contains__, ids):
            if not (message["role"] == "assistant" and templates.is_thought(tokenizer, token)):
                raise ValueError(f"message {i} contains {tokenizer.decode([token])}, a special "
                                 "token of this model")
        if format != "template" and (message["role"] == "tool" or "tool_calls" in message):
            raise ValueError(f'format "{format}" writes no tool calls; a chat template may')


def continuation(text: str, tokenizer) -> tuple[list[int], list[bool]]:
    """Return (ids, mask) of a plain text and the end-of-text token; a chat model's eos token ends a
    turn, so the token of that name goes before it."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    end = next((name for name in ("<|endoftext|>", "<|end_of_text|>") if name in names),
               tokenizer.eos_token)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.convert_tokens_to_ids(end)] if end else []
    return with_bos(ids, [True] * len(ids), tokenizer, "plain")


def with_bos(ids: list[int], mask: list[bool], tokenizer, format: str
             ) -> tuple[list[int], list[bool]]:
    """Return (ids, mask), with a BOS token where the format writes none and the model wants it."""
    bos = tokenizer.bos_token_id
    if format != "template" and bos is not None and bos in tokenizer("a").input_ids[:1]:
        ids, mask = [bos, *ids], [False, *mask]            # a template writes its own BOS
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError("the text starts with two BOS tokens: the chat template adds one more")
    return ids, mask
