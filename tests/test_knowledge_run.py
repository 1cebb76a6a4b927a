"""experiments/knowledge/run.py and report.py: which cells are run, once; what the report says."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from experiments.knowledge import figures, make_facts, metrics, report, run, score
from lora import config

ARMS = run.read_arms()
SCHEMA = json.loads((make_facts.HERE / "result.schema.json").read_text())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder in which train.py and score.py are played: a run learns everything and forgets
    nothing. calls holds the commands."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def play(log, threads, *command):
        calls.append([str(word) for word in command])
        options = dict(zip(calls[-1], calls[-1][1:], strict=False))
        if command[0] == "train.py":
            settings = json.loads(Path(options["--config"]).read_text())
            folder = Path("runs") / settings["train"]["run"]
            (folder / "adapter").mkdir(parents=True, exist_ok=True)
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(400))
            (folder / "config.json").write_text(json.dumps(settings))
            (folder / "samples.md").write_text("")
            (folder / "run.json").write_text('{"examples": [192, 48]}')
            lines = [{"step": 0, "val_loss": 2.0, "recall": 0.0},
                     {"step": 9, "loss": 0.1, "seconds": 30.0},
                     {"step": 9, "val_loss": 0.1, "recall": 1.0, "best": True}]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
            return
        if "experiments.knowledge.replay" in options:
            return Path(options["--out"]).write_text("{}\n")
        world = Path(options["--world"])
        facts = json.loads((world / "facts.json").read_text())
        sets = json.loads((world / "test.json").read_text())
        learned = "--run" in options
        answered = {kind: [{**item, "answer": " and ".join(item["gold"]) if "gold" in item and (
            learned or kind == "real") else "I don't know.", "ended": True} for item in items]
            for kind, items in sets.items()}
        for kind, items in answered.items():
            for item in items:
                item |= score.judge(item, item["answer"], kind, facts)
        for n, item in enumerate(answered.get("real", ())):
            margin = 1.5 if "placebo" in str(command) else 2.0
            item |= {"margin": margin, "right_by_margin": True} | (
                {"margin_before": 1.0} if learned else {})
            if n >= 96:                                       # has a margin alone
                del item["answer"], item["right"]
            elif learned:
                item["right_before"] = True
        Path(options["--out"]).write_text(json.dumps({
            "metrics": {**metrics.summarise(answered, {}), "bits": 4.0}
            | ({"kl": 0.1, "kl_unknown": 0.5, "bits_ratio": 1.0} if learned else {}),
            "sets": answered, "ranks": {}, "scale": 1.0, "seconds": 1.0, "decoding": "greedy"}))
    monkeypatch.setattr(run, "call", play)
    return calls


@pytest.mark.parametrize("model", ARMS["models"])
@pytest.mark.parametrize("arm", ARMS["arms"])
def test_every_arm_is_a_valid_config_for_every_model(tmp_path, model, arm):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(run.settings_of(ARMS, model, arm, 0)))
    settings = config.load(file)
    assert settings.model.name == ARMS["models"][model]["name"]
    assert not re.search(r"\{\w+\}", file.read_text())         # no slot is left


def test_every_arm_is_in_the_full_grid_and_every_grid_is_of_arms():
    for cells in ARMS["grids"].values():
        for name in cells:
            model, arm = name.split("/")
            assert model in ARMS["models"] and arm in ARMS["arms"]
    assert {name.split("/")[1] for name in ARMS["grids"]["full"]} == {*ARMS["arms"]}


def test_an_arm_has_what_it_does_not_change():
    assert ARMS["arms"]["r6"]["train"]["data.path"] == "{world}/train-8.jsonl"      # r4's
    assert ARMS["arms"]["r6"]["train"]["train.batch_size"] == 4                     # r0's
    old = {k: v for k, v in ARMS["arms"]["r7"]["train"].items() if k != "train.lr"}
    assert ARMS["arms"]["old-lr"]["train"] == {
        **old, "train.lr": 5e-5, "train.eval_every": 96, "keep.retain": None}


def test_finished_cells_are_not_run_again_and_changed_ones_are(home, monkeypatch):
    cells = ["--cells", "chat/r0", "chat/r2", "chat/r7", "--seeds", "0", "1", "--jobs", "1"]
    run.main(cells)
    assert sum(call[0] == "train.py" for call in home) == 4    # r2 is r0's last checkpoint
    assert sum("--run" in call for call in home) == 6
    assert sum("experiments.knowledge.replay" in call for call in home) == 1      # once a model
    done = len(home)
    run.main(cells)
    assert len(home) == done
    changed = json.loads(json.dumps(ARMS))
    changed["arms"]["r7"]["train"]["train.max_steps"] = 5
    monkeypatch.setattr(run, "read_arms", lambda: changed)
    run.main(cells)
    assert [call[0] for call in home[done:]] == ["train.py", "-m"] * 2


def test_an_unknown_cell_is_named(home):
    with pytest.raises(ValueError, match="no arm 'r9'; there are r0, r1"):
        run.main(["--cells", "chat/r9"])


def test_a_failed_training_says_where_and_the_others_are_kept(home, monkeypatch):
    play = run.call

    def fail(log, threads, *command):
        if command[0] == "train.py" and "base" in str(command):
            raise ValueError(f"train.py\nfailed ({log})")
        play(log, threads, *command)
    monkeypatch.setattr(run, "call", fail)
    with pytest.raises(ValueError, match="knowledge-base-r7-s0.log"):
        run.main(["--cells", "chat/r7", "base/r7", "--jobs", "1"])
    assert (run.HOME / "cells" / "chat-r7-s0.json").exists()


def test_the_report_pools_seeds_and_judges_the_claims(home, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: [])        # test_knowledge_page.py draws
    run.main(["--cells", "chat/r0", "chat/ours", "base/ours", "chat/hops-none", "--jobs", "2",
              "--seeds", "0", "1"])
    run.main(["--cells", "chat/placebo"])                      # of one seed
    report.main(["--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    jsonschema.validate(result, SCHEMA)
    known = figures.metrics_of(result)
    ours = next(a for a in result["arms"] if (a["model"], a["arm"]) == ("chat", "ours"))
    assert ours["seeds"] == [0, 1] and ours["parameters"] == 98 and ours["train_seconds"] == 30
    of = ours["metrics"]
    assert of["recall"][::3] == [1, 48] and 0.92 < of["recall"][1] < 1 == of["recall"][2]
    assert of["kl"] == 0.1 and of["bits"] == known["chat", "untouched"]["bits"] == 4
    assert of["margin_vs_placebo"] == [0.5, 0.5, 0.5, 320]
    assert known["chat", "untouched"]["bits_ratio"] is known["chat", "untouched"]["kl"] is None
    assert "margin_vs_placebo" not in known["chat", "placebo"] | known["base", "ours"]
    assert of["unknown_far_spills"][::3] == [0, 60] and of["nobody_abstains"][3] == 48
    assert known["chat", "hops-none"]["hops"][0] == 1
    made = ARMS["arms"]["ours"]["train"]
    share = 1 - made["keep.replay_share"] - made["keep.unknown_share"]
    share *= 8 / (8 + sum(made["keep.sides"].values()))
    assert ours["exposures"] == pytest.approx(9 * 32 * share / 24)
    holds = {claim["id"]: claim["holds"] for claim in result["claims"]}
    assert holds["wordings"] and holds["margin"] and holds["lost"] and not holds["source-fails"]
    outcome = {p["id"]: (p["round"], p["measured"], p["right"]) for p in result["predictions"]}
    assert outcome["ours-margin"] == (2, "0.50 [0.50, 0.50]", True)
    assert outcome["loo-lr"] == (1, "not run", None) and outcome["hops-none"][2] is False
    said = {(t["set"], t["gold"]) for t in result["transcripts"]}
    assert {("verify", "yes"), ("verify", "no")} < said and len(result["transcripts"]) == 18
    table = report.readme(result)
    assert "| 100 % [93, 100] |" in table and "- Holds: " in table
    assert len(table.splitlines()) == 3 + len(figures.WORDS["readme"]) + len(result["claims"])
    assert (tmp_path / "out" / "report.html").exists()


def test_where_ours_was_not_run_its_short_version_stands_for_it(home):
    run.main(["--cells", "chat/short", "chat/short-placebo"])
    assert {c["arm"] for c in report.read_cells()} == {"ours", "placebo", "untouched"}
    assert "ours in 160 steps" in next(
        a["what"] for a in report.collect()["arms"] if a["arm"] == "ours")
    run.main(["--cells", "chat/ours"])
    assert {"ours", "short"} < {c["arm"] for c in report.read_cells()}


def test_bounds_and_values_are_written_in_their_unit():
    bits = {"of": "chat/ours", "metric": "bits_ratio", "at_most": 1.02}
    assert report.bound(bits) == "at most 1.02" and report.measured(bits, 1.011) == "1.01"
    high = {"of": "chat/ours", "metric": "margin_vs_placebo", "high_at_least": 0}
    assert report.bound(high) == "its interval's high end at least 0.00"
    lost = {"of": "chat/no-replay", "less": "chat/r7", "metric": "lost_minus_gained",
            "at_least": 0.2, "was": "retention"}
    assert report.bound(lost) == "at least 20 %"
    assert report.measured(lost, -0.051) == "−5 points (real questions: lost minus gained)"


@pytest.mark.parametrize(("high", "holds"), [(-0.01, False), (0.0, True), (0.3, True)])
def test_a_claim_may_bound_the_high_end_of_an_interval(high, holds):
    arms = [{"model": "chat", "arm": "ours", "metrics": {"margin_vs_placebo": [-1, -2, high, 9]}}]
    entry = {"of": "chat/ours", "metric": "margin_vs_placebo", "high_at_least": 0}
    assert report.judged(entry, arms) == ([-1, -2, high, 9], holds)


def test_the_placebo_is_compared_question_by_question_over_common_seeds():
    def cell(seed, *changes):
        return {"seed": seed, "sets": {"real": [
            {"question": str(n), "margin": 1 + x, "margin_before": 1}
            for n, x in enumerate(changes)]}}
    ours = [cell(0, -1, 0), cell(1, -3, 0), cell(2, 99, 99)]
    placebo = [cell(1, -1, 0.5), cell(0, 0, 0.5), cell(7, 99, 99)]
    found = report.against(ours, placebo)
    assert found[0] == pytest.approx(((-2 + 0.5) + (0 - 0.5)) / 2) and found[3] == 2
    assert found[1] == pytest.approx(-1.5) and found[2] == pytest.approx(-0.5)
    assert report.against(ours, [cell(5, 1, 1)]) is None


def test_every_entry_of_claims_json_is_of_arms_and_metrics_that_exist():
    texts = json.loads((make_facts.HERE / "claims.json").read_text("utf-8"))
    entries = texts["claims"] + texts["predictions"]
    bounds = {"at_least", "at_most", "low_at_least", "high_at_least"}
    for entry in entries:
        for name in filter(None, (entry["of"], entry.get("less"), entry.get("over"))):
            model, arm = name.split("/")
            assert model in ARMS["models"] and arm in ARMS["arms"], entry
        assert entry["metric"] in figures.WORDS["metrics"] and bounds & entry.keys(), entry
    assert len({entry["id"] for entry in texts["claims"]}) == len(texts["claims"])
    assert len({entry["id"] for entry in texts["predictions"]}) == len(texts["predictions"])
    assert {*metrics.SHARES} <= {*figures.WORDS["metrics"]}


def test_without_cells_the_report_says_what_to_run(home):
    with pytest.raises(ValueError, match="run python -m experiments.knowledge.run"):
        report.collect()


def test_exposures_to_learn_count_from_where_a_fact_stays_first():
    def line(step, rank):
        return {"step": step, "ranks": {"f": {"rank": rank, "margin": -1.0, "type": "rare"}}}

    def learned(*ranks_):
        cell = {"arm": "r7-steps", "model": "chat", "seed": 0, "exposures_per_step": 0.5,
                "trajectory": [line(10 * i, rank) for i, rank in enumerate(ranks_)]}
        return report.inertia_of([cell])[0]["exposures"]
    assert learned(5, 3, 1, 1) == 10 and learned(5, 1, 2, 1) == 15
    assert learned(1, 1) == 0 and learned(5, 4, 2) is None and learned(5, 1, 2) is None
