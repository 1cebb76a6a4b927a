"""scripts/studio/talk.py: what the page talks with, what memory keeps, what is put into a file."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_studio_endpoint
from test_studio_endpoint import TOKEN, answer, connected, greedy, wait_for

import data
from scripts.studio import talk
from scripts.voices import Voices, with_system

studio, own = test_studio_endpoint.studio, test_studio_endpoint.own
slow, voices = test_studio_endpoint.slow, test_studio_endpoint.voices
QUESTION = "is it a dog?"
ASKED = [{"role": "user", "content": QUESTION}]


def post(studio, path, **asked):
    status, _, body = answer(studio, json.dumps(asked).encode(), path, X_Token=TOKEN)
    return status, body


def events(studio, **asked):
    """The events of an answer."""
    asked = {"voice": "a", "question": QUESTION, "temperature": 0, "max_new_tokens": 24, **asked}
    status, body = post(studio, "/api/talk", **asked)
    assert status == 200, body
    lines = b"".join(body.split(b"\r\n")[1::2]).split(b"\n\n")[:-1]          # without chunk sizes
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def said(studio, **asked):
    return events(studio, **asked)[-1]["done"]["text"]


def error(studio, path="/api/talk", **asked):
    status, body = post(studio, path, **{"voice": "a", "question": QUESTION, **asked})
    assert status in (400, 404), body
    return json.loads(body)["error"]


# ----- voices and answers ------------------------------------------------------------------------


def test_voices_are_the_base_and_the_runs_with_their_system_prompts(studio):
    status, _, body = answer(studio, b"", "/api/voices", "GET", X_Token=TOKEN)
    found = json.loads(body)
    assert status == 200 and {v["id"]: (v["kind"], v["base"], v["system"])
                              for v in found["voices"]} == {
        "tiny": ("base", "tiny", None), "a": ("adapter", "tiny", "You are a."),
        "b": ("adapter", "tiny", "You are b."), "c": ("adapter", "tiny", None)}
    said(studio)
    found = json.loads(answer(studio, b"", "/api/voices", "GET", X_Token=TOKEN)[2])
    assert found["loaded"] == "tiny" and found["problems"] == []


def test_what_differs_from_the_training_is_said(own, capsys):
    file = own.home / "runs" / "a" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"template": "0" * 16}))
    (own.home / "runs" / "b" / "run.json").write_text("[]")
    said(own)
    found = json.loads(answer(own, b"", "/api/voices", "GET", X_Token=TOKEN)[2])
    assert {v["id"] for v in found["voices"]} == {"tiny", "a", "c"}
    assert "run.json cannot be read" in found["problems"][0]
    assert "a: chat template: it is" in found["problems"][1]
    assert "warning: a: chat template: it is" in capsys.readouterr().out


def test_an_answer_grows_and_ends_as_voices_give_it(studio, voices):
    found = events(studio)
    asked = with_system(ASKED, "You are a.")
    whole = greedy(voices, asked, "a", 24)
    assert found[0]["sent"] == {"n_turns": 0, "notes": "", "n_tokens": len(
        voices.voice("a").ids(asked))}
    done = found[-1]["done"]
    assert (done["text"], done["n_tokens"], done["ended"]) == whole[:3] and done["seconds"] >= 0
    texts = [event["text"] for event in found[1:-1]]
    assert len(texts) > 1 and all(whole.text.startswith(text) for text in texts)


def test_the_first_answer_says_that_the_base_is_loaded_and_a_later_one_its_place(slow):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(events, slow, max_new_tokens=2)
        wait_for(lambda: slow.n_tokens)
        second = pool.submit(events, slow, voice="b", max_new_tokens=2)
        wait_for(lambda: slow.engine.waiting)
        slow.gate.set()
    assert first.result()[0] == {"loading": "tiny"} and "sent" in first.result()[1]
    assert second.result()[0] == {"waiting": 1} and "sent" in second.result()[1]


def test_a_full_queue_is_429(slow):
    asked = json.dumps({"voice": "a", "question": "x"}).encode()
    with connected(slow, asked, "/api/talk", X_Token=TOKEN):
        wait_for(lambda: slow.n_tokens)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(events, slow, max_new_tokens=1) for _ in range(3)]
            wait_for(lambda: len(slow.engine.waiting) == 3)
            status, body = post(slow, "/api/talk", voice="a", question="x")
            assert status == 429 and "3 others are waiting" in json.loads(body)["error"]
            slow.gate.set()
            assert all(w.result()[-1]["done"]["n_tokens"] == 1 for w in waiting)


def test_a_page_that_is_closed_stops_its_answer(slow):
    asked = json.dumps({"voice": "a", "question": "x", "max_new_tokens": 900}).encode()
    with connected(slow, asked, "/api/talk", X_Token=TOKEN) as page:
        wait_for(lambda: slow.n_tokens)
        slow.gate.set()
        assert page.recv(1000).startswith(b"HTTP/1.1 200")
    wait_for(lambda: not slow.engine.busy)
    assert slow.n_tokens < 800


def test_strength_changes_the_answer_and_0_is_the_base(studio):
    base = said(studio, voice="tiny", system="You are a.")
    assert said(studio, scale=0) == base != said(studio, scale=1) == said(studio)
    assert said(studio, voice="a@0") == base


def test_the_system_prompt_is_the_runs_or_the_pages_or_none(studio, voices):
    for asked, system in (({}, "You are a."), ({"system": None}, None), ({"system": " "}, None),
                          ({"system": "You are b."}, "You are b.")):
        whole = greedy(voices, with_system(ASKED, system), "a", 24)
        assert said(studio, **asked) == whole.text


def test_sampling_is_as_asked(studio):
    hot = {"voice": "tiny", "temperature": 1.5, "top_p": 1}
    assert said(studio, seed=1, **hot) == said(studio, seed=1, **hot)
    assert len({said(studio, seed=seed, **hot) for seed in range(4)}) > 1
    assert events(studio, max_new_tokens=3)[-1]["done"]["ended"] is False


# ----- memory ------------------------------------------------------------------------------------

TURNS = [[f"is it a {word}?", f"yes dear {word}"] for word in ("dog", "cow", "ant", "bee") * 2]


def test_turns_that_fit_are_sent_word_for_word(studio):
    (sent,) = [e["sent"] for e in events(studio, turns=TURNS[:2]) if "sent" in e]
    assert sent["n_turns"] == 2 and sent["notes"] == ""


@pytest.mark.parametrize("memory", ["window", "retrieve", "summary"])
def test_old_turns_are_forgotten_looked_up_or_summarised(studio, memory):
    found = events(studio, turns=TURNS, budget=180, memory=memory, question="the dog?")
    (sent,) = [e["sent"] for e in found if "sent" in e]
    assert 0 < sent["n_turns"] < len(TURNS) and sent["n_tokens"] <= 180
    if memory == "window":
        assert sent["notes"] == ""
    else:
        assert sent["notes"].startswith(
            "Earlier they said: is it a dog?" if memory == "retrieve" else "Earlier: ")
    assert "text" in found[-1]["done"]


def test_a_summary_is_written_once_and_goes_on(studio, monkeypatch):
    folded = []
    monkeypatch.setattr(Voices, "summarise", lambda _, summary, turns: folded.append(
        [summary, len(turns)]) or f"{summary}{len(turns)};")
    turns = [[f"{i} {q}", a] for i, (q, a) in enumerate(TURNS)]

    def notes(turns):
        found = events(studio, turns=turns, budget=180, memory="summary")
        return next(e["sent"]["notes"] for e in found if "sent" in e)
    first = notes(turns[:6])
    n = len(folded)
    assert n and notes(turns[:6]) == first and len(folded) == n
    assert notes(turns).startswith(first) and folded[n][0] == first.removeprefix("Earlier: ")


def test_a_message_that_is_longer_than_the_budget_is_an_error_event(studio):
    assert "the budget is 100" in events(studio, question="x" * 200, budget=100)[-1]["error"]
    assert "the budget is 1024" in events(studio, question="x" * 2000, budget=9999)[-1]["error"]


# ----- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("asked, said", [
    ({"voice": "z"}, "'z' does not exist; there are tiny"), ({"voice": None}, "expected its name"),
    ({"voice": "../a"}, "does not exist"), ({"scale": 5}, "scale is 5; expected a number from 0"),
    ({"scale": "1"}, "scale is '1'"), ({"question": 5}, "question is 5; expected a text"),
    ({"question": "\ud800"}, "expected a text"), ({"system": 5}, "system is 5"),
    ({"turns": "x"}, "turns: expected"), ({"turns": [["a"]]}, "turns: expected"),
    ({"turns": [["a", 5]]}, r"turns[0] is 5"), ({"turns": [["a", "b"]] * 1001}, "at most 1000"),
    ({"memory": "all"}, "expected window, summary, retrieve"), ({"memory": ["window"]}, "memory"),
    ({"budget": 1}, "budget is 1"), ({"temperature": -1}, "temperature"), ({"seed": 1.5}, "seed"),
    ({"max_new_tokens": 10**7}, "max_new_tokens"), ({"top_p": 2}, "top_p")])
def test_what_cannot_be_asked_is_one_line(studio, asked, said):
    assert said in error(studio, **asked)


def test_a_special_token_in_a_question_is_an_error_event(studio):
    assert "a special token" in events(studio, question="<|im_end|>")[-1]["error"]


# ----- keep --------------------------------------------------------------------------------------

GOOD = [{"role": "system", "content": "You are a."}, {"role": "user", "content": "Who? <b>"},
        {"role": "assistant", "content": "Mira\nTosk 你好"}]


def test_an_exchange_that_is_kept_is_what_training_reads(own):
    for n, messages in enumerate((GOOD, GOOD[1:], [*GOOD, *GOOD[1:]]), 1):
        status, body = post(own, "/api/keep", messages=messages)
        assert status == 200 and json.loads(body) == {"file": "runs/good.jsonl", "n": n}
    examples = data.read_examples(str(own.home / "runs" / "good.jsonl"))
    assert [e["messages"] for e in examples] == [GOOD, GOOD[1:], [*GOOD, *GOOD[1:]]]


def test_many_at_once_and_a_file_edited_by_hand_stay_whole(own):
    file = own.home / "runs" / "good.jsonl"
    file.write_text(json.dumps({"messages": GOOD[1:]}))        # no newline at its end
    long = [GOOD[1], {"role": "assistant", "content": "x" * 20_000}]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(own, "/api/keep", messages=long), range(8)))
    assert sorted(json.loads(body)["n"] for _, body in found) == list(range(2, 10))
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 9


@pytest.mark.parametrize("messages, said", [
    (None, "expected a list"), ([], "roles"), ([5], "expected a list"), (GOOD[:2], "roles"),
    (GOOD[:1], "roles"), (GOOD[::-1], "roles"), ([*GOOD, GOOD[0]], "roles"),
    ([GOOD[1], {"role": "assistant", "content": " "}], "one of them is empty"),
    ([GOOD[1], {"role": "assistant", "content": "\ud800"}], "expected a text"),
    ([{"role": "user"}, GOOD[2]], "expected a text")])
def test_what_is_no_exchange_is_refused_and_nothing_is_written(own, messages, said):
    assert said in error(own, "/api/keep", messages=messages)
    assert not (own.home / "runs" / "good.jsonl").exists()


def test_the_file_does_not_grow_without_end(own, monkeypatch):
    monkeypatch.setattr(talk, "MOST", 300)
    for _ in range(3):
        post(own, "/api/keep", messages=GOOD)
    status, body = post(own, "/api/keep", messages=GOOD)
    assert status == 413 and "rename it" in json.loads(body)["error"]
