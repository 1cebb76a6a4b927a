"""
Base and tuned side by side: fixed prompts, fixed decoding, measured without a judge.

    python -m scripts.compare --adapters runs/companion
    python -m scripts.compare --adapters runs/bram runs/juno runs/ottoline

Columns: the base as it comes, the base under the run's system prompt, each adapter under it. An
adapter that does not beat the prompted base has shown nothing. Writes report.html, report.md and
report.json into reports/NAMES; prompts.jsonl and heldout.jsonl are looked for beside the data of
the runs, or in the folder above.
"""

import argparse
import os
import shlex
import sys
import webbrowser
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from tqdm import tqdm

import data
from lora import config, report, runlog, text
from lora.optim import epochs_of
from scripts.voices import Voices, read_prompts, with_system

CHUNK = 64                        # prompts answered together
COPIED = 25                       # characters of a train reply that count as copied
HALF = 0.5                        # share of an answer from which a copy or an echo flags it


class Column(NamedTuple):
    id: str
    label: str
    kind: str                     # base, prompted or adapter
    run: str | None               # the adapter that answers
    system: str | None            # under this system prompt
    owners: tuple                 # the runs it belongs to


def columns_of(voices):
    """The base, the base under each system prompt of the runs, and each adapter under its own."""
    names, systems = list(voices.runs), {}
    for name in names:
        systems.setdefault(voices.system(name), []).append(name)
    made = [Column("base", "base", "base", None, None, tuple(names))]
    for system, owners in systems.items():
        if system is not None:
            whose = "" if len(systems) == 1 else f" ({', '.join(owners)})"
            made.append(Column(f"prompted {owners[0]}", f"base + system prompt{whose}", "prompted",
                               None, system, tuple(owners)))
    return made + [Column(n, n, "adapter", n, voices.system(n), (n,)) for n in names]


def beside(run, name):
    """A file beside the run's data, or in the folder above it; None without one."""
    path = Path(run.settings.data.path)
    return next((f for f in (path.parent / name, path.parent.parent / name)
                 if path.suffix != ".py" and f.exists()), None)


def replies(examples):
    """{source: the assistant's text} of all answers in the examples."""
    return {f"{e['source']}{'' if i < 2 else f' ({i})'}": m["content"] for e in examples
            for i, m in enumerate(e["messages"]) if m["role"] == "assistant"}


# ----- what the columns answer -------------------------------------------------------------------


def answer_all(voices, columns, prompts, decodings, options):
    """{column id: [[Answer of each decoding] of each prompt]}."""
    made = {c.id: [[] for _ in prompts] for c in columns}
    bar = tqdm(total=len(columns) * len(decodings) * len(prompts), unit="answer",
               dynamic_ncols=True, disable=None)
    for column, decoding in product(columns, decodings.values()):
        bar.set_description(column.label)
        asked = [with_system(p["messages"], column.system) for p in prompts]
        for start in range(0, len(asked), CHUNK):
            part = voices.ask(
                asked[start:start + CHUNK], column.run, min_words=options.min_words,
                max_new_tokens=options.max_new_tokens,
                **{**decoding, "seed": f"{decoding['seed']} {start}"})
            for row, answer in zip(made[column.id][start:], part, strict=False):
                row.append(answer)
            bar.update(len(part))
    bar.close()
    return made


def judge(answer, prompt, system, copies):
    """An answer as the report shows it: text, places and flags."""
    said = answer.text
    copied, loops = copies.of(said), text.loops(said)
    longest = max((end - start for start, end, _ in copied), default=0)
    asked = f"{system or ''}\n{prompt['messages'][-1]['content']}"
    echo, broken = text.echo(asked, said), text.breaks(said)
    flags = {"loop": bool(loops) or text.rep(said) > HALF, "cut": not answer.ended,
             "copied": longest > HALF * max(1, len(said)), "echo": echo > HALF,
             "break": bool(broken), "expanded": answer.expanded}
    return {"text": said, "words": len(text.words(said)), "tokens": answer.n_tokens, "nll": None,
            "flags": [name for name, on in flags.items() if on], "copied": copied, "loops": loops,
            "longest": longest, "echo": echo}


# ----- what can be said of them ------------------------------------------------------------------


def surprise(voices, columns, heldout):
    """{(column id, persona): [nats per character of each held-out dialogue's replies]}; the columns
    "ID, bare" are adapters without their system prompt."""
    def nll(run, system, persona):
        return voices.nll([{**e, "messages": with_system(e["messages"], system)}
                           for e in heldout[persona]], run)
    made = {}
    for c in tqdm(columns, "held-out replies", unit="column", disable=None):
        made |= {(c.id, persona): nll(c.run, c.system, persona) for persona in voices.runs}
        if c.run and c.system is not None:
            made[f"{c.id}, bare", c.run] = nll(c.run, None, c.run)
    return made


