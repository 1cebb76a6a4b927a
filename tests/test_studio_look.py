"""The studio's look at data: files, uploads, the doctor's findings and masks, by the tokenizer."""

import json
import sys
import threading
from pathlib import Path

import pytest
from test_studio_runs import Client, make_run, settings, studio  # noqa: F401

import dataset
from lora.use import show
from scripts import doctor
from scripts.studio import guard, look, runs

TALK = "".join(json.dumps({"prompt": f"What is {c}?", "completion": f"<b>{c}</b>.\n"}) + "\n"
               for c in "abcdefgh")


@pytest.fixture
def client(studio):  # noqa: F811
    look._last.clear()
    Path("examples/talk.jsonl").write_text(TALK)
    return Client([*look.routes(), *runs.routes()])


def refused(client, url, body):
    status, content = client.post(url, body)
    assert status == 400
    return content["error"]


# ----- files -------------------------------------------------------------------------------------


def test_files_that_can_be_trained_on_are_listed(client, tmp_path):
    Path("examples/friend").mkdir()
    for name in ("friend/train.jsonl", "friend/config.json", "a.csv", "pic.png"):
        Path("examples", name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text("x")
    Path("examples/out.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    make_run("t", [{"step": 1}])
    Path("runs/good.jsonl").write_text("{}")
    client.call("POST", "/api/upload?name=mine.md", b"a text")
    assert client.get("/api/files")["files"] == [
        "data.py", "examples/a.csv", "examples/facts.jsonl", "examples/friend/train.jsonl",
        "examples/talk.jsonl", "runs/good.jsonl", "runs/uploads/mine.md"]


def test_an_upload_is_stored_whole_and_never_over_another(client):
    for n, body in enumerate((TALK.encode(), b"\xff\0", b"3"), 1):
        path = "runs/uploads/x.y.jsonl" if n == 1 else f"runs/uploads/x.y-{n}.jsonl"
        assert client.call("POST", "/api/upload?name=x.y.jsonl", body) == (200, {"path": path})
        assert Path(path).read_bytes() == body
    assert len(list(Path("runs/uploads").iterdir())) == 3


@pytest.mark.parametrize("name", [
    "", "x", "x.py", "../x.json", "..%2fx.json", "/tmp/x.json", "a%2fb.txt", ".x.json", ".json",
    "x.json%00", "x%00.json", "x.json/", "C:%5Cx.json", "%0ax.txt", "x.JSON.exe", "x" * 60 + ".md",
    "-x.csv", "x%ff.csv"])
def test_an_upload_under_another_name_than_a_files_is_refused(client, name):
    status, content = client.call("POST", f"/api/upload?name={name}", b"x")
    assert status == 400 and "plain name" in content["error"]
    assert not list(Path().rglob("runs/*")) and not Path("/tmp/x.json").exists()


def test_an_upload_of_more_than_32_mib_is_refused(client):
    client.app = guard.Guard(client.app, "token", 8741, host="0.0.0.0", upload=2**25)
    client.app.check = lambda request: None
    status, content = client.call("POST", "/api/upload?name=x.txt", bytes(2**25 + 1))
    assert status == 413 and content["error"] and not Path("runs/uploads").exists()
    assert client.call("POST", "/api/upload?name=x.txt", bytes(2**25))[0] == 200


def test_uploads_make_no_run(client):
    for name in ("config.json", "run.json", "status.json"):
        client.call("POST", f"/api/upload?name={name}", b"{}")
    assert client.get("/api/runs") == {"runs": []}
    assert "no run here" in refused(client, "/api/mask", {"run": "uploads"})


# ----- the doctor --------------------------------------------------------------------------------


@pytest.mark.parametrize("body, words", [
    ({}, []), ({"path": "examples/talk.jsonl"}, ["examples/talk.jsonl"]),
    ({"path": "data.py"}, ["data.py"]), ({"run": "t"}, ["--dataset.format=plain"])])
def test_the_page_shows_what_the_doctor_prints(client, capsys, body, words):
    again = json.loads(TALK.splitlines()[0])
    with open("examples/talk.jsonl", "a") as out:
        out.write(json.dumps(again) + "\n" + json.dumps({**again, "completion": "No."}) + "\n")
    (make_run("t") / "config.json").write_text(json.dumps(
        {**settings(), "dataset": {"format": "plain"}}))
    status, shown = client.post("/api/doctor", body)
    assert status == 200 and capsys.readouterr().out == ""
    doctor.main(words)
    out = capsys.readouterr().out
    assert f"\ndoctor: {shown['about']}\n" in out
    lines = [line for line in out.splitlines() if line.startswith(
        ("  ok  ", "  warn  ", "  ERROR  ", "  note  "))]
    before = out.partition("\ndoctor: ")[0].splitlines()
    printed = [found for found in shown["findings"] if found["what"] in before]
    found = [found for found in shown["findings"] if found not in printed]
    assert len(found) == len(lines) and printed[0]["level"] == "note"
    for line, row in zip(lines, found, strict=True):
        assert line.startswith(f"  {row['level']:5}  {row['what']}")
        assert all(source in line for source in row["sources"][:5])
    low, high = min(shown["lengths"]), max(shown["lengths"])
    assert f"tokens: {low} to {high}," in out and shown["examples"] == len(shown["lengths"])


def test_what_is_wrong_with_a_file_is_said(client):
    Path("examples/bad.jsonl").write_text('{"prompt": "a"}\n')
    error = refused(client, "/api/doctor", {"path": "examples/bad.jsonl"})
    assert error.startswith("data: examples/bad.jsonl:1: ")
    Path("config.json").write_text('{"train": {"lr": 5}}')
    assert "train.lr is 5" in refused(client, "/api/doctor", {})
    Path("config.json").unlink()
    assert "config.json: cannot be read" in refused(client, "/api/doctor", {})


# ----- the mask ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", "plain"])
def test_the_mask_is_the_one_of_training(client, format):
    chosen = {**settings(), "dataset": {"format": format}}
    chosen["data"]["path"] = "examples/talk.jsonl"
    (make_run("t") / "config.json").write_text(json.dumps(chosen))
    found = doctor.read_data(dataset.config.load("runs/t/config.json"))
    assert len(found.tokenised) == 8
    for i, item in enumerate(found.tokenised.items):
        status, shown = client.post("/api/mask", {"run": "t", "index": i})
        assert status == 200 and shown["source"] == item["source"] and shown["n_examples"] == 8
        assert [tuple(span.values()) for span in shown["spans"]] == show.runs(item, found.tokenizer)
        assert shown["n_tokens"] == len(item["labels"])
        assert shown["n_supervised"] == sum(label != -100 for label in item["labels"]) > 0
        assert shown["format"] == ("template" if format == "auto" else "plain")
        assert "<b>" in "".join(span["text"] for span in shown["spans"] if span["on"])


@pytest.mark.parametrize("index", [-1, 8, 1e3, "0", True, None, [0]])
def test_an_index_that_is_none_is_refused(client, index):
    error = refused(client, "/api/mask", {"path": "examples/talk.jsonl", "index": index})
    assert error.endswith("expected 0 to 7")


def test_the_same_file_is_tokenised_once_and_again_when_it_changed(client, monkeypatch):
    reads = []
    monkeypatch.setattr(doctor, "read_data", lambda settings, read=doctor.read_data: reads.append(
        settings) or read(settings))
    body = {"path": "examples/talk.jsonl"}
    for i in range(3):
        assert client.post("/api/mask", {**body, "index": i})[0] == 200
    assert client.post("/api/doctor", body)[0] == 200 and len(reads) == 1
    Path("examples/talk.jsonl").write_text(TALK + TALK.replace("What", "Who"))
    assert client.post("/api/mask", body)[1]["n_examples"] == 16 and len(reads) == 2
    client.post("/api/mask", {"path": "data.py"})
    assert len(look._last) == 1


def test_an_edited_data_py_is_not_shown_as_it_was(client, monkeypatch):
    monkeypatch.setattr(look, "FACTS", 5)
    assert "start the studio again" in refused(client, "/api/doctor", {"path": "data.py"})


def test_what_other_threads_print_stays_theirs(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", heard := look.Heard())
        other = threading.Thread(target=print, args=("theirs",))
        other.start()
        other.join()
        print("mine")
    assert heard.getvalue() == "mine\n" and capsys.readouterr().out == "theirs\n"


# ----- safety ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "config.json", "model/tiny-llama",
                                  "examples/../config.json", "examples/out.jsonl", "x\0", 5, [1],
                                  "examples/none.jsonl", "runs/none", "data.pyc"])
@pytest.mark.parametrize("url", ["/api/doctor", "/api/mask"])
def test_a_file_elsewhere_is_not_read(client, url, path):
    Path("examples/out.jsonl").symlink_to("/etc/passwd")
    assert "expected a file or folder in examples/, runs/" in refused(client, url, {"path": path})


@pytest.mark.parametrize("key", ["path", "val_path", "system"])
def test_a_run_does_not_lead_the_page_out_of_the_project(client, tmp_path_factory, key):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    secret.write_text("secret")
    chosen = settings()
    chosen["data"][key] = str(secret)
    (make_run("t") / "config.json").write_text(json.dumps(chosen))
    for url in ("/api/doctor", "/api/mask"):
        assert f"data.{key} is " in refused(client, url, {"run": "t"})
    for name in ("..", "none", 5, [1], "", "a/b"):
        assert "no run here" in refused(client, "/api/mask", {"run": name})


def test_a_run_that_trusts_its_model_runs_no_code_here(client, tmp_path):
    folder = Path("model/tiny-llama")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Tokenizer",
                                "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}))
    chosen = settings()
    chosen["model"]["trust_remote_code"] = True
    (make_run("t") / "config.json").write_text(json.dumps(chosen))
    assert "That code was not run" in refused(client, "/api/mask", {"run": "t"})
    assert not (tmp_path / "ran").exists()
