"""
Base and tuned side by side: fixed prompts, fixed decoding, measured without a judge.

    python -m scripts.compare runs/companion
    python -m scripts.compare runs/bram runs/juno runs/ottoline

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
from lora import files
from lora.optim import epochs_of
from lora.run import cli, runlog
from lora.use import report, text
from measure import Answer
from scripts.voices import Voices, read_prompts, with_system

CHUNK = 64                        # prompts answered together
COPIED = 25                       # characters of a train reply that count as copied
HALF = 0.5                        # share of an answer from which a copy or an echo flags it
METRICS = files.read_json(Path(__file__).with_suffix(".json"))   # as the report shows them

Nats = dict[tuple[str, str], list[float]]     # by (column id, persona): see surprise()
Shown = dict[str, list[list[dict]]]           # by column id: for each prompt the judged answers


class Column(NamedTuple):
    id: str
    label: str
    kind: str                     # base, prompted or adapter
    run: str | None               # the adapter that answers
    system: str | None            # under this system prompt
    owners: tuple                 # the runs it belongs to


class Material(NamedTuple):
    prompts: list[dict]
    heldout: dict[str, list[dict]]        # by run: examples that nobody was trained on
    replies: dict[str, dict[str, str]]    # by run: replies() of its training examples
    sources: dict[str, str]               # "prompts" and by run: names of the files


def columns_of(voices: Voices) -> list[Column]:
    """The base, the base under each system prompt of the runs, and each adapter under its own."""
    names, owners_of = list(voices.runs), data.group_by(voices.system, voices.runs)
    columns = [Column("base", "base", "base", None, None, tuple(names))]
    for system, owners in owners_of.items():
        if system is not None:
            whose = "" if len(owners_of) == 1 else f" ({', '.join(owners)})"
            columns.append(Column(f"prompted {owners[0]}", f"base + system prompt{whose}",
                                  "prompted", None, system, tuple(owners)))
    return columns + [Column(n, n, "adapter", n, voices.system(n), (n,)) for n in names]


def prompted_of(column: Column, columns: list[Column]) -> Column | None:
    """The base under the system prompt of an adapter's column."""
    return next((c for c in columns if c.kind == "prompted" and column.run in c.owners), None)


def replies(examples: list[dict]) -> dict[str, str]:
    """{source: the assistant's text} of all answers in the examples."""
    return {f"{e['source']}{'' if i < 2 else f' ({i})'}": m["content"] for e in examples
            for i, m in enumerate(e["messages"]) if m["role"] == "assistant"}


def answer_all(voices: Voices, columns: list[Column], material: Material, decodings: dict,
               options) -> Shown:
    """Ask every column all prompts in every decoding, and judge the answers."""
    shown = {c.id: [[] for _ in material.prompts] for c in columns}
    bar = tqdm(total=len(columns) * len(decodings) * len(material.prompts), unit="answer",
               dynamic_ncols=True, disable=None)
    for c in columns:
        bar.set_description(c.label)
        copies = text.Copies({k: v for n in c.owners for k, v in material.replies[n].items()},
                             COPIED)
        messages = [with_system(p["messages"], c.system) for p in material.prompts]
        for decoding, start in product(decodings.values(), range(0, len(messages), CHUNK)):
            answers = voices.ask(
                messages[start:start + CHUNK], c.run, min_words=options.min_words,
                max_new_tokens=options.max_new_tokens,
                **{**decoding, "seed": f"{decoding['seed']} {start}"})
            for i, answer in enumerate(answers, start):
                shown[c.id][i].append(judge(answer, material.prompts[i], c.system, copies))
            bar.update(len(answers))
    bar.close()
    return shown


def judge(answer: Answer, prompt: dict, system: str | None, copies: text.Copies) -> dict:
    """An answer as the report shows it: text, places and flags."""
    copied, loops = copies.of(answer.text), text.loops(answer.text)
    longest = max((end - start for start, end, _ in copied), default=0)
    echo = text.echo(f"{system or ''}\n{prompt['messages'][-1]['content']}", answer.text)
    flags = {"loop": bool(loops) or text.rep(answer.text) > HALF, "cut": not answer.ended,
             "copied": longest > HALF * max(1, len(answer.text)), "echo": echo > HALF,
             "break": bool(text.breaks(answer.text)), "expanded": answer.expanded}
    return {"text": answer.text, "words": len(text.words(answer.text)), "tokens": answer.n_tokens,
            "nll": None, "flags": [name for name, on in flags.items() if on], "copied": copied,
            "loops": loops, "longest": longest, "echo": echo}


