"""The studio's runs: read while they train, started, stopped and resumed, on a tiny model."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import AUTO
from test_security import moved_out

pytest.importorskip("starlette", reason="needs requirements-studio.txt")

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from lora import config
from lora.run import lock
from scripts.studio import guard, runs

ROOT = Path(__file__).resolve().parents[1]
GONE = "the process is gone; resume goes on from the last checkpoint"
TWO_ANSWERS = [{"question": "where?", "answer": "", "value": "Ulm", "right": False},
               {"question": "who?", "answer": "hm"}]


class Client:
    """Calls routes by hand, each in an event loop of its own: (status, content)."""

    def __init__(self, routes):
        def missing(request, error):
            return guard.refusal(request, guard.Refused(error.detail, error.status_code))
        self.app = Starlette(routes=routes, exception_handlers={
            HTTPException: missing, ValueError: guard.refusal, Exception: guard.refusal})

    def call(self, method, url, body=b""):
        path, _, query = url.partition("?")
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)
        scope = {"type": "http", "method": method, "path": unquote(path), "headers": [],
                 "query_string": query.encode(), "raw_path": path.encode()}
        asyncio.run(self.app(scope, receive, send))
        content = b"".join(message.get("body", b"") for message in sent)

        def refuse(name):
            raise AssertionError(f"browsers refuse {name}")
        return sent[0]["status"], json.loads(content, parse_constant=refuse)

    def get(self, url):
        status, content = self.call("GET", url)
        assert status == 200, content
        return content

    def post(self, url, body=None):
        return self.call("POST", url, b"" if body is None else json.dumps(body).encode())


@pytest.fixture
def studio(place, monkeypatch):
    """The folder `place` as the studio wants it: data in examples/, the model in model/."""
    for folder, name in (("model", "tiny-llama"), ("examples", "facts.jsonl")):
        (place / folder).mkdir()
        (place / name).rename(place / folder / name)
    settings = json.loads((place / "config.json").read_text())
    settings["model"] |= {"name": "model/tiny-llama", "dtype": AUTO}
    settings["data"]["path"] = "examples/facts.jsonl"
    (place / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(place)
    yield place
    for _, process in runs._started:
        process.kill()
        process.wait()
    runs._started.clear()


@pytest.fixture
def client(studio):
    return Client(runs.routes())


def settings(**train):
    chosen = json.loads(Path("config.json").read_text())
    return {**chosen, "train": {**chosen["train"], **train}}


def until(look, limit=120):
    """The first true value that look() returns."""
    end = time.monotonic() + limit
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def when(client, name, test):
    """The run in the list as soon as it is there and passes the test."""
    return until(lambda: next((run for run in client.get("/api/runs")["runs"]
                               if run["name"] == name and test(run)), None))


def make_run(name, metrics=(), status=None, **info):
    """A run's folder, as training leaves it."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"run": name}}))
    (folder / "run.json").write_text(json.dumps(info))
    write(folder / "metrics.jsonl", *metrics)
    if status is not None:
        (folder / "status.json").write_text(json.dumps({"message": "", "steps": None, **status}))
    return folder


def write(file, *lines):
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def step(n, loss=1.0, **more):
    return {"step": n, "epoch": 1, "loss": loss, "accuracy": 0.5, "lr": 1e-3, "grad_norm": 1.0,
            "tokens_per_s": 100.0, "seconds": n / 2, "peak_memory_gib": 0.25, **more}


def evaluation(n, recall, **more):
    return {"step": n, "val_loss": 2.0, "val_accuracy": 0.5, "recall": recall, **more}


# ----- real runs ---------------------------------------------------------------------------------


