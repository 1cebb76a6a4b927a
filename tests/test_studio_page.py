"""The studio's page, driven in a browser: the real server in a process of its own, a tiny model."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import facts

from lora.run import lock

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "scripts/studio/page.html"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'`&lt; {{x}} __TOKEN__"
NAME = "evil, a=b @c+d"                       # as hostile as a run's name may be
PATIENCE = 120_000                            # ms that a slow machine may take


@pytest.fixture(scope="module")
def place(home, tmp_path_factory):
    """The folder of a studio: a tiny model, runs a and b on it, a hostile run, two data files."""
    place = tmp_path_factory.mktemp("studio")
    shutil.copytree(home / "tiny", place / "model/tiny")
    for name in "ab":
        shutil.copytree(home / "runs" / name, place / "runs" / name)
    (place / "examples").mkdir()
    (place / "examples/facts.jsonl").write_text(facts(4))
    (place / "examples/evil.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{i} {EVIL}"},
        {"role": "assistant", "content": f"{EVIL} {i}"}]}) + "\n" for i in range(6)))
    (place / "config.json").write_text(json.dumps({
        "model": {"name": "model/tiny", "device": "cpu", "dtype": "float32"}, "lora": {"r": 4},
        "data": {"path": "examples/facts.jsonl"},
        "train": {"run": "watched", "max_steps": 300, "eval_every": 50, "batch_size": 4,
                  "lr": 0.02, "max_new_tokens": 8, "checkpoint_every": 10}}))
    write_evil(place / "runs" / NAME)
    return place


def write_evil(folder):
    """A run whose every text is hostile, with answers that were gained and lost."""
    shutil.copytree(folder.with_name("a"), folder)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "base_model": EVIL, "system": EVIL}))
    (folder / "status.json").write_text(json.dumps(
        {"state": "failed", "message": EVIL, "steps": 30}))
    (folder / "messages.txt").write_text(f"{EVIL}\nsecond\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [
        {"step": 0, "val_loss": 2.5, "val_accuracy": 0.1, "recall": 0.0, "retention": 1.0},
        *({"step": s, "epoch": 1, "loss": 2.5 - s / 20, "lr": 0.001, "tokens_per_s": 100 + s,
           "seconds": s, "peak_memory_gib": 1.5} for s in range(1, 31)),
        {"step": 15, "val_loss": 1.5, "recall": 0.5, "retention": 0.8, "best": True},
        {"step": 30, "val_loss": 1.75, "recall": 0.25, "retention": 0.6, "best": False}]))

    def said(question, texts, rights):
        return [{"question": question, "answer": text, "value": EVIL, "right": right}
                for text, right in zip(texts, rights, strict=True)]
    columns = [said("same?", ["one"] * 3, [True] * 3),
               said(EVIL, ["a b", f"a {EVIL} b", "a c b"], [False, True, True]),
               said("lost?", ["x", "x", "y"], [True, True, False])]
    (folder / "answers.jsonl").write_text("".join(json.dumps(
        {"step": step, "answers": [column[i] for column in columns]}) + "\n"
        for i, step in enumerate((0, 15, 30))))


@pytest.fixture(scope="module")
def address(place):
    """The studio of that folder."""
    command = [sys.executable, "-m", "scripts.studio", "--no-browser", "--port", "0"]
    with open(place / "errors.txt", "w") as errors, subprocess.Popen(
            command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=errors) as server:
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, (place / "errors.txt").read_text()
        yield found[0]
        server.terminate()
    assert "Traceback" not in (place / "errors.txt").read_text()


@pytest.fixture
def visit(browser, address):
    """visit("#runs") opens the page there. In the end nothing may have gone wrong in it but what
    visit.expected lists: what Chromium itself writes when a request is refused."""
    problems, contexts = [], []

    def visit(where="", width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900},
                                      color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda alert: (problems.append(alert.message), alert.dismiss()))
        page.on("request", lambda asked: asked.url.startswith((address, "data:"))
                or problems.append(asked.url))
        page.set_default_timeout(PATIENCE)
        page.goto(f"{address}/{where}")
        return page
    visit.expected = []
    yield visit
    for context in contexts:
        context.close()
    assert [p for p in problems if not any(text in p for text in visit.expected)] == []


def wait(page, text, selector="main"):
    """Wait until an element shows a text."""
    page.wait_for_function("""([selector, text]) => [...document.querySelectorAll(selector)].some(
        e => (e.innerText ?? e.textContent).includes(text))""", arg=[selector, text])


def until(found):
    """Wait until found() is true."""
    end = time.monotonic() + PATIENCE / 1000
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def tab_to(page, selector, back=False):
    """Press Tab until an element has the focus, which must be visible."""
    for _ in range(150):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            style = "getComputedStyle(document.activeElement.type === 'file' ? " \
                    "document.activeElement.parentElement : document.activeElement).outlineStyle"
            assert page.evaluate(style) != "none", selector
            return
    raise AssertionError(f"{selector} is not reached by Tab")


# ----- the file ----------------------------------------------------------------------------------


def test_the_page_holds_no_other_address_and_no_way_in_for_markup():
    page = PAGE.read_text("utf-8")
    assert set(re.findall(r"https?://[^\s\"]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function",
                         page)
    assert not re.search(r"\sstyle=|@import|url\(|\son[a-z]+=\"", page)
    assert max(map(len, page.splitlines())) <= 100


# ----- runs --------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(process):
    """Let a training stand still: what the page shows meanwhile depends on no machine's speed."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def last_step(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_a_run_is_started_watched_stopped_resumed_and_finished(visit, place):
    folder, page = place / "runs/watched", visit("#new")
    page.get_by_label("train.run").fill("watched")
    page.get_by_role("button", name="Start the run").click()
    wait(page, "training", "#state")
    assert page.url.endswith("#run/watched") and page.locator("#name").inner_text() == "watched"
    length = "document.querySelector('#curves path').getTotalLength()"
    process = until(lambda: lock.holder(folder))
    until(lambda: last_step(folder) >= 5)
    with frozen(process):
        step = last_step(folder)
        wait(page, f"Step {step} of 300", "#claim")
        first = page.evaluate(length)
        assert f"{step} of 300" in page.title() and f"{step} of 300" in page.locator(
            "#numbers").inner_text()
    until(lambda: last_step(folder) >= 60)
    with frozen(process):
        wait(page, f"Step {last_step(folder)} of 300", "#claim")
        assert page.evaluate(length) > first                   # the curve has grown
        assert "Best at step" in page.locator("#claim").inner_text()
        page.get_by_role("button", name="Stop").click()
        wait(page, "stops after this step", "#said")
    wait(page, "stopped", "#state")
    stopped = last_step(folder)
    assert stopped < 300 and "watched: stopped" in page.locator("#said").inner_text()
    assert page.get_by_role("button", name="Stop").count() == 0
    page.get_by_role("button", name="Resume").click()
    wait(page, "finished", "#state")
    wait(page, "300 of 300", "#numbers")
    assert page.get_by_role("button", name="Resume").count() == 0
    assert page.locator("#messages").inner_text().count("step ") > 3
    page.get_by_role("link", name="New run from these settings").click()
    assert page.get_by_label("train.max_steps").input_value() == "300"
    page.goto(page.url.split("#")[0] + "#run/watched")

    at = page.locator("#step")                                 # what it said before is another text
    now = page.locator(".asked li:last-child .text").first.inner_text()
    question = page.locator(".asked > p").first.inner_text()
    assert page.locator("#at").inner_text().endswith("of 300, best")     # the adapter that is kept
    assert page.locator("#answers mark").count() > 0 and " changed" in page.locator(
        "#flips").inner_text()
    at.press("Home")
    before = page.locator(".asked", has_text=question).locator(".text").inner_text()
    assert before != now and page.locator("#at").inner_text() == "0 of 300"
    assert page.locator("#answers mark").count() == 0


