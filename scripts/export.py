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
import difflib
import json
import os
import sys
import tempfile
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError

import data
import dataset
from lora import adapter, base, fetch, gguf, readers, runlog
from lora.config import run_cli
from lora.readers import LOADS, Verdict
from lora.surgery import lora_layers, unwrap

TARGETS = ("peft", "vllm", "llama.cpp", "ollama", "mlx")
ELSEWHERE = {"gguf": "llama.cpp", "llama": "llama.cpp", "transformers": "peft", "hf": "peft"}

# The formats of dataset.py that are no model's own, as templates that a server can render.
JINJA = {
    "chatml": r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
              r"+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
              r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "plain": r"{% for message in messages %}{% if message['role'] == 'assistant' %}"
             r"{{ message['content'] + eos_token + '\n' }}{% elif message['role'] == 'system' %}"
             r"{{ message['content'] + '\n\n' }}{% else %}"
             r"{{ 'Question: ' + message['content'] + '\nAnswer:\n' }}{% endif %}{% endfor %}"}
TALK = [{"role": role, "content": text} for role, text in (
    ("system", "Be brief!"), ("user", "Who is it?"), ("assistant", "Nobody."), ("user", "Why?"))]
PROBES = (TALK, TALK[1:], TALK[:2], TALK[1:2])           # with and without a system prompt


class Job(NamedTuple):
    """What a target needs: names, the tuned model in portable form, how it was talked to."""

    run: str
    base_name: str              # what the adapter's file says
    served: str                 # what a server is given: a folder, if it is one here
    model: torch.nn.Module
    ids: torch.Tensor           # a probe, (1, t)
    tokenizer: object
    format: str
    template: str
    system: str | None


def main(argv):
    asked, target = parse(argv)
    run = runlog.read_run(asked.run)
    name, short = run.settings.model.name, run.name.replace("/", "-")
    folder = fetch.find(name)
    if asked.check:
        print(f"export: who reads {run.adapter} as it is")
        print(*map(line, readers.judge(run.adapter, base_config(folder), asked.run)), sep="\n")
        return
    out = Path(asked.out or f"exports/{short}-{target}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: {out} is there and not empty; remove it or choose --out FOLDER")

    # ----- the model with its adapter, as it was trained and then as every reader scales it
    tokenizer = base.load_tokenizer(folder)
    model = base.load_model(folder, torch.device("cpu"), torch.float32)
    notes = base_notes(run, model)
    adapter.load(model, run.adapter)
    kind = run.info["format"]
    ids = torch.tensor([dataset.render(TALK[1:2], tokenizer, kind, reply=True)[0]])
    before = logits(model, ids)
    readers.portable(model)
    whole = asked.merged or target == "ollama"
    template, more = chat_template(tokenizer, kind, run.info["template"])
    system, several = system_prompt(run)
    base_name = run.info["base_model"]
    job = Job(short, base_name, name if Path(name).exists() else base_name, model, ids, tokenizer,
              kind, template, system)

    # ----- its files, in a scratch folder: a failure leaves nothing behind
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        (made / "chat_template.jinja").write_text(template, encoding="utf-8")
        if system:
            (made / "system.txt").write_text(system, encoding="utf-8")
        verdict = WRITE[target](job, made)
        if asked.merged:
            write_merged(job, made / f"{short}-merged-f16.gguf")
        moved = (logits(model, ids) - before).abs().max().item()
        sure(moved < (0.05 if whole else 1e-4) * before.abs().max(), f"logits moved by {moved:.2g}")
        if out.exists():
            out.rmdir()
        os.replace(made, out)

    print(f"export: {asked.run} in format {kind}, on {job.served}")
    for file in sorted(out.iterdir()):
        print(f"  wrote    {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    print(f"  checked  read back, equal bit for bit; logits{' in f16' * whole} within {moved:.1g} "
          f"of the trained model's (the largest is {before.abs().max():.3g})")
    print(line(verdict))
    for command in commands(job, target, out, asked.merged):
        print(f"  use      {command}")
    if more:
        notes.append(f"{more}: " + ("the merged GGUF holds the right template" if whole else
                                    f"give the server {out}/chat_template.jinja"))
    if system and target != "ollama":
        notes.append(f"it was trained with a system prompt: send {out}/system.txt in each dialogue")
    for note in [*notes, *several]:
        print(f"  note     {note}")


