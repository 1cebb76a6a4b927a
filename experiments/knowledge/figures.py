"""
Draw the figures of the experiment from its result.json: ladder, which, early, inertia and price.

Each is NAME.png, NAME-dark.png for a dark page, and NAME.csv with the numbers drawn. What was not
measured is left out; a figure with nothing in it is not drawn. page.py is the command.
"""

import csv
from functools import partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from statistics import median

from data import group_by
from lora import files
from plots.figures import plain, plt, save

WORDS = files.read_json(Path(__file__).with_name("words.json"))
FIXES, REMOVED = WORDS["fixes"], WORDS["removed"]
STYLE = {"font.size": 10.5, "legend.fontsize": 10}
ABOUT_UNKNOWN = ("untouched", "in-prompt", "r0", "r7", "r8", "no-unknown", "no-replay")


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


# ----- ladder: what each repair gives ------------------------------------------------------------


def ladder_rows(result: dict) -> list[dict]:
    known = metrics_of(result)
    wanted = [*(("chat", arm) for arm in FIXES), ("base", "r7")]
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

PRICES = {"recall": "recall (%)", "retention": "retention (%)",
          "unknown_spills": "spill-over (%)"}


def which_rows(result: dict) -> list[dict]:
    known = metrics_of(result)
    rows = []
    for (model, arm), metrics in known.items():
        whole = known.get((model, "r7"), {})
        for name in PRICES if arm in REMOVED else ():
            if metrics.get(name) is not None and whole.get(name) is not None:
                without, r7 = spread(metrics[name]), spread(whole[name])
                rows.append({"model": model, "arm": arm, "removed": REMOVED[arm],
                             "metric": name, **without, "r7": r7["value"], "r7_low": r7["low"],
                             "r7_high": r7["high"], "change": without["value"] - r7["value"]})
    return sorted(rows, key=lambda row: (row["metric"] != "recall", row["value"]))


def which(rows: list[dict], colours: dict) -> plt.Figure:
    removed = in_order(rows, "removed")
    models = sorted(in_order(rows), key=lambda model: model != "chat")
    tint, height = tints(rows, colours), {}                   # of each dot, by what is removed
    for y, name in enumerate(removed):
        found = [m for m in models if any((r["model"], r["removed"]) == (m, name) for r in rows)]
        for i, model in enumerate(found):
            height[name, model] = y + 0.4 * (i - (len(found) - 1) / 2)
    figure, panels = sheet(1.5 + len(removed) * (0.22 + 0.12 * len(models)), colours, "both",
                           1, len(PRICES), sharey=True)
    for panel, (metric, label) in zip(panels, PRICES.items(), strict=True):
        for model in models:
            of = [r for r in rows if r["model"] == model and r["metric"] == metric]
            if not of:
                continue
            at, colour = [height[r["removed"], model] for r in of], tint[model]
            panel.axvline(100 * of[0]["r7"], color=colour, lw=1.5)
            if of[0]["r7_low"] is not None:
                panel.axvspan(100 * of[0]["r7_low"], 100 * of[0]["r7_high"], color=colour,
                              alpha=0.13, lw=0)
            panel.errorbar([100 * r["value"] for r in of], at, fmt="o", ms=6, color=colour,
                           xerr=error_bars(of), lw=1.5, label=model, clip_on=False)
            for y, row in zip(at, of, strict=True):
                change = f"{round(100 * row['change']):+d}".replace("-", "−").replace("+0", "0")
                panel.annotate(change, (1, y), (30, 0), textcoords="offset points", fontsize=9,
                               xycoords=("axes fraction", "data"), ha="right", va="center",
                               color=colour)
        panel.set(xlabel=label, xlim=(0, 100), xticks=(0, 50, 100))
    panels[0].set(yticks=range(len(removed)), yticklabels=removed,
                  ylim=(len(removed) - 0.4, -0.6))
    figure.supxlabel("Beside each panel: percentage points more or less than r7.", x=0.01,
                     ha="left", fontsize=9.5)
    if len(models) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=9)
    return figure


# ----- early: what the validation loss of held-out facts does not see ----------------------------

KNOWN = {"rank_1": ("ranked first of 16", "train", "-", "o"),       # label, colour, dash, marker
         "recall": ("said, when asked", "recall", "-", "s")}
LOSSES = {"val_loss": ("validation", "val", "-", "o"),
          "facts never taught": ("never taught", "val", "--", "^"),
          "held-out question": ("taught, other question", "train", "-", "s"),
          "held-out answer": ("taught, other answer", "lr", "-", "D"),
          "trained wording": ("taught, as trained", "recall", "-", "v")}


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
    """Return [(margin, exposures)]: medians over windows of a quarter of the dots. A fact that is
    never learned counts as top."""
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
    panel.set(xlabel="margin of the right value before training (nats)", ylim=(0, 1.1 * top),
              ylabel="exposures until it ranks first and stays")
    panel.set_yticks([y for y in panel.get_yticks() if y <= most * 1.05])
    return figure


