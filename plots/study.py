"""
Draw the figures of docs/maths.md from the numbers that its commands print there.

    python -m plots.study                # plots/gallery/study/*.png, light and dark
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from .figures import plain, plt, save

ROOT = Path(__file__).resolve().parents[1]
TEXT, FOLDER = ROOT / "docs" / "maths.md", ROOT / "plots" / "gallery" / "study"
Lines = list[str]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m plots.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise ValueError(f"{name}: unknown option; {parser.prog} takes none")
    for path in draw(TEXT, FOLDER):
        print(path.relative_to(ROOT))


def draw(text: Path, folder: Path) -> list[Path]:
    """Write every figure, light and dark; returns the light ones."""
    folder.mkdir(parents=True, exist_ok=True)
    found = outputs(text.read_text(encoding="utf-8"))
    paths = []
    for name, (figure_of, command) in FIGURES.items():
        if command not in found:
            raise ValueError(f"study: {text.name} has no output of `scripts.show {command}`")
        paths.append(save(folder / f"{name}.png", partial(figure_of, found[command])))
    return paths


def outputs(text: str) -> dict[str, Lines]:
    """Return {name: lines} of what `python -m scripts.show NAME` prints, as the text quotes it."""
    blocks = re.findall(r"```sh\npython -m scripts\.show (\w+)\n```\n```\n(.*?)```", text, re.S)
    return {name: block.splitlines() for name, block in blocks}


def floats(line: str) -> list[float]:
    """Return the numbers of a line that holds nothing else."""
    return [float(x) for x in line.split()]


def end(panel: plt.Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write a line's name behind its last point."""
    panel.annotate(text, (x, y), (7, 0), textcoords="offset points", color=colour, va="center",
                   annotation_clip=False)


def layer(lines: Lines, colours: dict) -> plt.Figure:
    """W, B and A to scale: the shapes of dL/dB (d_out, r) and dL/dA (r, d_in)."""
    shapes = [re.search(r"\((\d+), (\d+)\)", line) for line in lines if "autograd" in line]
    (d_out, r), (_, d_in) = (tuple(map(int, shape.groups())) for shape in shapes[:2])
    figure, panel = plt.subplots(figsize=(10, 2.4), layout="constrained")
    gap, x = 80, 0
    for name, height, width, colour, note, sign in (
            ("W", d_out, d_in, "lr", "frozen", "+   s"),
            ("B", d_out, r, "val", "starts at 0", ""),
            ("A", r, d_in, "train", "starts at random", "")):
        panel.add_patch(plt.Rectangle((x, -height), width, height, color=colours[colour]))
        for y, up, text, style in ((0, 5, name, {"weight": "bold", "size": 13}),
                                   (-height, -5, f"{height} × {width}\n{note}", {"va": "top"})):
            panel.annotate(text, (x + width / 2, y), (0, up), ha="center",
                           textcoords="offset points", **style)
        panel.text(x + width + gap / 2, -d_out / 2, sign, ha="center", va="center", size=14)
        x += width + gap
    panel.set(xlim=(-2, x - gap + 2), ylim=(-d_out - 62, 34), aspect="equal", xticks=[], yticks=[])
    plain(panel, colours)
    return figure


def values(lines: Lines, colours: dict) -> plt.Figure:
    """The singular values of the update, a line each, over steps of plain descent."""
    rows = [floats(line) for line in lines if re.match(r" +\d+ ", line)]
    figure, panel = plt.subplots(figsize=(8, 3.6), layout="constrained")
    steps = [row[0] for row in rows]
    for i, colour in ((3, "lr"), (2, "lr"), (1, "val"), (0, "train")):
        panel.plot(steps, [row[4 + i] for row in rows], "o-", ms=4, lw=2, color=colours[colour],
                   clip_on=False)
    last = rows[-1][4:]
    for value, text, colour in ((last[0], "first", "train"), (last[1], "second", "val"),
                                (last[2], "third, fourth", "lr")):
        end(panel, steps[-1], value, text, colours[colour])
    panel.set(xlabel="step of plain gradient descent", ylabel="singular values of s B A",
              xlim=(0, steps[-1]), ylim=(-0.06, 2.15), yticks=(0, 1, 2))
    plain(panel, colours, "y")
    return figure


def rank(lines: Lines, colours: dict) -> plt.Figure:
    """How far the loss falls in ten steps, over the rank: a panel for each optimizer."""
    ranks = floats(lines[0][21:])
    rows = {line[:21].strip(): floats(line[21:]) for line in lines if "alpha" in line}
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for panel, optimizer in zip(panels, ("SGD", "Adam"), strict=True):
        for scale, colour in (("alpha / r", "train"), ("alpha / sqrt(r)", "val")):
            drops = rows[f"{optimizer}, {scale}"]
            panel.plot(ranks, drops, "o-", ms=5, lw=2, color=colours[colour], clip_on=False)
            side = "left" if optimizer == "SGD" else "right"        # away from a sloping line
            under = optimizer == "SGD" and colour == "val"          # away from a line of the grid
            panel.annotate(scale, (ranks[3], drops[3]), (0, -18 if under else 9), ha=side,
                           textcoords="offset points", color=colours[colour])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ranks, [f"{r:.0f}" for r in ranks])
        panel.set_yticks((0.01, 0.1, 1), ("0.01", "0.1", "1"))
        panel.minorticks_off()
        panel.set(xlabel="rank r", ylim=(0.009, 2.8))
        panel.set_title({"SGD": "plain gradient descent", "Adam": "Adam"}[optimizer])
        plain(panel, colours, "y")
    panels[0].set_ylabel("fall of the loss in ten steps (nats)")
    return figure