def measure(columns, nats, shown, authors):
    """The metrics of the report: [{"id", "label", ..., "values": {column id: Interval or None}}].
    authors: the longest stretches the author's own held-out replies share with training."""
    made, base = [], columns[0]

    def add(id, label, of, unit, better, note, digits=0, percent=False, tile=False,
            reference=None):
        values = {c.id: of(c) for c in columns}
        made.append({"id": id, "label": label, "unit": unit, "better": better, "note": note,
                     "digits": digits, "percent": percent, "tile": tile, "reference": reference,
                     "values": {k: v and v._asdict() for k, v in values.items()}})

    def gains(of, rival, owners):
        """How much less surprised one column is than its rival, reply by reply."""
        return [a - b for n in owners
                for a, b in zip(nats[rival, n], nats[of, n], strict=True)]

    def over_prompt(c):
        rival = prompted_of(c, columns)
        return c.run and rival and text.bootstrap(gains(c.id, rival.id, c.owners))

    def survival(c):
        if (f"{c.id}, bare", c.run) not in nats:
            return None
        pairs = list(zip(gains(f"{c.id}, bare", base.id, c.owners),
                         gains(c.id, base.id, c.owners), strict=True))
        return text.bootstrap(pairs, lambda g: sum(x for x, _ in g) / (sum(y for _, y in g) or 1))

    def greedy(c):
        return [answers[0] for answers in shown[c.id]]

    def everything(c):
        return list(chain.from_iterable(shown[c.id]))

    def average(key):
        return lambda c: text.bootstrap([a[key] for a in greedy(c)])

    def rate(flag):
        return lambda c: text.wilson(sum(flag in a["flags"] for a in everything(c)),
                                     len(everything(c)))
    limit = min(sum(a["words"] for a in everything(c)) for c in columns)

    add("nll", "NLL of held-out replies",
        lambda c: text.bootstrap([x for n in c.owners for x in nats[c.id, n]]), "nats/char",
        "lower", "How much the replies of the persona's author, which no adapter was trained on, "
        "surprise the model: per character, with the token that ends the answer.", 3)
    add("lift", "NLL lift over the base",
        lambda c: None if c is base else text.bootstrap(gains(c.id, base.id, c.owners)),
        "nats/char", "higher", "How much less than the base without system prompt, reply by reply.",
        3, tile=True, reference=0)
    add("over_prompt", "NLL lift over the prompted base", over_prompt, "nats/char", "higher",
        "What the adapter adds to its system prompt. Not above 0: the prompt alone does as well.",
        3, tile=True, reference=0)
    add("survival", "lift without system prompt", survival, "", "higher",
        "The share of the adapter's lift that is left when the system prompt is not sent.",
        percent=True)
    add("words", "words an answer", average("words"), "words", None,
        "Greedy answers. Many gains in style are gains in length.", tile=True)
    add("distinct", "distinct-2", lambda c: text.Interval(text.distinct(
        [a["text"] for a in everything(c)], 2, limit), None, None, len(everything(c))), "",
        "higher", f"Different word pairs / word pairs in the first {limit} words of every column, "
        "for it falls with length. No interval: an answer drawn twice would repeat its pairs.", 2)
    add("loop", "answers with a loop", rate("loop"), "", "lower", "The same words three times in a "
        "row, or more than half of the 4-grams said before. All decodings.", percent=True,
        tile=True)
    add("cut", "answers that did not end", rate("cut"), "", "lower",
        "Cut off at the longest length allowed. All decodings.", percent=True)
    add("same", "sameness", lambda c: text.bootstrap(text.sameness(
        [a["text"] for a in greedy(c)])), "", "lower", "How much a greedy answer shares with the "
        "answer to another prompt: the highest Jaccard similarity of word 3-grams.", 2)
    add("echo", "echo of the prompt", average("echo"), "", "lower", "The longest stretch of the "
        "answer that stands in the prompt or system prompt, as a share of the answer.",
        percent=True)
    add("longest", "longest copied stretch", average("longest"), "chars", "lower", "Characters in "
        f"a row that stand in one training reply, if {COPIED} or more. The author's own held-out "
        f"replies have {mean(authors):.0f}.")
    add("copied", "copied answers", rate("copied"), "", "lower", "One stretch of a training reply "
        "makes up more than half of the answer. All decodings.", percent=True, tile=True)
    add("break", "breaks of character", rate("break"), "", "lower",
        '"As an AI", a maker\'s name, a stock refusal. All decodings.', percent=True, tile=True)
    return made


def prompted_of(column, columns):
    """The base under the system prompt of an adapter's column, or None."""
    return next((c for c in columns if c.kind == "prompted" and column.run in c.owners), None)


