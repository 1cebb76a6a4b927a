"""
WHAT a model has learned and what it has lost: asked at every evaluation of a run.

    voice = Voice(model, tokenizer)
    voice.ask([[{"role": "user", "content": "Where was Mira Tosk born?"}]])   # [Answer("Larkmoor")]

    exam = Exam(voice, train_set, val_set, retained, settings, batches)
    exam(24)       # {"step": 24, "val_loss": 0.41, "recall": 0.96, "retention": 0.9, "kl": 0.03 ..}

recall: the share of held-out questions that are answered with their value. retention: the same for
the questions of keep.retain that the base gets right. kl and own_loss: drift() on the base's own
answers to them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import dataset
from lora import loss, surgery
from lora.base import templates
from lora.generate import generate
from lora.run import parallel

Message = dict[str, str]                              # {"role": "user", "content": "Hi"}

# ----- a model that is asked and scored ----------------------------------------------------------


class Answer(NamedTuple):
    text: str
    n_tokens: int
    ended: bool                   # False: cut off at max_new_tokens
    expanded: bool = False        # the model was asked once for more (scripts/voices.py)


class Voice:
    """A model in the format it was trained in, to ask and to score.

    Args:
        format: a name of dataset.FORMATS; "auto" is the model's chat template or else plain.
    """

    def __init__(self, model, tokenizer, format: str = "auto"):
        self.model, self.tokenizer = model, tokenizer
        self.format = dataset.choose_format(tokenizer, format)

    def ids(self, messages: list[Message]) -> list[int]:
        """The tokens that the model reads before its answer."""
        return dataset.render(messages, self.tokenizer, self.format, reply=True)[0]

    def text(self, ids: list[int]) -> str:
        """An answer's tokens as text, without a thought before it."""
        if self.format == "template":
            return templates.shown(ids, self.tokenizer)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def ask(self, prompts: list[list[Message]], max_new_tokens: int = 32,
            on_text: Callable | None = None, **decoding) -> list[Answer]:
        """Answer prompts whose last message is the user's.

        on_text(i, text) is called as answer i grows, after its thought; decoding goes to
        lora.generate.generate.
        """
        if not prompts:
            return []
        on_token = None
        if on_text:
            def on_token(i, ids):
                if self.format != "template" or not templates.is_thinking(ids, self.tokenizer):
                    on_text(i, self.text(ids))
        answers = generate(self.model, [self.ids(prompt) for prompt in prompts],
                           dataset.stop_of(self.tokenizer, self.format), on_token=on_token,
                           max_new_tokens=max_new_tokens, **decoding)
        return [Answer(self.text(ids), len(ids), len(ids) < max_new_tokens) for ids in answers]

    def nll(self, examples: list[dict], batch_size: int = 8) -> list[float]:
        """The negative log-likelihood of each example's answers and what ends them, in nats."""
        examples = [{**example} for example in examples]      # each with an id of its own
        tokenised = dataset.QADataset(examples, self.tokenizer, self.format, max_length=10**6)
        by_length = sorted(range(len(tokenised)), key=lambda i: len(tokenised[i]["input_ids"]))
        nats = {id(example): 0.0 for example in examples}
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start:start + batch_size]
            batch = dataset.collate([tokenised[i] for i in rows], 0, self.model.device)
            for i, value in zip(rows, loss.ce_rows(self.model, batch).tolist(), strict=True):
                nats[id(tokenised[i]["example"])] += value
        return list(nats.values())


