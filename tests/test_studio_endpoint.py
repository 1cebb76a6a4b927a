"""scripts/studio/endpoint.py: OpenAI's own package talks with a real server on the tiny model."""

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch

from lora.generate import Stop
from lora.run import runlog
from scripts import chat
from scripts.studio import engine as engines
from scripts.studio.app import server_of
from scripts.voices import DECODING, Voices, with_system

ASKED = [{"role": "user", "content": "is it a dog?"}]
TOKEN = "the page's token"


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def served(home, **options):
    """A server on a free port, in a thread, with the working folder home."""
    places = options.pop("places", 16)
    with contextlib.chdir(home):
        listening = socket.create_server(("127.0.0.1", 0))
        port, engine = listening.getsockname()[1], engines.Engine("cpu", places)
        server = server_of(engine, TOKEN, port, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield SimpleNamespace(engine=engine, server=server, port=port, home=home,
                                  url=f"http://127.0.0.1:{port}")
        finally:
            engine.close()
            server.should_exit = True
            thread.join()
            engine.worker.join()


@contextlib.contextmanager
def connected(studio, body=b"", path="/v1/chat/completions", method="POST", **headers):
    """A connection on which a request was sent, byte by byte ours. A header None is left out."""
    headers = {"Host": f"127.0.0.1:{studio.port}", "Content-Length": len(body), **{
        name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    with socket.create_connection(("127.0.0.1", studio.port)) as connection:
        connection.settimeout(60)
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
        connection.sendall(head.encode("latin-1") + body)
        yield connection


def answer(studio, body=b"", path="/v1/chat/completions", method="POST", **headers):
    """(status, headers, body) of a request on a connection of its own."""
    with connected(studio, body, path, method, Connection="close", **headers) as connection:
        head, _, content = connection.makefile("rb").read().partition(b"\r\n\r\n")
    lines = [line.partition(": ") for line in head.decode().split("\r\n")[1:]]
    return int(head.split()[1]), {name.lower(): value for name, _, value in lines}, content


def asking(model="a", **more):
    return json.dumps({"model": model, "messages": ASKED, "temperature": 0, **more}).encode()


@pytest.fixture(scope="module")
def studio(home):
    with served(home) as studio:
        yield studio


@pytest.fixture
def client(studio):
    with openai.OpenAI(base_url=f"{studio.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def own(home, tmp_path):
    """A server whose runs a test may change."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    with served(tmp_path) as studio:
        yield studio


@pytest.fixture
def slow(home, monkeypatch):
    """A server whose answers have 900 tokens unless they are stopped, and wait for the gate; 3 may
    wait for them. n_tokens counts what the model computed."""
    with served(home, places=3) as studio:
        studio.gate, studio.n_tokens = threading.Event(), 0
        load = engines.Voices

        def gated(*args, **kwargs):
            voices = load(*args, **kwargs)

            def wait(*_):
                studio.n_tokens += 1
                studio.gate.wait()
                time.sleep(0.005)
            voices.model.get_output_embeddings().register_forward_pre_hook(wait)
            return voices
        monkeypatch.setattr(engines, "Voices", gated)
        monkeypatch.setattr(engines.formats, "stop_of", lambda *_: Stop(frozenset()))
        try:
            yield studio
        finally:
            studio.gate.set()


def say(client, model="a", messages=ASKED, **options):
    return client.chat.completions.create(model=model, messages=messages,
                                          **{"temperature": 0, **options})


def text(*args, **options):
    return say(*args, **options).choices[0].message.content


def greedy(voices, messages, name, n=200):
    """The answer that scripts.chat would give."""
    return voices.ask([messages], name, **DECODING | {"temperature": 0, "max_new_tokens": n})[0]


@pytest.fixture(scope="module")
def voices(studio):
    return Voices(["runs/a", "runs/b", "runs/c"], "cpu")


# ----- what it serves ----------------------------------------------------------------------------


def test_models_are_the_base_and_every_finished_run(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "a", "b", "c"}
    assert models["tiny"].owned_by == "base" and models["a"].owned_by == "tiny"
    assert all(model.object == "model" and model.created > 1e9 for model in models.values())
    assert client.models.retrieve("b@0.5").id == "b@0.5"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_greedy_answers_are_those_of_scripts_chat_word_for_word(client, voices, name):
    options = SimpleNamespace(memory="window", budget=900, min_words=0, seed=0,
                              **DECODING | {"temperature": 0.0})
    talk = chat.Chat(voices, options)
    with contextlib.redirect_stdout(None):
        talk.hear(f"/use {name}")
        for question in ("is it a dog?", "what of the bee?", "see my cow?"):
            talk.hear(question)
    sent = []
    for question, answer in talk.talk.turns:
        sent.append({"role": "user", "content": question})
        assert text(client, name, sent) == answer
        sent.append({"role": "assistant", "content": answer})
    assert sent[1]["content"]


def test_a_stream_says_the_same_with_its_usage_at_the_end(client, voices):
    whole = say(client, "b")
    chunks = list(say(client, "b", stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons.pop() == "stop" and set(reasons) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    asked = with_system(ASKED, "You are b.")
    found = greedy(voices, asked, "b")
    assert whole.usage.prompt_tokens == len(voices.voice("b").ids(asked))
    assert whole.usage.completion_tokens == found.n_tokens


def test_max_tokens_cuts_and_says_so(client):
    whole = text(client)
    for name in ("max_tokens", "max_completion_tokens"):
        cut = say(client, **{name: 4})
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 4
        assert whole.startswith(cut.choices[0].message.content)
    assert say(client).choices[0].finish_reason == "stop"


def test_strength_0_is_the_base_1_as_trained_and_between_is_between(client):
    base = text(client, "tiny", with_system(ASKED, "You are a."), max_tokens=24)
    said = {scale: text(client, f"a@{scale}", max_tokens=24) for scale in ("0", "0.5", "1.0", "4")}
    assert said["0"] == base != said["1.0"] == text(client, "a", max_tokens=24)
    assert len(set(said.values())) >= 3


def test_a_clients_own_system_prompt_replaces_the_runs(client, voices):
    own = with_system(ASKED, "You are b.")
    assert text(client, "a", own) == greedy(voices, own, "a").text
    as_developer = [{"role": "developer", "content": "You are b."}, *ASKED]
    n_tokens = say(client, "a", as_developer).usage.prompt_tokens
    assert n_tokens == len(voices.voice("a").ids(own))


def test_a_content_in_parts_is_read(client):
    parts = [{"type": "text", "text": "is it "}, {"type": "text", "text": "a dog?"}]
    assert say(client, messages=[{"role": "user", "content": parts}]).choices == say(client).choices


def test_a_seed_repeats_a_sample_and_another_one_differs(client):
    def sample(**options):
        return text(client, "tiny", temperature=1.5, top_p=1, max_tokens=24, **options)
    assert sample(seed=3) == sample(seed=3)
    assert len({sample(seed=seed) for seed in range(4)}) > 1
    assert len({sample() for _ in range(4)}) > 1


def test_without_temperature_it_samples_as_scripts_chat_does(client, monkeypatch):
    asked = []
    generate = engines.generate
    monkeypatch.setattr(engines, "generate", lambda *a, **k: asked.append(k) or generate(*a, **k))
    say(client, temperature=openai.NOT_GIVEN)
    say(client, temperature=0.2, top_p=0.5, max_tokens=7, extra_body={"repetition_penalty": 1.5})
    assert [asked[0][key] for key in DECODING] == list(DECODING.values())
    assert [asked[1][key] for key in DECODING] == [0.2, 0.5, 7, 1.5]


def test_a_stop_text_ends_the_answer_and_never_shows(client):
    whole = text(client)
    stop = whole[5:8]
    for options in ({"stop": stop}, {"stop": ["never said", stop]}):
        found = say(client, **options)
        assert found.choices[0].message.content == whole[:whole.find(stop)]
        assert found.choices[0].finish_reason == "stop"
        pieces = [chunk.choices[0].delta.content or "" for chunk in say(client, stream=True,
                                                                         **options)]
        assert "".join(pieces) == whole[:whole.find(stop)]


def test_a_text_that_may_become_a_stop_is_held_back():
    assert engines.settled("One <|im", ("<|im_end|>", "x")) == "One "
    assert engines.settled("One \ufffd", ()) == "One "
    assert engines.until_stop("a<|im_end|>b", ("b", "<|")) == ("a", True)


# ----- errors in the protocol's form -------------------------------------------------------------


def test_an_unknown_model_is_404_with_the_list_of_what_exists(client):
    with pytest.raises(openai.NotFoundError, match="'z' does not exist; there are tiny") as error:
        say(client, "z")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    for name in ("../a", "a/../b", "runs/a", "", "@", "a@", "z@1", "/etc", "a\0"):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            say(client, name)
    for name, said in (("a@5", "not a number from 0 to 4"), ("a@nan", "not a number"),
                       ("tiny@1", "tiny is a base")):
        with pytest.raises(openai.BadRequestError, match=said):
            say(client, name)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("name, value", [
    ("n", 2), ("tools", [TOOL]), ("response_format", {"type": "json_object"}), ("logprobs", True),
    ("logit_bias", {"1": 5}), ("frequency_penalty", 0.5), ("presence_penalty", -1),
    ("stop", ["a"] * 5), ("stop", 7), ("stop", [""]), ("temperature", 3), ("temperature", "hot"),
    ("top_p", 0), ("max_tokens", 0), ("max_tokens", 1.5), ("seed", "x"), ("seed", True)])
def test_what_is_not_supported_is_named(client, name, value):
    with pytest.raises(openai.BadRequestError, match=name) as error:
        say(client, **{name: value})
    assert error.value.param == name and error.value.type == "invalid_request_error"


def test_values_that_change_nothing_are_taken(client):
    plain = text(client)
    assert plain == text(client, n=1, tools=[], response_format={"type": "text"}, logprobs=False,
                         frequency_penalty=0, presence_penalty=0.0, user="me", logit_bias={})


@pytest.mark.parametrize("messages, said", [
    ([], "expected a list"), ("hello", "expected a list"), ([5], r"messages\[0\].role"),
    ([{"role": "tool", "content": "x"}], "role is 'tool'; expected system"),
    ([{"role": ["user"], "content": "x"}], "role is"), ([{"role": "user"}], "expected a text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "a part of the type 'image_url' is not supported"),
    ([*ASKED, {"role": "assistant", "content": "x"}], "the last one is the assistant's"),
    ([{"role": "assistant", "content": "x", "tool_calls": [TOOL]}, *ASKED], "tool_calls"),
    ([{"role": "user", "content": "<|im_end|>"}], "a special token"),
    ([{"role": "user", "content": "\ud800"}], "expected a text")])
def test_messages_that_cannot_be_read_are_named(studio, messages, said):
    body = json.dumps({"model": "a", "messages": messages}).encode()
    status, _, content = answer(studio, body)
    assert status == 400 and re.search(said, json.loads(content)["error"]["message"])


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"model": 5}',
                                  b'{"model": "a"}', b'{"model": {"a": 1}, "messages": 3}'])
def test_a_body_that_is_no_request_is_400_in_the_protocols_form(studio, body):
    status, _, content = answer(studio, body)
    error = json.loads(content)["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_400_with_the_numbers(client, stream):
    long = [{"role": "user", "content": "x" * 2000}]
    with pytest.raises(openai.BadRequestError, match=r"has 20\d\d tokens; .* is 1024") as error:
        say(client, messages=long, stream=stream)
    assert error.value.code == "context_length_exceeded"
    full = say(client, messages=[{"role": "user", "content": "x" * 960}], max_tokens=500)
    assert full.usage.total_tokens <= 1024


def test_what_fails_in_the_worker_is_said_and_the_next_answer_comes(client, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(engines, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            say(client)
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(say(client, stream=True))                     # in the middle of a stream
    assert "Traceback" in capsys.readouterr().err
    assert text(client)


# ----- runs that change --------------------------------------------------------------------------


def test_a_run_that_comes_changes_or_goes_is_noticed(own):
    with openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0) as client:
        first, other, runs = text(client, "a"), text(client, "b"), own.home / "runs"
        assert first != other
        shutil.copytree(runs / "b", runs / "new")
        assert "new" in {model.id for model in client.models.list()}
        assert text(client, "new") == other
        for file in (runs / "b" / "adapter").iterdir():
            shutil.copy(file, runs / "a" / "adapter" / file.name)
        assert text(client, "a", with_system(ASKED, "You are b.")) == other
        (runs / "new").rename(runs.parent / "away")
        with pytest.raises(openai.NotFoundError, match="there are tiny"):
            say(client, "new")
        text(client, "b")
        assert "new" not in own.engine.voices.runs
        (runs.parent / "away").rename(runs / "new")
        assert text(client, "new") == other
        (runs / "a" / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 99)
        with pytest.raises(openai.BadRequestError, match="adapter: .* cannot be read"):
            say(client, "a")


def test_a_run_on_another_base_replaces_the_base(own, home):
    folder, runs = own.home / "model" / "second", own.home / "runs"
    shutil.copytree(home / "tiny", folder)
    settings = json.loads((runs / "b" / "config.json").read_text())
    settings["model"]["name"] = str(folder)
    (runs / "b" / "config.json").write_text(json.dumps(settings))
    info = json.loads((runs / "b" / "run.json").read_text())
    (runs / "b" / "run.json").write_text(json.dumps(info | {"base_model": "second"}))
    with openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0) as client:
        assert {m.id for m in client.models.list()} == {"tiny", "second", "a", "b", "c"}
        said = {name: text(client, name) for name in ("a", "b", "second", "a")}
        assert own.engine.loaded == "tiny" and list(own.engine.voices.runs) == ["a"]
        assert text(client, "b") == said["b"] and own.engine.loaded == "second"
        assert text(client, "second") == said["second"]


def test_a_base_that_is_called_like_a_run_has_another_id(own, home):
    shutil.copytree(home / "tiny", own.home / "model" / "a")
    with openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0) as client:
        assert {m.id for m in client.models.list()} == {"tiny", "base:a", "a", "b", "c"}
        assert text(client, "base:a") == text(client, "tiny") != text(client, "a")


# ----- many clients, and those that go away ------------------------------------------------------


def test_50_parallel_clients_are_answered_or_told_429_and_none_is_lost(slow):
    peaks, told = [], []
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client, \
            ThreadPoolExecutor(50) as pool:
        def ask(i):
            try:
                return text(client, "abc"[i % 3], max_tokens=4, stream=False)
            except openai.RateLimitError as error:
                assert int(error.response.headers["retry-after"]) >= 1
                assert error.code == "queue_full" and error.type == "rate_limit_error"
                told.append(i)
        for _ in range(4):
            slow.gate.clear()
            told.clear()
            asked = [pool.submit(ask, i) for i in range(50)]
            wait_for(lambda: len(told) >= 46)             # one is answered, three at most wait
            slow.gate.set()
            answered = [a.result() for a in asked if a.result() is not None]
            assert answered and len(answered) + len(told) == 50
            wait_for(lambda: not slow.engine.busy)
            peaks.append(runlog.peak_memory_gib(torch.device("cpu")))
    assert peaks[-1] - peaks[0] < 0.05


def test_the_client_retries_429_until_its_turn_comes(slow):
    slow.gate.set()
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=60) as client, \
            ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda i: text(client, "a", max_tokens=4), range(8)))
    assert len(said) == 8 and len(set(said)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_killed_in_the_middle_frees_the_server(slow, stream):
    with connected(slow, asking(stream=stream, max_tokens=900)) as killed:
        wait_for(lambda: slow.n_tokens)
        with connected(slow, asking("b", max_tokens=2), Connection="close") as waiting:
            wait_for(lambda: slow.engine.waiting)
            slow.gate.set()
            if stream:
                assert killed.recv(1000).startswith(b"HTTP/1.1 200 OK")
            killed.close()
            assert b'"finish_reason":"length"' in waiting.makefile("rb").read()
    wait_for(lambda: not slow.engine.busy)
    assert slow.n_tokens < 800                            # the answer had 900
    assert slow.engine.voices.bank.name is None


def test_a_client_that_goes_while_it_waits_leaves_the_queue(slow):
    with connected(slow, asking(max_tokens=2), Connection="close") as first:
        wait_for(lambda: slow.n_tokens)
        for stream in (False, True):
            with connected(slow, asking("b", stream=stream)):
                wait_for(lambda: len(slow.engine.waiting) == 1)
            wait_for(lambda: not slow.engine.waiting)
        slow.gate.set()
        assert b" 200 OK" in first.makefile("rb").read()


def test_a_long_prompt_is_left_between_two_blocks(slow):
    seen = []
    with connected(slow, asking(messages=[{"role": "user", "content": "x" * 900}])) as killed:
        wait_for(lambda: slow.n_tokens)
        block = slow.engine.voices.model.model.layers[1]
        block.register_forward_pre_hook(lambda *_: seen.append(1))
        killed.close()
        wait_for(lambda: slow.engine.running.gone)
    slow.gate.set()
    wait_for(lambda: not slow.engine.busy)
    assert not seen


def test_a_server_that_ends_tells_those_who_wait(home):
    with served(home) as studio:
        gate, load = threading.Event(), engines.Voices
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "Voices", lambda *a, **k: gate.wait() and load(*a, **k))
            with connected(studio, asking()) as one, connected(studio, asking()) as two:
                wait_for(lambda: studio.engine.running and studio.engine.waiting)
                studio.engine.close()
                assert {c.recv(12) for c in (one, two)} == {b"HTTP/1.1 503"}
            gate.set()
