"""
Talk with one or several runs in the terminal; each answer appears word by word.

    python -m scripts.chat runs/companion
    python -m scripts.chat runs/bram runs/juno --memory retrieve --temperature 0.7

Chat uses the system prompt and the format stored with the run. A conversation longer than --budget
tokens loses its oldest turns, or keeps them as notes: lora/use/conversation.py.
"""

import contextlib
import sys
from pathlib import Path

from lora.run import cli, runlog
from lora.use.conversation import MEMORIES, Conversation
from scripts.voices import DECODING, Voices, with_system

with contextlib.suppress(ImportError):       # input() edits its line and remembers earlier ones;
    import readline  # noqa: F401             # Windows' terminal does that by itself

HELP = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n")
LEAVE = ("/quit", "/exit", "quit", "exit")


class Chat:
    """A conversation: the adapter, its strength, the turns so far. options are main's."""

    def __init__(self, voices: Voices, options):
        self.voices, self.options = voices, options
        self.name, self.scale, self.n_answers = next(iter(voices.runs)), 1.0, 0
        budget = options.budget or voices.runs[self.name].settings.dataset.max_length
        self.talk = Conversation(self.count_tokens, budget, voices.system(self.name),
                                 options.memory, voices.summarise)

    def count_tokens(self, messages: list[dict]) -> int:
        """How many tokens the model reads before its answer."""
        return len(self.voices.voice(self.name, self.format).ids(messages))

    @property
    def format(self) -> str:
        """The format of the run; the base answers in that of the first run."""
        return self.voices.format(self.name or next(iter(self.voices.runs)))

    def answer(self, name: str | None, messages: list[dict]) -> str:
        """Print an answer as it grows and return it; name is an adapter, or None for the base."""
        shown = 0

        def show(_, text):
            nonlocal shown
            if not text.endswith("\ufffd"):                 # half a character: wait for the rest
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print(f"{name or 'base'}: ", end="", flush=True)
        o, self.n_answers = self.options, self.n_answers + 1
        (answer,) = self.voices.ask(
            [messages], name, self.format, scale=self.scale if name else 1.0, on_text=show,
            min_words=o.min_words, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
            top_p=o.top_p, repetition_penalty=o.repetition_penalty,
            seed=f"{o.seed} {self.n_answers}")
        rest = "" if answer.expanded else answer.text[shown:]
        print(rest if answer.ended else f"{rest} [cut off: --max-new-tokens]")
        if answer.expanded:
            print(f"  [shorter than {o.min_words} words; asked for more:]\n{answer.text}")
        return answer.text

    def hear(self, line: str) -> None:
        """Answer a message or run a /command; raise ValueError if that is impossible."""
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
        print(HELP)

    def do_use(self, name):
        if name not in self.voices.runs:
            raise ValueError(f"chat: no adapter {name!r}; there are {', '.join(self.voices.runs)}")
        self.name, self.talk.system = name, self.voices.system(name)
        print(f"  now {name}, system prompt: {self.talk.system}")

    def do_base(self, _):
        self.name = None
        print(f"  now the base model, system prompt: {self.talk.system}")

    def do_compare(self, text):
        text = text or (self.talk.turns[-1][0] if self.talk.turns else "")
        if not text:
            raise ValueError("chat: nothing to compare yet; /compare TEXT")
        before = self.talk.turns
        self.talk.turns = before[:-1] if before and before[-1][0] == text else before
        messages, self.talk.turns = self.talk.messages(text), before
        for name in (None, *self.voices.runs):
            keeps = name in (None, self.name)
            system = self.talk.system if keeps else self.voices.system(name)
            self.answer(name, with_system(messages, system))

    def do_scale(self, text):
        try:
            scale = float(text)
        except ValueError:
            raise ValueError(f"chat: /scale {text}: expected a number such as 0.6") from None
        if not 0 <= scale <= 4:
            raise ValueError(f"chat: /scale {text}: expected 0 (the base) to 4; 1 is as trained")
        self.scale = scale
        print(f"  the adapter now acts {scale:g} times as strongly as trained")

    def do_system(self, text):
        if text:
            self.talk.system = text
            if text != self.voices.system(self.name):
                print("  the adapter was never trained on it: training had another")
        print(f"  system prompt: {self.talk.system}")

    def do_memory(self, mode):
        if mode not in MEMORIES:
            raise ValueError(f"chat: /memory {mode}; expected {', '.join(MEMORIES)}")
        self.talk.memory = mode
        print(f"  memory: {mode}")

    def do_retry(self, _):
        if not self.talk.turns:
            raise ValueError("chat: nothing to repeat yet")
        last = self.talk.turns.pop()
        try:
            self.hear(last[0])
        except BaseException:                              # Ctrl-C too: the turn stays
            self.talk.turns.append(last)
            raise

    def do_save(self, name):
        file = Path(name or "chat.jsonl")
        if not self.talk.turns:
            raise ValueError("chat: nothing to save yet")
        turns = [pair for q, a in self.talk.turns for pair in (("user", q), ("assistant", a))]
        messages = [{"role": r, "content": c} for r, c in turns]
        runlog.append(file, {"messages": with_system(messages, self.talk.system)})
        print(f"  added to {file}: {len(self.talk.turns)} turns")

    def do_reset(self, _):
        self.talk.reset()
        print("  forgotten")


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders on one base")
    parser.add_argument("--memory", choices=MEMORIES, default="window", help="of old turns")
    parser.add_argument("--budget", type=int, help="tokens sent at most (default: as in training)")
    for name, what in (("max_new_tokens", "length of an answer"),
                       ("temperature", "0: greedy, always the same answer"),
                       ("top_p", "sample from this share of the probability"),
                       ("repetition_penalty", "above 1: less likely to say again what was said")):
        default = DECODING[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                            help=what)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--min-words", type=int, default=0,
                        help="ask once for more where an answer is shorter; 0: never")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    options = parser.parse_args(argv)
    voices = Voices(options.runs, options.device)
    chat = Chat(voices, options)
    for problem in voices.problems:
        print(f"warning: {problem}")
    base = voices.runs[chat.name].info["base_model"]
    print(f"base {base}; adapters {', '.join(voices.runs)}; /help lists the commands")
    print(f"system prompt: {chat.talk.system}")
    while True:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            line = "/quit"
        if line in LEAVE:
            return 0
        if not line:
            continue
        try:
            chat.hear(line)
        except ValueError as error:
            print(f"  {error}")
        except KeyboardInterrupt:
            print("  [stopped]")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
