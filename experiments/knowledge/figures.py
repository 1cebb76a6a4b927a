"""
Draw the experiment's figures from its result.json: sides, ladder, which, early, inertia, price.

Each is NAME.png, NAME-dark.png for a dark page, and NAME.csv with the numbers drawn. What was not
measured is left out; a figure with nothing in it is not drawn. page.py is the command.
"""

import csv
from functools import partial
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path
from statistics import median
from textwrap import fill

from data import group_by
from lora import files
from plots.figures import plain, plt, save

WORDS = files.read_json(Path(__file__).with_name("words.json"))
FIXES, REMOVED = WORDS["fixes"], WORDS["removed"]
STYLE = {"font.size": 10.5, "legend.fontsize": 10}
ABOUT_UNKNOWN = "untouched", "in-prompt", "r0", "r7", "ours", "bare"


def draw(result: dict, folder: Path | str) -> list[Path]:
    """Draw a result into a folder; returns the paths of the light figures."""
    paths = []
    for name, (rows_of, _) in FIGURES.items():
        rows = rows_of(result)
        if not rows:
            continue
        file = Path(folder) / f"{name}.png"
        with open(file.with_suffix(".csv"), "w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        paths.append(save(file, partial(titled, name, rows), **STYLE))
    return paths


def titled(name: str, rows: list[dict], colours: dict) -> plt.Figure:
    """Draw a figure under its title."""
    figure = FIGURES[name][1](rows, colours)
    figure.suptitle(WORDS["titles"][name], x=0.01, ha="left", weight="bold", size=12)
    return figure


def spread(metric: list | float | None) -> dict:
    """Name the parts of a metric: value, low, high, n. The last three are None if unknown."""
    parts = metric if isinstance(metric, list) else [metric]
    return dict(zip(("value", "low", "high", "n"), [*parts, None, None, None], strict=False))


def metrics_of(result: dict) -> dict:
    """Return {(model, arm): metrics}."""
    return {(arm["model"], arm["arm"]): arm["metrics"] for arm in result["arms"]}


def in_order(rows: list[dict], key: str = "model") -> list:
    """List the values of a column, each once."""
    return list(dict.fromkeys(row[key] for row in rows))


def tints(rows: list[dict], colours: dict) -> dict:
    """Give each model of the rows a colour, the same in every figure."""
    rest = cycle((colours["recall"], colours["lr"]))
    fixed = {"chat": colours["train"], "base": colours["val"]}
    return {model: fixed.get(model) or next(rest) for model in in_order(rows)}


def sheet(height: float, colours: dict, grid: str = "", rows: int = 1, columns: int = 1,
          **more) -> tuple:
    """Make (figure, panels) 8 inches wide, with a grid as plain() takes it."""
    figure, panels = plt.subplots(rows, columns, figsize=(8, height), layout="constrained", **more)
    for panel in figure.axes:
        plain(panel, colours, grid)
    return figure, panels


def behind(colours: dict) -> dict:
    """The box of a text: paper that covers the lines behind it."""
    return {"facecolor": colours["paper"], "edgecolor": "none", "pad": 0.3, "alpha": 0.85}


def error_bars(rows: list[dict]) -> list[list[float]]:
    """The distances in % from value to low and high, as matplotlib takes them; 0 if unknown."""
    return [[0 if row[end] is None else 100 * max(0, sign * (row[end] - row["value"]))
             for row in rows] for sign, end in ((-1, "low"), (1, "high"))]


# ----- sides: what is known, from which side -----------------------------------------------------

SIDES, DOTS = WORDS["sides"], WORDS["dots"]                   # colour, colour inside, marker


def sides_rows(result: dict) -> list[dict]:
    return [{"model": model, "arm": arm, "side": side, **spread(metrics[side])}
            for (model, arm), metrics in metrics_of(result).items() if f"{model}, {arm}" in DOTS
            for side in SIDES if metrics.get(side) is not None]


def sides(rows: list[dict], colours: dict) -> plt.Figure:
    names = in_order(sorted(rows, key=lambda row: SIDES.index(row["side"])), "side")
    figure, panel = sheet(1.5 + 0.62 * len(names), colours, "x")
    drawn = group_by(lambda row: f"{row['model']}, {row['arm']}", rows)
    for i, (name, of) in enumerate(drawn.items()):
        tint, inside, marker = DOTS[name]
        at = [names.index(row["side"]) + 0.19 * (i - (len(drawn) - 1) / 2) for row in of]
        panel.errorbar([100 * row["value"] for row in of], at, xerr=error_bars(of), fmt=marker,
                       ms=6.5, lw=1.5, color=colours[tint], mfc=colours[inside], clip_on=False,
                       label=name)
    if "verify" in names:
        y = names.index("verify")
        panel.plot([50, 50], [y - 0.45, y + 0.45], color=colours["ink"], lw=1, ls=":")
    for y in range(1, len(names)):
        panel.axhline(y - 0.5, color=colours["faint"], lw=0.8)
    panel.set(yticks=range(len(names)), yticklabels=[fill(WORDS["metrics"][n], 26) for n in names],
              ylim=(len(names) - 0.5, -0.5), xlim=(0, 100), xlabel="right (%)")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(drawn))
    return figure


