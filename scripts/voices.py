"""
Runs on one base model, loaded and ready to answer: what chat, verify, compare and merge share.

    voices = Voices(["runs/bram", "runs/juno"])
    voices.ask([[{"role": "user", "content": "Hello!"}]], "bram")      # [Answer]; None is the base

dataset.py renders every prompt, as in training. system() is the system prompt stored in a run.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import data
import dataset
from lora import config, files
from lora.base import fetch, load, quant
from lora.run import runlog
from lora.use import text
from lora.use.bank import Bank
from measure import Answer, Message, Voice

DECODING = {  # where nobody says other
    "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 200, "repetition_penalty": 1.05}
SUMMARISE = "Summarise this conversation in two short sentences. Keep names and facts."
MORE = "Please say that again, a little more fully."
MORE_CJK = "请说得更详细一点。"


class Voices:
    """Several runs on one base model, in runs: {name: Run}. problems is a sentence for each
    difference from the training. The base is quantised as the first run's settings say; with a
    dtype it is dense. Raises ValueError if the runs are not on one base. base holds the settings of
    the model where there are no runs yet; add() and remove() change the runs later."""

    def __init__(self, paths: Iterable[Path | str], device: str = "auto", dtype: str = "auto",
                 base: config.ModelConfig | None = None):
        runs = [runlog.read_run(path) for path in paths]
        bases = {run.name: run.info.get("base_model") for run in runs}
        if len(bases) < len(runs):
            raise ValueError(f"voices: two runs have the same name: {[r.name for r in runs]}")
        if len(set(bases.values())) > 1:
            raise ValueError("voices: the runs are on different bases: " + ", ".join(
                f"{name} on {model}" for name, model in bases.items()))
        settings = base or runs[0].settings.model
        self.folder = fetch.find(settings.name)
        self.device = load.pick_device(settings.device if device == "auto" else device)
        self.dtype = load.pick_dtype(settings.dtype if dtype == "auto" else dtype, self.device)
        self.quant = settings.quant if dtype == "auto" else "none"
        self.model = load.load_model(self.folder, "cpu", self.dtype)
        self.weights = load.fingerprint(self.model)
        quant.quantise(self.model, self.quant, self.device)
        self.bank = Bank(self.model)
        self.runs, self.checks, self.tokenizers, self._templates = {}, {}, {}, {}
        for run in runs:
            self.add(run)
        self.tokenizer = (self.tokenizers[runs[0].name] if runs               # the base's
                          else load.load_tokenizer(self.folder))

    def add(self, run: runlog.Run) -> None:
        """Load a run's adapter; one that has its name is replaced."""
        self.remove(run.name)
        s = run.settings.dataset
        template = str((s.template_vars, s.date))          # runs that agree share a tokenizer
        if template not in self._templates:
            self._templates[template] = tokenizer_of(run, self.folder)
        tokenizer = self._templates[template]
        self.bank.add(run.name, run.adapter)
        self.runs[run.name], self.tokenizers[run.name] = run, tokenizer
        self.checks[run.name] = checks(run, tokenizer, self.weights, self.quant)

    def remove(self, name: str) -> None:
        """Forget a run, if it is there."""
        self.bank.remove(name)
        for known in (self.runs, self.tokenizers, self.checks):
            known.pop(name, None)

    @property
    def problems(self) -> list[str]:
        return [f"{name}: {what}: {problem}" for name, pairs in list(self.checks.items())
                for what, problem in pairs if problem]

    def format(self, name: str | None) -> str:
        """The format that a run was trained in; with None the base's."""
        return self.runs[name].info["format"] if name else dataset.choose_format(self.tokenizer)

    def system(self, name: str | None) -> str | None:
        """The system prompt that a run was trained with; None for the base."""
        return self.runs[name].info.get("system") if name else None

    def voice(self, name: str | None, format: str | None = None) -> Voice:
        """The model in the format of a run, with the adapter that the bank has in use."""
        tokenizer = self.tokenizers.get(name, self.tokenizer)
        return Voice(self.model, tokenizer, format or self.format(name))

    def ask(self, prompts: list[list[Message]], name: str | None, format: str | None = None, *,
            scale: float = 1.0, min_words: int = 0, on_text: Callable | None = None,
            **decoding) -> list[Answer]:
        """Answer prompts with an adapter, or with None by the base, as Voice.ask does. An answer
        of fewer than min_words words is asked for once more, and the longer one counts."""
        voice = self.voice(name, format)
        with self.bank.using(name, scale):
            answers = voice.ask(prompts, on_text=on_text, **decoding)
            short = [i for i, a in enumerate(answers) if len(text.words(a.text)) < min_words]
            again = voice.ask([[
                *prompts[i], {"role": "assistant", "content": answers[i].text or "..."},
                {"role": "user", "content": MORE_CJK if is_cjk(prompts[i]) else MORE}]
                for i in short], **decoding)
        for i, fuller in zip(short, again, strict=True):
            if len(fuller.text) > len(answers[i].text):
                answers[i] = fuller._replace(expanded=True)
        return answers

    def summarise(self, summary: str, turns: list[tuple]) -> str:
        """Let the base, whose style is neutral, fold turns (question, answer) into a summary."""
        dialogue = "\n".join(f"They: {q}\nYou: {a}" for q, a in turns)
        prompt = [{"role": "user", "content": f"{SUMMARISE}\n\n{summary}\n{dialogue}"}]
        return self.ask([prompt], None, max_new_tokens=60)[0].text

    def nll(self, examples: list[dict], name: str | None) -> list[float]:
        """Voice.nll per character of the answers or the text, so that tokenizers compare."""
        with self.bank.using(name):
            nats = self.voice(name).nll(examples)
        return [value / sum(len(data.said(m)) for m in example["messages"]
                            if m["role"] in ("assistant", "text"))
                for value, example in zip(nats, examples, strict=True)]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages with this system prompt in place of theirs; None removes it. A plain text has
    none."""
    turns = [m for m in messages if m["role"] != "system"]
    if system is None or turns[0]["role"] == "text":
        return turns
    return [{"role": "system", "content": system}, *turns]


def is_cjk(messages: list[Message]) -> bool:
    """Whether the last message is in Chinese, Japanese or Korean."""
    words = text.words(messages[-1]["content"])
    return sum(len(w) == 1 and w > "\u3040" for w in words) > len(words) / 2


def tokenizer_of(run: runlog.Run, folder: Path | str):
    """The base's tokenizer with the template as the run had it; never code that a run asks for."""
    s = run.settings.dataset
    return load.load_tokenizer(folder, variables=s.template_vars, day=s.date)