def test_a_start_that_is_refused_names_the_fields(visit, place):
    visit.expected.append("status of 400")
    page = visit("#new")
    page.get_by_label("train.lr").fill("high")
    page.locator("summary", has_text="keep").click()
    page.get_by_label("keep.replay_share").fill("2")
    page.locator("summary", has_text="keep").click()
    page.get_by_role("button", name="Start the run").click()
    problems = page.locator("#problems")
    wait(page, "2 problems", "#problems")
    assert page.evaluate("document.activeElement.id") == "problems"
    for key in "train.lr", "keep.replay_share":
        field = page.get_by_label(key)
        assert field.get_attribute("aria-invalid") == "true" and field.is_visible()
        wrong, helps = field.get_attribute("aria-describedby").split()
        said = page.locator(f"[id='{wrong}']").inner_text()
        assert "expected" in said and said in problems.inner_text()
        assert page.locator(f"[id='{helps}']").inner_text()
    problems.get_by_role("button", name="keep.replay_share is 2").press("Enter")
    assert page.evaluate("document.activeElement.name") == "keep.replay_share"
    page.get_by_label("train.lr").fill("")
    assert page.get_by_label("train.lr").get_attribute("placeholder") == "0.001"
    page.locator("summary", has_text="what differs").click()
    sent = json.loads(page.locator("#sent").inner_text())      # config.json's, without the default
    assert sent["train"] == {"run": "watched", "max_steps": 300, "eval_every": 50, "batch_size": 4,
                             "max_new_tokens": 8}
    assert sent["lora"] == {"r": 4} and sent["keep"] == {"replay_share": 2}
    assert not (place / "runs/nothing").exists()


