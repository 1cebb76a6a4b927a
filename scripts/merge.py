"""
Merge adapters into their base, a plain model folder; or several adapters into one.

    python -m scripts.merge runs/companion --out merged/companion               # model folder
    python -m scripts.merge runs/bram=0.7 runs/juno=0.3 --adapter --out runs/mix    # adapter

It computes W + scaling B A in float32 and rounds once, to --dtype. Then it reads the result again
and compares its predictions with those of base and adapter.
"""

import sys
from pathlib import Path

import torch

from lora import adapter, files, surgery
from lora.base import fetch, load
from lora.run import cli, runlog
from lora.use import readers
from scripts.voices import Voices, with_system

PROBES = ("Good morning! How are you?", "What is the capital of France?", "Tell me a story.")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}                # probability on other tokens


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN[=WEIGHT]", help="weight 1 if left out")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--adapter", action="store_true", help="write an adapter, as a run folder")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32",
                        help="of the model folder")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
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
    before = log_probs(voices, voices.model, "mix", first)
    out.mkdir(parents=True, exist_ok=True)
    origin = {"merged": weights, "of": {name: runlog.digest_file(
        run.adapter / adapter.WEIGHTS) for name, run in voices.runs.items()}}
    save = save_adapter if options.adapter else save_model
    again = save(voices, out, origin, getattr(torch, options.dtype))
    after = log_probs(voices, again, None, first)
    apart = (before.exp() - after.exp()).abs().sum(-1).max().item() / 2    # total variation
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    terms = [] if options.adapter else ["base"]
    terms += [f"{w:g} {name}" for name, w in weights.items()]
    print(f"merge: {out} = {' + '.join(terms)}\nread back: at most {apart:.1e} of the probability "
          f"is elsewhere, the likeliest token is the same at {same:.1%}")
    if apart > TOLERANCE["float32" if options.adapter else options.dtype]:
        or_float32 = "" if options.dtype == "float32" else ", or write --dtype float32"
        raise ValueError(f"merge: {out} does not compute what base and adapter do; keep the adapter"
                         + or_float32)


def refuse_quantised(run: runlog.Run) -> None:
    """Raise ValueError if the base is quantised: rounding would lose the update."""
    file = Path(fetch.find(run.settings.model.name)) / "config.json"
    if file.exists() and "quantization_config" in files.read_json(file):
        raise ValueError(
            f"merge: {run.settings.model.name} is quantised; merging would round the update away. "
            "Set model.name in the run's config.json to the same model in bfloat16 or float32, or "
            "serve the adapter beside the base.")


def log_probs(voices: Voices, model, name: str | None, run: str) -> torch.Tensor:
    """Log-probabilities at all positions of the probes, (positions, v), with an adapter or none and
    the system prompt of a run."""
    rows = []
    with voices.bank.using(name), torch.no_grad():
        for text in PROBES:
            messages = with_system([{"role": "user", "content": text}], voices.system(run))
            ids = torch.tensor([voices.voice(run).ids(messages)], device=voices.device)
            rows.append(model(input_ids=ids).logits[0].float().log_softmax(-1))
    return torch.cat(rows)


def save_model(voices: Voices, out: Path, origin: dict, dtype: torch.dtype):
    """Write a plain model folder; returns the model read from it. voices.model is merged after."""
    voices.bank.use("mix")
    for layer in surgery.lora_layers(voices.model).values():
        layer.merge()
    surgery.unwrap(voices.model)
    load.save_model(voices.model.to(dtype), voices.tokenizer, out)
    file, ours = Path(voices.folder) / "config.json", type(voices.model).__name__
    whole = readers.class_of(files.read_json(file)) if file.exists() else ""
    if whole in readers.TEXT_AT and whole != ours:
        print(f"merge: {out} holds {ours}, the text of {whole} alone: it sees and hears nothing")
    runlog.write_json(out / "merge.json", origin)
    return load.load_model(out, voices.device, dtype)


def save_adapter(voices: Voices, out: Path, origin: dict, dtype: torch.dtype):
    """Write a run folder with the mix as its adapter; returns the base with it, read again."""
    first = next(iter(voices.runs.values()))
    with voices.bank.using("mix"):
        adapter.save(voices.model, out / "adapter", first.info["base_model"])
    runlog.write_json(out / "run.json", {**first.info, **origin})
    (out / "config.json").write_bytes((first.adapter.parent / "config.json").read_bytes())
    systems = {voices.system(name) for name in voices.runs}
    if len(systems) > 1:
        print(f"merge: the runs have different system prompts; {out} keeps the one of {first.name}")
    again = Voices([out], voices.device, "float32")
    again.bank.use(next(iter(again.runs)))
    return again.model


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
