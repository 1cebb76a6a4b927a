"""
A model's own answers to prompts, once for all runs that replay them (train.py makes them itself
where keep.replay is a .txt file).

    python -m experiments.knowledge.replay --model smollm2-135m-instruct \\
        --prompts runs/knowledge/world-0/replay.txt --out replay-chat.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from experiments.knowledge.score import Subject
from lora.config import run_cli

TOKENS = 24                       # an answer may have; one that is broken off is marked open


def main(argv):
    parser = argparse.ArgumentParser(description="Let a model answer prompts, as keep.replay reads "
                                                 "them.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", nargs="+", required=True, help="files, a prompt a line")
    parser.add_argument("--out", required=True)
    asked = parser.parse_args(argv)
    subject = Subject(asked.model)
    prompts = [line for file in asked.prompts
               for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
    lines = [json.dumps({"messages": subject.messages(question, answer), "open": not ended},
                        ensure_ascii=False)
             for question, (answer, ended) in zip(prompts, subject.ask(prompts, TOKENS),
                                                  strict=True) if answer]
    Path(asked.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"replay: {len(lines)} of {len(prompts)} prompts answered")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
