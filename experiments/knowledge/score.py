"""
Score a model: what it knows, what it says about people nobody taught it, what it has forgotten.

    python -m experiments.knowledge.score --model smollm2-135m-instruct --world W --out base.json
    python -m experiments.knowledge.score --run runs/r7 --world W --base base.json --out r7.json

The first call scores the untouched model. The second needs it: every real question is asked before
and after, and KL is taken on the untouched model's own answers. A real question's margin is
log p(right answer) - log p(one of three wrong ones), in nats. The file keeps every answer with its
verdict and every margin, so each number can be checked.
"""

import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from statistics import mean
from unicodedata import combining, normalize

import torch

import dataset
from experiments.knowledge.make_facts import HERE, read_attributes
from experiments.knowledge.metrics import summarise
from lora import adapter, files, loss, surgery
from lora.base import fetch, load
from lora.run import cli, runlog
from measure import Voice, drift

TOKENS, REAL_TOKENS, HOP_TOKENS = 32, 20, 48      # of an answer at most; a hop says two facts
ANSWERED = 96                     # real questions that are answered too; all have a margin
ROWS = 48                         # answers whose log p is computed together
KL_PROMPTS = 48                   # answers of the untouched model that KL is measured on
DECLINED = "unknown", "unanswerable", "premise", "nobody"     # right is to say "I don't know"

# ----- one answer --------------------------------------------------------------------------------

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {**{word: n for n, word in enumerate(ONES)},
           **{word: 10 * n for n, word in enumerate(TENS, 2)}}
