"""
Show how far an adapter moved each weight, and what became of each training example.

    python -m scripts.inspect runs/demo                   # the best adapter; the ledger of examples
    python -m scripts.inspect runs/demo/last --no-ledger  # another adapter; needs no data

It writes inspect.json (every module, every example) and inspect.png (a map of the updates) into
runs/demo. Exit code 1 if a module of the adapter is dead. Mixed-in examples (keep) have no ledger.
"""

import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F

import data
import dataset
from lora import adapter, loss, surgery
from lora.run import cli, runlog
from scripts.voices import Voices

DEAD = 0.01                       # of the median root mean square of B: below it B is dead
LEARNED = math.log(2)             # nats of a whole answer: see ledger()


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or an adapter in it")
    parser.add_argument("--n", type=int, default=10, help="how many examples a list shows")
    parser.add_argument("--no-ledger", action="store_true", help="the updates alone")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    options = parser.parse_args(argv)
    run = runlog.read_run(options.run)
    examples = None if options.no_ledger else trained_on(run)

    voices = Voices([options.run], options.device)
    for problem in voices.problems:
        print(f"warning: {problem}")
    with voices.bank.using(run.name):
        modules = updates(voices.model)
        print(f"\ninspect: {run.adapter}: {len(modules)} modules on {run.info['base_model']}")
        print_updates(modules)
        record = {"run": run.name, "base_model": run.info["base_model"], "modules": modules,
                  "ledger": examples and ledger(voices, run, examples)}
    if examples:
        print_ledger(record["ledger"], options.n)
    folder = run.adapter.parent
    runlog.write_json(folder / "inspect.json", record)
    from plots.figures import draw_updates
    print(f"\ninspect: {folder / 'inspect.json'}, {draw_updates(folder)}")
    return int(any(m["alarm"] for m in modules))


# ----- the update --------------------------------------------------------------------------------


@torch.no_grad()
def updates(model) -> list[dict]:
    """Measure the update of each module against its weight. ratio is ||scaling B A|| / ||W|| in the
    Frobenius norm, spectral_ratio in the spectral norm; alarm says what is wrong, or None.

    effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli 2007, "The
    effective rank", section 2); stable_rank: Frobenius norm squared / spectral norm squared.
    Without an update both are 0; if A or B is not finite, all four are None."""
    layers = surgery.lora_layers(model)
    rms = {name: layer.lora_B.square().mean().sqrt().item() for name, layer in layers.items()}
    usual = median([size for size in rms.values() if math.isfinite(size)] or [0])
    modules = []
    for name, layer in layers.items():
        block, inside = surgery.split_path(name)
        stats = dict.fromkeys(("ratio", "spectral_ratio", "effective_rank", "stable_rank"))
        alarm = "A or B is not finite"
        if layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all():
            sigma, weight = singular_values(layer), base_weight(layer)
            shares = sigma[sigma > 0] / sigma.sum()
            frobenius, largest = sigma.norm().item(), sigma[0].item()
            stats = {"ratio": frobenius / weight.norm().item(),
                     "spectral_ratio": largest / spectral_norm(weight),
                     "effective_rank": (shares.log().mul(-shares).sum().exp().item() if largest
                                        else 0.0),
                     "stable_rank": (frobenius / largest) ** 2 if largest else 0.0}
            alarm = ("B is zero" if not rms[name] else None if rms[name] >= DEAD * usual else
                     f"B is under {DEAD:.0%} of the others'")
        modules.append({"module": name, "block": block,
                        "projection": re.sub(r"\.\d+(?=\.)", "", inside),
                        "r": layer.r, **stats, "alarm": alarm})
    return modules


def singular_values(layer) -> torch.Tensor:
    """The singular values of scaling B A, largest first: (r,), float64. With B = Q R and A^T = P S
    they are those of the r x r matrix R S^T, so B A is never formed."""
    r, s = (torch.linalg.qr(m.cpu().double()).R for m in (layer.lora_B, layer.lora_A.T))
    return torch.linalg.svdvals(layer.scaling * (r @ s.T))