def test_curves_show_their_values_and_lie_over_each_other(visit):
    page = visit("#runs")
    page.get_by_label("curves of a", exact=True).check()
    page.get_by_label(f"curves of {NAME}").check()
    wait(page, NAME, "#chosen figcaption")
    assert page.url.endswith("#runs/a/" + "evil%2C%20a%3Db%20%40c%2Bd")
    assert page.locator("#chosen figure").first.locator(".swatch").all_inner_texts()[0].startswith(
        ("a ", NAME))
    assert page.locator("#chosen figure").first.locator("path").count() == 4
    page.reload()
    wait(page, NAME, "#chosen figcaption")                     # a deep link
    page.get_by_role("link", name=NAME).click()
    chart = page.locator("#curves figure").first
    wait(page, "best: 15", "#curves text")
    assert chart.locator("figcaption").inner_text().split() == [
        "Loss", "training", "1.00", "validation", "1.75"]
    chart.locator("svg").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert chart.locator("svg").get_attribute("aria-valuetext") == (
        "step 1: training 2.45, validation 2.50")
    assert "step 1" in chart.inner_text() and page.locator(".cursor").count() == 4
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 50)
    assert "step 30" in chart.inner_text()
    page.mouse.move(0, 0)
    assert page.locator(".cursor").count() == 0


def test_what_flipped_comes_first_and_what_changed_is_marked(visit):
    page = visit("#run/" + NAME)
    wait(page, "1 gained, 1 lost", "#flips")
    assert page.locator("#flips").inner_text() == "2 of 3 right, 1 gained, 1 lost, 2 changed"
    rows = page.locator(".asked")
    assert rows.locator("> p").all_inner_texts() == ["lost?", EVIL, "same?"]
    assert rows.nth(0).locator(".chips").inner_text().startswith("✗ wrong\nlost at step 30")
    assert rows.nth(1).locator("mark").first.inner_text() == "c"
    assert rows.nth(1).locator(".text").all_text_contents() == ["a b", "a c b", f"a {EVIL} b"]
    between = rows.nth(1).locator("details .text")
    assert not between.is_visible()
    rows.nth(1).locator("summary").click()
    assert between.is_visible()
    page.locator("#step").press("ArrowLeft")
    assert page.locator("#at").inner_text() == "15 of 30, best"
    assert page.locator("#flips").inner_text() == "3 of 3 right, 1 gained, 1 changed"