def test_a_run_is_started_watched_stopped_resumed_and_finished(client):
    chosen = settings(max_steps=200, eval_every=50, checkpoint_every=50)
    assert client.post("/api/runs", {"settings": chosen}) == (200, {"name": "t", "kept": False})
    assert client.post("/api/runs", {"settings": chosen})[0] == 400          # it trains already
    run = when(client, "t", lambda run: run["step"] >= 2)
    assert (run["state"], run["steps"], run["base"], run["dtype"]) == (
        "training", 200, "tiny-llama", AUTO)
    assert run["first"]["step"] == 0 and run["eta_s"] > 0 and run["memory_gib"] > 0
    shown = client.get("/api/runs/t")
    assert shown["curves"]["loss"][0][0] == 1 and shown["settings"]["train"]["max_steps"] == 200
    assert any("step 0: " in line for line in shown["messages"])

    assert client.post("/api/runs/t/stop") == (200, {"name": "t"})
    run = when(client, "t", lambda run: run["state"] != "training")
    assert run["state"] == "stopped" and run["step"] < 200 and run["eta_s"] is None
    assert client.post("/api/runs/t/stop") == (400, {"error": "run: t does not train now"})

    assert client.post("/api/runs/t/resume") == (200, {"name": "t"})
    assert client.get("/api/runs/t")["step"] == run["step"]         # its numbers stay meanwhile
    run = when(client, "t", lambda run: run["state"] != "training")
    assert (run["state"], run["message"], run["step"]) == ("finished", "", 200)
    assert run["adapter_bytes"] > 0 and run["best"]["recall"] >= run["first"]["recall"]
    assert client.get("/api/runs/t/answers")["steps"] == [0, 50, 100, 150, 200]
    assert not Path("runs/.studio/t.json").exists()
    until(lambda: client.get("/api/runs") and not runs._started)


def test_a_run_of_the_terminal_appears_and_is_stopped_from_the_page(client):
    words = [sys.executable, str(ROOT / "train.py"), "--train.max_steps=100000"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            when(client, "t", lambda run: run["state"] == "training" and run["step"] >= 1)
            status, content = client.post("/api/runs", {"settings": settings()})
            assert status == 400 and "t trains now" in content["error"]
            assert client.post("/api/runs/t/resume")[0] == 400
            assert client.post("/api/runs/t/stop")[0] == 200
            assert process.wait(120) == 130
        finally:
            process.kill()
    assert when(client, "t", lambda run: run["state"] == "stopped")["message"] == ""


def test_a_start_that_fails_shows_why_and_the_earlier_run_of_its_name(client):
    Path("examples/bad.jsonl").write_text('{"prompt": "a"}\n')
    chosen = settings(run="bad name")
    chosen["data"]["path"] = "examples/bad.jsonl"
    assert client.post("/api/runs", {"settings": chosen})[1]["name"] == "bad name"
    assert when(client, "bad name", bool)["state"] == "training"
    run = when(client, "bad name", lambda run: run["state"] != "training")
    assert run["state"] == "failed" and "error: data: examples/bad.jsonl:1: " in run["message"]
    shown = client.get("/api/runs/bad%20name")
    assert shown["settings"] == chosen and shown["messages"][0].startswith("python train.py --con")

    make_run("bad name", [step(7)], {"state": "finished"})           # as if one had been there
    os.utime("runs/bad name/run.json", (1, 1))
    os.utime("runs/bad name/status.json", (1, 1))
    run = client.get("/api/runs/bad%20name")
    assert (run["state"], run["step"]) == ("finished", 7)
    assert "the last start did not begin: error: data: " in run["message"]


def test_a_start_is_stopped_before_it_has_begun(client, monkeypatch, tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('reading')\ntime.sleep(600)\n")
    monkeypatch.setattr(runs, "TRAIN", tmp_path / "slow.py")
    client.post("/api/runs", {"settings": settings()})
    run = when(client, "t", lambda run: run["message"] == "reading")
    assert run["state"] == "training" and run["first"] is None
    with monkeypatch.context() as patch:                             # another server sees it too
        patch.setattr(runs, "_started", [])
        assert client.get("/api/runs/t")["state"] == "training"
        assert client.post("/api/runs", {"settings": settings()})[0] == 400
    assert client.post("/api/runs/t/stop")[0] == 200
    when(client, "t", lambda run: run["state"] == "stopped")
    make_run("other", [step(7)], {"state": "stopped"})
    client.post("/api/runs/other/resume")
    run = when(client, "other", lambda run: run["message"] == "reading")
    assert (run["state"], run["step"]) == ("training", 7)            # it goes on from there


def test_a_start_says_that_an_earlier_run_is_kept(client, monkeypatch):
    launched = []
    monkeypatch.setattr(runs, "_launch", lambda *args: launched.append(args))
    make_run("t")
    assert client.post("/api/runs", {"settings": settings()})[1] == {"name": "t", "kept": True}
    assert client.post("/api/runs", {"settings": {}})[1] == {"name": "demo", "kept": False}
    assert [words for _, words, _ in launched] == [
        ["--config", f"runs/.studio/{name}.json"] for name in ("t", "demo")]


# ----- what may not be started -------------------------------------------------------------------


@pytest.mark.parametrize("section, key, value, said", [
    ("train", "lr", 5, "at most 1"), ("train", "epoch", 2, "Did you mean train.epochs"),
    ("lora", "r", "x", "expected a whole number"), ("train", "run", "../x", "not a path"),
    ("train", "run", "uploads", "another name"), ("train", "lr", float("nan"), "a number"),
    ("data", "system", "\ud800", "surrogate"), ("model", "trust_remote_code", True, "no code"),
    *((section, key, path, "expected a file or folder in runs/, model/, examples/")
      for section, key in (("model", "name"), ("model", "adapter"), ("data", "path"),
                           ("data", "val_path"), ("keep", "replay"), ("keep", "retain"))
      for path in ("/etc/passwd", "../x", "config.json", "examples/../config.json", "x\0y",
                   "examples/none.jsonl", "examples/link.jsonl", "", "model/a", "~/x"))])
def test_a_setting_that_is_wrong_is_refused_at_its_field(client, section, key, value, said):
    Path("examples/link.jsonl").symlink_to("../config.json")
    chosen = settings(run="new")
    chosen.setdefault(section, {})[key] = value
    status, content = client.post("/api/runs", {"settings": chosen})
    (problem,) = content["problems"]
    assert status == 400 and said in problem["message"] and problem["message"] in content["error"]
    assert problem["field"] == (f"{section}.{key}" if key != "epoch" else "")
    assert not Path("runs").exists()


def test_all_problems_are_told_at_once(client):
    _, content = client.post("/api/runs", {"settings": {
        "data": {"path": "/etc/passwd"}, "train": {"lr": 5, "seed": -1}, "lora": 5, "x": {}}})
    assert sorted(p["field"] for p in content["problems"]) == [
        "", "", "data.path", "train.lr", "train.seed"]


def test_a_text_file_elsewhere_is_not_read_as_the_system_prompt(client, tmp_path, monkeypatch):
    Path("secret.txt").write_text("secret")
    monkeypatch.setattr(runs, "_launch", lambda name, words, values: None)
    for text, field in (("secret.txt", "data.system"), (f"{tmp_path}/secret.txt", "data.system")):
        chosen = settings()
        chosen["data"]["system"] = text
        (problem,) = client.post("/api/runs", {"settings": chosen})[1]["problems"]
        assert problem["field"] == field
    for text in ("You end in secret.txt", "fixed"):
        chosen["data"]["system"] = text
        assert client.post("/api/runs", {"settings": chosen})[0] == 200


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "openai-community/gpt2", "a/b"])
def test_known_models_and_hub_ids_may_be_named(client, name):
    assert not runs.path_problems({"model": {"name": name}})


