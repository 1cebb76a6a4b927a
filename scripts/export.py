"""
Write what a server reads, check it, and say how to use it.

    python -m scripts.export runs/demo --check                   # who reads this adapter as it is?
    python -m scripts.export runs/demo --to llama.cpp            # into exports/demo-llama.cpp
    python -m scripts.export runs/demo --to llama.cpp --merged   # the whole tuned model as well
    python -m scripts.export runs/demo --to ollama --out FOLDER

    peft, vllm   an adapter folder that every reader scales alike: rsLoRA and patterns are folded
    llama.cpp    a GGUF LoRA; with --merged the tuned model as f16 GGUF too
    ollama       the tuned model as f16 GGUF, and a Modelfile
    mlx          mlx-lm's layout

Beside each: chat_template.jinja, which renders what the run was trained on, and system.txt.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError

import data
import dataset
from lora import adapter, config, files
from lora.base import fetch, load
from lora.run import cli, runlog
from lora.surgery import lora_layers, unwrap
from lora.use import gguf, readers
from lora.use.readers import LOADS, Verdict

ELSEWHERE = {"gguf": "llama.cpp", "llama": "llama.cpp", "transformers": "peft", "hf": "peft"}
USE = files.read_json(Path(__file__).with_suffix(".json"))      # what to type afterwards
JINJA = Path(__file__).with_name("chat_templates")       # the formats of dataset.py but "template"
TALK = [{"role": role, "content": text} for role, text in (
    ("system", "Be brief!"), ("user", "Who is it?"), ("assistant", "Nobody."), ("user", "Why?"))]
PROBES = (TALK, TALK[1:], TALK[:2], TALK[1:2])           # with and without a system prompt


class Job(NamedTuple):
    """A run's tuned model in the form that every reader scales alike, and how to talk to it."""

    run: str                    # its name, without a slash
    target: str                 # a key of WRITE
    base_name: str              # what the adapter's file says
    base: dict                  # the base model's config.json
    served: str                 # what a server is given: a folder, if it is one here
    model: torch.nn.Module
    ids: torch.Tensor           # a probe, (1, t)
    trained: torch.Tensor       # the logits of the probe as trained, (t, v)
    tokenizer: object
    format: str
    template: str
    system: str | None
    notes: list[str]            # what a user should know