# ----- ladder: what each repair gives ------------------------------------------------------------


def ladder_rows(result: dict) -> list[dict]:
    known = metrics_of(result)
    wanted = [*(("chat", arm) for arm in FIXES), ("base", "ours")]
    return [{"model": model, "arm": arm, "fix": FIXES[arm].replace("\n", " "),
             **spread(known[model, arm]["recall"])} for model, arm in wanted
            if known.get((model, arm), {}).get("recall") is not None]


def ladder(rows: list[dict], colours: dict) -> plt.Figure:
    figure, panel = sheet(4.2, colours, "y")
    tint = tints(rows, colours)
    at = [i if row["model"] == "chat" else i + 0.5 for i, row in enumerate(rows)]
    panel.bar(at, [100 * row["value"] for row in rows], 0.7,
              color=[tint[row["model"]] for row in rows], yerr=error_bars(rows),
              error_kw={"ecolor": colours["ink"], "lw": 1.2, "capsize": 3})
    for x, row in zip(at, rows, strict=True):
        top = max(row["value"], row["high"] or 0)
        panel.annotate(f"{100 * row['value']:.0f}", (x, 100 * top), (0, 4), ha="center",
                       textcoords="offset points", weight="bold", bbox=behind(colours))
    names = [f"{r['arm']}\n" + (FIXES[r["arm"]] if r["model"] == "chat" else
                                f"on the\n{r['model']} model") for r in rows]
    panel.set_xticks(at, names, fontsize=7.5 if len(rows) > 8 else 8.5 if len(rows) > 6 else 10,
                     linespacing=1.25)
    side = max(0.6, (6 - at[-1]) / 2)                         # few bars stay slim
    panel.set(ylabel="recall (%)", ylim=(0, 112), yticks=range(0, 101, 20),
              xlim=(-side, at[-1] + side))
    return figure


# ----- which: what each repair taken out costs ---------------------------------------------------

PRICES = WORDS["prices"]


def which_rows(result: dict) -> list[dict]:
    known, rows = metrics_of(result), []
    for arm, metric in product(REMOVED, PRICES):
        without, r7 = (spread(known.get(("chat", a), {}).get(metric)) for a in (arm, "r7"))
        if without["value"] is not None and r7["value"] is not None:
            rows.append({"arm": arm, "removed": REMOVED[arm], "metric": metric, **without,
                         "r7": r7["value"], "r7_low": r7["low"], "r7_high": r7["high"],
                         "change": without["value"] - r7["value"]})
    return sorted(rows, key=lambda row: (row["metric"] != "recall", row["value"]))


