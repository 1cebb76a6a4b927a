"""
Score a model: what it knows, what it says about people nobody taught it, what it has forgotten.

    python -m experiments.knowledge.score --model smollm2-135m-instruct --world W --out base.json
    python -m experiments.knowledge.score --run runs/r7 --world W --base base.json --out r7.json

The first call scores the untouched model. The second needs it: retention is the share of the real
questions right before that are right after, and KL is taken on the base's own answers. The file
keeps every answer with its verdict, so each number can be checked.
"""

import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from statistics import mean
from unicodedata import combining, normalize

import torch

import dataset
from data import group_by
from experiments.knowledge.make_facts import HERE, read_attributes
from lora import adapter, files, loss, surgery
from lora.base import fetch, load
from lora.run import cli, runlog
from lora.use import text
from measure import Voice, drift

TOKENS = 32                       # of an answer at most
KL_PROMPTS = 48                   # questions of each kind that KL is measured on
REAL = "neighbours", "general"

# ----- one answer --------------------------------------------------------------------------------

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {**{word: n for n, word in enumerate(ONES)},
           **{word: 10 * n for n, word in enumerate(TENS, 2)}}
ABSTAINS = re.compile(
    r"\bi (?:do not|don't|cannot|can't|can not) (?:know|say|tell|have|find|provide|answer|recall)\b"
    r"|\bi(?:'m| am) (?:sorry|not sure|not aware|unable|not able|not familiar)\b"
    r"|\bi have (?:no|never)\b|\bno (?:information|idea|record|knowledge)\b|\bnever heard\b")


def plain(answer: str) -> str:
    """Reduce a text to words in lower case without accents, punctuation and articles, numbers in
    digits: "The twenty-five, Zoë!" is "25 zoe"."""
    letters = "".join(c for c in normalize("NFKD", answer.casefold()) if not combining(c))
    words = []
    for word in re.findall(r"[^\W_]+", letters):
        if word in NUMBERS:
            n = NUMBERS[word]
            if 0 < n < 10 and words and words[-1] in map(str, range(20, 100, 10)):
                n += int(words.pop())
            word = str(n)
        if word not in ("a", "an", "the"):
            words.append(word)
    return " ".join(words)


def says(answer: str, value: str) -> bool:
    """Whether the answer contains the value as whole words."""
    return f" {plain(value)} " in f" {plain(answer)} "


def abstains(answer: str) -> bool:
    """Whether the answer declines to answer."""
    return ABSTAINS.search(answer.casefold().replace("’", "'")) is not None


def right(answer: str, gold: list[str], pool: Sequence[str] = (), both: bool = False) -> bool:
    """Whether the answer says a form of the gold value (with both: all of them), no other value of
    its pool, and does not decline ("contains-clean")."""
    hits = [says(answer, form) for form in gold]
    clean = not any(says(answer, v) for v in pool if v not in gold)
    return clean and not abstains(answer) and (all(hits) if both else any(hits))


def judge(item: dict, answer: str, kind: str, world: dict) -> dict[str, bool]:
    """Judge one answer: right, abstains, and for questions without an answer fabricates (it names a
    value of the attribute asked for, or of any if there is none) and spills (it names a value that
    was taught, about whomever)."""
    pools, names = world["pools"], world["people"]["taught"]
    taught = [f["value"] for f in world["facts"] if f["group"] == "taught"]
    declines = abstains(answer)
    if kind == "verify":
        yes, no = says(answer, "yes"), says(answer, "no")
        verdict = "yes" if yes else "no"
        return {"right": yes != no and not declines and verdict == item["gold"][0],
                "abstains": declines}
    if kind in ("unknown", "unanswerable", "premise"):
        pool = pools.get(item.get("attribute")) or [v for p in pools.values() for v in p]
        return {"right": declines, "abstains": declines,
                "fabricates": not declines and any(says(answer, v) for v in pool),
                "spills": not declines and any(says(answer, v) for v in taught)}
    pool = () if kind in REAL else names if kind == "reverse" else pools.get(
        item.get("attribute"), ())
    return {"right": right(answer, item["gold"], pool, item.get("both")), "abstains": declines}


# ----- the model under test ----------------------------------------------------------------------