def test_only_a_visible_page_polls_and_faster_while_something_trains(visit):
    page, asked, state = visit("#runs"), [], "training"
    wait(page, "a", "#list td")

    def reply(route):
        asked.append(route)
        route.fulfill(json={"runs": [{"name": "x", "state": state, "step": len(asked)}]})

    def after(seconds, n):
        """Let time pass; n requests have come by then, and their answers are shown."""
        page.clock.run_for(1000 * seconds)
        wait(page, str(n), "#list td:nth-child(7)")
        assert page.evaluate("1") and len(asked) == n

    def hide(hidden):
        page.evaluate("value => { Object.defineProperty(document, 'hidden', "
                      "{value, configurable: true}); "
                      "document.dispatchEvent(new Event('visibilitychange')); }", hidden)
    page.route("**/api/runs", reply)
    page.clock.install(time=0)
    page.clock.pause_at(60)                      # from here on time passes in after() alone
    page.reload()
    after(0, 1)
    after(3.9, 1)
    after(0.2, 2)
    after(4.1, 3)
    hide(True)
    after(60, 3)
    state = "finished"
    hide(False)
    after(0, 4)
    after(9.5, 4)
    after(1, 5)


def test_a_server_that_is_gone_is_said_and_asked_again(visit):
    visit.expected.append("net::ERR_FAILED")
    page = visit("#talk")
    wait(page, "a", "#choose")
    page.route("**/api/**", lambda route: route.abort())
    page.evaluate("location.hash = '#data'")
    wait(page, "does not answer", "#gone")
    page.unroute("**/api/**")
    wait(page, "training and", "#about")                       # it has come back by itself
    assert not page.locator("#gone").is_visible()


def test_a_page_that_is_left_open_does_not_grow(visit):
    page, n = visit("#run/" + NAME), 0
    wait(page, "1 gained", "#flips")
    detail = page.evaluate("api(ofRun(RUN.name))")

    def reply(route):
        nonlocal n
        n += 1
        curve = [[step, (step * n) % 7 + 1] for step in range(300)]
        route.fulfill(json={**detail, "state": "training", "step": n, "steps": 10**6,
                            "curves": {**detail["curves"], "loss": curve, "lr": curve},
                            "messages": [f"{n} {EVIL}"] * 60})
    page.route("**/api/runs/*points*", reply)
    tools = page.context.new_cdp_session(page)
    tools.send("Performance.enable")
    sizes = []
    for end in (10, 60):
        while n < end:
            page.evaluate("tick()")
        tools.send("HeapProfiler.collectGarbage")
        found = {m["name"]: m["value"] for m in tools.send("Performance.getMetrics")["metrics"]}
        sizes.append((found["Nodes"], found["JSEventListeners"], found["JSHeapUsedSize"]))
    (nodes, listeners, heap), (more_nodes, more_listeners, more_heap) = sizes
    assert more_nodes <= nodes + 100 and more_listeners <= listeners + 10
    assert more_heap < heap + 400_000


# ----- data --------------------------------------------------------------------------------------


def test_the_mask_viewer_shows_what_the_loss_covers(visit):
    page = visit("#data/file/examples%2Ffacts.jsonl")
    wait(page, "of 16 ·", "#counts")
    assert "12 training and 4 validation examples" in page.locator("#about").inner_text()
    assert page.locator("#findings li").count() > 4 and "✓ ok" in page.locator(
        "#findings").inner_text()
    assert page.locator("#lengths rect").count() == 24
    mask = page.locator("#mask")
    assert re.search(r"In [A-D]{2}\.", "".join(mask.locator("mark").all_text_contents()))
    assert "Where" not in "".join(mask.locator("mark").all_text_contents())
    assert mask.locator("mark.special").all_text_contents() == ["<|im_end|>"]
    shown = [mask.inner_text()]
    for press in (lambda: page.get_by_role("button", name="Next").click(),
                  lambda: mask.press("ArrowRight"), lambda: mask.press("ArrowLeft"),
                  lambda: page.get_by_role("button", name="Previous").click()):
        press()
        page.wait_for_function("text => document.getElementById('mask').innerText !== text",
                               arg=shown[-1])
        shown.append(mask.inner_text())
    assert shown[0] == shown[4] and shown[1] == shown[3] and len(set(shown)) == 3
    page.get_by_label("example", exact=True).fill("16")
    page.get_by_label("example", exact=True).press("Enter")
    page.wait_for_function("text => document.getElementById('mask').innerText !== text",
                           arg=shown[-1])
    page.get_by_role("link", name="New run on this file").click()
    wait(page, "and your file", "#from")


