"""
What a model knows after training, what it says about those it was told nothing of, and what it has
forgotten.

    python -m experiments.knowledge.score --model smollm2-135m-instruct --world W --out base.json
    python -m experiments.knowledge.score --run runs/r7 --world W --base base.json --out r7.json

The first call scores the untouched model; the second needs it, for retention is the share of the
real questions right before that are right after, and KL is taken on the base's own answers. Every
answer is kept in the file with its verdict, so each number can be looked at.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from os.path import commonprefix
from pathlib import Path
from statistics import mean
from unicodedata import combining, normalize

import torch

import dataset
from experiments.knowledge.make_facts import read_attributes
from lora import adapter, base, fetch, loss, meter, runlog, surgery, text
from lora.config import run_cli

HERE = Path(__file__).parent
TOKENS = 32                       # an answer may have
KL_PROMPTS = 48                   # of the general ones, and of those about unknown names
REAL = "neighbours", "general"

# ----- one answer --------------------------------------------------------------------------------

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = {word: 10 * n for n, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
ABSTAINS = re.compile(
    r"\bi (?:do not|don't|cannot|can't|can not) (?:know|say|tell|have|find|provide|answer|recall)\b"
    r"|\bi(?:'m| am) (?:sorry|not sure|not aware|unable|not able|not familiar)\b"
    r"|\bi have (?:no|never)\b|\bno (?:information|idea|record|knowledge)\b|\bnever heard\b")


def plain(said):
    """Words in lower case, separated by spaces: no accents, punctuation or articles, numbers in
    digits ("twenty-five" is "25")."""
    letters = "".join(c for c in normalize("NFKD", said.casefold()) if not combining(c))
    made = []
    for word in re.findall(r"[^\W_]+", letters):
        if word in ONES:
            n = ONES.index(word)
            if made and 0 < n < 10 and made[-1] in map(str, TENS.values()):
                n += int(made.pop())
            word = str(n)
        elif word in TENS:
            word = str(TENS[word])
        if word not in ("a", "an", "the"):
            made.append(word)
    return " ".join(made)


def says(answer, value):
    """Does the answer contain the value as whole words?"""
    return f" {plain(value)} " in f" {plain(answer)} "


def abstains(answer):
    return ABSTAINS.search(answer.casefold().replace("’", "'")) is not None


def right(answer, gold, pool=(), both=False):
    """Contains-clean: the answer says a form of the gold value (with both: all of them), no other
    value of its pool, and does not decline to answer."""
    clean = not any(says(answer, v) for v in pool if v not in gold)
    return clean and not abstains(answer) and (all if both else any)(says(answer, g) for g in gold)


def judge(item, answer, kind, world):
    """The verdicts on one answer: right, and for questions that have no answer what it invents.
    fabricates: it names a value of the attribute asked for (of any, if none is); spills: one that
    was taught, whoever it belongs to."""
    pools, names = world["pools"], world["people"]["taught"]
    taught = [f["value"] for f in world["facts"] if f["group"] == "taught"]
    declines = abstains(answer)
    if kind == "verify":
        yes, no = says(answer, "yes"), says(answer, "no")
        said = yes != no and not declines and ["no", "yes"][yes] == item["gold"][0]
        return {"right": said, "abstains": declines}
    if kind in ("unknown", "unanswerable", "premise"):
        pool = pools.get(item.get("attribute")) or [v for p in pools.values() for v in p]
        return {"right": declines, "abstains": declines,
                "fabricates": not declines and any(says(answer, v) for v in pool),
                "spills": not declines and any(says(answer, v) for v in taught)}
    pool = names if kind == "reverse" else () if kind in REAL else pools.get(
        item.get("attribute"), ())
    return {"right": right(answer, item["gold"], pool, item.get("both")), "abstains": declines}


# ----- the model under test ----------------------------------------------------------------------


class Subject:
    """A model with or without an adapter, or one made whole from it, and how it is asked."""

    def __init__(self, name, settings=None, folder=None, scale=1.0, decoding="greedy", whole=None):
        self.tokenizer = base.load_tokenizer(fetch.find(name))
        self.device = base.pick_device("auto")
        dtype = base.pick_dtype("auto", self.device)
        self.model = base.load_model(fetch.find(whole or name), self.device, dtype)
        self.untouched = base.load_model(fetch.find(name), self.device, dtype) if whole else None
        self.format = dataset.choose_format(
            self.tokenizer, settings.dataset.format if settings else "auto")
        self.system, self.decoding = settings and settings.data.system, decoding
        if folder:
            self.use(folder, scale)

    def use(self, folder, scale=1.0):
        """Load another adapter; scale multiplies its update."""
        surgery.unwrap(self.model)
        adapter.load(self.model, folder)
        for layer in surgery.lora_layers(self.model).values():
            layer.scaling *= scale

    def messages(self, question, answer=None):
        said = [{"role": "system", "content": self.system}] if self.system else []
        said.append({"role": "user", "content": question})
        return said + ([{"role": "assistant", "content": answer}] if answer is not None else [])

    def ask(self, questions, tokens=TOKENS):
        """[(answer, whether it ended)]"""
        prompts = [self.messages(q) for q in questions]
        if self.decoding == "greedy":
            return dataset.answer(self.model, self.tokenizer, prompts, self.format,
                                  max_new_tokens=tokens)
        return [said for i in range(0, len(prompts), 16)
                for said in self._beam(prompts[i:i + 16], tokens)]

    def _beam(self, prompts, tokens):
        """The source recipe's decoding: three beams and a repetition penalty of 1.1."""
        ids = [dataset.render(p, self.tokenizer, self.format, reply=True)[0] for p in prompts]
        stop, t = dataset.stop_of(self.tokenizer, self.format), max(map(len, ids))
        pad = min(stop.ids)
        made = self.model.generate(
            torch.tensor([[pad] * (t - len(row)) + row for row in ids], device=self.device),
            attention_mask=torch.tensor([[0] * (t - len(row)) + [1] * len(row) for row in ids],
                                        device=self.device),
            num_beams=3, repetition_penalty=1.1, do_sample=False, max_new_tokens=tokens,
            eos_token_id=sorted(stop.ids), pad_token_id=pad)[:, t:].tolist()
        ends = [next((i for i, x in enumerate(row) if x in stop.ids), None) for row in made]
        return [(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip(),
                 end is not None) for row, end in zip(made, ends, strict=True)]

    def batches(self, pairs, size=8):
        """Padded batches of (question, answer, whether it ended), in their order."""
        made = dataset.QADataset(
            [{"messages": self.messages(q, a), "source": q, "open": not ended}
             for q, a, ended in pairs], self.tokenizer, self.format, max_length=10**6)
        return [dataset.collate(made.items[i:i + size], 0, self.device)
                for i in range(0, len(made), size)]

    def nll(self, pairs):
        """Mean nats per token of answers to questions."""
        ce, _, n = loss.evaluate(self.model, self.batches([(q, a, True) for q, a in pairs]))
        return ce / n

    @torch.no_grad()
    def pool(self, question, answers):
        """[log p per token] of each answer, from where they differ on. What they share, question
        included, is computed once: its keys and values are repeated for every answer."""
        made = [dataset.render(self.messages(question, a), self.tokenizer, self.format)
                for a in answers]
        ids = [row[:max(t for t, on in enumerate(said) if on) + 1] for row, said in made]
        p = min(len(commonprefix(ids)), min(map(len, ids)) - 1)
        rest = [row[p:] for row in ids]
        s = max(map(len, rest))
        out = self.model(input_ids=torch.tensor([ids[0][:p]], device=self.device), use_cache=True)
        first = out.logits[:, -1:].float().log_softmax(-1)                       # (1, 1, v)
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(ids))
        given = torch.tensor([row + [0] * (s - len(row)) for row in rest], device=self.device)
        mask = torch.ones(len(ids), p + s, dtype=torch.long, device=self.device)
        logits = self.model(input_ids=given, attention_mask=mask, past_key_values=cache,
                            use_cache=True).logits[:, :-1].float().log_softmax(-1)
        steps = torch.cat([first.expand(len(ids), -1, -1), logits], 1)           # (n, s, v)
        logp = steps.gather(2, given[..., None]).squeeze(2)                      # (n, s)
        return [logp[i, :len(row)].mean().item() for i, row in enumerate(rest)]

    def perplexity(self, texts):
        """exp of the mean nats per token of plain texts, without any format."""
        nats = n = 0
        for written in texts:
            ids = torch.tensor([self.tokenizer(written).input_ids], device=self.device)
            batch = loss.Batch({"input_ids": ids},
                               torch.arange(ids.shape[1] - 1, device=self.device), ids[0, 1:])
            with torch.no_grad():
                nats += float(loss.ce_sum(self.model, batch)[0])
            n += ids.shape[1] - 1
        return math.exp(nats / n)