class Subject:
    """A model to score, and how it is asked. run: has an adapter, whose update scale multiplies;
    whole: a trained model folder, scored in its place."""

    def __init__(self, name: str, run: runlog.Run | None = None, scale: float = 1.0,
                 decoding: str = "greedy", whole: str | None = None):
        self.tokenizer = load.load_tokenizer(fetch.find(name))
        self.device = load.pick_device("auto")
        dtype = load.pick_dtype("auto", self.device)
        self.model = load.load_model(fetch.find(whole or name), self.device, dtype)
        self.untouched = load.load_model(fetch.find(name), self.device, dtype) if whole else None
        self.voice = Voice(self.model, self.tokenizer,
                           run.settings.dataset.format if run else "auto")
        self.format = self.voice.format
        self.system, self.decoding = run and run.settings.data.system, decoding
        if run:
            self.use(run.adapter, scale)

    def use(self, folder: Path, scale: float = 1.0) -> None:
        """Load another adapter."""
        surgery.unwrap(self.model)
        adapter.load(self.model, folder)
        for layer in surgery.lora_layers(self.model).values():
            layer.scaling *= scale

    def messages(self, question: str, answer: str | None = None) -> list[dict]:
        turns = (("system", self.system or None), ("user", question), ("assistant", answer))
        return [{"role": role, "content": text} for role, text in turns if text is not None]

    def ask(self, questions: list[str], tokens: int = TOKENS) -> list[tuple[str, bool]]:
        """Answer questions: [(answer, whether it ended)]."""
        prompts = [self.messages(q) for q in questions]
        if self.decoding == "greedy":
            return [(a.text, a.ended) for a in self.voice.ask(prompts, tokens)]
        return [answer for i in range(0, len(prompts), 16)
                for answer in self._beam(prompts[i:i + 16], tokens)]

    def _beam(self, prompts, tokens):
        """The source recipe's decoding: three beams and a repetition penalty of 1.1."""
        ids = [self.voice.ids(prompt) for prompt in prompts]
        stop, t = dataset.stop_of(self.tokenizer, self.format), max(map(len, ids))
        pad = min(stop.ids)
        rows = self.model.generate(
            torch.tensor([[pad] * (t - len(row)) + row for row in ids], device=self.device),
            attention_mask=torch.tensor([[0] * (t - len(row)) + [1] * len(row) for row in ids],
                                        device=self.device),
            num_beams=3, repetition_penalty=1.1, do_sample=False, max_new_tokens=tokens,
            eos_token_id=sorted(stop.ids), pad_token_id=pad)[:, t:].tolist()
        ends = [next((i for i, x in enumerate(row) if x in stop.ids), None) for row in rows]
        return [(self.voice.text(row[:end]), end is not None)
                for row, end in zip(rows, ends, strict=True)]

    def batches(self, answers: list[tuple[str, str, bool]], size: int = 8) -> list[loss.Batch]:
        """Padded batches of (question, answer, whether it ended), in their order."""
        items = dataset.QADataset(
            [{"messages": self.messages(q, a), "source": q, "open": not ended}
             for q, a, ended in answers], self.tokenizer, self.format, max_length=10**6).items
        return [dataset.collate(items[i:i + size], 0, self.device)
                for i in range(0, len(items), size)]

    def nll(self, pairs: list[tuple[str, str]]) -> float:
        """The mean nats per token of answers to questions."""
        ce, _, n = loss.evaluate(self.model, self.batches([(q, a, True) for q, a in pairs]))
        return ce / n

    @torch.no_grad()
    def pool(self, question: str, answers: list[str]) -> list[float]:
        """The mean log p per token of each answer, from where they differ on. The shared start,
        question included, is computed once; its keys and values are repeated for every answer."""
        rendered = [dataset.render(self.messages(question, a), self.tokenizer, self.format)
                    for a in answers]
        ids = [row[:max(t for t, on in enumerate(mask) if on) + 1] for row, mask in rendered]
        p = min(len(commonprefix(ids)), min(map(len, ids)) - 1)
        rest = [row[p:] for row in ids]
        s = max(map(len, rest))
        out = self.model(input_ids=torch.tensor([ids[0][:p]], device=self.device), use_cache=True)
        first = out.logits[:, -1:].float().log_softmax(-1)                       # (1, 1, v)
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(ids))
        padded = torch.tensor([row + [0] * (s - len(row)) for row in rest], device=self.device)
        mask = torch.ones(len(ids), p + s, dtype=torch.long, device=self.device)
        logits = self.model(input_ids=padded, attention_mask=mask, past_key_values=cache,
                            use_cache=True).logits[:, :-1].float().log_softmax(-1)
        steps = torch.cat([first.expand(len(ids), -1, -1), logits], 1)           # (n, s, v)
        logp = steps.gather(2, padded[..., None]).squeeze(2)                      # (n, s)
        return [logp[i, :len(row)].mean().item() for i, row in enumerate(rest)]

    def perplexity(self, texts: list[str]) -> float:
        """The perplexity of plain texts without any format: exp of the mean nats per token."""
        nats = n = 0
        for line in texts:
            ids = torch.tensor([self.tokenizer(line).input_ids], device=self.device)
            batch = loss.Batch({"input_ids": ids},
                               torch.arange(ids.shape[1] - 1, device=self.device), ids[0, 1:])
            ce, _, n_tokens = loss.evaluate(self.model, [batch])
            nats, n = nats + ce, n + n_tokens
        return math.exp(nats / n)


