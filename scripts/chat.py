"""
Talk with one or several runs in the terminal; the answers appear as they are made.

    python -m scripts.chat runs/companion
    python -m scripts.chat runs/bram runs/juno --memory retrieve --temperature 0.7

The system prompt and the chat format stored with the run are used. A conversation longer than
--budget tokens loses its oldest turns, or keeps them as notes: lora/conversation.py.
"""

import argparse
import json
import sys
from pathlib import Path

from lora import config
from lora.conversation import MEMORIES, Conversation
from scripts.voices import Voices, with_system

HELP = """  /use NAME      answer with another adapter, under its own system prompt
  /base          answer with the base model; /use NAME goes back
  /compare TEXT  the answers of the base and of every adapter; without TEXT to the last message
  /scale 0.6     how strongly the adapter acts: 0 is the base, 1 as trained
  /system TEXT   another system prompt; without TEXT show it
  /memory MODE   what becomes of old turns: window, summary or retrieve
  /retry         the last message again (with temperature: another answer)
  /save FILE     write the conversation as a line of JSONL, as training reads it
  /reset         forget the conversation
  /help          this list; an empty line or Ctrl-D ends"""

SUMMARISE = "Summarise this conversation in two short sentences. Keep names and facts."


class Chat:
    """The state of a conversation: which adapter, how strong, what was said."""

    def __init__(self, voices, options, out=None):
        self.voices, self.options, self.out = voices, options, out or sys.stdout
        self.name, self.scale, self.asked = next(iter(voices.runs)), 1.0, 0
        budget = options.budget or voices.runs[self.name].settings.dataset.max_length
        self.talk = Conversation(lambda messages: len(voices.ids(messages, self.format)), budget,
                                 voices.system(self.name), options.memory, self.summarise)

    @property
    def format(self):
        """The base answers in the format of the run it is compared with."""
        return self.voices.format(self.name or next(iter(self.voices.runs)))

    def say(self, *parts):
        print(*parts, file=self.out, flush=True)

    def answer(self, name, messages, label=""):
        """One answer, printed as it comes."""
        shown = 0

        def told(_, text):
            nonlocal shown
            if not text.endswith("\ufffd"):                 # half a character: wait for the rest
                print(text[shown:], end="", file=self.out, flush=True)
                shown = len(text)
        print(label or f"{name or 'base'}: ", end="", file=self.out, flush=True)
        o, self.asked = self.options, self.asked + 1
        (made,) = self.voices.ask(
            [messages], name, self.format, scale=self.scale if name else 1.0, told=told,
            min_words=o.min_words, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
            top_p=o.top_p, seed=f"{o.seed} {self.asked}")
        rest = "" if made.expanded else made.text[shown:]
        self.say(rest if made.ended else f"{rest} [cut off: --max-new-tokens]")
        if made.expanded:
            self.say(f"  [shorter than {o.min_words} words; asked for more:]\n{made.text}")
        return made.text

    def summarise(self, so_far, turns):
        """The base folds turns into a text; the adapter's style has no place in notes."""
        said = "\n".join(f"They: {q}\nYou: {a}" for q, a in turns)
        prompt = [{"role": "user", "content": f"{SUMMARISE}\n\n{so_far}\n{said}"}]
        (made,) = self.voices.ask([prompt], None, max_new_tokens=60)
        return made.text

    def hear(self, line):
        """One line of the user: a message or a command. Raises ValueError if it cannot be done."""
        if not line.startswith("/"):
            text = self.answer(self.name, self.talk.messages(line))
            self.talk.add(line, text)
            return
        command, _, rest = line[1:].partition(" ")
        commands = {n.removeprefix("do_"): getattr(self, n) for n in dir(self) if n[:3] == "do_"}
        if command not in commands:
            raise ValueError(f"chat: unknown command /{command}; there are /{' /'.join(commands)}")
        commands[command](rest.strip())

    def do_help(self, _):
        self.say(HELP)

    def do_use(self, name):
        if name not in self.voices.runs:
            raise ValueError(f"chat: no adapter {name!r}; there are {', '.join(self.voices.runs)}")
        self.name, self.talk.system = name, self.voices.system(name)
        self.say(f"  now {name}, system prompt: {self.talk.system}")

    def do_base(self, _):
        self.name = None
        self.say(f"  now the base model, system prompt: {self.talk.system}")

    def do_compare(self, text):
        text = text or (self.talk.turns[-1][0] if self.talk.turns else "")
        if not text:
            raise ValueError("chat: nothing to compare yet; /compare TEXT")
        before = self.talk.turns
        self.talk.turns = before[:-1] if before and before[-1][0] == text else before
        messages, self.talk.turns = self.talk.messages(text), before
        for name in (None, *self.voices.runs):
            own = self.talk.system if name in (None, self.name) else self.voices.system(name)
            self.answer(name, with_system(messages, own))

    def do_scale(self, text):
        try:
            scale = float(text)
        except ValueError:
            raise ValueError(f"chat: /scale {text}: expected a number such as 0.6") from None
        if not 0 <= scale <= 4:
            raise ValueError(f"chat: /scale {text}: expected 0 (the base) to 4; 1 is as trained")
        self.scale = scale
        self.say(f"  the adapter now acts {scale:g} times as strongly as trained")

    def do_system(self, text):
        if text:
            self.talk.system = text
            trained = self.voices.system(self.name)
            if text != trained:
                self.say("  not the system prompt of training: the adapter was never trained on it")
        self.say(f"  system prompt: {self.talk.system}")

    def do_memory(self, mode):
        if mode not in MEMORIES:
            raise ValueError(f"chat: /memory {mode}; expected {', '.join(MEMORIES)}")
        self.talk.memory = mode
        self.say(f"  memory: {mode}")

    def do_retry(self, _):
        if not self.talk.turns:
            raise ValueError("chat: nothing to repeat yet")
        last = self.talk.turns.pop()
        try:
            self.hear(last[0])
        except BaseException:                              # Ctrl-C too: what was said stays said
            self.talk.turns.append(last)
            raise

    def do_save(self, name):
        file = Path(name or "chat.jsonl")
        if not self.talk.turns:
            raise ValueError("chat: nothing to save yet")
        turns = [pair for q, a in self.talk.turns for pair in (("user", q), ("assistant", a))]
        messages = [{"role": r, "content": c} for r, c in turns]
        record = {"messages": with_system(messages, self.talk.system)}
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.say(f"  added to {file}: {len(self.talk.turns)} turns")

    def do_reset(self, _):
        self.talk.reset()
        self.say("  forgotten")


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.chat", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="run folders on one base, e.g. runs/companion")
    parser.add_argument("--memory", choices=MEMORIES, default="window")
    parser.add_argument("--budget", type=int, help="tokens sent at most; default: as in training")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-words", type=int, default=0,
                        help="ask once for more where an answer is shorter; 0: never")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    voices = Voices(options.runs, options.device)
    chat = Chat(voices, options)
    for problem in voices.problems:
        print(f"warning: {problem}")
    named = voices.runs[chat.name].info["base_model"]
    print(f"base {named}; adapters {', '.join(voices.runs)}; /help lists the commands")
    print(f"system prompt: {chat.talk.system}")
    while True:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            line = ""
        if not line:
            return 0
        try:
            chat.hear(line)
        except ValueError as error:
            print(f"  {error}")
        except KeyboardInterrupt:
            print("  [stopped]")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
