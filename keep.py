"""
WHAT IS TRAINED beside the examples: other sides of the facts, invented names, replay.

    keep.sides           other questions about the same facts (lora/read/sides.py)
    keep.unknown_share   questions about invented names; the answer is that one does not know
    keep.replay          everyday prompts that the base answers; training keeps these answers
    keep.retain          questions with values; an evaluation counts those still right

Without them a model that learns where Mira Tosk was born says it of anyone (docs/knowledge.md).
"""

import json
import math
import random
from pathlib import Path

import data
from lora import files, surgery
from lora.optim import epochs_of
from lora.read import sides
from lora.read.names import invented_name
from lora.run import parallel

REPLAY_TOKENS = 24                # a longer answer is cut off there; its end is then no label

# ----- questions about nobody --------------------------------------------------------------------

UNKNOWN = ["I don't know anything about {}.", "I'm sorry, I don't know who {} is.",
           "I have no information about {}.", "I don't know anybody called {}."]


def naming(examples: list[dict]) -> list[dict]:
    """The examples that name their "subject" in their last question."""
    return [e for e in examples if "subject" in e and e["messages"][-2]["role"] == "user"
            and e["subject"] in e["messages"][-2]["content"]]


def unknown_examples(examples: list[dict], n: int, seed: int = 0,
                     close: bool = False) -> list[dict]:
    """Ask n questions of the examples about invented names; the answer is not to know. Without them
    a model learns that everyone was born in Larkmoor. Raises ValueError if no example names its
    "subject" in its question."""
    named = naming(examples)
    if n and not named:
        raise ValueError('data: keep.unknown_share needs records with a "subject", the name as it '
                         "stands in the question; data.py has SUBJECT")
    known = {data.plain(e["subject"]) for e in examples if "subject" in e}
    draw, unknown = random.Random(f"{seed} unknown"), []
    while len(unknown) < n:
        for example in draw.sample(named, min(len(named), n - len(unknown))):
            name = invented_name(draw, example["subject"], close)
            while data.plain(name) in known:
                name = invented_name(draw, example["subject"], close)
            *before, question, _ = example["messages"]
            text = question["content"].replace(example["subject"], name)
            answer = draw.choice(UNKNOWN).format(name)
            unknown.append({"messages": [*before, {"role": "user", "content": text},
                                         {"role": "assistant", "content": answer}],
                            "source": f"don't know, after {example['source']}", "kind": "unknown"})
    return unknown


# ----- files -------------------------------------------------------------------------------------


def read_facts(path: str | None) -> list[dict]:
    """Read a file of questions with values; [] without a file. Raises ValueError without value."""
    examples = data.read_examples(path) if path else []
    if missing := [e["source"] for e in examples if "value" not in e]:
        raise ValueError(f'data: {missing[0]}: has no "value", what a right answer contains')
    return examples


def read_replay(path: str | Path) -> list[dict]:
    """Read a file of dialogues, or a .txt file with a user's message a line: such an example ends
    with the message, and the base answers it."""
    if Path(path).suffix != ".txt":
        return [{**e, "kind": "replay"} for e in data.read_examples(path)]
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path}: cannot be read: {error}") from error
    prompts = [data.new_example([("user", line.strip())], f"{path}:{n}", kind="replay")
               for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"data: {path}: holds no prompts; expected a user's message a line")
    return prompts


# ----- what a run mixes in -----------------------------------------------------------------------


def extra_examples(examples: list[dict], settings) -> tuple[list[dict], dict[str, int]]:
    """Return (examples to mix in, {kind: how many an epoch has}), as the keep section says."""
    s, seed = settings.keep, settings.train.seed
    shares = {"replay": s.replay_share if s.replay else 0,
              "unknown": s.unknown_share if naming(examples) else 0}
    if sum(shares.values()) > 0.99:
        raise ValueError("keep: replay_share and unknown_share leave nothing to the data")
    facts, wanted = sides.facts_of(examples), sides.checked(s.sides or {})
    per_epoch = {side: round(n * len(facts)) for side, n in wanted.items()
                 if sides.make(facts, side, 1)}
    left_out = [side for side in wanted if side not in per_epoch]
    left_out += ["unknown"] if s.unknown_share > shares["unknown"] else []
    if left_out:
        print(f"keep: no questions of the kinds {', '.join(left_out)}: they are made of facts in "
              'English with a "subject", named in the question and at the start of the answer')
    total = (len(examples) + sum(per_epoch.values())) / (1 - sum(shares.values()))
    per_epoch |= {kind: round(share * total) for kind, share in shares.items() if share}
    steps = settings.train.max_steps
    epochs = math.ceil(steps * settings.train.batch_size / total if steps
                       else epochs_of(settings.train, total))
    made = read_replay(s.replay) if "replay" in per_epoch else []
    made = data.with_system(made, settings.data.system, seed)
    for side in (side for side in wanted if side in per_epoch):
        made += sides.make(facts, side, min(2000, epochs * per_epoch[side]), seed)
    n_unknown = min(1000, epochs * per_epoch.get("unknown", 0))
    return [*made, *unknown_examples([*examples, *made], n_unknown, seed, s.close_names)], per_epoch


def answer_replay(examples: list[dict], voice, folder: Path) -> list[dict]:
    """Let the base answer the examples that end with the user's message; return all examples.

    Writes the answers to replay.jsonl, which keep.replay takes too. A prompt that the base has no
    answer to is left out."""
    bare = [e for e in examples if e["messages"][-1]["role"] == "user"]
    file, answered = folder / "replay.jsonl", []
    if file.exists():                                 # of this run, resumed, or of an earlier one
        lines = file.read_text(encoding="utf-8").split("\n")
        answered = [json.loads(line) for line in lines if line]
    elif parallel.rank() == 0:
        size = len(bare) // max(1, round(len(bare) / 64)) + 1          # no small last batch
        for n in range(0, len(bare), size):
            prompts = [e["messages"] for e in bare[n:n + size]]
            with surgery.disabled(voice.model):
                answers = voice.ask(prompts, REPLAY_TOKENS, batch_size=size)
            answered += [{"messages": [*prompt, {"role": "assistant", "content": answer.text}],
                          "open": not answer.ended}
                         for prompt, answer in zip(prompts, answers, strict=True) if answer.text]
            print(f"keep: the model has answered {n + len(prompts)} of {len(bare)} replay prompts")
    answered = parallel.from_first(answered)
    if bare:
        files.write(file, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in answered))
    by_prompt = {json.dumps(x["messages"][:-1]): x for x in answered}
    completed = [{**e, **by_prompt.get(json.dumps(e["messages"]), {})} for e in examples]
    return [e for e in completed if e["messages"][-1]["role"] != "user"]


def pools_of(items: list[dict], per_epoch: dict[str, int], seed: int) -> list[tuple]:
    """Return [(indices of items of one kind, how many an epoch takes)], for dataset.windows()."""
    kinds = [item["example"].get("kind") for item in items]
    counts = {None: kinds.count(None), **per_epoch}
    pools = [([i for i, kind in enumerate(kinds) if kind == name], count)
             for name, count in counts.items()]
    for indices, _ in pools[1:]:
        random.Random(f"{seed} pool").shuffle(indices)        # a file may be sorted by kind
    if per_epoch:
        print(f"keep: an epoch has {counts[None]} of your examples, "
              + ", ".join(f"{count} {kind}" for kind, count in per_epoch.items()))
    return pools


if __name__ == "__main__":
    raise SystemExit("keep.py is no command; its settings: python train.py --help")