def main(argv: list[str]) -> None:
    options = parse(argv)
    run = runlog.read_run(options.run)
    folder = fetch.find(run.settings.model.name)
    if options.check:
        print(f"export: who reads {run.adapter} as it is")
        for verdict in readers.judge(run.adapter, base_config(folder), options.run):
            print(line(verdict))
        return
    name = run.name.replace("/", "-")
    out = Path(options.out or f"exports/{name}-{options.to}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: {out} is there and not empty; remove it or choose --out FOLDER")
    job = load_job(run, folder, options, out)

    # its files, in a scratch folder: a failure leaves nothing behind
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "made"
        folder.mkdir()
        (folder / "chat_template.jinja").write_text(job.template, encoding="utf-8")
        if job.system:
            (folder / "system.txt").write_text(job.system, encoding="utf-8")
        verdict = WRITE[options.to](job, folder)
        if options.merged:
            write_merged(job, folder / f"{name}-merged-f16.gguf")
        moved = (logits(job.model, job.ids) - job.trained).abs().max().item()
        tolerance = 0.05 if options.whole else 1e-4
        sure(moved < tolerance * job.trained.abs().max(), f"logits moved by {moved:.2g}")
        if out.exists():
            out.rmdir()
        os.replace(folder, out)

    print(f"export: {options.run} in format {job.format}, on {job.served}")
    for file in sorted(out.iterdir()):
        print(f"  wrote    {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    print(f"  checked  read back, equal bit for bit; logits{' in f16' if options.whole else ''} "
          f"within {moved:.1g} of the trained model's (the largest is "
          f"{job.trained.abs().max():.3g})")
    print(line(verdict))
    for command in commands(job, options.merged, out):
        print(f"  use      {command}")
    for note in job.notes:
        print(f"  note     {note}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options: .to is a key of WRITE, .whole is true if a merged model is written."""
    parser = cli.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or an adapter in it")
    parser.add_argument("--to", metavar="TARGET", help=f"one of {', '.join(WRITE)}")
    parser.add_argument("--out", metavar="FOLDER", help="(default: exports/NAME-TARGET)")
    parser.add_argument("--check", action="store_true", help="write nothing; print the readers")
    parser.add_argument("--merged", action="store_true", help="the whole model too, for llama.cpp")
    options = parser.parse_args(argv)
    if not options.to and not options.check:
        raise ValueError(f"export: expected --check, or --to {'|'.join(WRITE)}")
    target = (options.to or "peft").lower()
    if target not in WRITE:
        near = config.nearest(target, {name: name for name in WRITE} | ELSEWHERE)
        raise ValueError(f"export: unknown target {options.to!r}. Known: {', '.join(WRITE)}."
                         + (f" Did you mean {near}?" if near else ""))
    if options.merged and target != "llama.cpp":
        raise ValueError(f"export: --merged goes with --to llama.cpp; --to {target} writes "
                         + ("a merged model anyway" if target == "ollama" else "the adapter"))
    options.to, options.whole = target, options.merged or target == "ollama"
    return options


def load_job(run: runlog.Run, folder: Path | str, options: argparse.Namespace, out: Path) -> Job:
    """Load base and adapter, note the logits as trained, and make the adapter portable."""
    name, base_name, format = run.settings.model.name, run.info["base_model"], run.info["format"]
    s = run.settings.dataset
    tokenizer = load.load_tokenizer(folder, variables=s.template_vars, day=s.date)
    model = load.load_model(folder, torch.device("cpu"), torch.float32)
    notes = base_notes(run, model)
    adapter.load(model, run.adapter)
    ids = torch.tensor([dataset.render(TALK[1:2], tokenizer, format, reply=True)[0]])
    trained = logits(model, ids)
    readers.portable(model)
    template, problem = chat_template(tokenizer, format, run.info["template"])
    system, system_notes = system_prompt(run)
    if problem:
        notes.append(f"{problem}: " + ("the merged GGUF holds the right template" if options.whole
                                       else f"give the server {out}/chat_template.jinja"))
    if system and options.to != "ollama":
        notes.append(f"it was trained with a system prompt: send {out}/system.txt in each dialogue")
    served = name if Path(name).exists() else base_name
    base = base_config(folder, model)
    if options.to in ("peft", "vllm") and any(
            path != readers.published(path, base) for path in lora_layers(model)):
        notes.append(f"its names are those of {readers.class_of(base)}; {type(model).__name__}, "
                     "which AutoModelForCausalLM gives, ignores them: it reads the run's adapter/")
    return Job(run.name.replace("/", "-"), options.to, base_name, base, served, model, ids, trained,
               tokenizer, format, template, system, notes + system_notes)


def base_config(folder: Path | str, model: torch.nn.Module | None = None) -> dict:
    """The base model's config.json; of a hub id, from the loaded model. A text-only class inside a
    checkpoint that also sees or hears names no class there: its name tells the published one."""
    file = Path(folder) / "config.json"
    if file.exists():
        return files.read_json(file)
    model = model or load.load_model(folder, torch.device("meta"), torch.float32)
    inner = type(model).__name__.replace("ForCausalLM", "ForConditionalGeneration")
    config = model.config.to_dict()
    if not config.get("architectures") and inner in readers.TEXT_AT:
        config["architectures"] = [inner]
    return config


def base_notes(run: runlog.Run, model: torch.nn.Module) -> list[str]:
    """Where the base model differs from the public one, or from the one of the training."""
    name, weights = run.settings.model.name, run.info.get("base_weights")
    notes = []
    if weights and weights != load.fingerprint(model):
        notes.append(f"{name} has other weights now than when {run.name} was trained on it")
    if getattr(fetch.KNOWN.get(name), "wheels", ()):
        notes.append(f"it was trained on 4-bit weights written out, model/{name}; "
                     f"{run.info['base_model']} has the unrounded ones, and answers may differ")
    return notes


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(t, v) in float32."""
    return model(input_ids=ids).logits[0].float()


def sure(holds: bool, problem: str) -> None:
    """Raise ValueError if what we wrote is wrong: an assertion that python -O keeps."""
    if not holds:
        raise ValueError(f"export: {problem}; nothing was written. This is a fault of the project: "
                         "please report it.")


def line(verdict: Verdict) -> str:
    """A verdict as printed, its fix on a second line."""
    fix = f"\n{'':26}fix: {verdict.fix}" if verdict.fix else ""
    return f"  {verdict.reader:13} {verdict.verdict:9} {verdict.because}{fix}".rstrip()


# ----- the targets -------------------------------------------------------------------------------
# Each writes into a folder, reads it back, and returns the reader's verdict on what it wrote.


def to_peft(job: Job, folder: Path) -> Verdict:
    adapter.save(job.model, folder, job.base_name)
    readers.fit(folder, job.base, for_peft=job.target == "peft")
    portable_logits = logits(job.model, job.ids)
    unwrap(job.model)                                     # the plain base again
    adapter.load(job.model, folder)
    sure(torch.equal(logits(job.model, job.ids), portable_logits), "the adapter read back differs")
    verdicts = {v.reader: v for v in readers.judge(folder, job.base)}
    if job.target == "peft":
        return verdicts["PEFT"]
    return verdicts["vLLM"]._replace(because=f"{verdicts['vLLM'].because}; not run here")


def to_llama_cpp(job: Job, folder: Path) -> Verdict:
    layers, config = lora_layers(job.model), job.model.config.to_dict()
    file = folder / f"{job.run}.gguf"
    gguf.write_lora(file, layers, config)
    fields, tensors = gguf.read(file, config, layers)
    for name, layer in layers.items():
        sure(fields["adapter.lora.alpha"] == layer.lora_alpha
             and torch.equal(tensors[f"{name}.lora_a"], layer.lora_A)
             and torch.equal(tensors[f"{name}.lora_b"], layer.lora_B), f"{name}: read back wrong")
    return Verdict("llama.cpp", LOADS, f"on any GGUF of {job.served}")


def to_ollama(job: Job, folder: Path) -> Verdict:
    write_modelfile(job, folder)
    write_merged(job, folder / f"{job.run}.gguf")
    return Verdict("Ollama", LOADS, "a merged model; not run here")


def to_mlx(job: Job, folder: Path) -> Verdict:
    if "text_config" in job.base:
        raise ValueError(f"export: how mlx-lm names the layers of {readers.class_of(job.base)} is "
                         "not known here; merge into a folder (python -m scripts.merge RUN --out "
                         "FOLDER) and convert that with mlx_lm.convert")
    readers.save_mlx(job.model, folder, job.base_name)
    config, tensors = readers.load_mlx(folder)
    scale = config["lora_parameters"]["scale"]
    for name, layer in lora_layers(job.model).items():
        sure(scale == layer.scaling and torch.equal(tensors[f"{name}.lora_a"].T, layer.lora_A)
             and torch.equal(tensors[f"{name}.lora_b"].T, layer.lora_B), f"{name}: read back wrong")
    return Verdict("mlx-lm", LOADS, "not run here")


WRITE = {"peft": to_peft, "vllm": to_peft, "llama.cpp": to_llama_cpp, "ollama": to_ollama,
         "mlx": to_mlx}


def write_merged(job: Job, file: Path) -> None:
    """Write the tuned model as f16 GGUF. The weights of job.model become those of the file."""
    for layer in lora_layers(job.model).values():
        layer.merge()
    config = job.model.config.to_dict()
    tensors = {name.replace(".base_layer", ""): tensor
               for name, tensor in job.model.state_dict().items()
               if not name.endswith((".lora_A", ".lora_B"))}
    gguf.write_model(file, tensors, config, job.tokenizer, job.template)
    for name, tensor in gguf.read(file, config, tensors)[1].items():
        sure(torch.equal(tensor, tensors[name].to(tensor.dtype)), f"{name} read back is another")
        tensors[name].copy_(tensor)


def commands(job: Job, merged: bool, out: Path) -> list[str]:
    """How to use what was written."""
    rank = readers.vllm_rank(next(iter(lora_layers(job.model).values())).r)
    auto = ("AutoModelForImageTextToText" if readers.class_of(job.base).endswith(
        "ForConditionalGeneration") else "AutoModelForCausalLM")
    return [USE[what].format(run=job.run, served=job.served, rank=rank, out=out, auto=auto)
            for what in ([job.target, "merged"] if merged else [job.target])]


# ----- what a server renders ---------------------------------------------------------------------


def renderer(tokenizer, template: str) -> Callable[[list[dict]], str]:
    """A function from messages to the text up to the reply, as a server renders it."""
    return lambda messages: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True)


def chat_template(tokenizer, format: str, digest: str) -> tuple[str, str]:
    """(template, problem): a Jinja template that renders what training did, and in words what a
    server without it would do. digest is that of the template the run was trained with."""
    model_template, problem = tokenizer.chat_template, ""
    if format == "template":
        if digest != runlog.digest(model_template or ""):
            problem = "the base model's template changed since the training"
        return model_template, problem
    bos = first_token(tokenizer)
    template = (JINJA / f"{format}.jinja").read_text(encoding="utf-8").rstrip("\n")
    template = "{{ bos_token }}" + template if bos else template
    for talk in PROBES:
        pieces = dataset.FORMATS[format](talk, tokenizer, reply=True)
        trained = bos + "".join(text for text, _ in pieces)
        sure(renderer(tokenizer, template)(talk) == trained,
             f"the template of {format} renders wrongly")
        served = renderer(tokenizer, model_template)(talk) if model_template else trained
        if served != trained:
            at = len(commonprefix([served, trained]))
            problem = (f"trained as {format}, where the model's own template has "
                       f"{served[at:at + 40]!r} for {trained[at:at + 40]!r}")
    if not model_template:
        problem = (f"trained as {format}, and the model has no template: a server refuses "
                   "dialogues, or renders ChatML")
    return template, problem


def first_token(tokenizer) -> str:
    """The text of the BOS token if the tokenizer puts it first by itself, else ""."""
    bos = tokenizer.bos_token
    return bos if bos and tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""


def system_prompt(run: runlog.Run) -> tuple[str | None, list[str]]:
    """(text, notes): the system prompt of the training."""
    text, n = run.info.get("system", run.settings.data.system), run.info.get("systems", 1)
    if text == "random" or n > 1:
        return None, ["it was trained with several system prompts: none is written"]
    return data.SYSTEM_PROMPT if text == "fixed" else text, []


def write_modelfile(job: Job, folder: Path) -> None:
    """Write Ollama's recipe. Its TEMPLATE is a Go template; without one it takes the GGUF's."""
    lines, system = [f"FROM ./{job.run}.gguf"], job.system
    try:
        template, default = go_template(renderer(job.tokenizer, job.template),
                                        first_token(job.tokenizer))
        lines.append(f'TEMPLATE """{template}"""')
        system = system or default
    except (ValueError, TemplateError) as error:
        lines.append(f"# no TEMPLATE: {error}. Ollama renders the template inside the GGUF.")
    if system and '"""' in system:
        raise ValueError('export: the system prompt holds """, which ends a text in a Modelfile')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stop = dataset.stop_of(job.tokenizer, job.format)
    ends = {job.tokenizer.decode([i]) for i in stop.ids} | {stop.text} - {""}
    lines += [f'PARAMETER stop "{end}"' for end in sorted(ends)]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(render: Callable[[list[dict]], str], bos: str = "") -> tuple[str, str]:
    """(template, default system prompt) for Ollama, read off rendered PROBES. Raises ValueError
    unless the chat template puts each message between two texts of its role. bos is left out: the
    tokenizer adds it."""
    start, to_user, to_answer, again, end = _gaps(render, bos, TALK)
    alone = _gaps(render, bos, TALK[1:2])[0]
    user = commonprefix([to_user[::-1], again[::-1], alone[::-1]])[::-1]
    like = start.replace("system", "user")                # no part of what ends a turn before it
    user = like if like and user.endswith(like) else user
    close = commonprefix([to_answer, end])
    around = {"system": (start, to_user.removesuffix(user)), "user": (user, close),
              "assistant": (to_answer.removeprefix(close), again.removesuffix(user))}
    reply, default = end.removeprefix(close), alone.removesuffix(user)
    default = default.removeprefix(start).removesuffix(around["system"][1])

    for talk in PROBES:
        text = ""
        if default and talk[0]["role"] != "system":
            text = around["system"][0] + default + around["system"][1]
        for message in talk:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        if text + reply != render(talk).removeprefix(bos):
            raise ValueError("the chat template is more than a text before and after each message")

    cases = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
        for role, (before, after) in around.items())
    return f"{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{_go(reply)}", default


def _gaps(render, bos, talk):
    """The texts before, between and after the messages of a rendered talk."""
    rest, gaps = render(talk).removeprefix(bos), []
    for message in talk:
        gap, _, rest = rest.partition(message["content"])
        gaps.append(gap)
    return [*gaps, rest]


def _go(text):
    """A text as a Go template writes it out."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