def surprise(voices: Voices, columns: list[Column], heldout: dict[str, list[dict]]) -> Nats:
    """{(column id, persona): [nats per character of each held-out dialogue's replies]}; the columns
    "ID, bare" are adapters without their system prompt."""
    def nll(run, system, persona):
        return voices.nll([{**e, "messages": with_system(e["messages"], system)}
                           for e in heldout[persona]], run)
    nats = {}
    for c in tqdm(columns, "held-out replies", unit="column", disable=None):
        for persona in voices.runs:
            nats[c.id, persona] = nll(c.run, c.system, persona)
        if c.run and c.system is not None:
            nats[f"{c.id}, bare", c.run] = nll(c.run, None, c.run)
    return nats


def gains(nats: Nats, column: str, rival: str, owners: tuple) -> list[float]:
    """How much less a column is surprised than its rival, reply by reply."""
    return [theirs - ours for n in owners
            for ours, theirs in zip(nats[column, n], nats[rival, n], strict=True)]


def survival(nats: Nats, column: Column) -> text.Interval | None:
    """The share of an adapter's lift that is left without its system prompt; None without one."""
    bare = f"{column.id}, bare"
    if (bare, column.run) not in nats:
        return None

    def share(pairs):
        return sum(x for x, _ in pairs) / (sum(y for _, y in pairs) or 1)
    return text.bootstrap(zip(gains(nats, bare, "base", column.owners),
                              gains(nats, column.id, "base", column.owners), strict=True), share)


def measure(columns: list[Column], nats: Nats, shown: Shown, author_copies: list[int]
            ) -> list[dict]:
    """METRICS with their values: {column id: Interval or None}. author_copies: the longest stretch
    that each of the author's own held-out replies shares with training."""
    every = {c: list(chain.from_iterable(rows)) for c, rows in shown.items()}
    limit = min(sum(a["words"] for a in answers) for answers in every.values())
    intervals = {}
    for c in columns:
        rival, greedy, answers = prompted_of(c, columns), [r[0] for r in shown[c.id]], every[c.id]
        interval = {
            "nll": text.bootstrap([x for n in c.owners for x in nats[c.id, n]]),
            "lift": None if c.kind == "base" else text.bootstrap(
                gains(nats, c.id, "base", c.owners)),
            "over_prompt": text.bootstrap(gains(nats, c.id, rival.id, c.owners)) if rival else None,
            "survival": survival(nats, c),
            "distinct": text.Interval(text.distinct([a["text"] for a in answers], 2, limit), None,
                                      None, len(answers)),
            "same": text.bootstrap(text.sameness([a["text"] for a in greedy]))}
        for key in ("words", "echo", "longest"):
            interval[key] = text.bootstrap([a[key] for a in greedy])
        for flag in ("loop", "cut", "copied", "break"):
            interval[flag] = text.wilson(sum(flag in a["flags"] for a in answers), len(answers))
        intervals[c.id] = {id: value and value._asdict() for id, value in interval.items()}
    facts = {"limit": limit, "copied": COPIED, "author": mean(author_copies)}
    return [{**m, "note": m["note"].format(**facts), "values": {
        id: interval[m["id"]] for id, interval in intervals.items()}} for m in METRICS]


def identify(columns: list[Column], personas: list[str], nats: Nats) -> dict:
    """The matrix model x persona, and how often a reply surprises its own model least."""
    rows = [c for c in columns if c.kind != "base"]
    matrix = {"rows": [{"id": c.id, "label": c.label, "kind": c.kind} for c in rows],
              "personas": personas, "nll": [[mean(nats[c.id, p]) for p in personas] for c in rows]}
    for key, kind in (("accuracy", "adapter"), ("prompted_accuracy", "prompted")):
        rivals, matrix[key] = [c for c in rows if c.kind == kind], None
        if {c.owners for c in rivals} == {(p,) for p in personas}:     # no prompt serves two
            right = [min((nats[c.id, p][i], c.owners) for c in rivals)[1] == (p,)
                     for p in personas for i in range(len(nats["base", p]))]
            matrix[key] = text.wilson(sum(right), len(right))._asdict()
    return matrix


def claim(columns: list[Column], metrics: list[dict]) -> str:
    """The result in a sentence for each adapter, whatever it is."""
    by_id = {m["id"]: m["values"] for m in metrics}
    sentences, before = [], by_id["loop"]["base"]["value"]
    for id in (c.id for c in columns if c.kind == "adapter"):
        lift, over, loops = (by_id[key][id] for key in ("lift", "over_prompt", "loop"))
        by_prompt = f", {_by(over)} than the base under the same system prompt" if over else ""
        sentences.append(
            f"{id}: held-out replies surprise the adapter {_by(lift)} than the base{by_prompt}; "
            f"{loops['value']:.0%} of its answers loop, {before:.0%} of the base's.")
    return " ".join(sentences)