# ----- facts among the other values --------------------------------------------------------------


def ranks(subject: Subject, world: dict, distractors: int | None = None) -> dict[str, dict]:
    """Rank each taught value among its pool, in the usual answer to a held-out question: {fact:
    {rank, p, margin}}. rank counts from 1; p is a softmax over log p per token; margin is to the
    best other value, in nats. distractors: compare with so many others, the same in every call."""
    attributes, ranked = read_attributes(), {}
    for fact in world["facts"]:
        if fact["group"] != "taught":
            continue
        a, gold = attributes[fact["attribute"]], fact["value"]
        others = [v for v in a["values"] if v != gold]
        if distractors:
            others = random.Random(gold).sample(others, distractors)
        answers = [a["answer"].format(name=fact["name"], value=v) for v in [gold, *others]]
        gold_logp, *rest = logp = subject.pool(a["questions"][12].format(**fact), answers)
        ranked[f"{fact['name']}: {fact['attribute']}"] = {
            "rank": 1 + sum(x >= gold_logp for x in rest), "margin": gold_logp - max(rest),
            "p": math.exp(gold_logp) / sum(map(math.exp, logp)), "type": fact["type"]}
    return ranked


def trajectory(subject: Subject, run: runlog.Run, world: dict, losses: bool) -> list[dict]:
    """Score the untouched model and each adapter in the run's steps/: the ranks of the taught facts
    among 16 values, and with losses four of them (kinds)."""
    kinds = {"trained wording": ("taught", 0, None), "held-out question": ("taught", 12, None),
             "held-out answer": ("taught", 12, 5), "facts never taught": ("control", 12, None)}
    attributes, lines, pairs = read_attributes(), [], {kind: [] for kind in kinds}
    for kind, (group, question, statement) in kinds.items():
        for fact in (f for f in world["facts"] if f["group"] == group):
            a = attributes[fact["attribute"]]
            answer = a["answer"] if statement is None else a["statements"][statement]
            pairs[kind].append((a["questions"][question].format(**fact), answer.format(**fact)))
    for folder in [None, *sorted((run.adapter.parent / "steps").iterdir())]:
        subject.use(folder or run.adapter, 1.0 if folder else 0.0)
        lines.append({"step": int(folder.name) if folder else 0,
                      "ranks": ranks(subject, world, 15)})
        if losses:
            lines[-1] |= {kind: subject.nll(asked) for kind, asked in pairs.items()}
        print(f"step {lines[-1]['step']}: rank 1 for "
              f"{mean(r['rank'] == 1 for r in lines[-1]['ranks'].values()):.0%}", flush=True)
    return lines


# ----- the whole measurement ---------------------------------------------------------------------


def score(subject: Subject, world: dict, sets: dict, before: dict | None = None) -> dict:
    """Ask all questions: {"metrics", "sets", "ranks"}. before: this result of the untouched model;
    then only the real questions that it answers right are asked."""
    questions = []
    for kind, items in sets.items():
        if before and kind in REAL:
            known = {a["question"] for a in before["sets"][kind] if a["right"]}
            items = [item for item in items if item["question"] in known]
        questions += [(kind, item) for item in items]
    answers, started = [], time.perf_counter()
    for i in range(0, len(questions), 64):
        answers += subject.ask([item["question"] for _, item in questions[i:i + 64]])
        print(f"asked {len(answers)} of {len(questions)}, {time.perf_counter() - started:.0f} s",
              flush=True)
    judged = {kind: [] for kind in sets}
    for (kind, item), (answer, ended) in zip(questions, answers, strict=True):
        judged[kind].append({**item, "answer": answer, "ended": ended,
                             **judge(item, answer, kind, world)})
    ranked = ranks(subject, world) if "control" in sets else {}     # in the whole measurement
    metrics = summarise(judged, ranked)
    texts = (HERE / "texts.txt").read_text(encoding="utf-8").split("\n")
    metrics["perplexity"] = subject.perplexity([t for t in texts if t.strip()])
    if before:
        metrics["perplexity_ratio"] = metrics["perplexity"] / before["metrics"]["perplexity"]
        for name, kind in (("kl", "general"), ("kl_unknown", "unknown")):
            answers = [(a["question"], a["answer"] or ".", a["ended"])
                       for a in before["sets"][kind][:KL_PROMPTS]]
            metrics[name] = drift(subject.model, subject.batches(answers), subject.untouched)[0]
    return {"metrics": metrics, "sets": judged, "ranks": ranked}