def which(rows: list[dict], colours: dict) -> plt.Figure:
    removed, colour = in_order(rows, "removed"), colours["train"]
    figure, panels = sheet(1.7 + 0.36 * len(removed), colours, "both", 1, len(PRICES), sharey=True)
    for panel, (metric, label) in zip(panels, PRICES.items(), strict=True):
        panel.set(xlabel=label, xlim=(0, 100), xticks=(0, 50, 100))
        of = [row for row in rows if row["metric"] == metric]
        if not of:
            continue
        at = [removed.index(row["removed"]) for row in of]
        panel.axvline(100 * of[0]["r7"], color=colour, lw=1.5)
        if of[0]["r7_low"] is not None:
            panel.axvspan(100 * of[0]["r7_low"], 100 * of[0]["r7_high"], color=colour, alpha=0.13,
                          lw=0)
        panel.errorbar([100 * row["value"] for row in of], at, fmt="o", ms=6, color=colour,
                       xerr=error_bars(of), lw=1.5, clip_on=False)
        for y, row in zip(at, of, strict=True):
            change = f"{round(100 * row['change']):+d}".replace("-", "−").replace("+0", "0")
            panel.annotate(change, (1, y), (30, 0), textcoords="offset points", fontsize=9,
                           xycoords=("axes fraction", "data"), ha="right", va="center")
    panels[1].set(xlim=(-10, 50), xticks=(0, 25, 50))         # lost minus gained
    panels[0].set(yticks=range(len(removed)), yticklabels=removed,
                  ylim=(len(removed) - 0.4, -0.6))
    return figure


# ----- early: what the validation loss of held-out facts does not see ----------------------------

KNOWN, LOSSES = WORDS["early"]                                # label, colour, dash, marker


def early_rows(result: dict) -> list[dict]:
    curves = [c for c in result["curves"] if c["arm"] == "old-split"]
    if not curves:
        return []
    curve = min(curves, key=lambda c: (c["model"] != "chat", c["seed"]))
    points = curve["points"]
    marks = {"stop": curve["best_step"], "last": points[-1]["step"]}
    return [{"model": curve["model"], "seed": curve["seed"], "step": p["step"],
             **{key: p.get(key) for key in (*KNOWN, *LOSSES)},
             "mark": " and ".join(name for name, step in marks.items() if step == p["step"])}
            for p in points]


def early(rows: list[dict], colours: dict) -> plt.Figure:
    figure, panels = sheet(5.6, colours, "y", 2, sharex=True, height_ratios=(2, 3))
    for panel, kinds, scale in zip(panels, (KNOWN, LOSSES), (100, 1), strict=True):
        for key, (label, colour, dash, marker) in kinds.items():
            line = [(r["step"], scale * r[key]) for r in rows if r[key] is not None]
            if line:
                panel.plot(*zip(*line, strict=True), color=colours[colour], ls=dash, marker=marker,
                           ms=4, lw=2, label=label, clip_on=False)
        if panel.lines:
            panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        panel.set_ylim(0, 104 if kinds is KNOWN else None)
    panels[0].set_ylabel("taught facts (%)")
    panels[1].set(ylabel="loss (nats per token)", xlabel="step (one optimizer update)",
                  xlim=(rows[0]["step"], 1.01 * rows[-1]["step"] or 1))
    marks = {"stop": ("validation loss says stop: step", 1.04, ":"),
             "last": ("last: step", 1.15, "-")}
    for row in rows:
        for name in filter(None, row["mark"].split(" and ")):
            text, height, dash = marks[name]
            for panel in panels:
                panel.axvline(row["step"], color=colours["ink"], lw=1.2, ls=dash)
            left = 2 * row["step"] < rows[0]["step"] + rows[-1]["step"]
            panels[0].annotate(f"{text} {row['step']}", (row["step"], height), fontsize=10,
                               xycoords=("data", "axes fraction"), ha="left" if left else "right")
    return figure


# ----- inertia: which facts are hard to put in ---------------------------------------------------

TYPES = {"handle": "o", "common": "s", "rare": "^"}


def inertia_rows(result: dict) -> list[dict]:
    return [{key: dot[key] for key in ("model", "seed", "fact", "type", "margin", "exposures")}
            for dot in result["inertia"] if dot["margin"] is not None]


