"""
loss.png: training and validation loss over steps, the best step marked; below it recall where it
was measured, and the learning rate. speed.png: samples a second of the trainers that were compared,
and their losses. inspect.png: how far the adapter moved each weight. loss-dark.png, speed-dark.png
and inspect-dark.png are the same for a dark page.
"""

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

LIGHT = {"paper": "#ffffff", "ink": "#24292f", "faint": "#d0d7de",
         "train": "#3b82c4", "val": "#d9622b", "recall": "#2e9d5a", "lr": "#8b8f98"}
DARK = {"paper": "#0d1117", "ink": "#d6dce4", "faint": "#30363d",
        "train": "#6cb0ee", "val": "#ff9e64", "recall": "#58c98a", "lr": "#7d848e"}


def draw(run):
    """Write loss.png and loss-dark.png into a run's folder, or speed.png and speed-dark.png into
    one of benchmark results; returns the path of the first.

    Raises ValueError if there is no metrics.jsonl or nothing in it to draw.
    """
    results = [json.loads(file.read_text()) for file in sorted(Path(run).glob("*-*.json"))]
    name = "speed" if results else "loss"
    lines = results or read_metrics(Path(run) / "metrics.jsonl")
    for end, colours in (("-dark.png", DARK), (".png", LIGHT)):
        figure = bars(lines, colours) if results else curves(lines, Path(run).name, colours)
        figure.savefig(Path(run) / (name + end), dpi=150, facecolor=colours["paper"])
        plt.close(figure)
    return Path(run) / f"{name}.png"


def read_metrics(file):
    """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
    try:
        texts = file.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"plots: {file}: cannot be read ({error})") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                raise ValueError(f"plots: {file}:{number}: not JSON") from error
            break
        if wrong := wrong_in(lines[-1]):
            raise ValueError(f"plots: {file}:{number}: {wrong}")
    if not any("loss" in line for line in lines):
        raise ValueError(f"plots: {file}: holds no training step yet")
    return lines


def wrong_in(line):
    """What keeps a line of metrics.jsonl from being drawn; "" for nothing."""
    if not isinstance(line, dict):
        return "expected an object"
    needed = ["step", *["lr"] * ("loss" in line), *["val_loss"] * bool(line.get("best"))]
    return ", ".join(
        f"{key} is {line.get(key)!r:.40}; expected a number" for key in (*needed, "loss", "recall")
        if key in (*needed, *line) and not (
            isinstance(line.get(key), int | float) and abs(line[key]) < 1e300))


def smooth(values):
    """Centred moving average over a tenth of the run: it does not lag behind, as a trailing one
    would."""
    half = max(1, len(values) // 20)
    return [sum(near) / len(near) for near in (
        values[max(0, i - half):i + half + 1] for i in range(len(values)))]


def curves(lines, title, colours):
    """A figure of one run: a panel each for loss, recall (if measured) and learning rate."""
    train = [line for line in lines if "loss" in line]
    val = [line for line in lines if "val_loss" in line]
    recall = [line for line in lines if "recall" in line]
    ink = colours["ink"]
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color",
                                       "ytick.color"), ink))
    heights = (4, 1.4, 1) if recall else (4, 1)
    figure, panels = plt.subplots(len(heights), 1, figsize=(8, 1.1 * sum(heights)), sharex=True,
                                  layout="constrained", height_ratios=heights)
    top, low = panels[0], panels[-1]
    steps, losses = [e["step"] for e in train], [e["loss"] for e in train]
    top.plot(steps, losses, color=colours["train"], alpha=0.3, lw=1)
    top.plot(steps, smooth(losses), color=colours["train"], lw=2, label="training (smoothed)")
    dots = {"marker": "o", "ms": 4, "lw": 2, "clip_on": False}
    if val:
        top.plot([e["step"] for e in val], [e["val_loss"] for e in val], color=colours["val"],
                 label="validation", **dots)
    if recall:
        panels[1].plot([e["step"] for e in recall], [100 * e["recall"] for e in recall],
                       color=colours["recall"], **dots)
        panels[1].set(ylabel="recall (%)", ylim=(0, 104))
    low.plot(steps, [e["lr"] for e in train], color=colours["lr"], lw=1.5)
    low.set(ylabel="learning rate", xlabel="step (one optimizer update)",
            xlim=(0, lines[-1]["step"] or 1), ylim=(0, 1.1 * max(e["lr"] for e in train) or 1))
    low.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    top.set(ylabel="loss (nats per supervised token)",
            ylim=(0, 1.05 * max([*losses, *(e["val_loss"] for e in val)]) or 1))
    top.set_title(title, loc="left", fontweight="bold", color=ink)
    top.legend(loc="center right", frameon=False)

    best = next((line for line in reversed(lines) if line.get("best")), None)
    if best:
        left = best["step"] < lines[-1]["step"] / 2             # the text stays inside the figure
        top.annotate(f"best adapter: step {best['step']}\nvalidation {best['val_loss']:.3g}",
                     (best["step"], 1), (6 if left else -6, -4), textcoords="offset points",
                     xycoords=("data", "axes fraction"), ha="left" if left else "right", va="top")
    for panel in panels:
        if best:
            panel.axvline(best["step"], color=ink, lw=1, ls=":")
        panel.set_facecolor(colours["paper"])
        panel.grid(axis="y", color=colours["faint"], lw=0.8)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    figure.align_ylabels()
    return figure


def bars(results, colours):
    """A figure of benchmark results. Left, for each, samples a second of the fastest TRL settings,
    of TRL with transformers' loss put in, and of ours; right the losses of the longest run, which
    should be one line."""
    groups = [r for r in results if "ours" in r["results"]]
    groups.sort(key=lambda r: ("smollm2" not in r["model"], r["model"], r["prefix"]))
    longest = max(groups, key=lambda r: r["steps"])
    groups.remove(longest)
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color",
                                       "ytick.color"), colours["ink"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.8 * len(groups)),
                                         layout="constrained", width_ratios=(3, 2))
    kinds = {"TRL, its fastest settings": "train", "TRL, transformers' loss put in": "lr",
             "ours": "val"}
    for y, group in enumerate(groups):
        ours = group["results"]["ours"]
        for i, (kind, colour) in enumerate(kinds.items()):
            arms = [arm for name, arm in group["results"].items() if "error" not in arm and i == (
                2 if name == "ours" else 1 if "fulllogits" in name else 0 if "trl-" in name else 3)]
            if arms:
                arm = max(arms, key=lambda arm: arm["samples_per_s"])
                rate, at = arm["samples_per_s"], y + 0.27 * (i - 1)
                spread = [[rate - arm["slowest"]], [arm["fastest"] - rate]]
                left.barh(at, rate, 0.25, color=colours[colour], xerr=spread,
                          ecolor=colours["ink"], label=kind if y == 0 else None)
                times = f" (ours: {ours['samples_per_s'] / rate:.1f} times)" if i < 2 else ""
                left.text(arm["fastest"], at, f"  {rate:.2f}{times}", va="center", fontsize=9)
    left.set(yticks=range(len(groups)), xlabel="samples a second", yticklabels=[
        f"{g['model'].removesuffix('-instruct')}\n{g['prefix']} shared tokens" for g in groups])
    left.set_xlim(0, 1.15 * max(g["results"]["ours"]["fastest"] for g in groups))
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside upper left",
                  ncols=3)

    for name, arm in longest["results"].items():
        if "error" in arm:
            continue
        ours = name == "ours"
        right.plot(range(1, len(arm["losses"]) + 1), arm["losses"], label=name,
                   lw=2 if ours else 6, alpha=1 if ours else 0.4,
                   color=colours["val" if ours else "train"])
    right.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.set_title("the same loss", loc="left", fontweight="bold", color=colours["ink"])
    right.legend(frameon=False)
    for panel in (left, right):
        panel.set_facecolor(colours["paper"])
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    return figure


def draw_updates(run):
    """Write inspect.png and inspect-dark.png of a folder's inspect.json; returns the first."""
    found = json.loads((Path(run) / "inspect.json").read_text(encoding="utf-8"))
    for end, colours in (("-dark.png", DARK), (".png", LIGHT)):
        figure = heat_map(found["modules"], found["run"], colours)
        figure.savefig(Path(run) / ("inspect" + end), dpi=150, facecolor=colours["paper"])
        plt.close(figure)
    return Path(run) / "inspect.png"


