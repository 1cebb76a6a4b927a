"""
Check that vLLM answers as our own code does: it serves the base model and adapters on this machine.

    python -m scripts.check_vllm runs/demo [runs/other ...] --vllm .venv-vllm/bin/vllm

It sends held-out prompts as our token ids, which compares the weights, and as messages, which
compares the template. It compares the greedy answers with lora/generate.py in the server's dtype
and in float32. Rounding differs, so an answer may also part from ours at a near tie: no token may
be more than TIE behind our likeliest. Exit code 0: nine in ten answers of every model agree, and
all templates.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import torch

import data
import dataset
from lora import adapter, config
from lora.base import fetch, load
from lora.generate import Stop
from lora.run import cli, runlog
from lora.use import readers
from measure import Voice

BASE = "base"          # what the server calls the base model
TIE = 0.25             # of log probability
ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, e.g. runs/demo")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm", help="its executable")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--n", type=int, default=20, help="prompts for each model")
    parser.add_argument("--tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--seconds", type=float, default=600, help="for the server to start")
    args = parser.parse_args(argv)
    if not shutil.which(args.vllm):
        raise ValueError(f"vllm: there is no executable {args.vllm}; `make vllm-env` makes "
                         ".venv-vllm/bin/vllm, --vllm PATH names another one")
    runs = runs_of_one_server(args.runs)
    settings = runs[0].settings
    line = command(args.vllm, fetch.find(settings.model.name), runs, args.dtype)
    tokenizer = load.load_tokenizer(line[2], variables=settings.dataset.template_vars,
                                    day=settings.dataset.date)
    format = dataset.choose_format(tokenizer, settings.dataset.format)
    stop = dataset.stop_of(tokenizer, format)

    def render(messages):
        return dataset.render(messages, tokenizer, format, reply=True)[0]
    prompts = {run.name: pick(run.settings, args.n) for run in runs}
    prompts = {BASE: prompts[runs[0].name], **prompts}
    good, theirs, clock = True, {}, time.perf_counter()
    with serve(line, args.seconds) as post:
        print(f"check: vLLM was ready after {time.perf_counter() - clock:.0f} s")
        for name, messages in prompts.items():
            theirs[name] = complete(post, name, list(map(render, messages)), stop, args.tokens)
            if format != "plain":                 # a base model's server renders no messages
                texts = [answer["text"] for answer in theirs[name]]
                good &= chat(post, name, messages, render, texts, args.tokens)
    for dtype in dict.fromkeys([args.dtype, "float32"]):
        for name, run in zip(prompts, [None, *runs], strict=True):
            model = load.load_model(line[2], load.pick_device(), getattr(torch, dtype))
            if run:
                adapter.load(model, run.adapter)
            voice = Voice(model, tokenizer, format)
            ours = [answer.text for answer in voice.ask(prompts[name], args.tokens)]
            scores = score(model, list(map(voice.ids, prompts[name])), theirs[name])
            print(f"\n{name}: vLLM in {args.dtype}, ours in {dtype}")
            good &= compare(prompts[name], theirs[name], ours, scores)
    print("\ncheck: vLLM " + ("agrees" if good else "DIFFERS"))
    return int(not good)


def runs_of_one_server(paths: list[str]) -> list[runlog.Run]:
    """Read the runs. Raises ValueError unless one server can have them all: adapters of one base
    model in one format, under different names."""
    runs = [runlog.read_run(path) for path in paths]
    names = [BASE, *(run.name for run in runs)]
    bases = sorted({(run.settings.model.name, run.settings.dataset.format) for run in runs})
    if len(set(names)) < len(names) or len(bases) > 1:
        raise ValueError("check: one server takes runs of one base model and format, under names "
                         f"that differ (from {BASE!r} too); these are {names[1:]} of {bases}")
    return runs


def pick(settings: config.Config, n: int) -> list[list[dict]]:
    """At most n prompts, spread over the run's held-out examples, or over all if those are few."""
    train, val = data.load(**asdict(settings.data), seed=settings.train.seed)
    train, val = ([e for e in part if not data.is_text(e)] for part in (train, val))
    examples = val if len(val) >= n else val + train
    return [e["messages"][:-1] for e in examples[::max(1, len(examples) // n)][:n]]


def command(vllm: str, folder: str, runs: list[runlog.Run], dtype: str) -> list[str]:
    """The command vllm serve FOLDER ..., on a free port of the loopback address alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = readers.vllm_rank(max(run.settings.lora.r for run in runs))
    return [vllm, "serve", folder, "--served-model-name", BASE, "--enable-lora", "--lora-modules",
            *(f"{run.name}={run.adapter}" for run in runs), "--max-lora-rank", str(rank),
            "--dtype", dtype, "--max-model-len", "2048", "--enforce-eager",
            "--host", "127.0.0.1", "--port", str(port)]


# ----- the server --------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(line: list[str], seconds: float) -> Iterator[Callable]:
    """Run the server while the block runs; yields post(path, payload). However the block ends, the
    server and its processes end too. Raises ValueError with the end of its log if it dies or takes
    longer than seconds to start."""
    def leave(number, frame):
        sys.exit(128 + number)
    before = {s: signal.signal(s, leave) for s in (signal.SIGTERM, signal.SIGHUP)}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=ENV | os.environ,
                                 start_new_session=True)          # and a process group
        try:
            wait(child, line[-1], seconds)
            yield partial(post, line[-1])
        except OSError as error:
            log.seek(0)
            tail = "".join(f"\n  {x:.200}" for x in log.read().rstrip().splitlines()[-12:])
            raise ValueError(f"vllm: {error}; the end of its log:{tail}") from error
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):       # the second for what is left
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, number)
                    child.wait(30)
            for number, handler in before.items():
                signal.signal(number, handler)


def wait(child: subprocess.Popen, port: str, seconds: float) -> None:
    """Wait until the server is ready. Raises OSError if it ends or takes longer than seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if child.poll() is not None:
            raise OSError(f"the server ended with code {child.returncode}")
        with contextlib.suppress(OSError, ValueError):
            post(port, "/health")
            return
        time.sleep(0.5)
    raise OSError(f"the server was not ready after {seconds:g} s")


def post(port: str, path: str, payload: dict | None = None):
    """Send a JSON request past any proxy and return the reply."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"},
        data=None if payload is None else json.dumps(payload).encode())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=600) as reply:
            return json.loads(reply.read() or "null")
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise ValueError(f"vllm: {path} answered {error.code}: {text:.500}") from error


# ----- questions and comparisons -----------------------------------------------------------------


def complete(post: Callable, name: str, prompts: list[list[int]], stop: Stop, n: int) -> list[dict]:
    """vLLM's answers to prompts of token ids: text, tokens, and their log probabilities."""
    reply = post("/v1/completions", {
        "model": name, "prompt": prompts, "temperature": 0, "max_tokens": n, "logprobs": 1,
        "return_token_ids": True, "stop_token_ids": sorted(stop.ids),
        **({"stop": [stop.text]} if stop.text else {})})
    return [{"text": choice["text"].strip(), "tokens": choice["token_ids"],
             "logp": choice["logprobs"]["token_logprobs"]}
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]


def chat(post: Callable, name: str, prompts: list[list[dict]], render: Callable, texts: list[str],
         n: int) -> bool:
    """Whether the server renders messages as we do, with their system prompt and without. Prints
    that count, and how many answers are texts, those to our ids."""
    bare = [[m for m in messages if m["role"] != "system"] for messages in prompts]

    def tokens(messages):
        return post("/tokenize", {"model": name, "messages": messages})["tokens"]

    def answer(messages):
        reply = post("/v1/chat/completions", {"model": name, "messages": messages,
                                              "temperature": 0, "max_tokens": n})
        return reply["choices"][0]["message"]["content"].strip()
    with ThreadPoolExecutor(8) as pool:
        right = [got == render(m) for got, m in zip(pool.map(tokens, prompts + bare),
                                                    prompts + bare, strict=True)]
        same = sum(a == b for a, b in zip(pool.map(answer, prompts), texts, strict=True))
    print(f"{name}: messages become our tokens for {sum(right)} of {len(right)} prompts (half of "
          f"them without system prompt); {same} of {len(texts)} answers are those to our tokens")
    return all(right)


@torch.no_grad()
def score(model, prompts: list[list[int]], theirs: list[dict]) -> list[tuple[list[float], float]]:
    """Score vLLM's answers by our model: (log probabilities of the tokens, how far the worst of
    them is behind our likeliest)."""
    scores = []
    for ids, answer in zip(prompts, theirs, strict=True):
        both = torch.tensor([ids + answer["tokens"]], device=model.device)
        logp = model(input_ids=both).logits[0, len(ids) - 1:-1].float().log_softmax(-1)
        chosen = logp.gather(1, both[0, len(ids):, None])[:, 0]
        scores.append((chosen.tolist(), (logp.amax(1) - chosen).max().item()))
    return scores


def compare(prompts: list[list[dict]], theirs: list[dict], ours: list[str],
            scores: list[tuple[list[float], float]]) -> bool:
    """Print the table of one model; returns whether nine in ten answers agree."""
    count, apart = {"same": 0, "tie": 0, "OTHER": 0}, []
    print("  answer  first token  behind  prompt")
    for messages, t, o, (logp, behind) in zip(prompts, theirs, ours, scores, strict=True):
        verdict = "same" if t["text"] == o else "tie" if behind <= TIE else "OTHER"
        count[verdict] += 1
        apart.append([a - b for a, b in zip(t["logp"], logp, strict=True)])
        print(f"  {verdict:6}  {apart[-1][0]:+11.4f}  {behind:6.2f}  "
              f"{' '.join(messages[-1]['content'].split()):.66}")
        if verdict != "same":
            print(f"    vLLM: {' '.join(t['text'].split()):.90}\n"
                  f"    ours: {' '.join(o.split()):.90}")
    print(f"  {count['same']} of {len(ours)} answers are the same, {count['tie']} part at near "
          "ties")
    for what, off in (("first", [a[0] for a in apart]), ("all", [x for a in apart for x in a])):
        print(f"  log probability of {what} tokens: {sum(map(abs, off)) / len(off):.1e} apart on "
              f"average, {max(map(abs, off)):.1e} at most")
    return count["OTHER"] * 10 <= len(ours)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