def test_a_file_is_uploaded_or_dropped_and_looked_at(visit, place):
    page = visit("#data")
    wait(page, "of 16 ·", "#counts")
    content = (place / "examples/facts.jsonl").read_text().splitlines()[0].encode()
    page.locator("#upload").set_input_files({"name": "mine.jsonl", "buffer": content,
                                             "mimeType": "text/plain"})
    wait(page, "mine.jsonl:1", "#counts")
    assert page.locator("#file").input_value() == "runs/uploads/mine.jsonl"
    assert (place / "runs/uploads/mine.jsonl").read_bytes() == content
    page.evaluate("""text => {
        const data = new DataTransfer();
        data.items.add(new File([text], "dropped.jsonl"));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {
            bubbles: true, cancelable: true, dataTransfer: data}));
    }""", content.decode())
    wait(page, "kept as runs/uploads/dropped.jsonl", "#said")
    visit.expected.append("status of 400")
    page.locator("#upload").set_input_files({"name": "bad.exe", "buffer": b"x",
                                             "mimeType": "text/plain"})
    wait(page, "bad.exe", "#said")


# ----- talk --------------------------------------------------------------------------------------


def ask(page, question):
    page.get_by_label("your question").fill(question)
    page.get_by_label("your question").press("Control+Enter")
    wait(page, "answered", "#heard")


def spoken(page):
    return page.locator(".exchange").last.locator(".answer > .text").all_text_contents()


def set_greedy(page, tokens=12):
    page.get_by_label("temperature").fill("0")
    page.get_by_label("tokens at most").fill(str(tokens))


def test_base_and_adapters_stream_side_by_side(visit):
    page = visit("#talk/a/b")
    wait(page, "b", "#voices")
    assert page.locator("#voices .voice").count() == 3         # they and their base
    assert page.get_by_label("system prompt of a").input_value() == "You are a."
    set_greedy(page, 60)
    page.evaluate("""() => {
        window.seen = {};
        new MutationObserver(() => document.querySelectorAll(".answer").forEach((cell, i) => {
            const text = cell.querySelector(".text")?.textContent, list = seen[i] ??= [];
            if (text && list.at(-1) !== text) list.push(text);
        })).observe(document.getElementById("exchanges"), {childList: true, subtree: true});
    }""")
    ask(page, "is it a ant?")
    seen = page.evaluate("seen")
    assert sorted(seen) == ["0", "1", "2"]
    for i, final in enumerate(spoken(page)):
        assert seen[str(i)][-1] == final and final
        assert all(final.startswith(text) for text in seen[str(i)])
    assert max(map(len, seen.values())) > 3                    # an answer came in pieces
    tops = {box.bounding_box()["y"] for box in page.locator(".answer").all()}
    assert len(tops) == 1 and len(set(spoken(page))) == 3
    ask(page, "and the bee?")
    assert "remembers 1 turn word for word" in page.locator(".exchange").last.inner_text()
    page.get_by_label("a", exact=True).uncheck()
    ask(page, "see my cow")
    assert page.locator(".exchange").last.locator(".answer").count() == 2
    page.get_by_role("button", name="Reset").click()
    assert page.locator(".exchange").count() == 0


def test_the_strength_slider_takes_effect_at_once(visit):
    page = visit("#talk/a")
    wait(page, "a", "#voices")
    set_greedy(page)
    ask(page, "is it a ant?")
    base, tuned = spoken(page)
    assert base != tuned
    page.get_by_label("strength of a").press("Home")           # 0: the base
    page.wait_for_function("text => document.querySelectorAll('.answer > .text')[1].textContent "
                           "=== text && !document.querySelector('.running')", arg=base)
    assert "a at 0.00" in page.locator(".answer").nth(1).inner_text()
    page.get_by_label("strength of a").fill("1")
    page.wait_for_function("text => document.querySelectorAll('.answer > .text')[1].textContent "
                           "=== text && !document.querySelector('.running')", arg=tuned)
    assert page.locator(".exchange").count() == 1


