"""
Let a model answer prompts once, for all runs that replay the answers. train.py does so itself where
keep.replay is a .txt file.

    python -m experiments.knowledge.replay --model smollm2-135m-instruct \\
        --prompts runs/knowledge/world-0/replay.txt --out replay-chat.jsonl
"""

import json
import sys
from pathlib import Path

from experiments.knowledge.score import Subject
from lora import config

TOKENS = 24                       # of an answer at most; one that is cut off is marked open


def main(argv: list[str]) -> None:
    parser = config.Parser(__doc__)
    parser.add_argument("--model", required=True, help="known model, folder or hub id")
    parser.add_argument("--prompts", nargs="+", required=True, help="files with a prompt a line")
    parser.add_argument("--out", required=True, help="the file of dialogues to write")
    options = parser.parse_args(argv)
    subject = Subject(options.model)
    prompts = [line for file in options.prompts
               for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
    lines = [json.dumps({"messages": subject.messages(question, answer), "open": not ended},
                        ensure_ascii=False)
             for question, (answer, ended) in zip(prompts, subject.ask(prompts, TOKENS),
                                                  strict=True) if answer]
    Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"replay: {len(lines)} of {len(prompts)} prompts answered")


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