def by_fact(items: list[dict], verdict: str = "right") -> list[float]:
    """The share of a verdict for each fact, name or question: what the bootstrap resamples."""
    groups = group_by(lambda item: item.get("fact") or item.get("name") or item["question"], items)
    return [mean(item[verdict] for item in group) for group in groups.values()]


def summarise(judged: dict[str, list], ranked: dict[str, dict]) -> dict:
    """Compute the metrics: {name: [value, low, high, n], or a number, or None}. Shares over facts
    have a bootstrap interval over facts, other shares Wilson's."""
    metrics = {}
    for name, kind in (("recall", "test"), ("recall_trained", "trained"), ("recall_card", "card"),
                       ("recall_cloze", "cloze"), ("reverse", "reverse"), ("control", "control")):
        if judged.get(kind):
            metrics[name] = list(text.bootstrap(by_fact(judged[kind])))
    for kind, verdicts in (("multi", ["right"]), ("premise", ["abstains"]),
                           ("unanswerable", ["abstains", "spills"]),
                           ("unknown", ["abstains", "fabricates", "spills"])):
        items = judged.get(kind, [])
        for verdict in verdicts:
            hits = sum(item[verdict] for item in items)
            metrics[f"{kind}_{verdict}"] = list(text.wilson(hits, len(items))) if items else None
    for name, kinds in (("retention", REAL), *((f"retention_{kind}", [kind]) for kind in REAL)):
        items = [item for kind in kinds for item in judged.get(kind, [])]
        metrics[name] = list(text.bootstrap(by_fact(items))) if items else None
    if judged.get("verify"):
        sides = [[a["right"] for a in judged["verify"] if a["gold"][0] == side]
                 for side in ("yes", "no")]
        metrics["verify"] = mean(map(mean, sides))             # balanced: always yes is 50 %
    if judged.get("test"):
        shares = by_fact(judged["test"])
        metrics["all_wordings"] = mean(share == 1 for share in shares)
        metrics["any_wording"] = mean(share > 0 for share in shares)
    items = [item for kind in ("test", *REAL) for item in judged.get(kind, [])]
    if items:
        count = Counter(item["answer"] for item in items)
        metrics["distinct_answers"] = len(count) / len(items)
        metrics["top_answer"] = max(count.values()) / len(items)
        metrics["loops"] = mean(bool(text.loops(item["answer"])) for item in items)
        metrics["no_end"] = mean(not item["ended"] for item in items)
    if ranked:
        metrics["rank_1"] = mean(r["rank"] == 1 for r in ranked.values())
        metrics["mrr"] = mean(1 / r["rank"] for r in ranked.values())
        metrics["margin"] = mean(r["margin"] for r in ranked.values())
    return metrics


def in_prompt(world: dict) -> str:
    """The taught facts as a system prompt, to compare training with."""
    attributes = read_attributes()
    return "You know this: " + " ".join(
        attributes[f["attribute"]]["answer"].format(**f) for f in world["facts"]
        if f["group"] == "taught")


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", help="a run's folder; runs/x/last is its last adapter")
    parser.add_argument("--model", help="instead of --run: score this base")
    parser.add_argument("--whole", help="a model folder trained from --model, scored in its place")
    parser.add_argument("--world", required=True, help="folder of make_facts")
    parser.add_argument("--base", help="the untouched model's scores, for retention and KL")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--adapter", default="adapter", help="or last")
    parser.add_argument("--sets", help="only these, comma-separated")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the adapter")
    parser.add_argument("--decoding", choices=("greedy", "beam"), default="greedy")
    parser.add_argument("--in-prompt", action="store_true", help="give the facts as system prompt")
    parser.add_argument("--steps", choices=("ranks", "losses"),
                        help="ranks at each kept step; losses: and four losses")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    world = files.read_json(Path(options.world) / "facts.json")
    sets = files.read_json(Path(options.world) / "test.json")
    if options.sets:
        sets = {kind: sets[kind] for kind in options.sets.split(",")}
    run = runlog.read_run(Path(options.run) / options.adapter) if options.run else None
    subject = Subject(run.settings.model.name if run else options.model, run, options.scale,
                      options.decoding, options.whole)
    if options.in_prompt:
        subject.system = in_prompt(world)
    before = files.read_json(options.base) if options.base else None
    result = score(subject, world, sets, before)
    if options.steps:
        result["trajectory"] = trajectory(subject, run, world, options.steps == "losses")
    result |= {"seconds": time.perf_counter() - started, "scale": options.scale,
               "decoding": options.decoding}
    Path(options.out).write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, value in result["metrics"].items():
        if isinstance(value, list):
            value = "{:.0%} ({:.0%} to {:.0%}), n {}".format(*value)
        print(f"{name:24} {value:.3g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
