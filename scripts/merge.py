"""
Fold adapters into their base: a plain model folder, or one adapter out of several.

    python -m scripts.merge runs/companion --out merged/companion               # model folder
    python -m scripts.merge runs/bram=0.7 runs/juno=0.3 --adapter --out runs/mix    # adapter

W + scaling B A is computed in float32 and rounded once, to --dtype. What was written is read again
and its predictions are compared with those of base and adapter.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from lora import adapter, base, config, fetch, runlog, surgery
from scripts.voices import Voices, with_system

PROBES = ("Good morning! How are you?", "What is the capital of France?", "Tell me a story.")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}                # probability on other tokens


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.merge", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN[=WEIGHT]", help="weight 1 if left out")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--adapter", action="store_true", help="write an adapter, as a run folder")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32",
                        help="of the model folder")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    weights, out = {}, Path(options.out)
    for text in options.runs:
        path, _, weight = text.partition("=")
        try:
            weights[path] = float(weight or 1)
        except ValueError:
            raise ValueError(f"merge: {text}: expected RUN=WEIGHT, e.g. runs/bram=0.5") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"merge: {out} is not empty; expected a new folder")
    for path in weights:
        refuse_quantised(runlog.read_run(path))

    voices = Voices(weights, options.device, dtype="float32")
    for problem in voices.problems:
        print(f"warning: {problem}")
    weights = dict(zip(voices.runs, weights.values(), strict=True))
    voices.bank.mix("mix", weights)
    first = next(iter(voices.runs))
    wanted = log_probs(voices, voices.model, "mix", first)
    out.mkdir(parents=True, exist_ok=True)
    made_of = {"merged": weights, "of": {name: runlog.digest_file(
        run.adapter / adapter.WEIGHTS) for name, run in voices.runs.items()}}
    save = save_adapter if options.adapter else save_model
    again = save(voices, out, made_of, getattr(torch, options.dtype))
    got = log_probs(voices, again, None, first)
    apart = (wanted.exp() - got.exp()).abs().sum(-1).max().item() / 2      # total variation
    same = (wanted.argmax(-1) == got.argmax(-1)).float().mean().item()
    said = " + ".join(f"{w:g} {name}" for name, w in weights.items())
    print(f"merge: {out} = {'' if options.adapter else 'base + '}{said}\nread back: at most "
          f"{apart:.1e} of the probability is elsewhere, the likeliest token is the same at "
          f"{same:.1%}")
    if apart > TOLERANCE["float32" if options.adapter else options.dtype]:
        raise ValueError(f"merge: {out} does not compute what base and adapter do; keep the adapter"
                         + ", or write --dtype float32" * (options.dtype != "float32"))


def refuse_quantised(run):
    """A 4-bit base holds the update no more than a coarse grid holds a fine line."""
    file = Path(fetch.find(run.settings.model.name)) / "config.json"
    if file.exists() and "quantization_config" in json.loads(file.read_text(encoding="utf-8")):
        raise ValueError(
            f"merge: {run.settings.model.name} is quantised; merging would round the update away. "
            "Set model.name in the run's config.json to the same model in bfloat16 or float32, or "
            "serve the adapter beside the base.")


def log_probs(voices, model, name, run):
    """Log-probabilities at all places of the probes: (places, v)."""
    made = []
    with voices.bank.using(name), torch.no_grad():
        for text in PROBES:
            messages = with_system([{"role": "user", "content": text}], voices.system(run))
            ids = torch.tensor([voices.ids(messages, voices.format(run))], device=voices.device)
            made.append(model(input_ids=ids).logits[0].float().log_softmax(-1))
    return torch.cat(made)


def save_model(voices, out, made_of, dtype):
    """A plain model folder; returns the model read again from it. Uses voices.model up."""
    voices.bank.use("mix")
    for layer in surgery.lora_layers(voices.model).values():
        layer.merge()
    surgery.unwrap(voices.model)
    base.save_model(voices.model.to(dtype), voices.tokenizer, out)
    runlog.write_json(out / "merge.json", made_of)
    return base.load_model(out, voices.device, dtype)


def save_adapter(voices, out, made_of, dtype):
    """A run folder with the mix as its adapter; returns the base with it, read again."""
    first = next(iter(voices.runs.values()))
    with voices.bank.using("mix"):
        adapter.save(voices.model, out / "adapter", first.info["base_model"])
    runlog.write_json(out / "run.json", {**first.info, **made_of})
    (out / "config.json").write_bytes((first.adapter.parent / "config.json").read_bytes())
    systems = {voices.system(name) for name in voices.runs}
    if len(systems) > 1:
        print(f"merge: the runs had different system prompts; {out} keeps the one of {first.name}")
    again = Voices([out], voices.device, "float32")
    again.bank.use(next(iter(again.runs)))
    return again.model


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
