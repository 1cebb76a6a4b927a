"""
Show what was built: the mask of an example, the adapters of a block.

    print(colour(item, tokenizer))     # supervised tokens stand out in a terminal
    page(items, tokenizer)             # the same as an HTML page; mask.html is its head
    tree(model)                        # the first adapted block, a line per module
"""

import html
from itertools import groupby
from pathlib import Path

from torch import nn

from ..layer import LoRALinear
from ..loss import IGNORE_INDEX
from ..surgery import find_blocks, lora_layers

PAGE = Path(__file__).with_name("mask.html").read_text(encoding="utf-8")


def runs(item: dict, tokenizer) -> list[tuple[str, bool, bool]]:
    """Return [(text, supervised, special)]. Neighbours of one kind are decoded together, for one
    character may be several tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pairs = zip(item["input_ids"], item["labels"], strict=True)
    return [(tokenizer.decode([i for i, _ in group]).replace("\n", "⏎\n"), *kind)
            for kind, group in groupby(
                pairs, key=lambda pair: (pair[1] != IGNORE_INDEX, pair[0] in special))]


def colour(item: dict, tokenizer) -> str:
    """Write one example for a terminal: supervised tokens green, special tokens underlined."""
    return "".join(f"\033[{'1;32' if on else '90'}{';4' if special else ''}m{text}\033[0m"
                   for text, on, special in runs(item, tokenizer))


def page(items: list[dict], tokenizer) -> str:
    """Write all examples as an HTML page that stands alone; every text is escaped."""
    rows = []
    for item in items:
        spans = "".join(f'<span class="{"on " if on else ""}{"special" if sp else ""}">'
                        f"{html.escape(text)}</span>" for text, on, sp in runs(item, tokenizer))
        supervised = sum(label != IGNORE_INDEX for label in item["labels"])
        rows.append(f"<h2>{html.escape(item['source'])} <small>{supervised} of "
                    f"{len(item['labels'])} tokens supervised</small></h2><pre>{spans}</pre>")
    return PAGE + "\n".join(rows)


def tree(model: nn.Module) -> str:
    """Draw the first adapted block, a line per module, with the LoRA layers' shapes."""
    where, blocks = find_blocks(model)
    used = [i for i, block in enumerate(blocks) if lora_layers(block)]
    lines = [f"{where}.{used[0]}"]
    for path, module in blocks[used[0]].named_modules():
        if not path or path.endswith((".base_layer", ".dropout")):
            continue
        note = "  frozen" if list(module.parameters(recurse=False)) else ""
        if isinstance(module, LoRALinear):
            note = f"  LoRA  A {tuple(module.lora_A.shape)}  B {tuple(module.lora_B.shape)}"
        lines.append("  " * (path.count(".") + 1) + path.rpartition(".")[2] + note)
    if len(used) > 1:
        lines.append(f"the same in blocks {used[1:]}")
    return "\n".join(lines)
