"""
Draw the results of train_speed.py: speed.png, and speed-dark.png for a dark page.

    python -m benchmarks.figures benchmarks/results
"""

import json
import sys
from pathlib import Path

from lora.run import cli
from plots.figures import plain, plt, save

KINDS = (("TRL, its fastest settings", "train"), ("the fastest of the other trainers", "lr"),
         ("ours", "val"))


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", default="benchmarks/results", metavar="FOLDER",
                        help="where the results are")
    print(draw(parser.parse_args(argv).folder))


def draw(folder: Path | str) -> Path:
    """Write speed.png and speed-dark.png of a folder's NAME-*.json; returns the first path.

    Raises ValueError if there are no results of ours.
    """
    files = sorted(Path(folder).glob("*-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    groups = [result for result in results if "ours" in result["results"]]
    if len(groups) < 2:
        raise ValueError(f"figures: {folder} holds {len(groups)} results of ours (NAME-*.json); "
                         "expected 2 or more")
    return save(Path(folder) / "speed.png", lambda colours: bars(groups, colours))


def bars(groups: list[dict], colours: dict) -> plt.Figure:
    """Draw samples a second on the left: for each model and prompt the fastest TRL settings, the
    fastest of litgpt and LLaMA-Factory, and ours. Draw the losses of the longest run on the right,
    which should be one line."""
    groups = sorted(groups, key=lambda r: ("smollm2" not in r["model"], r["model"],
                                           r.get("turns", 0), r["prefix"]))
    longest = max(groups, key=lambda r: r["steps"])
    groups.remove(longest)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.8 * len(groups)),
                                         layout="constrained", width_ratios=(3, 2))
    for y, group in enumerate(groups):
        ours = group["results"]["ours"]
        for i, (kind, colour) in enumerate(KINDS):
            arms = [arm for name, arm in group["results"].items()
                    if "error" not in arm and kind_of(name) == i]
            if not arms:
                continue
            arm = max(arms, key=lambda arm: arm["samples_per_s"])
            rate, at = arm["samples_per_s"], y + 0.27 * (i - 1)
            spread = [[rate - arm["slowest"]], [arm["fastest"] - rate]]
            left.barh(at, rate, 0.25, color=colours[colour], xerr=spread, ecolor=colours["ink"],
                      label=kind if y == 0 else None)
            times = f" (ours: {ours['samples_per_s'] / rate:.1f} times)" if i < 2 else ""
            left.text(arm["fastest"], at, f"  {rate:.2f}{times}", va="center", fontsize=9)
    work = [f"dialogues, {g['turns']} answers" if g.get("turns") else f"{g['prefix']} shared tokens"
            for g in groups]
    left.set(yticks=range(len(groups)), xlabel="samples a second", yticklabels=[
        f"{g['model'].removesuffix('-instruct')}\n{words}"
        for g, words in zip(groups, work, strict=True)])
    left.set_xlim(0, 1.15 * max(g["results"]["ours"]["fastest"] for g in groups))
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)

    for name, arm in longest["results"].items():
        if "error" not in arm:
            ours = name == "ours"
            right.plot(range(1, len(arm["losses"]) + 1), arm["losses"], label=name,
                       lw=2 if ours else 6, alpha=1 if ours else 0.4,
                       color=colours["val" if ours else "train"])
    right.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set_title("the same loss")
    right.legend()
    plain(left, colours)
    plain(right, colours)
    return figure


def kind_of(arm: str) -> int | None:
    """Return the place of an arm in KINDS, or None."""
    if arm.startswith("trl-") and "fulllogits" not in arm:
        return 0
    if arm.startswith(("litgpt", "llamafactory")):
        return 1
    return 2 if arm == "ours" else None


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
