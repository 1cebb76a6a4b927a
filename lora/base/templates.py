"""
What a chat template writes: its prompts, its answers, and what ends them.

    prepare(tokenizer, {"enable_thinking": False}, "2026-11-25")   # once, after loading
    samples(messages, tokenizer)   # [[("<|im_start|>user...", False), ("Hello!<|im_end|>", True)]]

Templates differ: some rewrite earlier answers, some begin an answer in the prompt, some end it only
when another turn follows. So every answer stands behind exactly the prompt that chat sends at its
place, and it ends in what chat stops at.
"""

import re
from datetime import date
from functools import lru_cache
from os.path import commonprefix
from typing import Any, NamedTuple

SYSTEM, USER, ANSWER = "SYSTEMTEXT", "USERTEXT", "ANSWERTEXT"
MARKED = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
IN_USER = (  # in front of a template without a system turn: the text begins the first user's turn
    "{% if messages and messages[0]['role'] == 'system' %}{% set messages = [{'role': 'user', "
    "'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] %}"
    "{% endif %}")
THOUGHT = r"(?i:[<\[]/?[^\s<>]*(?:think|thought|reason)[^\s<>]*[>\]])"
OPEN_THOUGHT = re.compile(rf"(?![<\[]/){THOUGHT}\s*$")
IN_PARTS = (  # in front of a template that reads a list of parts
    "{% set as_parts = namespace(list=[]) %}{% for m in messages %}{% set as_parts.list = "
    "as_parts.list + [{'role': m['role'], 'content': [{'type': 'text', 'text': m['content']}]}] %}"
    "{% endfor %}{% set messages = as_parts.list %}")


def write(messages: list[dict], tokenizer, prompt: bool = False) -> str:
    """Render messages with the tokenizer's template; with prompt, up to where the next answer
    begins. Messages may carry the conversation's "tools". Raises ValueError if the template
    refuses the messages."""
    tools = next((m["tools"] for m in messages if "tools" in m), None)
    if tools:                                          # no part of a message, for a template
        messages = [{key: m[key] for key in m if key != "tools"} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt,
                                             tools=tools)
    except Exception as error:              # transformers' sandbox, or an error of the template
        raise ValueError(f"the chat template refuses it: {error}") from error


# ----- once, after loading -----------------------------------------------------------------------


def prepare(tokenizer, variables: dict[str, Any] | None = None, day: str | None = None) -> None:
    """Rewrite the tokenizer's template so that all its readers get the same text: of several named
    templates the default one, variables set, today's date that of day ("2026-11-25"), a content
    as a list of parts where it reads parts alone, a system prompt in the first user's turn where it
    has no turn of its own. Raises ValueError if the template does not read a variable."""
    if isinstance(tokenizer.chat_template, dict):
        names = tokenizer.chat_template
        tokenizer.chat_template = names.get("default") or next(iter(names.values()))
    if not tokenizer.chat_template:
        if variables:
            raise ValueError("dataset.template_vars: this model has no chat template")
        return
    text = tokenizer.chat_template
    if unread := [name for name in variables or {}
                  if not (name.isidentifier() and re.search(rf"\b{name}\b", text))]:
        raise ValueError(f"dataset.template_vars: the chat template does not read "
                         f"{', '.join(unread)}; it reads "
                         f"{', '.join(variables_of(tokenizer)) or 'none'}")
    tokenizer.chat_template = "".join(
        f"{{% set {name} = {value!r} %}}" for name, value in (variables or {}).items()
    ) + text
    if day:
        pin_date(tokenizer, day)
    if USER not in _try(MARKED, tokenizer):
        before = tokenizer.chat_template
        tokenizer.chat_template = IN_PARTS + before
        if USER not in _try(MARKED, tokenizer):
            tokenizer.chat_template = before
    with_system = [{"role": "system", "content": SYSTEM}, *MARKED]
    if USER in _try(MARKED, tokenizer) and SYSTEM not in _try(with_system, tokenizer):
        tokenizer.chat_template = IN_USER + tokenizer.chat_template


def variables_of(tokenizer) -> list[str]:
    """The variables that the template asks for, apart from those that it gets anyway."""
    names = {*re.findall(r"(\w+) is (?:not )?defined", tokenizer.chat_template)}
    return sorted(names - {"tools", "add_generation_prompt", "messages", "bos_token"})