def test_a_hub_id_that_is_a_folder_here_is_a_path(client):
    Path("a/b").mkdir(parents=True)
    assert runs.path_problems({"model": {"name": "a/b"}})


@pytest.mark.parametrize("body", [b"[]", b"nonsense", b'{"settings": 5}', b"[" * 100_000, b"\xff",
                                  b"{}"])
def test_a_body_that_is_no_object_is_refused(client, body):
    status, content = client.call("POST", "/api/runs", body)
    assert status == 400 and content["error"]


@pytest.mark.parametrize("name", [
    "..", "%2e%2e", "..%2f..", "a%2fb", ".studio", "uploads", "a%00b", "none", "%2ftmp", "x" * 61,
    "out", "linked", "-x", "%0a", "<b>"])
def test_a_name_that_is_no_run_here_is_refused(client, tmp_path, name):
    make_run("linked")
    moved_out(Path("runs/linked").resolve(), "run.json")
    make_run("elsewhere").rename(tmp_path / "elsewhere")
    Path("runs/out").symlink_to(tmp_path / "elsewhere")
    Path("runs/uploads").mkdir()
    Path("runs/uploads/config.json").write_text("{}")
    for method, path in (("GET", ""), ("GET", "/answers"), ("POST", "/stop"), ("POST", "/resume")):
        status, content = client.call(method, f"/api/runs/{name}{path}")
        assert status in (400, 404) and content["error"]
    assert not Path("runs/.studio").exists()
    listed = {run["name"]: run for run in client.get("/api/runs")["runs"]}
    assert set(listed) == {"linked", "out"}
    assert all("leads out of" in run["message"] for run in listed.values())


