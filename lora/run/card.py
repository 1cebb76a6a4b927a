"""
The README.md of an adapter: its base, its data, its settings, its numbers, and how to load it.

    card.write("runs/demo/adapter", info, settings, best={"step": 27, "recall": 0.98})

card.md is the template. The text holds no path of this machine and no time: the same run writes the
same text.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

from .. import adapter, config, files

FILES = {"model.adapter", "data.path", "data.val_path", "keep.replay", "keep.retain"}
TEXT = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")


def write(folder: str | Path, info: dict, settings: config.Config, best: dict,
          before: dict | None = None) -> None:
    """Write README.md into the folder of an adapter that is there. For the arguments see card()."""
    folder = Path(folder)
    of_adapter = files.read_json(folder / adapter.CONFIG)
    files.write(folder / "README.md", card(info, settings, best, before, of_adapter))


def card(info: dict, settings: config.Config, best: dict, before: dict | None,
         of_adapter: dict) -> str:
    """The text of an adapter's README.md. info is the content of run.json, of_adapter that of
    adapter_config.json; best is the adapter's line of metrics, {"step": 27, "val_loss": 0.03, ...},
    and before that of step 0. Settings name files without their folders, and the base by its public
    name."""
    base, r, quant = of_adapter["base_model_name_or_path"], of_adapter["r"], settings.model.quant
    system = " ".join((info["system"] or "none").replace("|", "\\|").split())
    if info["systems"] > 1:
        system += f" (the most frequent of {info['systems']})"
    values = asdict(settings)
    values["model"]["name"] = base
    for key in FILES:
        section, _, name = key.partition(".")
        values[section][name] = file_name(values[section][name])
    return TEXT.format(
        base=base, r=r, alpha=of_adapter["lora_alpha"], name=settings.train.run,
        max_rank=max(16, 1 << (r - 1).bit_length()), dtype=info["dtype"].removeprefix("torch."),
        quant="" if quant == "none" else f", its linear layers in {quant}",
        weights=info["base_weights"], data=values["data"]["path"], digest=info["data"],
        format=info["format"], system=system, numbers=numbers(best, before or {}),
        settings=json.dumps(values, indent=2, ensure_ascii=False))


def numbers(best: dict, before: dict) -> str:
    """A table of the adapter's measures beside those before training."""
    rows = [f"| {key} | {f'{before[key]:.4f}' if key in before else '–'} | {value:.4f} |"
            for key, value in best.items() if key not in ("step", "epoch", "best")]
    if not rows:
        return f"Nothing was measured: it is the adapter of step {best['step']}."
    return "\n".join([f"| measure | before | step {best['step']} |", "|---|--:|--:|", *rows])


def file_name(path: str | None) -> str | None:
    r"""The last part of a path, of this system or another.

    >>> file_name("/home/me/facts.jsonl"), file_name(r"C:\me\facts.jsonl"), file_name(None)
    ('facts.jsonl', 'facts.jsonl', None)
    """
    return path and re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def write_samples(file: Path, prompts: list[list[dict]], before: list[str],
                  after: list[str]) -> None:
    """Print the answers before and after, and write them as a Markdown table."""
    rows = ["| question | before | after |", "|---|---|---|"]
    for messages, *both in zip(prompts, before, after, strict=True):
        question, old, new = (" ".join(text.split()) for text in (messages[-1]["content"], *both))
        print(f"\n  {question}\n    before: {old:.100}\n    after:  {new:.100}")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (question, old, new))
                    + " |")
    files.write(file, "\n".join(rows) + "\n")