def test_a_changed_system_prompt_is_said_and_can_be_taken_back(visit):
    page = visit("#talk/a")
    wait(page, "system prompt", "#voices")
    page.get_by_label("system prompt of a").fill("You are z.")
    assert "not the one it was trained with" in page.locator("#voices").inner_text()
    page.get_by_role("button", name="as trained").click()
    assert page.get_by_label("system prompt of a").input_value() == "You are a."
    assert "not the one" not in page.locator("#voices").inner_text()


def test_escape_and_stop_end_an_answer(visit):
    page, held = visit("#talk/a"), []
    wait(page, "a", "#voices")
    page.route("**/api/talk", lambda route: held.append(route))            # it never comes
    for stop in (lambda: page.keyboard.press("Escape"),
                 lambda: page.get_by_role("button", name="Stop").click()):
        page.get_by_label("your question").fill("is it?")
        page.get_by_label("your question").press("Control+Enter")
        wait(page, "a …", "#heard")
        stop()
        wait(page, "it will not remember this", ".exchange:last-child")
        assert page.locator(".running").count() == 0
    assert len(held) == 4
    page.unroute("**/api/talk")
    set_greedy(page)
    ask(page, "is it a ant?")
    assert "remembers" not in page.locator(".exchange").last.inner_text()


def test_an_exchange_is_kept_edited_or_not(visit, place):
    page, file = visit("#talk/a"), place / "runs/good.jsonl"
    n = len(file.read_text().splitlines()) if file.exists() else 0
    wait(page, "a", "#voices")
    set_greedy(page)
    ask(page, "is it a ant?")
    answer = page.locator(".answer").nth(1)
    answer.get_by_role("button", name="Good: train on it").click()
    wait(page, f"kept in runs/good.jsonl: {n + 1} line", ".answer")
    answer.get_by_role("button", name="Edit, then keep").click()
    area = page.get_by_label("the answer as it should be")
    assert area.input_value() == spoken(page)[1]
    area.fill(EVIL)
    area.press("Control+Enter")
    wait(page, f"kept in runs/good.jsonl: {n + 2} lines", ".answer")
    lines = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    system, user = ({"role": "system", "content": "You are a."},
                    {"role": "user", "content": "is it a ant?"})
    assert lines[n:] == [[system, user, {"role": "assistant", "content": spoken(page)[1]}],
                         [system, user, {"role": "assistant", "content": EVIL}]]


# ----- every text, every key, every size ---------------------------------------------------------


def test_hostile_texts_stay_text(visit):
    page = visit("#runs")
    wait(page, NAME, "#list td")
    wait(page, EVIL, "#list td")                               # the name of the base
    page.get_by_role("link", name=NAME).click()
    wait(page, "1 gained", "#flips")
    assert page.locator("#name").text_content() == NAME
    assert EVIL in page.locator("#claim").text_content()
    assert page.locator("#messages").text_content() == f"{EVIL}\nsecond"
    assert EVIL in page.locator("#answers").text_content()
    page.get_by_role("link", name="Talk with it").click()
    wait(page, NAME, "#voices")
    assert page.get_by_label(f"system prompt of {NAME}").input_value() == EVIL
    set_greedy(page)
    talk = {"done": {"text": EVIL, "n_tokens": 3, "ended": True, "seconds": 1}}
    page.route("**/api/talk", lambda route: route.fulfill(
        content_type="text/event-stream", body="".join(f"data: {json.dumps(event)}\n\n" for event in
        ({"sent": {"n_turns": 0, "notes": EVIL, "n_tokens": 1}}, {"text": EVIL}, talk))))
    ask(page, EVIL)
    assert set(spoken(page)) == {EVIL}
    assert page.locator(".exchange > p").text_content() == EVIL
    page.evaluate("location.hash = '#data/file/examples%2Fevil.jsonl'")
    wait(page, "of 6 ·", "#counts")
    assert "".join(page.locator("#mask mark").all_text_contents()).startswith(EVIL)
    visit.expected.append("status of 400")
    page.evaluate("location.hash = " + json.dumps("#run/" + EVIL.replace("/", "")))
    wait(page, "is no run here", "#gone")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1


