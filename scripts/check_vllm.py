"""
Does vLLM answer as our own code does? The base model and adapters, served and asked right here.

    python -m scripts.check_vllm runs/demo [runs/other ...] --vllm .venv-vllm/bin/vllm

Greedy answers to held-out prompts, sent as our own token ids (which compares the weights) and as
messages (which compares the template), against lora/generate.py in the server's dtype and in
float32. Two right programs round differently, so an answer may also part from ours at a near tie:
no token of it may be more than TIE behind our likeliest. Exit code 0: nine in ten answers of every
model agree, and all templates.
"""

import argparse
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import torch

import data
import dataset
from lora import adapter, base, config, fetch, readers, runlog
from lora.generate import generate

BASE = "base"          # what the server calls the base model
TIE = 0.25             # of log probability
ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.check_vllm", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs, e.g. runs/demo")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--n", type=int, default=20, help="prompts for each model")
    parser.add_argument("--tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--seconds", type=float, default=600, help="for the server to start")
    args = parser.parse_args(argv)
    if not shutil.which(args.vllm):
        raise ValueError(f"vllm: there is no executable {args.vllm}; `make vllm-env` makes "
                         ".venv-vllm/bin/vllm, another one is named with --vllm PATH")
    runs = look_at(args.runs)
    settings = runs[0].settings
    line = command(args.vllm, fetch.find(settings.model.name), runs, args.dtype)
    tokenizer = base.load_tokenizer(line[2])
    format = dataset.choose_format(tokenizer, settings.dataset.format)
    stop = dataset.stop_of(tokenizer, format)

    def render(messages):
        return dataset.render(messages, tokenizer, format, reply=True)[0]
    prompts = [pick(run.settings, args.n) for run in runs]
    asked = dict(zip([BASE, *(run.name for run in runs)], [prompts[0], *prompts], strict=True))
    good, theirs, clock = True, {}, time.perf_counter()
    with serve(line, args.seconds) as post:
        print(f"check: vLLM was ready after {time.perf_counter() - clock:.0f} s")
        for name, messages in asked.items():
            theirs[name] = complete(post, name, list(map(render, messages)), stop, args.tokens)
            if format != "plain":                 # a base model's server renders no messages
                said = [answer["text"] for answer in theirs[name]]
                good &= chat(post, name, messages, render, said, args.tokens)
    for dtype in dict.fromkeys([args.dtype, "float32"]):
        for name, run in zip(asked, [None, *runs], strict=True):
            model = base.load_model(line[2], base.pick_device(), getattr(torch, dtype))
            if run:
                adapter.load(model, run.adapter)
            ids = list(map(render, asked[name]))
            own = [tokenizer.decode(answer, skip_special_tokens=True).strip()
                   for answer in generate(model, ids, stop, args.tokens)]
            print(f"\n{name}: vLLM in {args.dtype}, ours in {dtype}")
            good &= compare(asked[name], theirs[name], own, score(model, ids, theirs[name]))
    print("\ncheck: vLLM " + ("agrees" if good else "DIFFERS"))
    return int(not good)


def look_at(paths):
    """The runs. Raises ValueError unless one server can have them all: adapters of one base model
    in one format, under different names."""
    runs = [runlog.read_run(path) for path in paths]
    names = [BASE, *(run.name for run in runs)]
    bases = sorted({(run.settings.model.name, run.settings.dataset.format) for run in runs})
    if len(set(names)) < len(names) or len(bases) > 1:
        raise ValueError("check: one server takes runs of one base model and format, under names "
                         f"that differ (from {BASE!r} too); these are {names[1:]} of {bases}")
    return runs


def pick(settings, n):
    """The messages of n prompts or fewer, spread over the run's held-out examples, or over all."""
    train, val = data.load(**asdict(settings.data), seed=settings.train.seed)
    examples = val if len(val) >= n else val + train
    return [e["messages"][:-1] for e in examples[::max(1, len(examples) // n)][:n]]


def command(vllm, folder, runs, dtype):
    """vllm serve FOLDER ..., on a free port of the loopback address alone."""
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
def serve(line, seconds):
    """Run the server while the block runs; gives post(path, payload). However the block ends, the
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


def wait(child, port, seconds):
    """Return when the server is ready, raise OSError when it will not be."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if child.poll() is not None:
            raise OSError(f"the server ended with code {child.returncode}")
        with contextlib.suppress(OSError, ValueError):
            return post(port, "/health")
        time.sleep(0.5)
    raise OSError(f"the server was not ready after {seconds:g} s")


def post(port, path, payload=None):
    """The reply to a JSON request; no proxy is asked for it."""
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


# ----- what is asked and compared ----------------------------------------------------------------


def complete(post, name, prompts, stop, n):
    """vLLM's answers to prompts of token ids: text, tokens, and their log probabilities."""
    reply = post("/v1/completions", {
        "model": name, "prompt": prompts, "temperature": 0, "max_tokens": n, "logprobs": 1,
        "return_token_ids": True, "stop_token_ids": sorted(stop.ids),
        **({"stop": [stop.text]} if stop.text else {})})
    return [{"text": choice["text"].strip(), "tokens": choice["token_ids"],
             "logp": choice["logprobs"]["token_logprobs"]}
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]


def chat(post, name, prompts, render, said, n):
    """Does the server render messages as we do, with their system prompt and without, and answer
    them as it did our ids? Prints both counts."""
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
        same = sum(a == b for a, b in zip(pool.map(answer, prompts), said, strict=True))
    print(f"{name}: messages become our tokens for {sum(right)} of {len(right)} prompts (half of "
          f"them without system prompt); {same} of {len(said)} answers are those to our tokens")
    return all(right)


@torch.no_grad()
def score(model, prompts, theirs):
    """For each of vLLM's answers, by our model: (its tokens' log probabilities, how far the worst
    of them is behind our likeliest)."""
    made = []
    for ids, answer in zip(prompts, theirs, strict=True):
        both = torch.tensor([ids + answer["tokens"]], device=model.device)
        logp = model(input_ids=both).logits[0, len(ids) - 1:-1].float().log_softmax(-1)
        given = logp.gather(1, both[0, len(ids):, None])[:, 0]
        made.append((given.tolist(), (logp.amax(1) - given).max().item()))
    return made


def compare(prompts, theirs, own, scores):
    """Print the table of one model. Do nine in ten answers agree?"""
    count, apart = {"same": 0, "tie": 0, "OTHER": 0}, []
    print("  answer  first token  behind  prompt")
    for messages, t, o, (logp, behind) in zip(prompts, theirs, own, scores, strict=True):
        verdict = "same" if t["text"] == o else "tie" if behind <= TIE else "OTHER"
        count[verdict] += 1
        apart.append([a - b for a, b in zip(t["logp"], logp, strict=True)])
        print(f"  {verdict:6}  {apart[-1][0]:+11.4f}  {behind:6.2f}  "
              f"{' '.join(messages[-1]['content'].split()):.66}")
        if verdict != "same":
            print(f"    vLLM: {' '.join(t['text'].split()):.90}\n"
                  f"    ours: {' '.join(o.split()):.90}")
    print(f"  {count['same']} of {len(own)} answers are the same, {count['tie']} part at near ties")
    for what, off in (("first", [a[0] for a in apart]), ("all", [x for a in apart for x in a])):
        print(f"  log probability of {what} tokens: {sum(map(abs, off)) / len(off):.1e} apart on "
              f"average, {max(map(abs, off)):.1e} at most")
    return count["OTHER"] * 10 <= len(own)


if __name__ == "__main__":
    config.run_cli(main, sys.argv[1:])