def running_median(dots: list[dict], top: float) -> list[tuple[float, float]]:
    """Return medians (margin, exposures) of windows of a quarter of the dots; never is top."""
    dots = sorted((d["margin"], top if d["exposures"] is None else d["exposures"]) for d in dots)
    width = max(5, len(dots) // 4)
    windows = [dots[i:i + width] for i in range(len(dots) - width + 1)]
    return [tuple(median(values) for values in zip(*w, strict=True)) for w in windows]


def inertia(rows: list[dict], colours: dict) -> plt.Figure:
    figure, panel = sheet(4.8, colours, "y")
    tint = tints(rows, colours)
    most = max((r["exposures"] or 0 for r in rows), default=0) or 1
    never = any(r["exposures"] is None for r in rows)
    top = 1.2 * most if never else most
    if never:
        panel.axhline(top, color=colours["ink"], lw=1, ls=":")
        panel.annotate("never learned", (1, top), (0, 7), xycoords=("axes fraction", "data"),
                       textcoords="offset points", ha="right", fontsize=10)
    for model, of in group_by(itemgetter("model"), rows).items():
        colour = tint[model]
        for kind, marker in TYPES.items():
            dots = [r for r in of if r["type"] == kind]
            panel.scatter([r["margin"] for r in dots],
                          [top if r["exposures"] is None else r["exposures"] for r in dots], 34,
                          color=colour, marker=marker, alpha=0.6, lw=0, clip_on=False)
        if line := running_median(of, top):
            panel.plot(*zip(*line, strict=True), color=colour, lw=2.5)
    for label, colour in tint.items():
        panel.plot([], [], color=colour, lw=2.5, label=f"{label}, running median")
    for kind in in_order(rows, "type"):
        panel.plot([], [], ls="", marker=TYPES[kind], color=colours["lr"], label=f"{kind} name")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    panel.set(xlabel="margin of the right value before training (nats per token)",
              ylabel="exposures until it ranks first and stays", ylim=(0, 1.1 * top))
    panel.set_yticks([y for y in panel.get_yticks() if y <= most * 1.05])
    return figure


# ----- price: what the facts cost ----------------------------------------------------------------

ANSWERS = ("abstains", "fabricates", "spills")
BOUNDS = 97, 2                     # of recall and of lost − gained, in %


def price_rows(result: dict) -> list[dict]:
    """The points of the frontier, then the answers about unknown names, far from the taught ones
    and near. Columns of the other kind are empty."""
    known = metrics_of(result)
    empty = dict.fromkeys(("panel", "model", "arm", "scale", "recall", "lost_minus_gained",
                           "names", *ANSWERS))
    rows = [{**empty, "panel": "frontier", **{k: p[k] for k in empty if k in p}}
            for p in result["frontier"] if p["lost_minus_gained"] is not None]
    for model, arm, names in product(sorted({model for model, _ in known}, reverse=True),
                                     ABOUT_UNKNOWN, ("far", "near")):
        shares = {a: spread(known.get((model, arm), {}).get(f"unknown_{names}_{a}"))["value"]
                  for a in ANSWERS}
        if None not in shares.values():
            rows.append({**empty, "panel": "unknown", "model": model, "arm": arm, "names": names,
                         **shares})
    return rows


def price(rows: list[dict], colours: dict) -> plt.Figure:
    points, answers = ([r for r in rows if r["panel"] == kind] for kind in ("frontier", "unknown"))
    parts = [part for part in ((frontier, points, 4.5),
                               (unknown, answers, 0.9 + 0.34 * len(answers))) if part[1]]
    heights = [height for *_, height in parts]
    figure, _ = sheet(sum(heights) + 0.8, colours, "", len(heights), height_ratios=heights)
    for panel, (draw_part, of, _) in reversed([*zip(figure.axes, parts, strict=True)]):
        draw_part(panel, of, colours)              # frontier last: its names need the layout
    return figure


def frontier(panel: plt.Axes, rows: list[dict], colours: dict) -> None:
    """Draw what is lost over what is known, a dot for each arm."""
    plain(panel, colours, "both")
    spots = [(100 * row["recall"], 100 * row["lost_minus_gained"]) for row in rows]
    panel.plot(*zip(*spots, strict=True), "o", ms=6, color=colours["train"], clip_on=False)
    panel.axvline(BOUNDS[0], color=colours["ink"], lw=1, ls=":")
    panel.axhline(BOUNDS[1], color=colours["ink"], lw=1, ls=":")
    panel.set(xlabel=f"recall on held-out wordings (%); bound {BOUNDS[0]}", xlim=(-3, 124),
              ylabel=f"lost − gained (%); bound {BOUNDS[1]}", xticks=range(0, 101, 20))
    name_dots(panel, spots, [row["arm"] for row in rows], colours)


def name_dots(panel: plt.Axes, spots: list[tuple], names: list[str], colours: dict) -> None:
    """Write a name beside each dot, where no dot, target line or earlier name is. A name far from
    its dot gets a line to it, which crosses none of them either."""
    panel.figure.draw_without_rendering()                     # fixes the layout, for pixels
    inside, point = panel.get_window_extent(), panel.figure.dpi / 72
    dots, (x, y) = panel.transData.transform(spots), panel.transData.transform(BOUNDS)
    lines = [(x, inside.y0, x, inside.y1), (inside.x0, y, inside.x1, y)]
    taken = [(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point) for x, y in dots]

    def free(box, others):
        return all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in others)
    ways = [(dx * far, dy * far) for far in (1, 2, 3, 4, 5, 6, 8, 10, 13) for dx, dy in (
        (8, 0), (-8, 0), (0, 12), (0, -12), (7, 9), (-7, 9), (7, -9), (-7, -9))]
    for spot, (x, y), name in zip(spots, dots, names, strict=True):
        for dx, dy in ways:
            text = panel.annotate(
                name, spot, (dx, dy), textcoords="offset points", fontsize=9, va="center",
                ha="left" if dx > 0 else "right" if dx < 0 else "center", bbox=behind(colours))
            text.set_in_layout(False)
            box = text.get_window_extent().extents
            far = abs(dx) + abs(dy) > 16
            leader = [2 * (x + t * dx * point, y + t * dy * point)
                      for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)] if far else []
            if free(box, taken + lines) and all(free(spot, taken) for spot in leader) and (
                    inside.x0 < box[0] and box[2] < inside.x1
                    and inside.y0 < box[1] and box[3] < inside.y1):
                break
            if (dx, dy) != ways[-1]:
                text.remove()
        taken += [box, *leader]
        if far:
            panel.annotate("", spot, (dx, dy), textcoords="offset points", arrowprops={
                "arrowstyle": "-", "color": colours["lr"], "lw": 0.7, "shrinkB": 3})


