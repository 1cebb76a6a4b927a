"""
Runs on one base model, loaded and ready to answer: what chat, verify, compare and merge share.

    voices = Voices(["runs/bram", "runs/juno"])
    voices.ask([[{"role": "user", "content": "Hello!"}]], "bram")      # [Answer]; None is the base

Every answer is rendered by dataset.py, as in training, with the system prompt stored in the run.
"""

import json
from pathlib import Path
from typing import NamedTuple

import dataset
from lora import base, fetch, loss, quant, runlog, text
from lora.bank import Bank
from lora.generate import generate

MORE = {False: "Please say that again, a little more fully.", True: "请说得更详细一点。"}


class Answer(NamedTuple):
    text: str
    n_tokens: int
    ended: bool                   # False: cut off at max_new_tokens
    expanded: bool                # the model was asked once for more


class Voices:
    """model, tokenizer and bank of several runs; runs is {name: Run}, problems are sentences about
    what does not match the training (checks has all that was looked at). The base is quantised as
    the first run's settings say; with a dtype asked for it is dense. Raises ValueError if they
    cannot be on one base."""

    def __init__(self, paths, device="auto", dtype="auto"):
        runs = [runlog.read_run(path) for path in paths]
        self.runs = {run.name: run for run in runs}
        bases = {run.name: run.info.get("base_model") for run in runs}
        if len(self.runs) < len(runs):
            raise ValueError(f"voices: two runs have the same name: {[r.name for r in runs]}")
        if len(set(bases.values())) > 1:
            raise ValueError("voices: the runs are on different bases: " + ", ".join(
                f"{name} on {model}" for name, model in bases.items()))
        settings = runs[0].settings.model
        self.folder = fetch.find(settings.name)
        self.device = base.pick_device(settings.device if device == "auto" else device)
        self.dtype = base.pick_dtype(settings.dtype if dtype == "auto" else dtype, self.device)
        self.quant = settings.quant if dtype == "auto" else "none"
        self.tokenizer = base.load_tokenizer(self.folder)     # never code that a run asks for
        self.model = base.load_model(self.folder, "cpu", self.dtype)
        weights = base.fingerprint(self.model)
        quant.quantise(self.model, self.quant, self.device)
        self.bank = Bank(self.model)
        for run in runs:
            self.bank.add(run.name, run.adapter)
        self.checks = {run.name: list(checks(run, self.tokenizer, weights, self.quant))
                       for run in runs}
        self.problems = [f"{name}: {what}: {problem}" for name, found in self.checks.items()
                         for what, problem in found if problem]

    def format(self, name):
        """The format that run was trained in; of the base, its own."""
        return self.runs[name].info["format"] if name else dataset.choose_format(self.tokenizer)

    def system(self, name):
        """The system prompt that run was trained with; None for the base."""
        return self.runs[name].info.get("system") if name else None

    def ids(self, messages, format):
        """What the model reads before its answer, token by token."""
        return dataset.render(messages, self.tokenizer, format, reply=True)[0]

    def ask(self, prompts, name, format=None, *, scale=1.0, min_words=0, told=None, **decoding):
        """An Answer to each prompt (messages, the last one the user's) by an adapter or, with None,
        by the base. An answer of fewer than min_words words is asked for once more, in full: the
        longer one counts. decoding goes to generate(); told(i, text) is called as text i grows."""
        format = format or self.format(name)
        stop, limit = dataset.stop_of(self.tokenizer, format), decoding["max_new_tokens"]

        def say(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

        def run(prompts, told=None):
            made = generate(
                self.model, [self.ids(p, format) for p in prompts], stop, **decoding,
                on_token=told and (lambda i, ids: told(i, say(ids))))
            return [Answer(say(ids), len(ids), len(ids) < limit, False) for ids in made]

        with self.bank.using(name, scale):
            answers = run(prompts, told)
            short = [i for i, a in enumerate(answers) if len(text.words(a.text)) < min_words]
            again = run([[*prompts[i], {"role": "assistant", "content": answers[i].text or "..."},
                          {"role": "user", "content": MORE[is_cjk(prompts[i])]}] for i in short])
        for i, fuller in zip(short, again, strict=True):
            if len(fuller.text) > len(answers[i].text):
                answers[i] = fuller._replace(expanded=True)
        return answers

    def nll(self, examples, name, format=None, batch_size=8):
        """Nats per character of each example's answers (with the token that ends them), by an
        adapter or the base: [float]. Per character, so that tokenizers compare."""
        made = dataset.QADataset(examples, self.tokenizer, format or self.format(name),
                                 max_length=10**6)
        order = sorted(range(len(made)), key=lambda i: len(made[i]["input_ids"]))
        nats = [0.0] * len(made)
        with self.bank.using(name):
            for start in range(0, len(order), batch_size):
                rows = order[start:start + batch_size]
                batch = dataset.collate([made[i] for i in rows], 0, self.device)
                for i, value in zip(rows, loss.ce_rows(self.model, batch).tolist(), strict=True):
                    nats[i] = value
        return [value / sum(len(m["content"]) for m in example["messages"]
                            if m["role"] == "assistant")
                for value, example in zip(nats, examples, strict=True)]


def with_system(messages, system):
    """The messages under a system prompt, or under none."""
    own = [m for m in messages if m["role"] != "system"]
    return [{"role": "system", "content": system}, *own] if system is not None else own


def is_cjk(messages):
    """Is the last message in Chinese, Japanese or Korean?"""
    said = text.words(messages[-1]["content"])
    return sum(len(w) == 1 and w > "\u3040" for w in said) > len(said) / 2


def checks(run, tokenizer, weights, quant):
    """[(what, problem)]: is what a run was trained with what is at hand? "" if so. weights is the
    fingerprint of the dense base, quant what was made of it."""
    info, written = run.info, json.loads((run.adapter / "adapter_config.json").read_text("utf-8"))
    own, trained = runlog.digest(tokenizer.chat_template or ""), run.settings.model.quant
    before = "run.json does not say: the run is older than this check"
    named = written.get("base_model_name_or_path")
    yield "base model", "" if named == info.get("base_model") else (
        f"the adapter is of {named}, the run of {info.get('base_model')}")
    yield "base weights", before if "base_weights" not in info else (
        f"they are {weights}, training used {info['base_weights']}"
        if weights != info["base_weights"] else
        "" if trained == quant else f"quantisation is {quant}, training used {trained}")
    yield "chat template", "" if own == info.get("template") else (
        f"it is {own}, training used {info.get('template')}: the model will read other tokens than "
        "it was trained on")
    many = info.get("systems", 1)
    yield "system prompt", before if "system" not in info else "" if many == 1 else (
        f"training used {many} different ones; the most frequent is taken")


def read_prompts(file):
    """[{"id", "category", "theme", "gold", "messages"}] of a .jsonl file with messages (the last
    one the user's) or a .txt file with a question a line. Raises ValueError that names the line."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: {file} cannot be read: {error}") from error
    made = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = {"messages": [{"role": "user", "content": line.strip()}]}
        if Path(file).suffix != ".txt":
            try:
                record = json.loads(line)
                roles = [m["role"] for m in record["messages"] if m["content"].strip()]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"prompts: {file}:{n}: {error!r}; expected {{\"messages\": [...]}}"
                                 " with role and content") from error
            own = roles[roles[:1] == ["system"]:]
            if own != ["user", "assistant"] * (len(own) // 2) + ["user"]:
                raise ValueError(f"prompts: {file}:{n}: roles {roles}; expected user and assistant "
                                 "to alternate and the user to speak last")
        made.append({"id": f"{Path(file).name}:{n}", "category": record.get("category", ""),
                     "theme": record.get("theme", ""), "gold": record.get("gold"),
                     "messages": [{"role": m["role"], "content": m["content"]}
                                  for m in record["messages"]]})
    if not made:
        raise ValueError(f"prompts: {file} holds no prompts")
    return made
