"""
Compute the metrics of a model from its judged answers (score.py), of one world or of several.

A metric is [value, low, high, n] with a 95 % interval over n units, or a number. A unit is what
answers are alike about: a fact, a name, a question of several seeds.
"""

import math
from collections import Counter
from statistics import mean

from data import group_by
from lora.use import text

SHARES = {"recall": ("test", "right"), "recall_trained": ("trained", "right"),   # of set, verdict
          "recall_card": ("card", "right"), "recall_cloze": ("cloze", "right"),
          "reverse": ("reverse", "right"), "multi_right": ("multi", "right"),
          "reverse_far": ("reverse_far", "right"),
          "hops": ("hops", "right"), "control": ("control", "right"),
          "everyday_spills": ("everyday", "spills"), "everyday_refuses": ("everyday", "refuses"),
          "real_right": ("real", "right_by_margin"), "premise_abstains": ("premise", "abstains"),
          **{f"{kind}_{verdict}": (kind, verdict)
             for kind in ("nobody", "unanswerable", "unknown_far", "unknown_near")
             for verdict in ("abstains", "spills", "fabricates")[:3 if "_" in kind else 2]}}


def unit(item: dict) -> str | tuple:
    """What an item is about: its fact; its name, and topic; the value that nobody has; or the
    question."""
    keys = ("name", "topic") if "name" in item else ("value",) if "value" in item else ("question",)
    return item.get("fact") or tuple(item.get(key) for key in keys)


def units(items: list[dict]) -> list[list[dict]]:
    """Group items by unit: what the bootstrap resamples."""
    return list(group_by(unit, items).values())


def shares(items: list[dict], verdict: str = "right") -> list[float]:
    """The share of a verdict in each unit."""
    return [mean(item[verdict] for item in of) for of in units(items)]


def balanced(of: list[list[dict]]) -> float:
    """The mean of the shares right where yes is right and where no is: always yes is 50 %."""
    sides = group_by(lambda item: item["gold"][0], [item for items in of for item in items])
    return mean(mean(item["right"] for item in side) for side in sides.values())


def summarise(judged: dict[str, list], ranked: dict[str, dict]) -> dict:
    """Compute all metrics; what was not asked is left out."""
    metrics, sets = {}, dict(judged)
    for kind in ("unknown", "real"):
        for side, near in (("near", True), ("far", False)):
            sets[f"{kind}_{side}"] = [item for item in judged.get(kind, ())
                                      if item.get("near", False) == near]
    for name, (kind, verdict) in SHARES.items():
        if sets.get(kind):
            metrics[name] = list(text.share(shares(sets[kind], verdict)))
    if sets.get("verify"):
        metrics["verify"] = list(text.share(units(sets["verify"]), balanced))
    for end in ("", "_near", "_far"):
        of = units([item for item in sets.get(f"real{end}", ()) if "margin_before" in item])
        if of:
            metrics[f"margin_change{end}"] = list(text.bootstrap(
                mean(item["margin"] - item["margin_before"] for item in items) for items in of))
    metrics |= changes(sets.get("real", []))
    if sets.get("test"):
        known = shares(sets["test"])
        metrics["all_wordings"] = mean(share == 1 for share in known)
        metrics["any_wording"] = mean(share > 0 for share in known)
    items = [item for kind in ("test", "real") for item in sets.get(kind, ()) if "answer" in item]
    if items:
        count = Counter(item["answer"] for item in items)
        metrics["distinct_answers"] = len(count) / len(items)
        metrics["top_answer"] = max(count.values()) / len(items)
        metrics["loops"] = mean(bool(text.loops(item["answer"])) for item in items)
        metrics["no_end"] = mean(not item["ended"] for item in items)
    if ranked:
        metrics["rank_1"] = mean(r["rank"] == 1 for r in ranked.values())
        metrics["mrr"] = mean(1 / r["rank"] for r in ranked.values())
        metrics["margin"] = mean(r["margin"] for r in ranked.values())
    return metrics


def changes(real: list[dict]) -> dict[str, list | float]:
    """Compare real questions before and after: by margin, and by the answer said."""
    margins = [[(item["margin_before"] > 0, item["margin"] > 0) for item in items]
               for items in units([item for item in real if "margin_before" in item])]
    answers = [[(item["right_before"], item["right"]) for item in items]
               for items in units([item for item in real if "right_before" in item])]
    metrics = {}
    if margins:
        (metrics["lost"], metrics["gained"], metrics["lost_minus_gained"],
         metrics["mcnemar"]) = lost_and_gained(margins)
    if answers:
        (metrics["answer_lost"], metrics["answer_gained"], metrics["answer_net"],
         metrics["answer_mcnemar"]) = lost_and_gained(answers)
    return metrics


def lost_and_gained(pairs: list[list[tuple[bool, bool]]]) -> tuple[list, list, list, float]:
    """Return (lost, gained, lost - gained, p) of (right before, right after) of each question, one
    pair a seed: shares of all questions, each with its mean over seeds. p: McNemar's exact test,
    two-sided, of the questions that lost more than they gained against the others (1947)."""
    lost = [mean(old > new for old, new in of) for of in pairs]
    gained = [mean(old < new for old, new in of) for of in pairs]
    net = [a - b for a, b in zip(lost, gained, strict=True)]
    worse, better = sum(x > 0 for x in net), sum(x < 0 for x in net)
    lost, gained, net = text.share(lost), text.share(gained), text.bootstrap(net)
    if not (lost.value or gained.value):                      # no width: the exact ends instead
        net = net._replace(low=-lost.high, high=lost.high)
    n = worse + better
    tail = sum(math.comb(n, k) for k in range(min(worse, better) + 1)) / 2**n
    return list(lost), list(gained), list(net), min(1.0, 2 * tail)
