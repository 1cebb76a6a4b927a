"""
Is a run what it says, and does its adapter do anything? Exit code 1 if not.

    python -m scripts.verify runs/companion
    python -m scripts.verify runs/companion --system "You are kind."     # what your server sends

The base model, its weights, the chat template and the system prompt must be those of the training;
the adapter is loaded and answers fixed prompts beside the base. One without effect is an error.
"""

import argparse
import sys
from pathlib import Path

from lora import config
from scripts.voices import Voices, read_prompts, with_system

PROMPTS = ("Good morning! How are you?", "Tell me about yourself.", "What did you do yesterday?",
           "I feel a little sad today.", "What is the capital of France?", "Can you help me?")


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.verify", allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, e.g. runs/companion")
    parser.add_argument("--prompts", help=".jsonl with messages, or .txt with a question a line")
    parser.add_argument("--system", help="the system prompt that will be sent, or a file with it")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    asked = [p["messages"] for p in read_prompts(options.prompts)] if options.prompts else [
        [{"role": "user", "content": text}] for text in PROMPTS]

    voices = Voices([options.run], options.device)
    (name, run), = voices.runs.items()
    system, checks = voices.system(name), list(voices.checks[name])
    if options.system is not None:
        given = Path(options.system)
        sent = given.read_text(encoding="utf-8").strip() if given.is_file() else options.system
        checks.append(("system prompt", "" if sent == system else
                       f"training used {system!r}, this is {sent!r}"))
    layers, _ = voices.bank.adapters[name]
    moved = sum(bool(layer.lora_B.any()) and bool(layer.lora_A.any()) for layer in layers.values())
    checks.append((f"adapter: {len(layers)} modules, {moved} with an update that is not zero",
                   "" if moved else "the adapter has no effect: every update is zero"))

    prompts = [with_system(messages, system) for messages in asked]
    before, after = ([a.text for a in voices.ask(prompts, who, voices.format(name),
                                                 max_new_tokens=options.max_new_tokens)]
                     for who in (None, name))
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    checks.append((f"answers: {changed} of {len(asked)} differ from the base's", "" if changed else
                   "the adapter has no effect: it answers what the base answers, word for word"))

    print(f"verify: {options.run}, trained {run.info.get('started', 'at an unknown time')[:10]}")
    for what, problem in checks:
        print(f"  {'ERROR' if problem else 'ok   '}  {what}{': ' * bool(problem)}{problem}")
    print(f"  system prompt: {system}")
    for messages, *both in zip(asked, before, after, strict=True):
        print("\n  {}\n    base:  {:.150}\n    tuned: {:.150}".format(
            *(" ".join(text.split()) for text in (messages[-1]["content"], *both))))
    errors = sum(bool(problem) for _, problem in checks)
    print(f"\nverify: {errors} errors")
    return int(errors > 0)


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