def unknown(panel: plt.Axes, rows: list[dict], colours: dict) -> None:
    """Draw stacked bars of the answers to questions about invented names. fabricates also counts
    taught values; "gives another value" is the rest of it."""
    plain(panel, colours, "x")
    parts = {"says it does not know": ("recall", lambda r: r["abstains"]),
             "gives a taught value": ("val", lambda r: r["spills"]),
             "gives another value": ("train", lambda r: max(0, r["fabricates"] - r["spills"])),
             "says something else": ("faint", None)}
    at = [i + 0.5 * (i // 2) for i in range(len(rows))]       # far and near side by side
    start = [0.0] * len(rows)
    for label, (colour, share) in parts.items():
        wide = [100 * share(r) if share else max(0, 100 - s)
                for r, s in zip(rows, start, strict=True)]
        panel.barh(at, wide, 0.72, left=start, color=colours[colour], label=label,
                   edgecolor=colours["paper"])
        for y, x, w in zip(at, start, wide, strict=True):
            if w >= 5:
                panel.text(x + w / 2, y, f"{w:.0f}", ha="center", va="center", fontsize=9.5,
                           color=colours["ink" if share is None else "paper"])
        start = [x + w for x, w in zip(start, wide, strict=True)]
    panel.set(yticks=at, yticklabels=[f"{r['model']}, {r['arm']}: {r['names']}" for r in rows],
              xlim=(0, 100), ylim=(at[-1] + 0.6, -0.6), xlabel="answers about unknown names (%)")
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2)


FIGURES = {"sides": (sides_rows, sides), "ladder": (ladder_rows, ladder),
           "which": (which_rows, which), "early": (early_rows, early),
           "inertia": (inertia_rows, inertia), "price": (price_rows, price)}


if __name__ == "__main__":
    raise SystemExit("figures is no command; python -m experiments.knowledge.report draws them")