def base_weight(layer) -> torch.Tensor:
    """W in float32 on the CPU, (d_out, d_in) or transposed. A packed weight is read off the layer's
    outputs for unit vectors."""
    if layer.dense:
        return layer.weight.float().cpu()
    rows = []
    for part in torch.arange(layer.in_features, device=layer.lora_A.device).split(512):
        units = F.one_hot(part, layer.in_features).float()
        bias = layer.base_layer(torch.zeros_like(units[:1]))
        rows.append((layer.base_layer(units) - bias).float().cpu())
    return torch.cat(rows)


def spectral_norm(weight: torch.Tensor) -> float:
    """The largest singular value, by subspace iteration (Halko et al. 2011, arXiv:0909.4061)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(weight, q=min(16, *weight.shape), niter=8)[1][0].item()


def print_updates(modules: list[dict]) -> None:
    """Print a line for each projection, and the dead modules."""
    rows = data.group_by(lambda m: m["projection"], modules)
    width = max(map(len, rows))
    print(f"  {'update / weight':{width}}    mean    least             most              "
          "spectral norm   effective rank")
    for projection, members in rows.items():
        live = sorted((m for m in members if m["ratio"] is not None), key=lambda m: m["ratio"])
        if not live:
            continue
        ends = [f"{m['ratio']:.2%}" + ("" if m["block"] is None else f" (block {m['block']})")
                for m in (live[0], live[-1])]
        share, spectral, rank = (mean(m[key] for m in live)
                                 for key in ("ratio", "spectral_ratio", "effective_rank"))
        print(f"  {projection:{width}} {share:7.2%}    {ends[0]:17} {ends[1]:17} {spectral:13.2%} "
              f"{rank:10.1f} of {max(m['r'] for m in live)}")
    dead = data.group_by(lambda m: m["alarm"], modules)
    alive = len(dead.pop(None, []))
    print(f"  {'ok   ' if alive else 'ERROR'}  {alive} modules with an update")
    for alarm, members in dead.items():
        names = [m["module"] for m in members[:5]] + (["..."] if len(members) > 5 else [])
        print(f"  ERROR  {len(members)} modules: {alarm}: {', '.join(names)}")


# ----- the examples ------------------------------------------------------------------------------


def trained_on(run: runlog.Run) -> list[dict]:
    """The training examples of a run. Raises ValueError if the data has changed."""
    parts = data.load(**asdict(run.settings.data), seed=run.settings.train.seed)
    now = runlog.digest([e["messages"] for part in parts for e in part])
    if now != run.info.get("data"):
        raise ValueError(
            f"inspect: {run.settings.data.path} gives examples {now}, the run was trained on "
            f"{run.info.get('data')}: the data has changed. Put it back, or use --no-ledger.")
    return parts[0]


def ledger(voices: Voices, run: runlog.Run, examples: list[dict]) -> dict:
    """Score each example under the base and every adapter that the run kept.

    learned: its answers as a whole have a probability above 1/2 (less than ln 2 nats) at some time.
    Of two answers to one prompt, at most one has that at a time. forgotten: learned once, but at
    the end at most half as probable as at its best.
    """
    tokenised = dataset.tokenise(examples, voices.tokenizer, run.settings.dataset)
    for note in tokenised.notes():
        print(f"dataset: {note}")
    rows = sorted(tokenised.items, key=lambda item: len(item["input_ids"]))
    tokens = torch.tensor([sum(x != loss.IGNORE_INDEX for x in row["labels"]) for row in rows])
    batches = dataset.micro_batches(rows, 8, voices.tokenizer.pad_token_id or 0, voices.device)
    nats, seen = {}, {}
    print(f"\ninspect: {len(rows)} training examples")

    def measure(name):
        nats[name] = torch.cat([loss.ce_rows(voices.model, b) for b in batches]).cpu()
        print(f"  {name:14} {nats[name].sum() / tokens.sum():6.3f} nats a token, "
              f"{(nats[name] < LEARNED).sum()} learned")
    with surgery.disabled(voices.model):
        measure("base")
    for name, folder in kept(run.adapter.parent).items():
        same = seen.setdefault(runlog.digest_file(folder / adapter.WEIGHTS), name)
        if same == name:
            adapter.load(voices.model, folder)
            measure(name)
        else:
            nats[name] = nats[same]
            print(f"  {name:14} is {same}")
    entries = {}
    for i, (row, n) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        path = {name: values[i].item() for name, values in nats.items()}
        best, last = min(path.values()), [*path.values()][-1]
        entries[id(row["example"])] = {
            "source": row["source"], "prompt": "".join(
                data.said(m) for m in row["example"]["messages"][-2:-1]),
            "answer": data.said(row["example"]["messages"][-1]), "tokens": n,
            "nats_per_token": {name: value / n for name, value in path.items()},
            "verdict": "never learned" if best >= LEARNED else
                       "forgotten" if last >= best + LEARNED else "learned"}
    pairs = [[entries[id(e)] for e in pair] for pair in contradictions(
        [item["example"] for item in tokenised.items])]
    against = {id(e) for pair in pairs for e in pair}
    for e in entries.values():
        e["contradicted"] = id(e) in against
    return {"examples": [entries[id(item["example"])] for item in tokenised.items],
            "contradictions": pairs}


def kept(folder: Path) -> dict[str, Path]:
    """{name: folder} of the adapters that a run kept, in the order of training."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    best = [float(re.search(r'"step": (\d+)', line)[1]) for line in lines
            if '"best": true' in line]
    steps = {f"steps/{path.name}": float(path.name) for path in (folder / "steps").glob("[0-9]*")}
    steps |= {"adapter": max(best, default=math.inf), "last": math.inf}
    return {name: folder / name for name in sorted(steps, key=steps.get)
            if (folder / name / adapter.WEIGHTS).exists()}