# ----- facts among the other values --------------------------------------------------------------


def ranks(subject, world, distractors=None):
    """{fact: {rank, p, margin}} of the gold value among its pool, in the usual answer to a held-out
    question: rank from 1, p of a softmax over log p per token, margin to the best other in nats.
    distractors: only so many other values, the same for every call."""
    attributes, found = read_attributes(), {}
    for fact in world["facts"]:
        if fact["group"] != "taught":
            continue
        a, gold = attributes[fact["attribute"]], fact["value"]
        others = [v for v in a["values"] if v != gold]
        if distractors:
            others = random.Random(gold).sample(others, distractors)
        answers = [a["answer"].format(name=fact["name"], value=v) for v in [gold, *others]]
        own, *rest = logp = subject.pool(a["questions"][12].format(**fact), answers)
        found[f"{fact['name']}: {fact['attribute']}"] = {
            "rank": 1 + sum(x >= own for x in rest), "margin": own - max(rest),
            "p": math.exp(own) / sum(map(math.exp, logp)), "type": fact["type"]}
    return found


def trajectory(subject, run, world, losses):
    """For the untouched model and each adapter in the run's steps/: ranks of the taught facts among
    16 values, and with losses four of them: the trained wording, a held-out question, a held-out
    wording of the answer, and facts never taught."""
    def pairs(group, question, statement=None):
        for fact in world["facts"]:
            if fact["group"] == group:
                a = read_attributes()[fact["attribute"]]
                said = a["answer"] if statement is None else a["statements"][statement]
                yield a["questions"][question].format(**fact), said.format(**fact)
    kinds = {"trained wording": ("taught", 0), "held-out question": ("taught", 12),
             "held-out answer": ("taught", 12, 5), "facts never taught": ("control", 12)}
    lines = []
    for folder in [None, *sorted((run.adapter.parent / "steps").iterdir())]:
        subject.use(folder or run.adapter, 1.0 if folder else 0.0)
        lines.append({"step": int(folder.name) if folder else 0,
                      "ranks": ranks(subject, world, 15)})
        if losses:
            lines[-1] |= {kind: subject.nll(list(pairs(*which))) for kind, which in kinds.items()}
        print(f"step {lines[-1]['step']}: rank 1 for "
              f"{mean(r['rank'] == 1 for r in lines[-1]['ranks'].values()):.0%}", flush=True)
    return lines


