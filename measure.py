"""
WHAT a model has learned and what it has lost: asked at every evaluation of a run.

    evaluate = exam(model, tokenizer, format, val_set, retain, settings, batches, lean)
    evaluate(24)   # {"step": 24, "val_loss": 0.41, "recall": 0.96, "retention": 0.9, "kl": 0.03 ..}

recall is the share of held-out questions that are answered with their value. retention is the same
for the questions of keep.retain which the base gets right; kl and own_loss are the forgetting meter
on the base's own answers to them (lora/meter.py).
"""

import data
import dataset
from lora import files, loss, meter, parallel, surgery


def answerer(model, tokenizer, format, s):
    """A function from prompts, lists of messages, to the model's (answer, whether it ended); s is
    the train section."""
    def answer(prompts):
        return dataset.answer(model, tokenizer, prompts, format, max_new_tokens=s.max_new_tokens,
                              repetition_penalty=s.repetition_penalty) if prompts else []
    return answer


def held_out_facts(val_set):
    """The validation examples with a value to look for in the answer."""
    return [e for e in (item["example"] for item in val_set or ()) if "value" in e]


def exam(model, tokenizer, format, val_set, retain, settings, batches, lean=True):
    """evaluate(step), which gives a line of metrics. batches(items) makes the batches of a loss.

    Each process takes its share of the questions, or all of them if the base is sharded: its blocks
    are gathered by all processes at once, so all have to take the same steps.
    """
    shared, total = (list, list) if settings.model.shard else (parallel.mine, parallel.add_up)
    answer = answerer(model, tokenizer, format, settings.train)
    facts = held_out_facts(val_set)

    def right(asked):
        """Of each question, 1 if it is answered with its value, else 0."""
        here, found = shared(range(len(asked))), [0] * len(asked)
        given = answer([asked[i]["messages"][:-1] for i in here])
        for i, (text, _) in zip(here, given, strict=True):
            found[i] = int(data.contains(text, asked[i]["value"]))
        return total(found)

    known, own = what_it_knows(model, tokenizer, format, retain, settings, right)

    def evaluate(step):
        line = {"step": step}
        if val_set:
            ce, hits, n = total(loss.evaluate(model, batches(shared(val_set.items)), lean))
            line["val_loss"], line["val_accuracy"] = ce / n, hits / n
        if facts:
            line["recall"] = sum(right(facts)) / len(facts)
        if known:
            line["retention"] = sum(right(known)) / len(known)
            line["kl"], line["own_loss"], line["own_loss_before"] = meter.drift(
                model, [b for i in range(0, len(own), 8) for b in batches(own.items[i:i + 8])])
        return parallel.from_first(line)
    return evaluate


def what_it_knows(model, tokenizer, format, asked, settings, right):
    """(the questions asked that the base gets right, its own answers to them as a QADataset): what
    evaluations hold the model to. right(questions) asks as evaluations do. In bfloat16 an answer
    may depend on who else is in the batch, so questions are left out until the base gets all right
    that are asked together: before training, retention is 100 %."""
    if not asked:
        return [], []
    with surgery.disabled(model):
        given = answerer(model, tokenizer, format, settings.train)(
            [e["messages"][:-1] for e in asked])
    known = [(e, text, ended) for e, (text, ended) in zip(asked, given, strict=True)
             if data.contains(text, e["value"])]
    with surgery.disabled(model):
        while not all(held := right([e for e, *_ in known])):
            known = [one for one, still in zip(known, held, strict=True) if still]
    print(f"keep: {len(known)} of {len(asked)} questions of {settings.keep.retain} are right "
          "before training")
    own = [{"messages": [*e["messages"][:-1], {"role": "assistant", "content": text}],
            "source": e["source"], "open": not ended} for e, text, ended in known]
    return [e for e, _, _ in known], own and dataset.QADataset(own, tokenizer, format,
                                                               max_length=10**6)


def questions(wanted, some_set, system, seed, n=8):
    """Prompts to answer before and after: the wanted questions, else about n of a set's own."""
    asked = [{"messages": [{"role": "user", "content": text}]} for text in wanted]
    own = [item["example"]["messages"][:-1] for item in some_set.items[::-(-len(some_set) // n)]]
    return [e["messages"] for e in data.with_system(asked, system, seed)] or own


def show(line):
    """A line of metrics in words: val_loss 0.1234, recall 98%."""
    shares = "recall", "accuracy", "retention"
    return ", ".join(f"{k} {v:.0%}" if k.endswith(shares) else f"{k} {v:.4f}"
                     for k, v in line.items() if k not in ("step", "epoch"))


def write_samples(file, prompts, before, after):
    """Print the answers before and after, and write them as a table."""
    rows = ["| question | before | after |", "|---|---|---|"]
    for messages, *both in zip(prompts, before, after, strict=True):
        cells = [" ".join(text.split()) for text in (messages[-1]["content"], *both)]
        print("\n  {}\n    before: {:.100}\n    after:  {:.100}".format(*cells))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    files.write(file, "\n".join(rows) + "\n")