def test_code_of_a_model_is_not_run_by_resuming(client):
    file = make_run("t") / "config.json"
    file.write_text(json.dumps({"model": {"trust_remote_code": True}}))
    status, content = client.post("/api/runs/t/resume")
    assert status == 400 and "in a terminal: python train.py --resume runs/t" in content["error"]


# ----- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, samples, state, message", [
    (None, True, "finished", ""), (None, False, "stopped", ""),          # before status.json
    ({"state": "finished"}, True, "finished", ""), ({"state": "stopped"}, False, "stopped", ""),
    ({"state": "failed", "message": "train: step 3"}, False, "failed", "train: step 3"),
    ({"state": "training"}, False, "failed", GONE), ({"state": 5}, False, "stopped", "")])
def test_the_state_of_a_run(client, status, samples, state, message):
    folder = make_run("t", [step(3)], status)
    if samples:
        (folder / "samples.md").write_text("")
    (run,) = client.get("/api/runs")["runs"]
    assert (run["state"], run["message"]) == (state, message)


def test_who_holds_the_lock_trains_and_is_not_disturbed(client, monkeypatch):
    make_run("t", status={"state": "failed"})
    killed = []
    with lock.locked("runs/t"):
        (run,) = client.get("/api/runs")["runs"]
        assert (run["state"], run["message"]) == ("training", "")
        monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
        client.post("/api/runs/t/stop")
    assert (os.getpid(), signal.SIGINT) in killed
    del killed[:]
    assert client.post("/api/runs/t/stop")[0] == 400 and (os.getpid(), signal.SIGINT) not in killed


@pytest.mark.parametrize("file", ["run.json", "status.json", "config.json", "metrics.jsonl",
                                  "answers.jsonl", "messages.txt"])
@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"\xff\xfe\0", b"[" * 100_000, b'{"step": "x"}\n', b'{"step": 1e999}\n',
    b'{"state": NaN, "steps": Infinity, "base_model": ["\\ud800"], "train": {"lr": NaN}}\n',
    b'{"step": 3, "answers": [5]}\n{"step": 4, "answers": 5}\n', b'{"step": 2, "best": [true]}\n'])
def test_a_damaged_file_is_no_error_of_the_list(client, file, content):
    make_run("good", [step(1)], {"state": "finished"})
    folder = make_run("bad", [step(1)], {"state": "finished"})
    (folder / file).write_bytes(content)
    listed = {run["name"]: run for run in client.get("/api/runs")["runs"]}
    assert listed["good"]["message"] == "" and listed["bad"]["state"] in ("finished", "stopped")
    shown = client.get("/api/runs/bad")
    if file.endswith("json") and not content.endswith(b"}\n"):
        assert file in shown["message"] and (
            file == "config.json" or file in listed["bad"]["message"])
    assert client.call("GET", "/api/runs/bad/answers")[0] in (200, 400)


def test_the_newest_run_is_first(client):
    for i, name in enumerate(("old", "new", "older")):
        os.utime(make_run(name) / "run.json", (100 + 10 * i, (300, 500, 100)[i]))
    assert [run["name"] for run in client.get("/api/runs")["runs"]] == ["new", "old", "older"]


# ----- files that grow ---------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch):
    """The lines that were parsed."""
    lines = []
    monkeypatch.setattr(runs, "parse", lambda line, parse=runs.parse: lines.append(line)
                        or parse(line))
    return lines


def test_the_list_shows_the_last_step_and_the_best_evaluation(client):
    make_run("t", [evaluation(0, 0.1), step(1), step(2), evaluation(2, 0.5, best=True), step(3),
                   evaluation(3, 0.4, best=False), {"step": 3, "epoch": 1, "epoch_loss": 1.5}],
             {"state": "stopped", "steps": 10}, base_model="b", dtype="torch.bfloat16")
    (run,) = client.get("/api/runs")["runs"]
    assert (run["step"], run["steps"], run["seconds"], run["base"], run["dtype"]) == (
        3, 10, 1.5, "b", "bfloat16")
    assert run["first"] == evaluation(0, 0.1) and run["best"] == evaluation(2, 0.5, best=True)


def test_a_half_line_waits_for_its_other_half(client):
    file = make_run("t", [step(1)]) / "metrics.jsonl"
    text = json.dumps(step(2))
    for part, n in ((text[:20], 1), (text[20:], 1), ("\n", 2)):
        with open(file, "a") as out:
            out.write(part)
        shown = client.get("/api/runs/t")
        assert (shown["step"], len(shown["curves"]["loss"])) == (n, n) and not shown["message"]


