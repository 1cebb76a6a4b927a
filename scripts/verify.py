"""
Check that a run is intact and that its adapter changes answers. Exit code 1 if not.

    python -m scripts.verify runs/companion
    python -m scripts.verify runs/companion --system "You are kind."     # what your server sends

The base model, its weights, the chat template and the system prompt must be those of the training.
Base and adapter answer fixed prompts; an adapter without effect is an error.
"""

import sys

from lora import config
from lora.run import cli
from scripts.voices import Voices, with_system

PROMPTS = ("Good morning! How are you?", "Tell me about yourself.", "What did you do yesterday?",
           "I feel a little sad today.", "What is the capital of France?", "Can you help me?")


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, e.g. runs/companion")
    parser.add_argument("--system", help="the system prompt your server sends: a text or .txt file")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of an answer")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    options = parser.parse_args(argv)

    voices = Voices([options.run], options.device)
    (name, run), = voices.runs.items()
    system, checks = voices.system(name), list(voices.checks[name])
    if options.system is not None:
        sent = config.text_of(options.system)
        checks.append(("system prompt", "" if sent == system else
                       f"training used {system!r}, this is {sent!r}"))
    layers, _ = voices.bank.adapters[name]
    moved = sum(bool(layer.lora_B.any()) and bool(layer.lora_A.any()) for layer in layers.values())
    checks.append((f"adapter: {len(layers)} modules, {moved} with an update that is not zero",
                   "" if moved else "the adapter has no effect: every update is zero"))

    prompts = [with_system([{"role": "user", "content": text}], system) for text in PROMPTS]
    before, after = ([a.text for a in voices.ask(prompts, who, voices.format(name),
                                                 max_new_tokens=options.max_new_tokens)]
                     for who in (None, name))
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    checks.append((f"answers: {changed} of {len(prompts)} differ from the base's", "" if changed
                   else "the adapter has no effect: they are the base's, word for word"))

    print(f"verify: {options.run}, trained {run.info.get('started', 'at an unknown time')[:10]}")
    for what, problem in checks:
        print(f"  ERROR  {what}: {problem}" if problem else f"  ok     {what}")
    print(f"  system prompt: {system}")
    for texts in zip(PROMPTS, before, after, strict=True):
        print("\n  {}\n    base:  {:.150}\n    tuned: {:.150}".format(
            *(" ".join(text.split()) for text in texts)))
    errors = sum(bool(problem) for _, problem in checks)
    print(f"\nverify: {errors} errors")
    return int(errors > 0)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