def checks(run: runlog.Run, tokenizer, weights: str, quant: str) -> list[tuple[str, str]]:
    """Compare a run's record with the base at hand: [(what, problem)], "" where they agree.
    weights is the fingerprint of the dense base, quant its quantisation here."""
    info, trained_quant = run.info, run.settings.model.quant
    base = files.read_json(run.adapter / "adapter_config.json").get("base_model_name_or_path")
    template = runlog.digest(tokenizer.chat_template or "")
    unknown = "run.json does not say: the run is older than this check"
    rules = [  # what is checked, whether it is wrong, the problem; the first of each counts
        ("base model", base != info.get("base_model"),
         f"the adapter is of {base}, the run of {info.get('base_model')}"),
        ("base weights", "base_weights" not in info, unknown),
        ("base weights", weights != info.get("base_weights"),
         f"they are {weights}, training used {info.get('base_weights')}"),
        ("base weights", quant != trained_quant,
         f"quantisation is {quant}, training used {trained_quant}"),
        ("chat template", template != info.get("template"),
         f"it is {template}, training used {info.get('template')}: the model will read other "
         "tokens than it was trained on"),
        ("system prompt", "system" not in info, unknown),
        ("system prompt", info.get("systems", 1) != 1, f"training used {info.get('systems')} "
         "different ones; the most frequent is taken")]
    return [(what, next((problem for of, wrong, problem in rules if of == what and wrong), ""))
            for what in dict.fromkeys(what for what, _, _ in rules)]


def read_prompts(file: Path | str) -> list[dict]:
    """Read [{"id", "category", "theme", "gold", "messages"}] from a .jsonl file with messages (the
    last one the user's) or a .txt file with a question a line. ValueError names the line."""
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: {file} cannot be read: {error}") from error
    prompts = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = {"messages": [{"role": "user", "content": line.strip()}]}
        if file.suffix != ".txt":
            record = parse_prompt(line, f"{file}:{n}")
        messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
        prompts.append({"id": f"{file.name}:{n}", "category": record.get("category", ""),
                        "theme": record.get("theme", ""), "gold": record.get("gold"),
                        "messages": messages})
    if not prompts:
        raise ValueError(f"prompts: {file} holds no prompts")
    return prompts


def parse_prompt(line: str, where: str) -> dict:
    """Parse a line of a .jsonl file of prompts; raise ValueError that starts with where."""
    try:
        record = json.loads(line)
        roles = [m["role"] for m in record["messages"] if m["content"].strip()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"prompts: {where}: {error!r}; expected {{\"messages\": [...]}} with role "
                         "and content") from error
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(f"prompts: {where}: roles {roles}; expected user and assistant to "
                         "alternate and the user to speak last")
    return record


if __name__ == "__main__":
    raise SystemExit("voices is no command; python -m scripts.compare --help shows one")