def _by(lift):
    """0.31 nats/char less (0.28 to 0.35)."""
    sure = "" if lift["low"] > 0 or lift["high"] < 0 else ", which may be chance"
    return (f"{abs(lift['value']):.3f} nats/char {'less' if lift['value'] > 0 else 'more'} "
            f"({lift['low']:.3f} to {lift['high']:.3f}{sure})")


def head(runs: dict[str, runlog.Run], material: Material, options) -> list[list[str]]:
    """The settings table, before anything is claimed."""
    adapters, training, heldout = [], [], []
    for name, run in runs.items():
        s, n = run.settings, run.info["examples"][0]
        adapters.append(f"{name}: r {s.lora.r}, lora_alpha {s.lora.lora_alpha}, "
                        f"{len(run.info['adapted'])} modules")
        training.append(f"{name}: {n} examples, {epochs_of(s.train, n):g} epochs, batch "
                        f"{s.train.batch_size}, lr {s.train.lr:g}")
        heldout.append(f"{name}: {len(material.heldout[name])} dialogues of "
                       f"{material.sources[name]}")
    return [
        ["date", f"{datetime.now():%Y-%m-%d %H:%M}"],
        ["base model", next(iter(runs.values())).info["base_model"]],
        ["adapters", "; ".join(adapters)], ["training", "; ".join(training)],
        ["prompts", f"{len(material.prompts)} of {material.sources['prompts']}"],
        ["held-out replies", "; ".join(heldout)],
        ["decoding", f"greedy, and {options.samples} sampled at temperature "
         f"{options.temperature:g}, top-p {options.top_p:g}; at most {options.max_new_tokens} new "
         "tokens; no repetition penalty, nothing edited"],
        ["length control", f"answers under {options.min_words} words were asked for once more"
         if options.min_words else "off"]]


def foot(voices: Voices, material: Material, options, argv: list[str]) -> list[list[str]]:
    """What is needed to make the report again: command, seeds, versions, hashes."""
    runs, info = voices.runs.items(), next(iter(voices.runs.values())).info
    quant = "" if voices.quant == "none" else f", base in {voices.quant}"
    device = f"{voices.device}, {str(voices.dtype).removeprefix('torch.')}{quant}"
    return [["command", shlex.join(["python", "-m", "scripts.compare", *argv])],
            ["seed", str(options.seed)], ["device", device],
            ["versions", ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))],
            ["base weights", info.get("base_weights", "")], ["chat template", info["template"]],
            ["prompts", runlog.digest([p["messages"] for p in material.prompts])],
            *[[f"adapter {name}", runlog.digest_file(run.adapter / "adapter_model.safetensors")]
              for name, run in runs],
            *[[f"data {name}", run.info["data"]] for name, run in runs],
            *[[f"held-out {name}", runlog.digest([e["messages"] for e in material.heldout[name]])]
              for name, _ in runs]]


def beside(run: runlog.Run, name: str) -> Path | None:
    """A file beside the run's data, or in the folder above it."""
    path = Path(run.settings.data.path)
    return next((f for f in (path.parent / name, path.parent.parent / name)
                 if path.suffix != ".py" and f.exists()), None)


def read_material(runs: dict[str, runlog.Run], options) -> Material:
    """Read what is asked and scored; warn about prompts that share 8 words with training data."""
    heldout, trained = {}, {}
    chosen = {name: file for name, _, file in (pair.partition("=") for pair in options.heldout)}
    if unknown := chosen.keys() - runs.keys():
        raise ValueError(f"compare: --heldout {min(unknown)}=...: expected one of {list(runs)}")
    found = [options.prompts, *(beside(run, "prompts.jsonl") for run in runs.values())]
    if not any(found):
        raise ValueError("compare: no prompts.jsonl beside the runs' data; use --prompts FILE")
    file = Path(next(filter(None, found)))
    prompts, sources = read_prompts(file), {"prompts": file.name}
    for name, run in runs.items():
        trained[name], val = data.load(**asdict(run.settings.data), seed=run.settings.train.seed)
        file = chosen.get(name) or beside(run, "heldout.jsonl")
        sources[name] = Path(file).name if file else "the validation part"
        heldout[name] = data.read_examples(file) if file else val
        if not heldout[name]:
            raise ValueError(f"compare: {name} has no held-out replies; --heldout {name}=FILE")
    known = [m["content"] for part in trained.values() for e in part for m in e["messages"]
             if m["role"] == "user"]
    for i, gram in text.shared_ngrams([p["messages"][-1]["content"] for p in prompts], known):
        print(f"warning: {prompts[i]['id']} stands in the training data: {gram!r}")
    return Material(prompts, heldout, {n: replies(part) for n, part in trained.items()}, sources)