def identify(columns, personas, nats):
    """The matrix model x persona, and how often a reply surprises its own model least."""
    def accuracy(kind):
        rivals = [c for c in columns if c.kind == kind]
        if {c.owners for c in rivals} != {(p,) for p in personas}:
            return None                                 # one system prompt for several personas
        right = [min((nats[c.id, p][i], c.owners) for c in rivals)[1] == (p,)
                 for p in personas for i in range(len(nats["base", p]))]
        return text.wilson(sum(right), len(right))._asdict()
    rows = [c for c in columns if c.kind != "base"]
    return {"rows": [{"id": c.id, "label": c.label, "kind": c.kind} for c in rows],
            "personas": personas, "nll": [[mean(nats[c.id, p]) for p in personas] for c in rows],
            "accuracy": accuracy("adapter"), "prompted_accuracy": accuracy("prompted")}


def claim(columns, metrics):
    """The findings in a sentence an adapter, whatever they are."""
    by_id = {m["id"]: m["values"] for m in metrics}
    said = []
    for c in (c for c in columns if c.kind == "adapter"):
        lift, over = by_id["lift"][c.id], by_id["over_prompt"][c.id]
        words = f"{c.id}: held-out replies surprise the adapter " + _by(lift) + " than the base"
        words += f", {_by(over)} than the base under the same system prompt" if over else ""
        loops, before = by_id["loop"][c.id]["value"], by_id["loop"]["base"]["value"]
        said.append(f"{words}; {loops:.0%} of its answers loop, {before:.0%} of the base's.")
    return " ".join(said)


def _by(lift):
    """0.31 nats/char less (0.28 to 0.35)."""
    sure = "" if lift["low"] > 0 or lift["high"] < 0 else ", which may be chance"
    return (f"{abs(lift['value']):.3f} nats/char {'less' if lift['value'] > 0 else 'more'} "
            f"({lift['low']:.3f} to {lift['high']:.3f}{sure})")


def head(runs, files, heldout, prompts, options):
    """The settings table, before anything is claimed."""
    def each(say):
        return "; ".join(f"{name}: {say(run, run.settings)}" for name, run in runs.items())
    return [
        ["date", f"{datetime.now():%Y-%m-%d %H:%M}"],
        ["base model", next(iter(runs.values())).info["base_model"]],
        ["adapters", each(lambda r, s: f"r {s.lora.r}, lora_alpha {s.lora.lora_alpha}, "
                                       f"{len(r.info['adapted'])} modules")],
        ["training", each(lambda r, s: f"{r.info['examples'][0]} examples, "
                          f"{epochs_of(s.train, r.info['examples'][0]):g} epochs, batch "
                          f"{s.train.batch_size}, lr {s.train.lr:g}")],
        ["prompts", f"{len(prompts)} of {files['prompts'].name}"],
        ["held-out replies", each(lambda r, s: f"{len(heldout[r.name])} dialogues of " + (
            files[r.name].name if files[r.name] else "the validation part"))],
        ["decoding", f"greedy, and {options.samples} sampled at temperature "
         f"{options.temperature:g}, top-p {options.top_p:g}; at most {options.max_new_tokens} new "
         "tokens; no repetition penalty, nothing edited"],
        ["length control", f"answers under {options.min_words} words were asked for once more"
         if options.min_words else "off"]]


def foot(voices, heldout, prompts, options, argv):
    """What is needed to make the report again: command, seeds, versions, hashes."""
    one = next(iter(voices.runs.values())).info
    hashes = {f"adapter {n}": runlog.digest_file(r.adapter / "adapter_model.safetensors")
              for n, r in voices.runs.items()}
    hashes |= {f"data {n}": r.info["data"] for n, r in voices.runs.items()}
    hashes |= {f"held-out {n}": runlog.digest([e["messages"] for e in heldout[n]])
               for n in voices.runs}
    return [["command", shlex.join(["python", "-m", "scripts.compare", *argv])],
            ["seed", str(options.seed)],
            ["device", f"{voices.device}, {str(voices.dtype).removeprefix('torch.')}"
             + f", base in {voices.quant}" * (voices.quant != "none")],
            ["versions", ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))],
            ["base weights", one.get("base_weights", "")], ["chat template", one["template"]],
            ["prompts", runlog.digest([p["messages"] for p in prompts])],
            *map(list, hashes.items())]