def has_no_system_turn(tokenizer) -> bool:
    """Whether prepare() puts system prompts into the first user's turn."""
    return tokenizer.chat_template.startswith(IN_USER)


def prints_date(tokenizer) -> bool:
    """Whether the template prints today's date."""
    return "strftime_now(" in (tokenizer.chat_template or "")


def pin_date(tokenizer, day: str) -> None:
    """Let the template print the date of a day, "2026-11-25", for today's."""
    today = date.fromisoformat(day)
    tokenizer.chat_template = re.sub(
        r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""",
        lambda call: repr(today.strftime(call[2])), tokenizer.chat_template)


def _try(messages, tokenizer):
    """The rendered text, "" where the template refuses the messages."""
    try:
        return write(messages, tokenizer)
    except ValueError:
        return ""


# ----- what stands around an answer --------------------------------------------------------------


class Frame(NamedTuple):
    """What a template writes around an answer."""

    before: str                   # between the prompt and the answer: "<think>\n\n</think>\n\n"
    thought: tuple[str, str]      # what begins and ends a thought or names a channel; "": nothing
    end: str                      # what ends the answer: "<|im_end|>"
    known: bool                   # False: the template writes no end; it is the eos token
    steady: bool                  # a plain answer is written alike at the end and before a turn


def frame(tokenizer) -> Frame:
    """Look with probes of one turn and of two at what stands around an answer. Raises ValueError if
    nothing could end it."""
    return _frame(tokenizer, tokenizer.chat_template, tokenizer.eos_token)


@lru_cache
def _frame(tokenizer, template, eos):
    other = [{"role": "user", "content": "NEXTTEXT"}, {"role": "assistant", "content": "LASTTEXT"}]
    try:
        one, two = write(MARKED, tokenizer), _try([*MARKED, *other], tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}. It writes no plain question and answer at all: set "
                         'dataset.format to "chatml" or "plain"') from error
    prompt = write(MARKED[:1], tokenizer, prompt=True)
    tail = one.rpartition(ANSWER)[2] if ANSWER in one else ""
    gap = two.partition(ANSWER)[2].partition("NEXTTEXT")[0]
    before = ""
    if one.startswith(prompt) and ANSWER in one[len(prompt):]:
        before = one[len(prompt):].partition(ANSWER)[0]
    tags, opened = re.findall(r"<[^<>\n]+>|\[[^\[\]\n]+\]", before), OPEN_THOUGHT.search(prompt)
    thought = (tags[0], tags[-1]) if tags else ("", "")
    if opened and not tags:
        opening = opened[0].strip()
        thought = ("", f"{opening[0]}/{opening[1:]}")
    specials, steady = special_texts(tokenizer), ANSWER in one and two.startswith(one)
    for text in (commonprefix([tail, gap]), tail, gap):
        places = [(text.find(token), token) for token in specials if token in text]
        if places:
            at, token = min(places, key=lambda place: (place[0], -len(place[1])))
            if not text[:at].strip():
                return Frame(before, thought, text[:at] + token, True, steady)
    for text in (commonprefix([tail, gap]), tail):
        if text.strip() and len(text.split()) < 8:    # more is the text of a classifier
            return Frame(before, thought, text.rstrip(), True, False)
    if not eos:
        raise ValueError("dataset: the chat template ends an answer with nothing the model could "
                         'learn to stop at; set dataset.format to "plain".')
    return Frame(before, thought, eos, False, False)


def special_texts(tokenizer) -> set[str]:
    """The texts of all control tokens, named (eos, ...) or not."""
    texts = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return texts | ({tokenizer.eos_token} if tokenizer.eos_token else set())


def shown(ids: list[int], tokenizer) -> str:
    """An answer's text without what the template itself writes in front of it, an empty thought or
    the name of a channel; a thought that the model wrote there goes too. A thought that has not
    ended is shown as it is."""
    _, end = frame(tokenizer).thought
    if not end:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    text = tokenizer.decode(ids).rpartition(end)[2]
    for token in special_texts(tokenizer) if "<" in text or "[" in text else ():
        text = text.replace(token, "")
    return text.strip()


def is_thought(tokenizer, token: int) -> bool:
    """Whether a control token begins or ends a thought, which an answer may hold: <think>."""
    return re.fullmatch(THOUGHT, tokenizer.decode([token])) is not None


def is_thinking(ids: list[int], tokenizer) -> bool:
    """Whether an answer has begun with a thought, or a channel, that has not ended."""
    start, end = frame(tokenizer).thought
    text = tokenizer.decode(ids).lstrip()
    return bool(end) and end not in text and (text.startswith(start) or start.startswith(text))


# ----- samples -----------------------------------------------------------------------------------

Pieces = list[tuple[str, bool]]                       # [(text, supervised)]: joined, what is read


def samples(messages: list[dict], tokenizer) -> list[Pieces]:
    """Return what is trained of a conversation: samples in pieces.

    An answer follows the prompt that chat sends at its place. Answers stand in one sample where the
    template writes the earlier ones as it wrote them first; where it rewrites them (Qwen3 drops
    thoughts), each has its own. Raises ValueError if an answer cannot follow its prompt.
    """
    steady = frame(tokenizer).steady                  # refuses a template that writes no answer
    steady = steady and all(m.keys() == {"role", "content"} and m["role"] != "tool"
                            and not re.search(THOUGHT, m["content"]) for m in messages)
    whole, found = write(messages, tokenizer), []
    answers = [answer(messages, i, tokenizer, whole, steady) for i, message in enumerate(messages)
               if message["role"] == "assistant"]
    left = list(answers)
    while left:
        prompt, body, end = left[-1]
        text, pieces, done = prompt + body + end, [], 0
        if len(left) == len(answers) and whole.startswith(text):
            text = whole                              # with what follows the last answer
        alone = []
        for prompt, body, end in left:
            if text.startswith(prompt + body + end) and len(prompt) >= done:
                pieces += [(text[done:len(prompt)], False), (body + end, True)]
                done = len(prompt + body + end)
            else:
                alone.append((prompt, body, end))
        pieces.append((text[done:], False))
        found.insert(0, pieces)
        left = alone
    return found


def answer(messages: list[dict], i: int, tokenizer, whole: str, steady: bool = False
           ) -> tuple[str, str, str]:
    """Return (prompt, answer, end) of message i: the texts that chat sends, that the model learns,
    and that stop it; whole is the conversation's text. steady: later messages do not change how an
    answer is written, so that whole is read for the history up to i. Raises ValueError if the
    template does not write the answer, or begins it in a way that the message does not go on."""
    end = frame(tokenizer).end
    prompt = write(messages[:i], tokenizer, prompt=True)
    alike = i + 1 == len(messages) or (steady and whole.startswith(prompt))
    history = whole if alike else write(messages[:i + 1], tokenizer)
    content = (messages[i].get("content") or "").strip()
    common = len(prompt if history.startswith(prompt) else commonprefix([prompt, history]))
    at = history.rfind(content)
    if common < len(prompt) and at < common <= at + len(content):
        common = at                                   # the answer begins as the prompt goes on
    question = messages[i - 1]
    if question["role"] == "user" and (
            "".join(question["content"].split()) not in "".join(prompt.split())):
        raise ValueError(f"the chat template does not write message {i}, "
                         f"{question['content'][:40]!r}: the prompt ends in {prompt[-40:]!r}")
    begun, written = prompt[common:], history[common:]
    thought = OPEN_THOUGHT.search(begun)
    if thought and content.startswith(thought[0].strip()):
        return prompt, content[len(thought[0].strip()):].lstrip("\n"), end
    where = f"the prompt ends in {prompt[-40:]!r}, where the history holds {written[:40]!r}"
    if thought:
        raise ValueError(f"{where}: the model begins with a thought, and the answer has none. "
                         f"Write it into the data, {thought[0].strip()}...; or switch thoughts off "
                         f"with dataset.template_vars (the template reads "
                         f"{', '.join(variables_of(tokenizer)) or 'none'})")
    behind = written.find(content) + len(content) if content in written else 0
    at = written.find(end, behind)
    body = written[:at] if at >= 0 else written.rstrip()
    if not body.strip() and not begun:                # a template that waits for the next turn
        return prompt, content, end
    visible, whole = "".join(body.split()), "".join(content.split())
    if whole not in visible and not (visible and whole.endswith(visible)):
        raise ValueError(f"the chat template does not write the answer {content[:40]!r}: {where}")
    if begun:                                         # the prompt has an empty thought or channel
        body = content if whole and whole in visible else body.strip()
    return prompt, body, end
