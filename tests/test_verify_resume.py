"""scripts/verify_resume.py: it proves what it says, and sees what differs."""

import contextlib
import json
import shutil

import pytest
from test_resume import fork

from scripts import verify_resume

pytestmark = pytest.mark.auto


def test_a_killed_run_is_resumed_and_found_the_same(place, capsys):
    with contextlib.chdir(place):
        code = verify_resume.main(["--kills", "1", "--train.max_steps=4"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "kill 1 of 1: " in out
    assert "1 kills, 1 resumes: adapters and metrics are the same, bit for bit" in out


def test_every_difference_is_named(place):
    assert fork(place, "--train.max_steps=2")[0] == 0
    with contextlib.chdir(place):
        shutil.copytree("runs/t", "runs/u")
        assert verify_resume.differences("runs/t", "runs/u") == []
        lines = (place / "runs/u/metrics.jsonl").read_text().splitlines()
        changed = [json.loads(line) for line in lines]
        changed[1] |= {"loss": 1.5, "seconds": 99}
        (place / "runs/u/metrics.jsonl").write_text("".join(
            json.dumps(line) + "\n" for line in changed[:-1]))
        weights = place / "runs/u/last/adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        found = verify_resume.differences("runs/t", "runs/u")
    assert len(found) == 3 and "runs/t/last/adapter_model.safetensors and" in found[0]
    assert found[1].endswith(f"{len(lines)} lines, {len(lines) - 1} lines")
    assert found[2].startswith("metrics.jsonl:2: loss: ") and found[2].endswith(" and 1.5")


def test_a_run_that_cannot_start_is_said(place):
    with contextlib.chdir(place), pytest.raises(ValueError, match="nowhere.jsonl"):
        verify_resume.main(["--data.path=nowhere.jsonl"])