# ----- price: what the facts cost ----------------------------------------------------------------

ANSWERS = ("abstains", "fabricates", "spills")


def price_rows(result: dict) -> list[dict]:
    """The points of the frontier (of the arms if it was not measured), then the answers about
    unknown names. Columns of the other kind are empty."""
    known = metrics_of(result)
    points = result["frontier"] or [
        {"model": model, "arm": arm, "scale": 1.0, "recall": spread(m.get("recall"))["value"],
         "retention": spread(m.get("retention"))["value"]} for (model, arm), m in known.items()]
    empty = dict.fromkeys(("panel", "model", "arm", "scale", "recall", "retention", *ANSWERS))
    rows = [{**empty, "panel": "frontier", **{k: p[k] for k in empty if k in p}} for p in points
            if p["recall"] is not None and p["retention"] is not None]
    for model in sorted({model for model, _ in known}, key=lambda m: (m != "chat", m)):
        for arm in ABOUT_UNKNOWN:
            shares = {a: spread(known.get((model, arm), {}).get(f"unknown_{a}"))["value"]
                      for a in ANSWERS}
            if None not in shares.values():
                rows.append({**empty, "panel": "unknown", "model": model, "arm": arm, **shares})
    return rows


def price(rows: list[dict], colours: dict) -> plt.Figure:
    points, answers = ([r for r in rows if r["panel"] == kind] for kind in ("frontier", "unknown"))
    parts = [part for part in ((frontier, points, 4.5),
                               (unknown, answers, 0.9 + 0.32 * len(answers))) if part[1]]
    heights = [height for *_, height in parts]
    figure, _ = sheet(sum(heights) + 0.8, colours, "", len(heights), height_ratios=heights)
    for panel, (draw_part, of, _) in reversed([*zip(figure.axes, parts, strict=True)]):
        draw_part(panel, of, colours)              # frontier last: its names need the layout
    return figure


def frontier(panel: plt.Axes, rows: list[dict], colours: dict) -> None:
    """Draw retention over recall, a line for each arm over its strengths."""
    plain(panel, colours, "both")
    tint = tints(rows, colours)
    for (model, _), of in group_by(itemgetter("model", "arm"), rows).items():
        of = sorted(of, key=itemgetter("scale"))
        panel.plot([100 * r["recall"] for r in of], [100 * r["retention"] for r in of], lw=1,
                   marker="o", ms=6, color=tint[model], clip_on=False)
    for model, colour in tint.items():
        panel.plot([], [], ls="", marker="o", color=colour, label=f"{model} model")
    panel.axvline(95, color=colours["ink"], lw=1, ls=":")
    panel.axhline(90, color=colours["ink"], lw=1, ls=":")
    low = min(100 * r["retention"] for r in rows)
    panel.set(xlabel="recall on held-out wordings (%); target 95", xlim=(-3, 124),
              ylabel="retention (%); target 90", ylim=(min(60, low - 5), 104),
              xticks=range(0, 101, 20))
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=9, borderpad=0)
    spots = [(100 * r["recall"], 100 * r["retention"]) for r in rows]
    several = {r["arm"] for r in rows if r["scale"] != 1}
    names = []
    for r in rows:
        name = f"{r['model']} {r['arm']}" if len(tint) > 1 else r["arm"]
        names.append(f"{name} × {r['scale']:g}" if r["arm"] in several else name)
    name_dots(panel, spots, names, colours)


def name_dots(panel: plt.Axes, spots: list[tuple], names: list[str], colours: dict) -> None:
    """Write a name beside each dot, where no dot, target line or earlier name is. A name far from
    its dot gets a line to it, which crosses none of them either."""
    panel.figure.draw_without_rendering()                     # fixes the layout, for pixels
    inside, point = panel.get_window_extent(), panel.figure.dpi / 72
    dots, (x, y) = panel.transData.transform(spots), panel.transData.transform((95, 90))
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
    start = [0.0] * len(rows)
    for label, (colour, share) in parts.items():
        wide = [100 * share(r) if share else max(0, 100 - s)
                for r, s in zip(rows, start, strict=True)]
        panel.barh(range(len(rows)), wide, 0.72, left=start, color=colours[colour], label=label,
                   edgecolor=colours["paper"])
        for y, (x, w) in enumerate(zip(start, wide, strict=True)):
            if w >= 5:
                panel.text(x + w / 2, y, f"{w:.0f}", ha="center", va="center", fontsize=9.5,
                           color=colours["ink" if share is None else "paper"])
        start = [x + w for x, w in zip(start, wide, strict=True)]
    panel.set(yticks=range(len(rows)), yticklabels=[f"{r['model']}, {r['arm']}" for r in rows],
              xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel="answers about unknown names (%)")
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0.2)


FIGURES = {"ladder": (ladder_rows, ladder), "which": (which_rows, which),
           "early": (early_rows, early), "inertia": (inertia_rows, inertia),
           "price": (price_rows, price)}


if __name__ == "__main__":
    raise SystemExit("figures is no command; python -m experiments.knowledge.report draws them")