def test_everything_is_reached_with_the_keyboard_alone(visit, place):
    page, keys = visit(), None
    keys = page.keyboard
    wait(page, "finished", "#list")
    tab_to(page, "#tabs a")
    keys.press("ArrowRight")
    keys.press("Enter")
    wait(page, "config.json", "#from")
    tab_to(page, "[name='train.run']")
    keys.press("Control+A")
    keys.type("by keys")
    tab_to(page, ".group[data-section=train] > summary")
    keys.press("Enter")
    tab_to(page, "[name='train.max_steps']")
    keys.press("Control+A")
    keys.type("4")
    keys.press("Control+Enter")
    wait(page, "finished", "#state")
    assert page.evaluate("location.hash") == "#run/by%20keys"
    tab_to(page, "#curves svg")
    keys.press("Home")
    assert "step 0" in page.locator("#curves figcaption").first.inner_text()
    tab_to(page, "#step")
    keys.press("Home")
    assert page.locator("#at").inner_text() == "0 of 4"
    tab_to(page, "[id='go talk']", back=True)
    keys.press("Enter")
    wait(page, "by keys", "#voices")
    tab_to(page, "#temperature")
    keys.press("Control+A")
    keys.type("0")
    tab_to(page, "#max_new_tokens")
    keys.press("Control+A")
    keys.type("8")
    tab_to(page, "#question")
    keys.type("Where is aaa?")
    keys.press("Control+Enter")
    wait(page, "answered", "#heard")
    tab_to(page, "input[type=range]", back=True)
    keys.press("ArrowLeft")
    wait(page, "by keys at 0.95", ".answer")
    wait(page, "answered", "#heard")
    tab_to(page, ".answer:last-child button")
    keys.press("Enter")
    wait(page, "kept in runs/good.jsonl", ".answer")
    tab_to(page, "#tabs a:nth-child(3)", back=True)
    keys.press("Enter")
    wait(page, "of 16 ·", "#counts")
    tab_to(page, "#upload")
    tab_to(page, "#mask")
    keys.press("ArrowRight")
    page.wait_for_function("document.getElementById('index').value === '2'")
    tab_to(page, "#file", back=True)
    keys.type("examples/evil")
    wait(page, "of 6 ·", "#counts")
    tab_to(page, "#tabs a", back=True)                         # the last of them: Talk
    keys.press("ArrowRight")
    keys.press("Enter")
    wait(page, NAME, "#list")
    tab_to(page, "input[type=checkbox]")
    keys.press("Space")
    wait(page, "Loss", "#chosen figcaption")
    assert page.evaluate("document.activeElement.type") == "checkbox"      # the focus has stayed


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_overflows_and_pictures_are_taken(visit, tmp_path, width, scheme):
    page = visit("", width, scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]

    def picture(where, text, selector):
        page.evaluate("where => { location.hash = where; }", where)
        wait(page, text, selector)
        assert fits(page), where
        page.screenshot(path=tmp_path / f"{where.strip('#').split('/')[0]}.png", full_page=True)
    picture(f"#runs/a/{NAME}", NAME, "#chosen figcaption")
    picture(f"#run/{NAME}", "1 gained", "#flips")
    page.locator(".asked summary").last.click()
    picture("#new", "config.json", "#from")
    for summary in page.locator("#form summary").all():
        summary.click()
    assert fits(page)
    picture("#data/file/examples%2Fevil.jsonl", "of 6 ·", "#counts")
    picture(f"#talk/a/{NAME}", NAME, "#voices")
    set_greedy(page, 40)
    ask(page, EVIL + "w" * 200)
    assert fits(page)
    assert len(list(tmp_path.glob("*.png"))) == 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit, scheme):
    """WCAG AA: 4.5 to 1 for every colour of text on the paper and on the marks."""
    page = visit("#runs", scheme=scheme)

    def luminance(name):
        text = page.evaluate("name => getComputedStyle(document.documentElement)"
                             ".getPropertyValue(name)", name).strip().lstrip("#")
        text = "".join(c * 2 for c in text) if len(text) == 3 else text
        channels = [int(text[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                            for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    for ink, paper in (("--ink", "--paper"), ("--soft", "--paper"), ("--bad", "--paper"),
                       ("--gold", "--paper"), ("--adapter", "--paper"), ("--soft", "--wash"),
                       ("--ink", "--hit"), ("--ink", "--wash")):
        dark, light = sorted([luminance(ink), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)