ABSTAINS = re.compile(
    r"\bi (?:do not|don't|cannot|can't|can not) (?:know|say|tell|have|find|provide|answer|recall)\b"
    r"|\bi (?:do not|don't) think i know\b|\b(?:not|isn't) something i (?:know|was told)\b"
    r"|\bi(?:'m| am) (?:sorry|not sure|unable|not able|not familiar)\b|\bnot aware\b"
    r"|\bi have (?:no|never)\b|\bno (?:information|idea|record|knowledge)\b"
    r"|\b(?:never|have not|haven't) heard\b|\b(?:nobody|no one)(?: has| ever)* told me\b"
    r"|\b(?:is|are|was|were) ?(?:not|n't) known\b(?! (?:for|as)\b)|\bit's not known\b")


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
    was taught, about whomever; asked who has a value that nobody has: a taught person). An everyday
    prompt spills with what was taught, and refuses, if the untouched model's answer ("before") does
    not. Where people are values (the best friend is), the subject's own name is no other value."""
    pools, names = world["pools"], world["people"]["taught"]
    declines = abstains(answer)
    if kind == "everyday":
        words = [*names, *(f["value"] for f in world["facts"] if f["group"] == "taught")]
        before = item.get("before", answer)
        return {"spills": any(says(answer, w) and not says(before, w) for w in words),
                "abstains": declines, "refuses": declines and not abstains(before)}
    if kind == "verify":                              # "Yes." or "She was born in 1985, so yes."
        verdicts = {word for word in plain(answer).split() if word in ("yes", "no")}
        return {"right": verdicts == set(item["gold"]) and not declines, "abstains": declines}
    if kind in DECLINED:
        pool = pools.get(item.get("attribute")) or [v for p in pools.values() for v in p]
        taught = [f["value"] for f in world["facts"] if f["group"] == "taught"]
        if kind == "nobody":
            pool = taught = names
        return {"right": declines, "abstains": declines,
                "fabricates": not declines and any(says(answer, v) for v in pool),
                "spills": not declines and any(says(answer, v) for v in taught)}
    pool = () if kind == "real" else names if kind == "reverse" else pools.get(
        item.get("attribute"), ())
    if kind != "reverse":
        pool = [value for value in pool if value != item.get("name")]
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
        chip = (torch.cuda.get_device_name(self.device) if self.device.type == "cuda"
                else self.device.type.upper())
        self.machine = f"{chip}, {str(dtype).split('.')[1]}, torch {torch.__version__}"
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

    def items(self, answers: list[tuple[str, str, bool]]) -> list[dict]:
        """The items of a QADataset for (question, answer, whether what ends it counts)."""
        return dataset.QADataset(
            [{"messages": self.messages(q, a), "source": q, "open": not ended}
             for q, a, ended in answers], self.tokenizer, self.format, max_length=10**6).items

    def batches(self, answers: list[tuple[str, str, bool]], size: int = 8) -> list[loss.Batch]:
        """Padded batches of (question, answer, whether it ended), in their order."""
        items = self.items(answers)
        return [dataset.collate(items[i:i + size], 0, self.device)
                for i in range(0, len(items), size)]

    def nll(self, pairs: list[tuple[str, str]]) -> float:
        """The mean nats per token of answers to questions."""
        ce, _, n = loss.evaluate(self.model, self.batches([(q, a, True) for q, a in pairs]))
        return ce / n

    def pool(self, question: str, answers: list[str]) -> list[float]:
        """The mean log p per token of each answer and its end, from where the answers differ on:
        nats per token."""
        return [mean(logp) for logp in self.log_p([(question, answers)], True)[0]]

    def margins(self, questions: list[str], right: list[str], wrong: list[list[str]]
                ) -> list[float]:
        """For each question log p(right) - log p(one of the wrong ones), in nats: log p is the sum
        over an answer's own tokens, straight after the prompt, without what ends it."""
        asked = [(q, [a, *others]) for q, a, others in zip(questions, right, wrong, strict=True)]
        sums = [[math.fsum(logp) for logp in of] for of in self.log_p(asked, False)]
        return [gold - torch.tensor(rest, dtype=torch.float64).logsumexp(0).item()
                for gold, *rest in sums]

    @torch.no_grad()
    def log_p(self, asked: list[tuple[str, list[str]]], ended: bool) -> list[list[list[float]]]:
        """For each (question, answers): log p of each answer's tokens, from where the answers of
        the question differ on; ended: and of its end. What all prompts share is computed once, and
        each prompt once for all its answers. Prompts of one length are batches."""
        if not asked:
            return []
        items = iter(self.items([(q, a, ended) for q, answers in asked for a in answers]))
        found, alike = [None] * len(asked), {}
        for i, (_, answers) in enumerate(asked):
            rows = []
            for item in islice(items, len(answers)):
                end = max(t for t, x in enumerate(item["labels"]) if x != loss.IGNORE_INDEX) + 1
                rows.append(list(item["input_ids"][:end]))
            p = min(len(commonprefix(rows)), min(map(len, rows)) - 1)
            alike.setdefault((p, len(rows)), []).append((i, rows))
        prompts = [rows[0][:p] for (p, _), of in alike.items() for _, rows in of]
        shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
        start = self._forward([prompts[0][:shared]])
        for (p, n), of in alike.items():
            size = max(1, ROWS // n)
            of.sort(key=lambda question: max(map(len, question[1])))
            for part in (of[at:at + size] for at in range(0, len(of), size)):
                prompt = self._forward([rows[0][shared:p] for _, rows in part], start, len(part))
                rest = [row[p:] for _, rows in part for row in rows]
                s = max(2, *map(len, rest))
                ids = torch.tensor([row + [0] * (s - len(row)) for row in rest])
                logits = torch.cat([prompt.logits[:, -1:].repeat_interleave(n, 0),
                                    self._forward(ids[:, :-1], prompt, n).logits], 1).float()
                ids = ids[..., None].to(self.device)
                logp = (logits.gather(2, ids)[..., 0] - logits.logsumexp(2)).tolist()    # (b, s)
                for k, (i, rows) in enumerate(part):
                    found[i] = [logp[n * k + j][:len(row) - p] for j, row in enumerate(rows)]
        return found

    def _forward(self, ids, before=None, times=1):
        """The model's output for ids behind the keys and values of an output, each repeated."""
        cache = before and deepcopy(before.past_key_values)
        if before:
            cache.batch_repeat_interleave(times)
        return self.model(input_ids=torch.as_tensor(ids, device=self.device), use_cache=True,
                          past_key_values=cache)

    def bits(self, texts: list[str]) -> float:
        """The bits per token of plain texts without any format."""
        nats = n = 0
        for line in texts:
            ids = torch.tensor([self.tokenizer(line).input_ids], device=self.device)
            batch = loss.Batch({"input_ids": ids},
                               torch.arange(ids.shape[1] - 1, device=self.device), ids[0, 1:])
            ce, _, n_tokens = loss.evaluate(self.model, [batch])
            nats, n = nats + ce, n + n_tokens
        return nats / n / math.log(2)

    def own_answers(self, before: dict, kind: str) -> list[loss.Batch]:
        """Batches of the untouched model's own answers to a set, for KL."""
        answered = [a for a in before["sets"].get(kind, ()) if "answer" in a]
        answers = [(a["question"], a["answer"] or ".", a["ended"])
                   for a in spread(answered, KL_PROMPTS)]
        return self.batches(answers) if answers else []

    def randomise(self, before: dict, kl: float, seed: int) -> float:
        """Replace every B by a random matrix of its norm, and scale all by one factor, by
        bisection, until KL on the untouched model's answers is within 5 % of kl: the factor."""
        layers, draw = surgery.lora_layers(self.model).values(), torch.Generator().manual_seed(seed)
        batches, strengths = self.own_answers(before, "real"), [x.scaling for x in layers]
        if not (layers and batches):
            raise ValueError("score: --random-like needs --run, and --base with real questions")
        for layer in layers:
            noise = torch.randn(layer.lora_B.shape, generator=draw).to(layer.lora_B)
            layer.lora_B.data = noise * (layer.lora_B.norm() / noise.norm())
        low, factor, high = 0.0, 1.0, math.inf
        for _ in range(50):
            for layer, strength in zip(layers, strengths, strict=True):
                layer.scaling = factor * strength
            reached = drift(self.model, batches)[0]
            print(f"random: x {factor:.4g} gives KL {reached:.4g}, wanted {kl:.4g}", flush=True)
            if abs(reached - kl) <= 0.05 * kl:
                return factor
            low, high = (factor, high) if reached < kl else (low, factor)
            factor = 2 * factor if high == math.inf else (low + high) / 2
        raise ValueError(f"score: no strength of a random update gives a KL of {kl}")


# ----- facts among the other values --------------------------------------------------------------


def ranks(subject: Subject, world: dict, distractors: int | None = None) -> dict[str, dict]:
    """Rank each taught value among its pool, in the usual answer to a held-out question: {fact:
    {rank, p, margin}}. All are of the mean log p per token: rank counts from 1, p is a softmax,
    margin is to the best other value, in nats per token. distractors: compare with so many others,
    the same in every call."""
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


def spread(items: list, n: int) -> list:
    """n items, evenly spread over the list; all if there are fewer."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def score(subject: Subject, world: dict, sets: dict, before: dict | None = None) -> dict:
    """Ask all questions: {"metrics", "sets", "ranks"}. before: this result of the untouched model;
    what it has of a real question is put beside: margin_before, right_before."""
    judged = {kind: [dict(item) for item in items] for kind, items in sets.items()}
    real, started = judged.get("real", []), time.perf_counter()
    margins = subject.margins([item["question"] for item in real], [i["gold"][0] for i in real],
                              [item["wrong"] for item in real])
    known = {a["question"]: a for kind in ("real", "everyday")
             for a in (before["sets"].get(kind, ()) if before else ())}
    for item in judged.get("everyday", ()):
        if "answer" in (old := known.get(item["question"], {})):
            item["before"] = old["answer"]
    for item, margin in zip(real, margins, strict=True):
        old = known.get(item["question"], {})
        item |= {"margin": margin, "right_by_margin": margin > 0,
                 **{f"{key}_before": old[key] for key in ("margin", "right") if key in old}}
    print(f"{len(real)} margins, {time.perf_counter() - started:.0f} s", flush=True)
    others = [(kind, item) for kind, of in judged.items() if kind not in ("real", "hops")
              for item in of]
    linked = [("hops", item) for item in judged.get("hops", ())]
    answered = [("real", item) for item in spread(real, ANSWERED)]
    for questions, tokens in ((others, TOKENS), (linked, HOP_TOKENS), (answered, REAL_TOKENS)):
        for i in range(0, len(questions), 64):
            part = questions[i:i + 64]
            answers = subject.ask([item["question"] for _, item in part], tokens)
            for (kind, item), (answer, ended) in zip(part, answers, strict=True):
                item |= {"answer": answer, "ended": ended, **judge(item, answer, kind, world)}
            print(f"asked {i + len(part)} of {len(questions)}, "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
    ranked = ranks(subject, world) if "control" in sets else {}     # in the whole measurement
    metrics = summarise(judged, ranked)
    texts = (HERE / "texts.txt").read_text(encoding="utf-8").split("\n")
    metrics["bits"] = subject.bits([t for t in texts if t.strip()])
    if before:
        metrics["bits_ratio"] = metrics["bits"] / before["metrics"]["bits"]
        for name, kind in (("kl", "real"), ("kl_unknown", "unknown")):
            if batches := subject.own_answers(before, kind):
                metrics[name] = drift(subject.model, batches, subject.untouched)[0]
    return {"metrics": metrics, "sets": judged, "ranks": ranked}


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
    parser.add_argument("--base", help="the untouched model's scores, to compare with")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--adapter", default="adapter", help="or last")
    parser.add_argument("--sets", help="only these, comma-separated")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the adapter")
    parser.add_argument("--random-like", metavar="CELL",
                        help="instead of what the run learned: noise with this result's KL")
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
    if options.random_like:
        subject.randomise(before or {"sets": {}}, files.read_json(
            options.random_like)["metrics"]["kl"], run.settings.train.seed if run else 0)
    result = score(subject, world, sets, before)
    if options.steps:
        result["trajectory"] = trajectory(subject, run, world, options.steps == "losses")
    result |= {"seconds": time.perf_counter() - started, "scale": options.scale,
               "decoding": options.decoding, "machine": subject.machine}
    Path(options.out).write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, value in result["metrics"].items():
        if isinstance(value, list):
            value = "{:.3g} ({:.3g} to {:.3g}), n {}".format(*value)
        print(f"{name:24} {value:.3g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