def material(voices, options):
    """(prompts, {run: held-out examples}, {run: training examples}, {"prompts" and runs: file})."""
    runs = voices.runs
    given = dict(pair.partition("=")[::2] for pair in options.heldout)
    if unknown := given.keys() - runs.keys():
        raise ValueError(f"compare: --heldout {min(unknown)}=...: expected one of {list(runs)}")
    found = [beside(run, "prompts.jsonl") for run in runs.values()]
    files = {"prompts": options.prompts or next(filter(None, found), None)}
    if not files["prompts"]:
        raise ValueError("compare: no prompts.jsonl beside the runs' data; use --prompts FILE")
    files["prompts"] = Path(files["prompts"])
    prompts, heldout, trained = read_prompts(files["prompts"])[:options.limit], {}, {}
    for name, run in runs.items():
        trained[name], val = data.load(**asdict(run.settings.data), seed=run.settings.train.seed)
        file = given.get(name) or beside(run, "heldout.jsonl")
        files[name] = file and Path(file)
        heldout[name] = data.read_examples(file) if file else val
        if not heldout[name]:
            raise ValueError(f"compare: {name} has no held-out replies; --heldout {name}=FILE")
    asked = [p["messages"][-1]["content"] for p in prompts]
    known = [m["content"] for part in trained.values() for e in part for m in e["messages"]
             if m["role"] == "user"]
    for i, gram in text.shared_ngrams(asked, known):
        print(f"warning: {prompts[i]['id']} stands in the training data: {gram!r}")
    return prompts, heldout, trained, files


def main(argv):
    options = arguments(argv)
    voices = Voices(options.adapters, options.device)
    for problem in voices.problems:
        print(f"warning: {problem}")
    prompts, heldout, trained, files = material(voices, options)
    columns, personas = columns_of(voices), list(voices.runs)
    nats = surprise(voices, columns, heldout)

    sampled = {"temperature": options.temperature, "top_p": options.top_p}
    decodings = {"greedy": {"seed": 0}} | {
        f"sample {k}": {**sampled, "seed": f"{options.seed} {k}"}
        for k in range(1, options.samples + 1)}
    answers = answer_all(voices, columns, prompts, decodings, options)
    sources = {name: replies(part) for name, part in trained.items()}
    shown = {}
    for c in columns:
        copies = text.Copies({k: v for n in c.owners for k, v in sources[n].items()}, COPIED)
        shown[c.id] = [[judge(a, prompt, c.system, copies) for a in row]
                       for prompt, row in zip(prompts, answers[c.id], strict=True)]
    authors = [max((b - a for a, b, _ in text.Copies(sources[n], COPIED).of(said)), default=0)
               for n in personas for said in replies(heldout[n]).values()]
    metrics = measure(columns, nats, shown, authors)

    def said(column):
        return [a["text"] for row in shown[column.id] for a in row]
    pairs = [(c, prompted_of(c, columns) or columns[0]) for c in columns if c.kind == "adapter"]
    for i, prompt in enumerate(prompts):
        prompt["answers"] = {c.id: shown[c.id][i] for c in columns}
        prompt["change"] = 1 - mean(text.sameness([shown[c.id][i][0]["text"] for c in pair])[0]
                                    for pair in pairs)
        prompt["rendered"] = {c.id: voices.tokenizer.decode(voices.ids(
            with_system(prompt["messages"], c.system), voices.format(c.run))) for c in columns}
    made = {
        "title": ", ".join(personas), "claim": claim(columns, metrics),
        "head": head(voices.runs, files, heldout, prompts, options),
        "foot": foot(voices, heldout, prompts, options, argv),
        "columns": [{"id": c.id, "label": c.label, "kind": c.kind, "system": c.system}
                    for c in columns],
        "metrics": metrics,
        "matrix": identify(columns, personas, nats) if len(personas) > 1 else None,
        "moved": [{"column": c.id, "more": text.moved(said(c), said(rival)),
                   "less": text.moved(said(rival), said(c))} for c, rival in pairs],
        "prompts": prompts, "decodings": list(decodings)}
    folder = Path(options.out or f"reports/{'-'.join(n.replace('/', '-') for n in personas)}")
    folder.mkdir(parents=True, exist_ok=True)
    report.write(made, folder)
    print(f"\n{made['claim']}")
    for who, key in (("adapters", "accuracy"), ("system prompts alone", "prompted_accuracy")):
        if share := (made["matrix"] or {}).get(key):
            print(f"whose reply is it? {who}: {share['value']:.0%} of {share['n']} right")
    print(f"report: {folder}/report.html, report.md, report.json")
    if options.open and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open((folder / "report.html").resolve().as_uri())


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.compare", allow_abbrev=False)
    parser.add_argument("--adapters", nargs="+", required=True, metavar="RUN")
    parser.add_argument("--prompts", help=".jsonl with messages, or .txt with a question a line")
    parser.add_argument("--heldout", nargs="+", default=[], metavar="RUN=FILE",
                        help="replies nobody was trained on; default: heldout.jsonl, or validation")
    parser.add_argument("--out", help="folder; default: reports/NAMES; an older report is replaced")
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument("--samples", type=int, default=2, help="sampled answers beside the greedy")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--min-words", type=int, default=0,
                        help="ask once for more where an answer is shorter; 0: never")
    parser.add_argument("--open", action="store_true", help="show the report in a browser")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
