"""python -m scripts.check_vllm: a server that agrees, one that does not, and one that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import dataset
from inject import inject
from lora import adapter, config
from lora.base import load
from lora.generate import generate
from lora.run import runlog
from lora.surgery import lora_layers
from scripts import check_vllm

ROOT = Path(__file__).resolve().parents[1]
VLLM = os.environ.get("VLLM") or str(ROOT / ".venv-vllm/bin/vllm")

# answers what replies.json beside it holds, by path and then by model and messages or prompts
SERVER = f"""#!/bin/sh
'''exec' '{sys.executable}' -S "$0" "$@" # a path with spaces has no place in the first line
'''
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply("null")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = [self.path, asked["model"], asked.get("messages", asked.get("prompt"))]
        self.reply(json.dumps(REPLIES[json.dumps(key)]))
    def reply(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

REPLIES = json.loads(Path(__file__).with_name("replies.json").read_text())
host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def run(tmp_path, tiny_folder):
    """A run of the tiny model: config.json and an adapter that changes its answers."""
    folder = tmp_path / "runs" / "mine"
    model = load.load_model(tiny_folder, "cpu", torch.float32)
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    adapter.save(model, folder / "adapter", "tiny")
    settings = {"model": {"name": str(tiny_folder)}, "data": {"system": "fixed"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "run.json").write_text("{}")
    return folder


def executable(file, text):
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def honest(run, tiny_folder, n, tokens):
    """What a right server replies, by our own code."""
    settings = config.load(run / "config.json")
    tokenizer = load.load_tokenizer(tiny_folder)
    prompts, stop = check_vllm.pick(settings, n), dataset.stop_of(tokenizer, "template")
    replies = {}
    for name in ("base", "mine"):
        model = load.load_model(tiny_folder, "cpu", torch.float32)
        if name == "mine":
            adapter.load(model, run / "adapter")
        ids, choices = [], []
        for i, messages in enumerate(prompts):
            bare = messages[1:]
            for asked in (messages, bare):
                replies[json.dumps(["/tokenize", name, asked])] = {
                    "tokens": dataset.render(asked, tokenizer, "template", reply=True)[0]}
            ids.append(dataset.render(messages, tokenizer, "template", reply=True)[0])
            (answer,) = generate(model, ids[-1:], stop, tokens)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            given = answer + [tokenizer.eos_token_id] * (len(answer) < tokens)
            logits = model(torch.tensor([ids[-1] + given])).logits[0, len(ids[-1]) - 1:-1]
            logp = [row[token].item() for row, token in zip(logits.log_softmax(-1), given,
                                                            strict=True)]
            choices.append({"index": i, "text": text, "token_ids": given,
                            "logprobs": {"token_logprobs": logp}})
            replies[json.dumps(["/v1/chat/completions", name, messages])] = {
                "choices": [{"message": {"content": text}}]}
        # vLLM gives the choices of one request in any order
        replies[json.dumps(["/v1/completions", name, ids])] = {"choices": choices[::-1]}
    return replies


@pytest.fixture
def check(run, tiny_folder, tmp_path, capsys):
    """check(change): exit code and print of a check against a server with changed replies."""
    def call(change=lambda replies: None):
        replies = honest(run, tiny_folder, 4, 6)
        change(replies)
        (tmp_path / "replies.json").write_text(json.dumps(replies))
        vllm = executable(tmp_path / "vllm", SERVER)
        code = check_vllm.main([str(run), "--vllm", vllm, "--dtype", "float32", "--n", "4",
                                "--tokens", "6", "--seconds", "30"])
        return code, capsys.readouterr().out
    return call


def test_a_server_that_answers_as_we_do_passes(check):
    code, out = check()
    assert code == 0 and out.endswith("check: vLLM agrees\n")
    assert out.count("4 of 4 answers are the same") == 2 and out.count("0.0000    0.00  ") == 8
    assert out.count("our tokens for 8 of 8 prompts") == 2
    assert "ours in bfloat16" not in out


def test_a_server_that_ignores_the_adapter_fails(check):
    def ignore(replies):
        for key in replies:
            replies[key] = replies[key.replace('"mine"', '"base"')]
    code, out = check(ignore)
    assert code == 1 and out.endswith("check: vLLM DIFFERS\n")
    before, after = out.split("mine: vLLM")
    assert "OTHER" not in before and after.count("  OTHER ") >= 3 and "    ours: " in after


def test_a_server_with_another_template_fails(check):
    def spoil(replies):
        key = next(k for k in replies if "/tokenize" in k and '"system"' not in k)
        replies[key]["tokens"].insert(0, 1)
    code, out = check(spoil)
    assert code == 1 and "our tokens for 7 of 8 prompts" in out
    assert out.count("4 of 4 answers are the same") == 2


@pytest.mark.parametrize("behind, others, good", [
    (0.2, 20, True), (0.3, 2, True), (0.3, 3, False), (float("nan"), 3, False)])
def test_nine_in_ten_answers_have_to_agree(capsys, behind, others, good):
    prompts = [[{"role": "user", "content": f"Question\n{i}?"}] for i in range(20)]
    theirs = [{"text": "x" if i < others else "y", "logp": [-1.0, -2.0]} for i in range(20)]
    assert check_vllm.compare(prompts, theirs, ["y"] * 20, [([-1.5, -4.0], behind)] * 20) == good
    out = capsys.readouterr().out
    assert out.count("+0.5000") == 20 and "first tokens: 5.0e-01 apart on average" in out
    assert "all tokens: 1.2e+00 apart on average, 2.0e+00 at most" in out
    assert out.count("    vLLM: x\n    ours: y\n") == others and "Question 7?" in out


def test_a_score_is_of_the_answer_alone(model):
    ids, answer = [5, 6, 7], [9, 3]
    ((given, behind),) = check_vllm.score(model, [ids], [{"tokens": answer}])
    logp = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1).detach()
    assert given == pytest.approx([logp[2, 9].item(), logp[3, 3].item()])
    worst = max(logp[2].max() - logp[2, 9], logp[3].max() - logp[3, 3])
    assert behind == pytest.approx(worst.item())


@pytest.mark.parametrize("rank, allowed", [(8, 16), (16, 16), (17, 32), (300, 320)])
def test_the_command_names_a_rank_that_vllm_takes_and_the_loopback_address(rank, allowed):
    runs = [runlog.Run(name, Path("runs", name, "adapter"),
                       config.Config(lora=config.LoraConfig(r=r)), {})
            for name, r in (("a", rank), ("b", 4))]
    line = check_vllm.command("vllm", "model/x", runs, "bfloat16")
    assert line[:3] == ["vllm", "serve", "model/x"]
    at = {key: line[i + 1:] for i, key in enumerate(line) if key.startswith("--")}
    assert at["--lora-modules"][:2] == ["a=runs/a/adapter", "b=runs/b/adapter"]
    assert at["--max-lora-rank"][0] == str(allowed) and at["--host"][0] == "127.0.0.1"
    assert at["--port"] == [line[-1]] and 1024 < int(line[-1]) < 65536


# ----- errors ------------------------------------------------------------------------------------


def test_a_missing_executable_says_how_to_get_one(run):
    with pytest.raises(ValueError, match="no executable nowhere/vllm; `make vllm-env`"):
        check_vllm.main([str(run), "--vllm", "nowhere/vllm"])


def test_a_missing_adapter_is_named(tmp_path):
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no finished run: .*adapter_config.json is missing"):
        check_vllm.main([str(tmp_path), "--vllm", sys.executable])


def test_runs_that_one_server_cannot_have_are_refused(run):
    with pytest.raises(ValueError, match="under names that differ"):
        check_vllm.runs_of_one_server([run, run])
    other = run.rename(run.with_name("base"))
    with pytest.raises(ValueError, match="from 'base' too"):
        check_vllm.runs_of_one_server([other])
    (there,) = check_vllm.runs_of_one_server([other.rename(run)])
    assert there.name == "mine"


def test_a_server_that_dies_shows_the_end_of_its_log(run, tmp_path):
    vllm = executable(tmp_path / "vllm", "#!/bin/sh\nseq 100\necho no memory >&2\nexit 3\n")
    with pytest.raises(ValueError) as caught:
        check_vllm.main([str(run), "--vllm", vllm])
    first, *log = str(caught.value).splitlines()
    assert first == "vllm: the server ended with code 3; the end of its log:"
    assert log == [f"  {n}" for n in range(90, 101)] + ["  no memory"]


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
LINGERS = "#!/bin/sh\nsleep 600 &\necho $! > {0}\nwait\n"


def gone(file):
    """Wait for the process whose id is in the file to end."""
    for _ in range(100):
        state = Path(f"/proc/{file.read_text().strip()}/stat")
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@needs_proc
def test_a_server_that_never_is_ready_ends_with_its_children(tmp_path):
    child = tmp_path / "child"
    vllm = executable(tmp_path / "vllm", LINGERS.format(child))
    started = time.monotonic()
    with pytest.raises(ValueError, match="was not ready after 1 s"):
        with check_vllm.serve([vllm, "1"], 1):
            raise AssertionError("it was never ready")
    assert time.monotonic() - started < 20 and gone(child)


@needs_proc
@pytest.mark.parametrize("fail, caught", [
    (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
    (lambda: json.loads("{"), ValueError)])
def test_a_failure_while_asking_ends_the_server(tmp_path, monkeypatch, fail, caught):
    child, before = tmp_path / "child", signal.getsignal(signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # of a job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    vllm = executable(tmp_path / "vllm", LINGERS.format(child))
    monkeypatch.setattr(check_vllm, "wait", lambda *_: time.sleep(1))
    with pytest.raises(caught):
        with check_vllm.serve([vllm, "1"], 1):
            fail()
            time.sleep(10)
    assert gone(child) and signal.getsignal(signal.SIGTERM) == before


# ----- the real one ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.access(VLLM, os.X_OK), reason="needs vLLM: `make vllm-env`, or its path "
                    "in the environment variable VLLM")
def test_vllm_answers_as_we_do(tmp_path):
    rows = [json.dumps({"questions": f.questions, "answer": f.answer.format(f.value),
                        "value": f.value}) for f in data.FACTS[9:12]]
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    for line in (
            [ROOT / "train.py", "--config", ROOT / "config.json", "--data.path=facts.jsonl",
             "--train.batch_size=9", "--train.max_steps=10", "--train.warmup_steps=2"],
            ["-m", "scripts.check_vllm", "runs/demo", "--vllm", VLLM, "--dtype", "float32"]):
        done = subprocess.run([sys.executable, *line], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("our tokens for 40 of 40 prompts") == 2
    assert done.stdout.count("20 of 20 answers are the same") == 2      # the base and the adapter