@pytest.mark.parametrize("how", ["replaced", "shorter", "cut and longer", "gone", "same size"])
def test_a_file_that_was_replaced_is_read_anew(client, how):
    file = make_run("t", [evaluation(0, 0.5), step(1), step(2), step(3)]) / "metrics.jsonl"
    assert client.get("/api/runs/t")["step"] == client.get("/api/runs")["runs"][0]["step"] == 3
    size = file.stat().st_size
    if how == "cut and longer":                                      # a run that was resumed
        os.truncate(file, len(file.read_bytes().rpartition(b'{"step": 2')[0]))
        write(file, step(2, 7.0), *(step(n, 7.0) for n in range(3, 8)))
    else:
        file.unlink()
        write(file, *{"replaced": [step(n, 7.0) for n in range(1, 9)], "shorter": [step(1, 7.0)],
                      "same size": [evaluation(0, 0.5), step(1, 7.0), step(2, 7.0), step(3, 7.0)],
                      "gone": []}[how])
        if how == "gone":
            file.unlink()
    assert (file.exists() and file.stat().st_size == size) == (how == "same size")
    last = {"replaced": 8, "shorter": 1, "cut and longer": 7, "gone": 0, "same size": 3}[how]
    for shown in (client.get("/api/runs")["runs"][0], client.get("/api/runs/t")):
        assert shown["step"] == last
        assert (shown["first"] is None) == (how in ("replaced", "shorter", "gone"))
    assert [value for _, value in shown["curves"]["loss"]] == {
        "gone": [], "cut and longer": [1.0] + 6 * [7.0]}.get(how, last * [7.0])


def test_twenty_long_runs_are_listed_by_parsing_little_and_kept_in_little(client, parsed):
    lines = [evaluation(0, 0.1)]
    for n in range(1, 10_001):
        lines += [step(n)] + ([evaluation(n, 0.5, best=n == 5000)] if n % 1000 == 0 else [])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for i in range(20):
        file = make_run(f"r{i}") / "metrics.jsonl"
        file.write_text(text)
    assert len(client.get("/api/runs")["runs"]) == 20
    assert len(parsed) <= 20 * 14                                    # evaluations, and a last step
    del parsed[:]
    kept = runs.metrics_of.cache_info().currsize
    shown = client.get("/api/runs/r19?points=200")
    assert len(parsed) <= 3 * 11 + 10_000 and shown["best_step"] == 5000
    assert 150 < len(shown["curves"]["loss"]) <= 200 and len(shown["curves"]["recall"]) == 11
    del parsed[:]
    write(file, step(10_001))
    for _ in range(5):                                               # again: the new line alone
        assert client.get("/api/runs/r19")["step"] == 10_001
        assert len(client.get("/api/runs")["runs"]) == 20
    assert len(parsed) <= 5 * 2 * 2 * 21 and runs.metrics_of.cache_info().currsize == kept
    for i in range(20):
        make_run(f"short{i}", [step(1)])
        client.get(f"/api/runs/short{i}")
    assert runs.curves_of.cache_info().currsize <= 32


def test_a_curve_is_the_mean_of_equal_buckets_of_steps(client):
    file = make_run("t", [step(n, float(n)) for n in range(1, 101)]) / "metrics.jsonl"
    write(file, *(evaluation(n, n / 100) for n in range(0, 101, 20)))
    curves = client.get("/api/runs/t?points=10")["curves"]
    assert len(curves["loss"]) == 10
    assert all(at == pytest.approx(value) for at, value in curves["loss"])
    assert all(b[0] - a[0] == pytest.approx(10, abs=1) for a, b in zip(
        curves["loss"], curves["loss"][1:], strict=False))
    assert curves["recall"] == [[n, n / 100] for n in range(0, 101, 20)]
    assert len(client.get("/api/runs/t?points=3")["curves"]["recall"]) == 3
    assert client.get("/api/runs/t")["curves"]["retention"] == []


def test_a_curve_stays_small_however_long_the_run(client):
    file = make_run("t", [step(n, float(n)) for n in range(1, 9000)]) / "metrics.jsonl"
    with runs.curves_of(file.resolve()).reading() as drawn:
        points = drawn.curves["loss"]
        assert len(points) <= 2 * runs.MOST and sum(n for n, _, _ in points) == 8999
        assert all(steps == pytest.approx(values) for _, steps, values in points)