# ----- the whole measurement ---------------------------------------------------------------------


def score(subject, world, sets, before=None):
    """{"metrics", "sets", "ranks"} of a subject; before is what this function returned for the
    untouched model."""
    asked = {}
    for kind, items in sets.items():
        if before and kind in REAL:                            # only those it could lose
            known = {a["question"] for a in before["sets"][kind] if a["right"]}
            items = [item for item in items if item["question"] in known]
        asked[kind] = items
    flat = [(kind, item) for kind, items in asked.items() for item in items]
    given, seen = [], time.perf_counter()
    for i in range(0, len(flat), 64):
        given += subject.ask([item["question"] for _, item in flat[i:i + 64]])
        print(f"asked {len(given)} of {len(flat)}, {time.perf_counter() - seen:.0f} s", flush=True)
    answered = {kind: [] for kind in sets}
    for (kind, item), (said, ended) in zip(flat, given, strict=True):
        answered[kind].append({**item, "answer": said, "ended": ended,
                               **judge(item, said, kind, world)})
    found = ranks(subject, world) if "control" in sets else {}      # in the whole measurement
    metrics = summarise(answered, found)
    texts = (HERE / "texts.txt").read_text(encoding="utf-8").split("\n")
    metrics["perplexity"] = subject.perplexity([t for t in texts if t.strip()])
    if before:
        metrics["perplexity_ratio"] = metrics["perplexity"] / before["metrics"]["perplexity"]
        for name, kind in (("kl", "general"), ("kl_unknown", "unknown")):
            said = [(a["question"], a["answer"] or ".", a["ended"])
                    for a in before["sets"][kind][:KL_PROMPTS]]
            metrics[name] = meter.drift(subject.model, subject.batches(said),
                                        subject.untouched)[0]
    return {"metrics": metrics, "sets": answered, "ranks": found}


def by_fact(items, verdict="right"):
    """The share of an item's verdict for each fact (or name): what the bootstrap resamples."""
    groups = {}
    for item in items:
        groups.setdefault(item.get("fact") or item.get("name") or item["question"], []).append(
            item[verdict])
    return [mean(hits) for hits in groups.values()]


