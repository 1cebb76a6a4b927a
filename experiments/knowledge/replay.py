"""
Let a model answer prompts once, for all runs that replay the answers. train.py does so itself where
keep.replay is a .txt file.

    python -m experiments.knowledge.replay --model smollm2-135m-instruct \\
        --prompts runs/knowledge/world-0/replay.txt --out replay-chat.jsonl
"""

import json
import sys

import keep
from experiments.knowledge.score import Subject
from lora import files
from lora.run import cli


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="known model, folder or hub id")
    parser.add_argument("--prompts", nargs="+", required=True, help="files with a prompt a line")
    parser.add_argument("--out", required=True, help="the file of dialogues to write")
    options = parser.parse_args(argv)
    prompts = [e["messages"] for file in options.prompts for e in keep.read_replay(file)]
    answers = Subject(options.model).voice.ask(prompts, keep.REPLAY_TOKENS)
    lines = [{"messages": [*prompt, {"role": "assistant", "content": answer.text}],
              "open": not answer.ended}
             for prompt, answer in zip(prompts, answers, strict=True) if answer.text]
    files.write(options.out, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    print(f"replay: {len(lines)} of {len(prompts)} prompts answered")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