def heat_map(modules, title, colours):
    """A figure of an adapter's updates, a cell for each block and projection: above the update's
    norm in % of the weight's, below its effective rank; more is further from the paper. The mean
    where a cell has several modules (experts). x is a module with an alarm."""
    modules = [m for m in modules if m["block"] is not None]
    rows = list(dict.fromkeys(m["projection"] for m in modules))
    blocks = range(1 + max((m["block"] for m in modules), default=0))
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color",
                                       "ytick.color"), colours["ink"]))
    figure, panels = plt.subplots(2, 1, figsize=(10, 1.6 + 0.56 * len(rows)), sharex=True,
                                  layout="constrained")
    shades = LinearSegmentedColormap.from_list(
        "", [colours["paper"], colours["train"], colours["ink"]])
    dead = [(m["block"], rows.index(m["projection"])) for m in modules if m["alarm"]]
    for panel, key, unit, low, label in (
            (panels[0], "ratio", 100, 0, "norm of the update\n(% of the weight's)"),
            (panels[1], "effective_rank", 1, 1, "effective rank")):
        cells = {}
        for m in modules:
            if not m["alarm"]:
                cells.setdefault((m["projection"], m["block"]), []).append(unit * m[key])
        means = [[sum(cells[row, block]) / len(cells[row, block]) if (row, block) in cells
                  else math.nan for block in blocks] for row in rows]
        mesh = panel.imshow(means, shades, aspect="auto", vmin=low)
        figure.colorbar(mesh, ax=panel, label=label, pad=0.01).outline.set_visible(False)
        if dead:
            panel.plot(*zip(*dead, strict=True), "x", color=colours["val"])
        panel.set_yticks(range(len(rows)), rows)
        panel.set_facecolor(colours["faint"])
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    panels[0].set_title(title, loc="left", fontweight="bold", color=colours["ink"])
    panels[1].set_xlabel("block" + " (x: an update that is dead)" * bool(dead))
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    return figure