@torch.no_grad()
def drift(model, batches: list[loss.Batch], untouched=None) -> tuple[float, float, float]:
    """Measure how far a model has moved from itself: (KL, cross-entropy, cross-entropy before).

    All in nats per supervised token over the batches. The KL(base || tuned) is over the whole
    vocabulary. The base is the same model with its adapter off, or the model untouched. Texts that
    the base wrote itself show a change best: there the base is surest.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        with surgery.disabled(model):
            base = F.log_softmax(loss.logits_at(untouched or model, batch).float(), -1)   # (n, v)
        tuned = F.log_softmax(loss.logits_at(model, batch).float(), -1)
        at = batch.targets[:, None]
        kl = F.kl_div(tuned, base, reduction="sum", log_target=True)
        sums += torch.stack([kl, -tuned.gather(1, at).sum(), -base.gather(1, at).sum()]).cpu()
    return tuple((sums / sum(len(batch.targets) for batch in batches)).tolist())


# ----- the exam of a run -------------------------------------------------------------------------


class Exam:
    """What a run measures at every evaluation.

    Args:
        val_set: a QADataset of held-out examples, or None.
        retained: examples of keep.retain, questions with values; may be empty.
        batches: a function from items to the batches of a loss (dataset.Batches).

    Each process takes its share of the questions, or all of them if the base is sharded: all
    processes gather its blocks at once, so all take the same steps.
    """

    def __init__(self, voice: Voice, train_set, val_set, retained: list[dict], settings, batches):
        self.voice, self.val_set, self.batches, self.s = voice, val_set, batches, settings
        self.sharded = settings.model.shard
        self.facts = held_out_facts(val_set)
        self.prompts = sample_prompts(settings, val_set or train_set)
        self.said = self.samples = []                 # the answers of the last call
        self.known, self.own_answers = self._what_the_base_knows(retained)

    def __call__(self, step: int) -> dict:
        """A line of metrics. said receives the answers: {"question", "answer"}, of the held-out
        facts also {"value", "right"}. Several processes share the facts; said has this one's.
        samples receives the answers to prompts."""
        line = {"step": step}
        if self.val_set:
            ce, hits, n = self._total(loss.evaluate(
                self.voice.model, self.batches(self._share(self.val_set.items)),
                self.batches.lean))
            line["val_loss"], line["val_accuracy"] = ce / n, hits / n
        marks = self.right(self.facts, self.prompts)
        if self.facts:
            line["recall"] = sum(marks) / len(self.facts)
        if self.known:
            line["retention"] = sum(self.right(self.known)) / len(self.known)
            items = self.own_answers.items
            line["kl"], line["own_loss"], line["own_loss_before"] = drift(
                self.voice.model, [batch for start in range(0, len(items), 8)
                                   for batch in self.batches(items[start:start + 8])])
        return parallel.from_first(line)

    def answers(self) -> list[str]:
        """The model's answers to the run's sample prompts."""
        return [answer.text for answer in self._ask(self.prompts)]

    def right(self, examples: list[dict], prompts: list = ()) -> list[int]:
        """For each example 1 if the model's answer contains its value, else 0. With prompts, which
        are asked in the same batch, said and samples receive the answers."""
        indices, marks = self._share(range(len(examples))), [0] * len(examples)
        asked = [examples[i]["messages"][:-1] for i in indices]
        asked += [prompt for prompt in prompts if prompt not in asked]
        said = [{"question": prompt[-1]["content"], "answer": answer.text}
                for prompt, answer in zip(asked, self._ask(asked), strict=True)]
        for i, line in zip(indices, said, strict=False):
            marks[i] = int(data.contains(line["answer"], examples[i]["value"]))
            line |= {"value": examples[i]["value"], "right": bool(marks[i])}
        if prompts:
            self.said, self.samples = said, [said[asked.index(p)]["answer"] for p in prompts]
        return self._total(marks)

    def rank(self, line: dict) -> tuple:
        """The sort key of an evaluation: smaller is better. Retention below keep.min_retention
        counts like recall lost. A hard bound would keep an adapter that forgot nothing because it
        learned nothing."""
        lost = max(0.0, self.s.keep.min_retention - line.get("retention", 1.0))
        by_recall = chooses_by_recall(self.s.train.best_by, len(self.facts))
        return (lost - line["recall"] if by_recall else lost + line["val_loss"], line["val_loss"])

    def _ask(self, prompts):
        s = self.s.train
        return self.voice.ask(prompts, s.max_new_tokens, repetition_penalty=s.repetition_penalty)

    def _share(self, items):
        return list(items) if self.sharded else parallel.mine(items)

    def _total(self, numbers):
        return list(numbers) if self.sharded else parallel.add_up(numbers)

    def _what_the_base_knows(self, examples):
        """(the examples that the base gets right, its own answers to them as a QADataset).

        In bfloat16 an answer may depend on who else is in the batch. So questions are left out
        until the base gets all right that are asked together: retention starts at 100 %."""
        if not examples:
            return [], None
        with surgery.disabled(self.voice.model):
            answers = self._ask([e["messages"][:-1] for e in examples])
            known = [(e, a) for e, a in zip(examples, answers, strict=True)
                     if data.contains(a.text, e["value"])]
            while not all(marks := self.right([e for e, _ in known])):
                known = [pair for pair, mark in zip(known, marks, strict=True) if mark]
        print(f"keep: {len(known)} of {len(examples)} questions of {self.s.keep.retain} are right "
              "before training")
        own = [{"messages": [*e["messages"][:-1], {"role": "assistant", "content": a.text}],
                "source": e["source"], "open": not a.ended} for e, a in known]
        voice = self.voice
        return [e for e, _ in known], own and dataset.QADataset(
            own, voice.tokenizer, voice.format, max_length=10**6)


def held_out_facts(val_set) -> list[dict]:
    """The validation examples with a value to look for in the answer."""
    return [example for example in (val_set.examples if val_set else []) if "value" in example]


def chooses_by_recall(best_by: str, n_facts: int) -> bool:
    """Whether recall chooses the best adapter. Raises ValueError if it shall and cannot."""
    if best_by == "recall" and not n_facts:
        raise ValueError('train: best_by is "recall", but no validation example has a "value".')
    return best_by == "recall" or (best_by == "auto" and n_facts > 0)


def sample_prompts(settings, some_set, n: int = 8) -> list[list[Message]]:
    """Prompts to answer before and after training: train.questions, else about n of a set, without
    its plain texts; and keep.questions."""
    def asked(texts):
        wanted = [{"messages": [{"role": "user", "content": text}]} for text in texts]
        return [e["messages"] for e in
                data.with_system(wanted, settings.data.system, settings.train.seed)]
    prompts = asked(settings.train.questions)
    if not prompts:
        dialogues = [example for example in some_set.examples if not data.is_text(example)]
        stride = max(1, math.ceil(len(dialogues) / n))
        prompts = [example["messages"][:-1] for example in dialogues[::stride]]
    return [*prompts, *asked(settings.keep.questions)]


if __name__ == "__main__":
    raise SystemExit("measure.py is no command; to ask a run: python -m scripts.compare runs/demo")