def contradictions(examples: list[dict]) -> list[tuple[dict, dict]]:
    """Pairs of examples with the same prompt or the same fact (subject and group) but another
    value; without a value, another answer."""
    def says(example):
        texts = example["value"].split("|") if "value" in example else [
            data.said(example["messages"][-1])]
        return frozenset(map(data.plain, texts))
    facts = [e for e in examples if "value" in e and "group" in e]
    pairs = {}
    for same in [*data.group_by(data.prompt_of, examples).values(),
                 *data.group_by(lambda e: (e.get("subject"), e["group"]), facts).values()]:
        one, *others = (those[0] for those in data.group_by(says, same).values())
        pairs |= {(id(one), id(other)): (one, other) for other in others
                  if says(one).isdisjoint(says(other))}
    return list(pairs.values())


def print_ledger(ledger: dict, n: int) -> None:
    """Print the worst n of each kind: the loss under the base, at its least, and at the end; the
    probability of the whole answer at the end."""
    def show(e, sign=" "):
        path = e["nats_per_token"]
        low, (*_, end) = min(path, key=path.get), path
        losses = [f"{name} {path[name]:.3f}" for name in dict.fromkeys(("base", low, end))]
        print(f"   {sign}{e['source']}: {', '.join(losses)} nats a token; probability "
              f"{math.exp(-path[end] * e['tokens']):.0%}\n"
              f"        {' '.join(e['answer'].split()):.80}")

    def last(e):
        return [*e["nats_per_token"].values()][-1]
    for verdict, badness in (("never learned", last), ("forgotten", lambda e: last(e) - min(
            e["nats_per_token"].values()))):
        those = [e for e in ledger["examples"] if e["verdict"] == verdict]
        print(f"\n  {verdict}: {len(those)} of {len(ledger['examples'])}; "
              f"{sum(e['contradicted'] for e in those)} of them contradicted")
        for e in sorted(those, key=badness, reverse=True)[:n]:
            show(e)
    print(f"\n  contradictions: {len(ledger['contradictions'])}")
    for one, other in ledger["contradictions"][:n]:
        show(one)
        show(other, "≠")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