def summarise(answered, found):
    """{metric: Interval as a list, or a number}. Shares over facts have a bootstrap interval over
    facts, other shares Wilson's."""
    made = {}

    def share(name, items, verdict="right"):
        hits = sum(item[verdict] for item in items)
        made[name] = list(text.wilson(hits, len(items))) if items else None
    for name, kind in (("recall", "test"), ("recall_trained", "trained"), ("recall_card", "card"),
                       ("recall_cloze", "cloze"), ("reverse", "reverse"), ("control", "control")):
        if answered.get(kind):
            made[name] = list(text.bootstrap(by_fact(answered[kind])))
    for kind, verdicts in (("multi", ["right"]), ("premise", ["abstains"]),
                           ("unanswerable", ["abstains", "spills"]),
                           ("unknown", ["abstains", "fabricates", "spills"])):
        for verdict in verdicts:
            share(f"{kind}_{verdict}", answered.get(kind, []), verdict)
    for name, kinds in (("retention", REAL), *((f"retention_{kind}", [kind]) for kind in REAL)):
        asked = [a for kind in kinds for a in answered.get(kind, [])]
        made[name] = list(text.bootstrap(by_fact(asked))) if asked else None
    if answered.get("verify"):
        sides = [[a["right"] for a in answered["verify"] if a["gold"][0] == side]
                 for side in ("yes", "no")]
        made["verify"] = mean(map(mean, sides))                # balanced: always yes is 50 %
    if answered.get("test"):
        shares = by_fact(answered["test"])
        made["all_wordings"], made["any_wording"] = (mean(f(x) for x in shares) for f in (
            lambda x: x == 1, lambda x: x > 0))
    everything = [a["answer"] for kind in ("test", *REAL) for a in answered.get(kind, [])]
    if everything:
        top = Counter(everything).most_common(1)[0][1]
        made["distinct_answers"] = len(set(everything)) / len(everything)
        made["top_answer"] = top / len(everything)
        made["loops"] = mean(bool(text.loops(a)) for a in everything)
        made["no_end"] = mean(not a["ended"] for kind in ("test", *REAL)
                              for a in answered.get(kind, []))
    if found:
        made["rank_1"] = mean(r["rank"] == 1 for r in found.values())
        made["mrr"] = mean(1 / r["rank"] for r in found.values())
        made["margin"] = mean(r["margin"] for r in found.values())
    return made


def in_prompt(world):
    """The taught facts as a system prompt: what no training costs."""
    attributes = read_attributes()
    return "You know this: " + " ".join(
        attributes[f["attribute"]]["answer"].format(**f) for f in world["facts"]
        if f["group"] == "taught")


def main(argv):
    parser = argparse.ArgumentParser(description="Score a run, or with --model an untouched model.")
    parser.add_argument("--run", help="a run's folder; runs/x/last is its last adapter")
    parser.add_argument("--model", help="instead of --run: score this base")
    parser.add_argument("--whole", help="a model folder made from --model, scored in its place")
    parser.add_argument("--world", required=True, help="folder of make_facts")
    parser.add_argument("--base", help="the untouched model's scores, for retention and KL")
    parser.add_argument("--out", required=True)
    parser.add_argument("--adapter", default="adapter", help="or last")
    parser.add_argument("--sets", help="only these, comma-separated")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the adapter")
    parser.add_argument("--decoding", choices=("greedy", "beam"), default="greedy")
    parser.add_argument("--in-prompt", action="store_true", help="give the facts as system prompt")
    parser.add_argument("--steps", choices=("ranks", "losses"),
                        help="ranks at each kept step; losses: and four losses")
    asked = parser.parse_args(argv)
    started = time.perf_counter()
    world = json.loads((Path(asked.world) / "facts.json").read_text(encoding="utf-8"))
    sets = json.loads((Path(asked.world) / "test.json").read_text(encoding="utf-8"))
    if asked.sets:
        sets = {kind: sets[kind] for kind in asked.sets.split(",")}
    run = runlog.read_run(Path(asked.run) / asked.adapter) if asked.run else None
    subject = Subject(run.settings.model.name if run else asked.model, run and run.settings,
                      run and run.adapter, asked.scale, asked.decoding, asked.whole)
    if asked.in_prompt:
        subject.system = in_prompt(world)
    before = json.loads(Path(asked.base).read_text(encoding="utf-8")) if asked.base else None
    made = score(subject, world, sets, before)
    if asked.steps:
        made["trajectory"] = trajectory(subject, run, world, asked.steps == "losses")
    made |= {"seconds": time.perf_counter() - started, "scale": asked.scale,
             "decoding": asked.decoding}
    Path(asked.out).write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, value in made["metrics"].items():
        shown = "{:.0%} ({:.0%} to {:.0%}), n {}".format(*value) if isinstance(value, list) \
            else value if value is None else f"{value:.3g}"
        print(f"{name:24} {shown}")


if __name__ == "__main__":
    import sys
    run_cli(main, sys.argv[1:])