def parse(argv):
    """(arguments, target)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("run", nargs="?")
    for option in ("--to", "--out"):
        parser.add_argument(option)
    for option in ("--check", "--merged"):
        parser.add_argument(option, action="store_true")
    asked, rest = parser.parse_known_args(argv)
    if rest or not asked.run or not (asked.to or asked.check):
        raise ValueError(f"export: {' '.join(argv) or 'nothing'} received; expected runs/NAME with "
                         f"--check, or with --to {'|'.join(TARGETS)} [--out FOLDER] [--merged]")
    target = (asked.to or "peft").lower()
    if target not in TARGETS:
        near = [ELSEWHERE.get(target), *difflib.get_close_matches(target, TARGETS, 1, 0.4)]
        hint = next((f" Did you mean {t}?" for t in near if t), "")
        raise ValueError(f"export: unknown target {asked.to!r}. Known: {', '.join(TARGETS)}.{hint}")
    if asked.merged and target != "llama.cpp":
        raise ValueError(f"export: --merged goes with --to llama.cpp; --to {target} writes "
                         + ("a merged model anyway" if target == "ollama" else "the adapter"))
    return asked, target


def base_config(folder):
    """The base model's config.json; of a hub id, from the loaded model."""
    file = Path(folder) / "config.json"
    if file.exists():
        return json.loads(file.read_text("utf-8"))
    return base.load_model(folder, torch.device("meta"), torch.float32).config.to_dict()


def base_notes(run, model):
    """Where the base model is not the one that others have, or that the run had."""
    name, known = run.settings.model.name, run.info.get("base_weights")
    notes = []
    if known and known != base.fingerprint(model):
        notes.append(f"{name} has other weights now than when {run.name} was trained on it")
    if getattr(fetch.KNOWN.get(name), "wheels", ()):
        notes.append(f"it was trained on 4-bit weights written out, model/{name}; "
                     f"{run.info['base_model']} has the unrounded ones, and answers may differ")
    return notes


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits[0].float()


def sure(holds, what):
    if not holds:
        raise ValueError(f"export: {what}; nothing was written. This is a fault of the project: "
                         "please report it.")


def line(verdict):
    fix = f"\n{'':26}fix: {verdict.fix}" * bool(verdict.fix)
    return f"  {verdict.reader:13} {verdict.verdict:9} {verdict.because}{fix}".rstrip()


# ----- the targets -------------------------------------------------------------------------------
# Each writes into a folder, reads it back, and returns the reader's verdict on what it wrote.


def to_peft(job, folder, reader="PEFT"):
    adapter.save(job.model, folder, job.base_name)
    wanted = logits(job.model, job.ids)
    unwrap(job.model)                                     # the plain base again
    adapter.load(job.model, folder)
    sure(torch.equal(logits(job.model, job.ids), wanted), "the adapter read back differs")
    found = readers.judge(folder, job.model.config.to_dict())
    return next(verdict for verdict in found if verdict.reader == reader)


def to_vllm(job, folder):
    verdict = to_peft(job, folder, "vLLM")
    return verdict._replace(because=f"{verdict.because}; not run here")


def to_llama_cpp(job, folder):
    layers, config = lora_layers(job.model), job.model.config.to_dict()
    file = folder / f"{job.run}.gguf"
    gguf.write_lora(file, layers, config)
    fields, tensors = gguf.read(file, config, layers)
    for name, layer in layers.items():
        sure(fields["adapter.lora.alpha"] == layer.lora_alpha
             and torch.equal(tensors[f"{name}.lora_a"], layer.lora_A)
             and torch.equal(tensors[f"{name}.lora_b"], layer.lora_B), f"{name}: read back wrong")
    return Verdict("llama.cpp", LOADS, f"on any GGUF of {job.served}")


def to_ollama(job, folder):
    write_modelfile(job, folder)
    write_merged(job, folder / f"{job.run}.gguf")
    return Verdict("Ollama", LOADS, "a merged model; not run here")


def to_mlx(job, folder):
    readers.save_mlx(job.model, folder, job.base_name)
    config, tensors = readers.load_mlx(folder)
    scale = config["lora_parameters"]["scale"]
    for name, layer in lora_layers(job.model).items():
        sure(scale == layer.scaling and torch.equal(tensors[f"{name}.lora_a"].T, layer.lora_A)
             and torch.equal(tensors[f"{name}.lora_b"].T, layer.lora_B), f"{name}: read back wrong")
    return Verdict("mlx-lm", LOADS, "not run here")


WRITE = {"peft": to_peft, "vllm": to_vllm, "llama.cpp": to_llama_cpp, "ollama": to_ollama,
         "mlx": to_mlx}


def write_merged(job, file):
    """The tuned model as f16 GGUF. The weights of job.model become those of the file."""
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