def prompt_view(voices: Voices, columns: list[Column], pairs: list[tuple[Column, Column]],
                prompt: dict, answers: dict[str, list[dict]]) -> dict:
    """A prompt with its answers, and how far the adapters' differ from their rivals'."""
    same = [text.sameness([answers[c.id][0]["text"] for c in pair])[0] for pair in pairs]
    rendered = {c.id: voices.tokenizer.decode(voices.voice(c.run).ids(
        with_system(prompt["messages"], c.system))) for c in columns}
    return {**prompt, "answers": answers, "change": 1 - mean(same), "rendered": rendered}


def main(argv: list[str]) -> None:
    options = arguments(argv)
    voices = Voices(options.runs, options.device)
    for problem in voices.problems:
        print(f"warning: {problem}")
    material = read_material(voices.runs, options)
    columns, personas = columns_of(voices), list(voices.runs)
    nats = surprise(voices, columns, material.heldout)

    decodings = {"greedy": {"seed": 0}}
    for k in range(1, options.samples + 1):
        decodings[f"sample {k}"] = {"temperature": options.temperature, "top_p": options.top_p,
                                    "seed": f"{options.seed} {k}"}
    shown = answer_all(voices, columns, material, decodings, options)
    texts = {c: [a["text"] for row in rows for a in row] for c, rows in shown.items()}
    author_copies = []
    for name in personas:
        copies = text.Copies(material.replies[name], COPIED)
        author_copies += [max((b - a for a, b, _ in copies.of(reply)), default=0)
                          for reply in replies(material.heldout[name]).values()]
    metrics = measure(columns, nats, shown, author_copies)
    pairs = [(c, prompted_of(c, columns) or columns[0]) for c in columns if c.kind == "adapter"]
    result = {
        "title": ", ".join(personas), "claim": claim(columns, metrics),
        "head": head(voices.runs, material, options),
        "foot": foot(voices, material, options, argv),
        "columns": [{"id": c.id, "label": c.label, "kind": c.kind, "system": c.system}
                    for c in columns],
        "metrics": metrics,
        "matrix": identify(columns, personas, nats) if len(personas) > 1 else None,
        "moved": [{"column": c.id, "more": text.moved(texts[c.id], texts[rival.id]),
                   "less": text.moved(texts[rival.id], texts[c.id])} for c, rival in pairs],
        "prompts": [prompt_view(voices, columns, pairs, prompt,
                                {c.id: shown[c.id][i] for c in columns})
                    for i, prompt in enumerate(material.prompts)],
        "decodings": list(decodings)}
    names = "-".join(name.replace("/", "-") for name in personas)
    page = report.write(result, options.out or f"reports/{names}")
    print(f"\n{result['claim']}")
    for who, key in (("adapters", "accuracy"), ("system prompts alone", "prompted_accuracy")):
        if share := (result["matrix"] or {}).get(key):
            print(f"whose reply is it? {who}: {share['value']:.0%} of {share['n']} right")
    print(f"report: {page}, report.md, report.json")
    if options.open and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open(page.resolve().as_uri())


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders on one base")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="RUN", help="more of them")
    parser.add_argument("--prompts", metavar="FILE",
                        help=".jsonl with messages, or .txt with a question a line")
    parser.add_argument("--heldout", nargs="+", default=[], metavar="RUN=FILE",
                        help="replies nobody was trained on (default: heldout.jsonl or validation)")
    parser.add_argument("--out", metavar="FOLDER",
                        help="an older report in it is replaced (default: reports/NAMES)")
    parser.add_argument("--samples", type=int, default=2, help="sampled answers beside the greedy")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples")
    parser.add_argument("--top-p", type=float, default=0.9, help="of the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="length of an answer")
    parser.add_argument("--min-words", type=int, default=0, metavar="N",
                        help="ask once more where an answer has fewer; 0: never")
    parser.add_argument("--open", action="store_true", help="show the report in a browser")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    options = parser.parse_args(argv)
    options.runs += options.adapters
    if not options.runs:
        raise ValueError("compare: RUN is missing; expected runs/NAME, one or several")
    return options


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