@pytest.mark.parametrize("points", ["1", "0", "-5", "x", "", "99999", "1e3", "²"])
def test_points_out_of_range_are_refused(client, points):
    make_run("t")
    assert client.call("GET", f"/api/runs/t?points={points}")[0] == 400


def test_the_time_left_counts_steps_and_evaluations(client):
    folder = make_run("t", [evaluation(0, 0.1)], {"state": "training", "steps": 100})
    with lock.locked("runs/t"):
        assert client.get("/api/runs/t")["eta_s"] is None
        # 20 steps of half a second, evaluations of 5 s at steps 0, 10 and 20: 8 are left
        write(folder / "metrics.jsonl", *(step(n) for n in range(1, 21)))
        write(folder / "metrics.jsonl", evaluation(10, 0.2), evaluation(20, 0.3))
        os.utime(folder / "status.json", (1000, 1000))
        os.utime(folder / "metrics.jsonl", (1025, 1025))
        assert client.get("/api/runs/t")["eta_s"] == pytest.approx(80 * 0.5 + 8 * 5)
        os.utime(folder / "status.json", (1020, 1020))               # resumed a moment ago
        assert client.get("/api/runs/t")["eta_s"] == pytest.approx(80 * 0.5)


def test_readers_at_the_same_time_agree(client):
    make_run("t", [step(n) for n in range(1, 3000)])
    found = []
    threads = [threading.Thread(target=lambda: found.append(Client(runs.routes()).get(
        "/api/runs/t"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(shown == found[0] for shown in found)


# ----- answers, messages, settings ---------------------------------------------------------------


def test_answers_are_shown_where_they_changed_and_flips_are_named(client):
    folder = make_run("t", [evaluation(20, 1.0, best=True)])
    for n, (text, right) in {0: ("in Bonn", False), 10: ("in Ulm", True), 20: ("in Ulm", True),
                             30: ("in Rom", False)}.items():
        write(folder / "answers.jsonl", {"step": n, "answers": [
            {**TWO_ANSWERS[0], "answer": text, "right": right}, TWO_ANSWERS[1]]})
    with open(folder / "answers.jsonl", "a") as out:
        out.write('{"step": 40, "answers": [{"quest')                # half a line
    shown = client.get("/api/runs/t/answers")
    assert shown["steps"] == [0, 10, 20, 30] and shown["best_step"] == 20
    where, who = shown["questions"]
    assert where["value"] == "Ulm" and where["flipped"] == [[0, 10, "gained"], [20, 30, "lost"]]
    assert where["answers"] == [{"step": 0, "text": "in Bonn", "right": False},
                                {"step": 10, "text": "in Ulm", "right": True},
                                {"step": 30, "text": "in Rom", "right": False}]
    assert [a["text"] for a in who["answers"]] == ["hm"] and who["flipped"] == []
    assert client.get("/api/runs/t/answers") == shown


def test_a_run_without_answers_has_none(client):
    make_run("t")
    assert client.get("/api/runs/t/answers") == {"steps": [], "best_step": None, "questions": []}


def test_the_last_sixty_messages_are_shown(client):
    folder = make_run("t")
    (folder / "messages.txt").write_text("".join(f"line {i} <b>é\n\n" for i in range(5000)))
    assert client.get("/api/runs/t")["messages"] == [f"line {i} <b>é" for i in range(4940, 5000)]


def test_settings_have_their_documentation_and_the_value_here(client):
    shown = client.get("/api/settings")
    rows = {row["key"]: row for row in shown["settings"]}
    assert list(rows) == list(config.flat(config.Config())) and shown["problem"] == ""
    assert rows["train.lr"] == {"key": "train.lr", "section": "train", "name": "lr",
                                "default": 0.001, "values": "a number", "value": 0.02,
                                "comment": "peak learning rate"}
    assert "model/tiny-llama" in shown["models"] and "smollm2-135m-instruct" in shown["models"]
    Path("config.json").write_text('{"train": {"lr": 5}}')
    shown = client.get("/api/settings")
    assert "train.lr is 5" in shown["problem"] and len(shown["settings"]) == len(rows)
    with contextlib.suppress(FileNotFoundError):
        Path("config.json").unlink()
    assert client.get("/api/settings")["problem"] == ""