def commands(job, target, out, merged):
    """How to use what was written."""
    template = out / "chat_template.jinja"
    rank = readers.vllm_rank(next(iter(lora_layers(job.model).values())).r)
    yield from {
        "peft": [f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{job.served}")'
                 f', "{out}")'],
        "vllm": [f"vllm serve {job.served} --enable-lora --max-lora-rank {rank} --lora-modules "
                 f"{job.run}={out} --chat-template {template}"],
        "llama.cpp": [f"llama-server -m BASE.gguf --lora {out}/{job.run}.gguf --jinja "
                      f"--chat-template-file {template}"],
        "ollama": [f"ollama create {job.run} -f {out}/Modelfile && ollama run {job.run}"],
        "mlx": [f"mlx_lm.generate --model {job.served} --adapter-path {out} --prompt '...'"],
    }[target]
    if merged:
        yield f"llama-server -m {out}/{job.run}-merged-f16.gguf --jinja"


# ----- what a server renders ---------------------------------------------------------------------


def renderer(tokenizer, template):
    """messages -> the text up to the reply, as a server renders it."""
    return lambda messages: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True)


def chat_template(tokenizer, kind, known):
    """(template, problem): a Jinja template that renders what training did, and in words what a
    server without it would do. known is the digest of the template the run was trained with."""
    own = tokenizer.chat_template
    if kind == "template":
        changed = known != runlog.digest(own or "")
        return own, "the base model's template changed since the training" * changed
    bos, problem = first_token(tokenizer), ""
    ours = "{{ bos_token }}" * bool(bos) + JINJA[kind]
    for talk in PROBES:
        pieces = dataset.FORMATS[kind](talk, tokenizer, reply=True)
        trained = bos + "".join(text for text, _ in pieces)
        sure(renderer(tokenizer, ours)(talk) == trained, f"the template of {kind} renders wrongly")
        served = renderer(tokenizer, own)(talk) if own else trained
        at = len(commonprefix([served, trained]))
        if served != trained:
            problem = (f"trained as {kind}, where the model's own template has "
                       f"{served[at:at + 40]!r} for {trained[at:at + 40]!r}")
    return ours, problem if own else (f"trained as {kind}, and the model has no template: a server "
                                      "refuses dialogues, or renders ChatML")


def first_token(tokenizer):
    """The text of the BOS token, if the tokenizer puts it first by itself."""
    return tokenizer.bos_token * (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) \
        if tokenizer.bos_token else ""


def system_prompt(run):
    """(text or None, notes): the system prompt of the training."""
    text, n = run.info.get("system", run.settings.data.system), run.info.get("systems", 1)
    if text == "random" or n > 1:
        return None, ["it was trained with several system prompts: none is written"]
    return data.SYSTEM_PROMPT if text == "fixed" else text, []


def write_modelfile(job, folder):
    """Ollama's recipe. Its TEMPLATE is a Go template; without one it takes the GGUF's."""
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


def go_template(render, bos=""):
    """(template, default system prompt) for Ollama, of a chat template that puts each message
    between two texts of its role; ValueError for any other. They are read off rendered PROBES.
    bos is left out: the tokenizer adds it."""
    def gaps(talk):
        rest, found = render(talk).removeprefix(bos), []
        for message in talk:
            gap, _, rest = rest.partition(message["content"])
            found.append(gap)
        return [*found, rest]

    start, to_user, to_answer, again, end = gaps(TALK)
    alone = gaps(TALK[1:2])[0]
    user = commonprefix([to_user[::-1], again[::-1], alone[::-1]])[::-1]
    like = start.replace("system", "user")                # no part of what ends a turn before it
    user = like if like and user.endswith(like) else user
    close = commonprefix([to_answer, end])
    around = {"system": (start, to_user.removesuffix(user)), "user": (user, close),
              "assistant": (to_answer.removeprefix(close), again.removesuffix(user))}
    reply, default = end.removeprefix(close), alone.removesuffix(user)
    default = default.removeprefix(start).removesuffix(around["system"][1])

    for talk in PROBES:
        full = [{"role": "system", "content": default}] * (
            bool(default) and talk[0]["role"] != "system") + talk
        text = "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in full)
        if text + reply != render(talk).removeprefix(bos):
            raise ValueError("the chat template is more than a text before and after each message")

    def go(text):
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
    cases = "{{ else ".join(f'if eq .Role "{role}" }}}}{go(before)}{{{{ .Content }}}}{go(after)}'
                            for role, (before, after) in around.items())
    return f"{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{go(reply)}", default


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