def labels(lines: Lines, colours: dict) -> plt.Figure:
    """The tokens of a conversation above their labels; an arrow from each output to its target."""
    rows = [re.match(r" +(\d+)  (\S+) +(\d+) +(-?\d+)(  .+)?$", line) for line in lines]
    rows = [row.groups() for row in rows if row]
    figure, panel = plt.subplots(figsize=(12, 2.6), layout="constrained")
    for x, (position, token, number, label, target) in enumerate(rows):
        on = label != "-100"
        for y, text, colour in ((2, token, "ink"), (1.45, number, "lr"),
                                (0, label, "recall" if on else "lr")):
            panel.text(x, y, text, ha="center", va="center", color=colours[colour], size=9,
                       weight="bold" if on and y == 0 else "normal")
        panel.text(x, 2.6, position, ha="center", va="center", color=colours["lr"], size=8)
        panel.add_patch(plt.Rectangle((x - 0.46, -0.3), 0.92, 0.6, fill=False, lw=1.5,
                                      color=colours["recall" if on else "faint"]))
        if target:
            panel.annotate("", (x + 1, 0.32), (x, 1.2), arrowprops={
                "arrowstyle": "->", "color": colours["val"], "lw": 1.8})
    panel.text(9, 0.72, "each output is scored against the label of the next position", ha="right",
               va="center", size=9, color=colours["val"])
    for y, text in ((2.6, "position"), (2, "token"), (1.45, "input_ids"), (0, "labels")):
        panel.text(-0.7, y, text, ha="right", va="center", size=9, weight="bold")
    panel.set(xlim=(-1.9, len(rows) - 0.5), ylim=(-0.4, 2.8), xticks=[], yticks=[])
    plain(panel, colours)
    return figure


def adamw(lines: Lines, colours: dict) -> plt.Figure:
    """The path of one parameter under plain descent and under AdamW, for two curvatures."""
    rows = [floats(line) for line in lines[1:]]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    steps = [row[0] for row in rows]
    for panel, title, first in ((panels[0], "plain gradient descent", 1), (panels[1], "AdamW", 3)):
        for i, text, colour, style in ((1, "flat, k = 0.1", "train", "-"),
                                       (0, "steep, k = 10", "val", "--")):
            path = [row[first + i] for row in rows]
            panel.plot(steps, path, style, lw=2.4, color=colours[colour], label=text)
        panel.axhline(0, color=colours["ink"], lw=0.8, ls=":")
        panel.set_title(title)
        panel.set(xlabel="step", xlim=(0, steps[-1]), ylim=(-0.2, 1.05))
        plain(panel, colours, "y")
    panels[0].set_ylabel("p (best value: 0)")
    panels[1].legend(loc="upper right")
    return figure


def mask(lines: Lines, colours: dict) -> plt.Figure:
    """Which key a query sees, where two samples share a prompt."""
    names = lines[0].partition("sees ")[2].split()
    rows = [line.split()[-len(names):] for line in lines[1:1 + len(names)]]
    positions = [line.split()[1] for line in lines[1:1 + len(names)]]
    figure, panel = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    kinds = ["train" if name in "st" else "val" if name in "d" else "recall" for name in names]
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            colour = colours[kinds[x]] if cell == "x" else colours["paper"]
            panel.add_patch(plt.Rectangle((x, y), 1, 1, fc=colour, ec=colours["faint"], lw=1))
    panel.set_xticks([i + 0.5 for i in range(len(names))], names)
    panel.set_yticks([i + 0.5 for i in range(len(names))], [
        f"{name}   {position}" for name, position in zip(names, positions, strict=True)])
    for y, text, colour in ((0.5, "s t: the shared prompt,\ncomputed once", "train"),
                            (2.5, "d: own token of std", "val"),
                            (4.5, "a b c: own tokens of stabc", "recall")):
        panel.text(len(names) + 0.3, y, text, va="center", color=colours[colour])
    panel.xaxis.tick_top()
    panel.xaxis.set_label_position("top")
    panel.set(xlim=(0, len(names)), ylim=(len(names), 0), aspect="equal", xlabel="key",
              ylabel="query and its position")
    plain(panel, colours)
    return figure


FIGURES = {"layer": (layer, "gradient"), "values": (values, "steps"), "rank": (rank, "rank"),
           "labels": (labels, "labels"), "adamw": (adamw, "descent"), "mask": (mask, "shared")}

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
