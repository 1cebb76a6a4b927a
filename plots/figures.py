"""
Draw the curves of a run: loss.png and loss-dark.png, the same for a dark page.

They show training and validation loss over steps with the best step marked, recall where it was
measured, and the learning rate. inspect.png shows how far an adapter moved each weight. The colours
and helpers here also draw experiments/knowledge/figures.py and benchmarks/figures.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

LIGHT = {"paper": "#ffffff", "ink": "#24292f", "faint": "#d0d7de",
         "train": "#3b82c4", "val": "#d9622b", "recall": "#2e9d5a", "lr": "#8b8f98"}
DARK = {"paper": "#0d1117", "ink": "#d6dce4", "faint": "#30363d",
        "train": "#6cb0ee", "val": "#ff9e64", "recall": "#58c98a", "lr": "#7d848e"}
INKED = "text.color", "axes.labelcolor", "xtick.color", "ytick.color"
STYLE = {"legend.frameon": False, "axes.titlelocation": "left", "axes.titleweight": "bold"}


def save(file: Path, figure_of: Callable[[dict], plt.Figure], **style) -> Path:
    """Write NAME.png and NAME-dark.png; returns the first path. figure_of draws the figure in the
    colours it receives; style: more rc parameters of matplotlib."""
    for path, colours in ((file.with_stem(f"{file.stem}-dark"), DARK), (file, LIGHT)):
        with plt.rc_context(dict.fromkeys(INKED, colours["ink"]) | STYLE | style):
            figure = figure_of(colours)
            figure.savefig(path, dpi=150, facecolor=colours["paper"])
            plt.close(figure)
    return file


def plain(panel: plt.Axes, colours: dict, grid: str = "") -> None:
    """Remove a panel's frame and ticks; grid is x, y, both or none."""
    if grid:
        panel.grid(axis=grid, color=colours["faint"], lw=0.8)
        panel.set_axisbelow(True)
    panel.set_facecolor(colours["paper"])
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def draw(run: Path | str) -> Path:
    """Write loss.png and loss-dark.png into a run's folder; returns the path of the first.

    Raises ValueError if metrics.jsonl is missing, damaged or without a training step.
    """
    lines = read_metrics(Path(run) / "metrics.jsonl")
    return save(Path(run) / "loss.png", lambda colours: curves(lines, Path(run).name, colours))


def read_metrics(file: Path) -> list[dict]:
    """Read the lines of metrics.jsonl; a last line that a crash cut off is left out."""
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


def wrong_in(line: dict) -> str:
    """Say what keeps a line of metrics.jsonl from being drawn; "" for nothing."""
    if not isinstance(line, dict):
        return "expected an object"
    drawn = ["step"]
    if "loss" in line:
        drawn.append("lr")
    if line.get("best"):
        drawn.append("val_loss")
    drawn += [key for key in ("loss", "recall") if key in line]
    return ", ".join(f"{key} is {line.get(key)!r:.40}; expected a number" for key in drawn if not (
        isinstance(line.get(key), int | float) and abs(line[key]) < 1e300))


def smooth(values: list[float]) -> list[float]:
    """Average each value with its neighbours, a tenth of the run. The average is centred: a
    trailing one would lag behind."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def curves(lines: list[dict], title: str, colours: dict) -> plt.Figure:
    """Draw one run: a panel each for loss, recall (if measured) and learning rate."""
    train, val, recall = ([line for line in lines if key in line]
                          for key in ("loss", "val_loss", "recall"))
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
    top.set_title(title)
    top.legend(loc="center right")

    best = next((line for line in reversed(lines) if line.get("best")), None)
    if best:
        left = best["step"] < lines[-1]["step"] / 2             # the text stays inside the figure
        top.annotate(f"best adapter: step {best['step']}\nvalidation {best['val_loss']:.3g}",
                     (best["step"], 1), (6 if left else -6, -4), textcoords="offset points",
                     xycoords=("data", "axes fraction"), ha="left" if left else "right", va="top")
    for panel in panels:
        if best:
            panel.axvline(best["step"], color=colours["ink"], lw=1, ls=":")
        plain(panel, colours, "y")
    figure.align_ylabels()
    return figure


def draw_updates(run: Path | str) -> Path:
    """Write inspect.png and inspect-dark.png of a folder's inspect.json; returns the first path."""
    record = json.loads((Path(run) / "inspect.json").read_text(encoding="utf-8"))
    return save(Path(run) / "inspect.png",
                lambda colours: heat_map(record["modules"], record["run"], colours))


def heat_map(modules: list[dict], title: str, colours: dict) -> plt.Figure:
    """Draw an adapter's updates, a cell for each block and projection: above the update's norm in %
    of the weight's, below its effective rank. A larger value is further from the paper's colour; a
    cell of several modules (experts) shows their mean; x marks a module with an alarm."""
    modules = [m for m in modules if m["block"] is not None]
    rows = list(dict.fromkeys(m["projection"] for m in modules))
    blocks = range(1 + max((m["block"] for m in modules), default=0))
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
        plain(panel, colours)
        panel.set_facecolor(colours["faint"])
    panels[0].set_title(title)
    panels[1].set_xlabel("block (x: an update that is dead)" if dead else "block")
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    return figure
