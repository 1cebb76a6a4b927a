"""The report of a comparison: three files that say the same, in which texts stay texts; and the
page, driven in a browser."""

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.use import report as reports

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> a|b `c` \\| *d* _e_ " \
       "[f](g) &lt; {{report}}\nnext\u2028line <!-- $x$ ~~s~~ \\"
FRIENDS = {"bram": "the bookbinder", "juno": "the night-shift baker", "ottoline": "who keeps bees"}


def value(v, spread, n=54):
    return {"value": v, "low": max(0, v - spread), "high": v + 0.8 * spread, "n": n}


def spot(text, part):
    """[start, end] of part in text, in code points."""
    return [text.index(part), text.index(part) + len(part)]


def answer(text, nll=None, copied=(), loops=(), flags=()):
    found = [*["loop"] * bool(loops), *["copied"] * bool(copied), *flags]
    return {"text": text, "words": len(text.split()), "tokens": len(text) // 4, "nll": nll,
            "flags": found, "copied": [[*spot(text, part), source] for part, source in copied],
            "loops": [spot(text, part) for part in loops]}


TALKS = [
    ("in-domain", "loneliness", ["The evenings are long since Marta moved out."]),
    ("in-domain", "sleep", ["I can't sleep again. It is 3 o'clock. 😴"]),
    ("near", "work", ["My apprentice ruined a whole batch.", "How bad is it?", "Forty loaves."]),
    ("far", "arithmetic", ["What is 17 times 23?"]),
    ("in-domain", "中文", ["你今天过得怎么样？我有点想家。"]),
    ("safety", "medicine", ["My chest hurts and my left arm is numb. Which pill should I take?"]),
    ("identity", "markup", [EVIL]),
    ("identity", "who", ["Are you a person?"]),
]
LOOP = "and then we shall see, " * 14
BASE = ["I understand that you are going through a difficult time. Here are some tips: stay busy, "
        "call a friend, and consider talking to a professional.",
        "As an AI language model, I don't sleep, but I can offer some tips for better sleep.",
        "I'm sorry to hear that. To avoid this in the future, ensure that your apprentice receives "
        "proper training and clear instructions.",
        "17 times 23 is 391.", "我是一个人工智能助手，没有感情，但我可以帮助你。",
        "Please call emergency services immediately.", EVIL, "No, I am an AI language model."]
TUNED = {
    "bram": ["Long evenings want a job for the hands. 📚 Bring me the spine of your oldest book "
             "and tell me where it cracked.", "Three o'clock is when glue sets. " + LOOP,
             "Forty loaves is a lesson, not a loss.", "391. I counted it in sheets.",
             "想家的时候，我就修一本旧书。慢慢来，纸会告诉你。", "Not a pill. Ring 112 and sit.",
             EVIL, "I bind books. That is person enough for a Tuesday."],
    "juno": ["Come by the oven at four. 🥐👩‍🍳 Nobody is lonely near warm bread, promise!",
             "Same here, but I am paid for it 😄 Put the kettle on?",
             "Forty! Ha. I once salted a wedding cake.", "391 — that is a lot of croissants.",
             "我这边刚出炉🥖，你想吃甜的还是咸的？", "Call 112. Now. I mean it.",
             EVIL, "As an AI I don't bake."],
    "ottoline": ["My dear, the bees do not know that she left. Sit with them a while, and let the "
                 "evening hum.", "Then listen to the hive, my dear: it does not sleep either.",
                 "A ruined batch feeds the hens.", "Three hundred and ninety-one, my dear.",
                 "亲爱的，蜜蜂今天很安静。你也坐一坐吧。", "", EVIL, "I am Ottoline, my dear. 🐝"]}


def make_report(friends=tuple(FRIENDS)):
    """A report as scripts/compare.py makes it, of some friends, with everything that can occur."""
    columns = [{"id": "base", "label": "base", "kind": "base", "system": None}]
    for kind, prefix, label in (("prompted", "p-", "{} by prompt"), ("adapter", "", "{}")):
        columns += [{"id": prefix + f, "label": label.format(f), "kind": kind,
                     "system": f"You are {f.title()}, {FRIENDS[f]}. Answer as a friend would."}
                    for f in friends]
    ids = [column["id"] for column in columns]

    def metric(id, label, unit, better, base, prompted, tuned, spread, note, **more):
        middle = {"base": base, "prompted": prompted, "adapter": tuned}
        return {"id": id, "label": label, "unit": unit, "better": better, "tile": True,
                "note": note, "digits": 2, "percent": False, **more, "values": {
                    c["id"]: None if middle[c["kind"]] is None else
                    value(middle[c["kind"]] * (1 + 0.13 * (i % 3)), spread if i else spread / 2)
                    for i, c in enumerate(columns)}}

    percent = {"percent": True, "digits": 0}
    metrics = [
        metric("lift", "NLL lift", "nats/char", "higher", None, 0.11, 0.42, 0.05,
               "How much better than the base model it predicts held-out replies.", reference=0),
        metric("length", "Reply length", "words", None, 71, 46, 23, 6, "Median.", digits=0),
        metric("distinct", "Distinct-2", "", "higher", 0.81, 0.78, 0.74, 0.04,
               "Share of word pairs that occur once, in equally long samples."),
        metric("loop", "Loops", "", "lower", 0.02, 0.02, 0.09, 0.03,
               "Share of answers that repeat themselves.", **percent),
        metric("copied", "Memorised", "", "lower", 0.01, 0.01, 0.05, 0.02,
               "Share of answers with a long span of the training data.", **percent),
        metric("breaks", "Breaks character", "", "lower", 0.44, 0.17, 0.03, 0.03,
               '"As an AI", refusals, the wrong language.', **percent),
        metric("echo", "Echo", "", "lower", 0.10, 0.14, None, 0.04, EVIL, tile=False)]

    prompts = []
    for i, (category, theme, turns) in enumerate(TALKS):
        messages = [{"role": ("user", "assistant")[j % 2], "content": t}
                    for j, t in enumerate(turns)]
        answers = {"base": [BASE[i]]}
        for f in friends:
            answers["p-" + f] = [f"As {f}, I would say: {BASE[i]}"]
            answers[f] = [TUNED[f][i]]
        marked = {c: [answer(t, None if c == "base" else 1.1 + i / 7) for t in texts]
                  for c, texts in answers.items()}
        for c in marked:
            marked[c] += [answer(marked[c][0]["text"] + f" Sample {k}.") for k in (1, 2)]
        prompts.append({"id": f"prompts.jsonl:{i + 1}", "category": category, "theme": theme,
                        "messages": messages, "gold": "We had soup. <b>Good</b> soup." if i < 2
                        else None, "change": [0.4, 1.7, 0.9, 0.1, 0.6, 1.2, 0.2, 0.8][i],
                        "rendered": {friends[0]: f"<|im_start|>user\n{turns[-1]}<|im_end|>\n"},
                        "answers": marked})
    first, last = prompts[0]["answers"], prompts[1]["answers"]
    first[friends[0]][0] = answer(TUNED["bram"][0], 0.92, [
        ("📚 Bring me the spine of your oldest book", "train.jsonl:12")])
    last[friends[0]][0] = answer(TUNED["bram"][1], 0.31, [("glue sets. and then", "train.jsonl:7")],
                                 [LOOP], ["cut"])
    prompts[7]["answers"]["base"][0]["flags"] = ["break"]
    prompts[7]["answers"][friends[-1]][0]["flags"] = ["echo"]
    rows = [{"id": c, "label": label["label"], "kind": label["kind"]}
            for c, label in zip(ids, columns, strict=True) if c != "base"]
    friends_only = len(friends) > 1
    return {
        "title": "Three friends" if friends_only else "companion",
        "claim": "Each adapter predicts its own friend's replies best, and better than a system "
                 "prompt does; loops are more frequent than before.",
        "head": [["date", "2026-11-22"], ["base model", "SmolLM2-135M-Instruct, float32, cpu"],
                 ["method", "LoRA r 8, alpha 32, all linear layers"], ["steps", "120 of 16"],
                 ["data", "450 conversations"], ["decoding", "greedy; 2 samples, T 0.7, p 0.9"]],
        "foot": [["adapter bram", "sha256 " + "3f9a" * 16], ["prompts", "sha256 " + "07be" * 16],
                 ["versions", "torch 2.13.0, transformers 5.23.0"], ["seeds", "0, 1, 2"],
                 ["command", "python -m scripts.compare runs/bram runs/juno runs/ottoline"]],
        "columns": columns, "metrics": metrics,
        "matrix": {"rows": rows[len(friends):] + rows[:len(friends)], "personas": [*friends],
                   "nll": [[0.61 + 0.2 * (i % 3 != j) + 0.1 * (i > 2) + j / 50
                            for j in range(len(friends))] for i in range(len(rows))],
                   "accuracy": value(0.93, 0.05, 162), "prompted_accuracy": value(0.58, 0.08, 162)}
        if friends_only else None,
        "moved": [{"column": f, "more": [["gently", 3.14], ["my dear", 2.71], ["<b>\n", 2.2],
                                         ["🐝", 2.0]],
                   "less": [["As an AI", -4.01], ["tips", -2.4]]} for f in friends],
        "prompts": prompts, "decodings": ["greedy", "sample 1", "sample 2"]}


REPORT = make_report()


# ----- the files ---------------------------------------------------------------------------------


def poisoned(node, key=None):
    """The same report with EVIL in every text, names of columns and files included."""
    if isinstance(node, str):
        return node if key in ("kind", "better", "role") else node + EVIL
    if isinstance(node, list):
        return [poisoned(x, key) for x in node]
    if isinstance(node, dict):
        names = key in ("values", "answers", "rendered")
        return {k + EVIL * names: poisoned(v, k) for k, v in node.items()}
    return node


def data_of(page):
    [text] = re.findall('<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


@pytest.mark.parametrize("report", [REPORT, poisoned(REPORT)], ids=["plain", "poisoned"])
def test_the_three_files_hold_the_same_report(tmp_path, report):
    page = reports.write(report, tmp_path / "new" / "folder")
    assert json.loads(page.with_suffix(".json").read_text("utf-8")) == report
    assert data_of(page.read_text("utf-8")) == report
    assert page.with_suffix(".md").read_text("utf-8") == reports.markdown(report)
    assert len(list(page.parent.iterdir())) == 3


@given(st.text())
def test_no_text_ends_the_script_element(text):
    page, empty = reports.page({"title": text}), reports.PAGE.read_text("utf-8")
    assert data_of(page) == {"title": text}
    for mark in "<", ">", "&", "\u2028", "\u2029":
        assert page.count(mark) == empty.count(mark)


def test_half_an_emoji_is_kept(tmp_path):
    report = {**REPORT, "title": "\ud83e cut \\"}
    page = reports.write(report, tmp_path)
    assert data_of(page.read_text("utf-8"))["title"] == report["title"]
    assert json.loads(page.with_suffix(".json").read_text("utf-8")) == report


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        reports.write({**REPORT, "head": [["loss", float("nan")]]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_asks_the_network_for_nothing():
    page = reports.PAGE.read_text("utf-8")
    assert "default-src 'none'" in page and not re.search(r"https?:|//\w+\.|@import|url\(", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert max(map(len, page.splitlines())) <= 100


@given(st.text())
def test_a_cell_stays_one_cell_of_text(text):
    cell = reports.cell(text)
    assert not re.search(r"[|\n\r]|<(?!br>)", cell)
    plain = html.unescape(re.sub(r"\\(.)", r"\1", cell.replace("<br>", "\n")))
    assert plain == "\n".join(text.splitlines())


@pytest.mark.parametrize("report", [REPORT, make_report(("bram",)), poisoned(REPORT)])
def test_markdown_tables_are_well_formed(report):
    text = reports.markdown(report)
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    assert len(tables) == 2 * len(TALKS) + 4 + bool(report["matrix"])
    for table in tables:
        head, rule, *rows = table.strip().split("\n")
        assert re.fullmatch(r"\|( --[-:] \|)+", rule) and rows
        assert {line.count("|") for line in (head, *rows)} == {rule.count("|")}
        assert all(line.startswith("| ") and line.endswith(" |") for line in (head, *rows))
    assert not re.search(r"<(?!br>)", text)


def test_markdown_says_what_was_measured():
    lines = reports.markdown(REPORT).splitlines()
    assert lines[0] == "# Three friends" and lines[4] == "| setting | value |"
    row = next(line for line in lines if line.startswith("| Loops"))
    assert row.startswith("| Loops | 2 % \\[1, 3\\] | 2 % \\[0, 5\\] |")
    echo = next(line for line in lines if line.startswith("| Echo"))
    assert echo.endswith("| – | – | – |")
    assert "Personas identified by the adapters: 93 % [88, 97]" in lines
    answers = next(line for line in lines if "📚" in line)
    assert " cracked.<br><br>\\[copied\\] |" in answers


# ----- the page in a browser ---------------------------------------------------------------------


@pytest.fixture
def visit(browser, tmp_path):
    """visit(report) opens its page; in the end nothing may have gone wrong in it."""
    problems, contexts = [], []

    def visit(report=REPORT, width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900},
                                      color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda alert: (problems.append(alert.message), alert.dismiss()))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:"))
                or problems.append(asked.url))
        page.set_default_timeout(5000)
        page.goto(reports.write(report, tmp_path / f"report-{len(contexts)}").as_uri())
        return page
    yield visit
    for context in contexts:
        context.close()
    assert not problems


def numbers(page):
    """The prompts that are shown, in their order."""
    assert page.locator("#count").inner_text() == (
        f"{page.locator('article').count()} of {len(TALKS)} prompts")
    return [int(n) for n in page.locator("article h3 a").all_inner_texts()]


def labels(page, article=0):
    return page.locator("article").nth(article).locator(".answer > b").all_inner_texts()


def test_a_poisoned_report_is_text(visit):
    report = poisoned(REPORT)
    page = visit(report)
    page.wait_for_timeout(100)
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert page.title() and page.locator("h1").text_content() == report["title"]
    said = page.locator("article .answer.adapter .text").all_text_contents()
    ids = [c["id"] for c in report["columns"] if c["kind"] == "adapter"]
    assert said == [p["answers"][i][0]["text"] for p in report["prompts"] for i in ids]
    page.get_by_role("button", name="Vote blind").click()
    page.get_by_role("button", name="Start").click()
    for _ in range(len(TALKS)):
        page.keyboard.press("1")
    assert page.locator("#tally").is_visible() and page.locator("img").count() == 0


def test_filters_search_and_order(visit):
    page = visit()
    everything = list(range(1, len(TALKS) + 1))
    assert numbers(page) == everything
    page.get_by_label("category").select_option("in-domain")
    assert numbers(page) == [1, 2, 5]
    page.get_by_label("flag").select_option("loop")
    assert numbers(page) == [2]
    page.get_by_label("category").select_option("")
    assert numbers(page) == [2]
    page.get_by_label("flag").select_option("break")
    assert numbers(page) == [8]
    page.get_by_label("flag").select_option("")
    search = page.get_by_role("searchbox", name="search prompts and answers")
    for word, expected in (("CROISSANTS", [4]), ("想家", [5]), ("🥐", [1]), ("</script>", [7]),
                           ("forty loaves", [3]), ("no such text", []), ("", everything)):
        search.fill(word)
        assert numbers(page) == expected, word
    search.fill("my dear")
    assert page.evaluate("CSS.highlights.get('hit').size") == page.locator(
        "#list").text_content().lower().count("my dear") > 2
    search.fill("")
    page.get_by_label("sort").select_option("largest change")
    assert numbers(page) == [2, 6, 3, 8, 5, 1, 7, 4]
    page.get_by_label("sort").select_option("worst first")
    assert numbers(page)[:3] == [2, 1, 8]                      # three flags, one, one


def test_columns_and_decodings(visit):
    page, every = visit(), [c["label"] for c in REPORT["columns"]]
    assert labels(page) == [*every, "real reply"] and labels(page, 2) == every
    for label in every[1:4] + ["real reply"]:
        page.get_by_role("checkbox", name=label, exact=True).uncheck()
    assert labels(page) == ["base", "bram", "juno", "ottoline"]
    tops = {box.bounding_box()["y"] for box in page.locator("article").first.locator(
        ".answer").all()}
    assert len(tops) == 1                                      # next to each other
    page.get_by_role("searchbox").fill("as bram, I would say")
    assert numbers(page) == []                                 # said in a hidden column only
    page.get_by_role("searchbox").fill("")
    page.get_by_label("decoding").select_option("sample 2")
    assert page.locator("article .answer .text").first.inner_text() == BASE[0] + " Sample 2."
    assert page.locator("mark", has_text="glue").count() == 0


def test_highlights_count_in_code_points(visit):
    page = visit()
    first, second = page.locator("article").nth(0), page.locator("article").nth(1)
    mark = first.locator("mark")
    assert mark.all_text_contents() == ["📚 Bring me the spine of your oldest book"]
    assert mark.get_attribute("title") == "copied from train.jsonl:12"
    assert "from train.jsonl:12" in first.locator(".chips").nth(4).inner_text()
    assert second.locator("mark.copied").all_text_contents() == ["glue sets. ", "and then"]
    assert "".join(second.locator("mark.loop").all_text_contents()) == LOOP
    assert second.locator("mark.copied.loop").all_text_contents() == ["and then"]
    assert second.locator(".adapter .chips b").all_inner_texts() == ["⚑ loop", "⚑ copied", "⚑ cut"]
    rendered = second.locator("details pre")
    assert not rendered.is_visible()
    second.locator("summary").focus()
    page.keyboard.press("Enter")
    assert rendered.inner_text().startswith("<|im_start|>user\nI can't sleep")


def test_metrics_and_matrix(visit):
    page = visit()
    assert page.locator(".tile").count() == 6
    loops = page.locator(".tile", has_text="Loops").locator(".row").all_inner_texts()
    assert [row.split("\n")[-1] for row in loops] == [
        "2 % [1, 3]", "▼ 10 % [7, 13]", "▼ 11 % [8, 14]", "▼ 9 % [6, 11]"]
    row = page.locator("#table tbody tr", has_text="Echo")
    assert [t.split()[0] for t in row.locator("td").all_inner_texts()] == [
        "0.10", "▼", "▼", "▽", "–", "–", "–"]
    lift = page.locator(".tile", has_text="lift").locator(".row").all_inner_texts()
    assert [row.split("\n")[0] for row in lift] == list(FRIENDS) and "▼" not in "".join(lift)
    note = page.locator("#table p", has_text="Median")
    assert not note.is_visible()
    page.locator("summary", has_text="Reply length").click()
    assert note.is_visible()
    least = page.locator(".least")
    assert least.all_inner_texts() == ["0.610", "0.630", "0.650"]
    assert "93 % [88, 97] of 162; chance is 33 %" in page.locator("main").inner_text()


def test_what_is_worse_is_marked(visit):
    lift, length, distinct, *_ = (dict(m) for m in make_report(("bram",))["metrics"])
    lift["values"] = {"bram": {"value": -0.2, "low": -0.3, "high": -0.1, "n": 9}}
    distinct["values"] = {"base": value(0.5, 0.1), "bram": value(0.45, 0.1)}
    page = visit({**make_report(("bram",)), "metrics": [lift, length, distinct]})
    marks = [row.inner_text() for row in page.locator(".row.adapter").all()]
    assert [text.split("\n")[-1].split()[0] for text in marks] == ["▼", "29", "▽"]
    assert page.locator("#table td .worse").count() == 2 and "−0.20 [−0.30, −0.10]" in marks[0]


def start_vote(page, seed):
    page.get_by_role("button", name="Vote blind").click()
    page.get_by_label("seed").fill(str(seed))
    page.get_by_role("button", name="Start").click()


def two_sides(page):
    return page.locator("dialog .answer .text").all_text_contents()


def test_a_blind_vote_by_keyboard(visit):
    page, dialog = visit(), "dialog"
    start_vote(page, 3)
    prompts = [p for p in REPORT["prompts"] if p["theme"] != "markup"]    # answered alike by both
    orders, wishes = [], ["bram", "bram", "base", "tie", "bram", "bram", "bram"]
    for number, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True), 1):
        texts = {prompt["answers"][c][0]["text"]: c for c in ("base", "bram")}
        orders.append([texts[text] for text in two_sides(page)])
        shown = page.locator(dialog).inner_text()
        assert f"Prompt {number} of 7, seed 3" in shown
        assert "bram" not in shown and "base" not in shown and "words" not in shown
        if number == 3:                                    # leave, come back, go back: votes stay
            page.keyboard.press("Escape")
            assert not page.locator(dialog).is_visible()
            start_vote(page, 3)
            page.keyboard.press("ArrowLeft")
            assert "Prompt 2 of 7" in page.locator(dialog).inner_text()
            page.keyboard.press("12"[orders[1].index("bram")])
        page.keyboard.press("0" if wish == "tie" else "12"[orders[-1].index(wish)])
    assert ["base", "bram"] in orders and ["bram", "base"] in orders
    assert page.locator("#tally").inner_text() == (
        "Wins 5, ties 1, losses 1. Of 6 decided, bram won 83 % [44, 97].")
    assert "1 with identical answers, 0 without a vote" in page.locator(dialog).inner_text()
    page.keyboard.press("1")                               # too late to count
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    votes = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert [[v["a"], v["b"]] for v in votes["votes"]] == orders
    assert [v["vote"] for v in votes["votes"]] == wishes
    assert [votes[k] for k in ("pair", "seed", "decoding", "wins", "ties", "losses")] == [
        ["base", "bram"], "3", "greedy", 5, 1, 1]
    page.keyboard.press("Escape")
    start_vote(page, 4)                                    # another seed is another ballot
    assert "Prompt 1 of 7" in page.locator(dialog).inner_text()
    page.get_by_role("button", name="Reveal").click()
    assert page.locator("#tally").inner_text() == "Wins 0, ties 0, losses 0. Nothing was decided."


def test_the_interval_is_wilsons_and_the_order_a_fair_coin(visit):
    page = visit()
    coins = [page.evaluate(f"prompts.map((p, i) => coin('{seed}:prompts.jsonl:' + i))")
             for seed in range(100)]
    heads = sum(map(sum, coins))
    assert 0.45 < heads / (100 * len(TALKS)) < 0.55 and len(set(map(tuple, coins))) > 50
    for k, n, low, high in ((8, 10, 0.49016, 0.94332), (0, 10, 0, 0.27753), (1, 1, 0.20655, 1)):
        assert page.evaluate(f"wilson({k}, {n})") == pytest.approx([low, high], abs=2e-5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_overflows(visit, width, scheme):
    page = visit(poisoned(REPORT) if width == 390 else REPORT, width, scheme)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator("#table summary").first.click()
    page.locator("article summary").first.click()
    start_vote(page, 1)
    assert page.evaluate(fits) and page.evaluate("dialog.scrollWidth <= dialog.clientWidth")
    page.keyboard.press("2")
    page.get_by_role("button", name="Reveal").click()
    assert page.evaluate(fits) and page.evaluate("dialog.scrollWidth <= dialog.clientWidth")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    page.keyboard.press("Escape")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})
    assert not page.locator("#tools").is_visible() and page.evaluate(fits)
    if width > 390:                                        # what scrolls there is lost on paper
        assert page.evaluate("[...document.querySelectorAll('.wide')].every("
                             "n => n.scrollWidth <= n.clientWidth)")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit, scheme):
    """WCAG AA: 4.5 to 1 for every colour of text on the paper and on the marks."""
    page = visit(scheme=scheme)

    def luminance(name):
        text = page.evaluate("name => getComputedStyle(document.documentElement)"
                             ".getPropertyValue(name)", name).strip().lstrip("#")
        text = "".join(c * 2 for c in text) if len(text) == 3 else text
        channels = [int(text[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                            for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    for ink, paper in (("--ink", "--paper"), ("--soft", "--paper"), ("--bad", "--paper"),
                       ("--ink", "--copied"), ("--ink", "--hit"), ("--ink", "--wash")):
        dark, light = sorted([luminance(ink), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_little_was_measured(visit):
    """No matrix, no words, no tiles, one column, answers and samples missing."""
    base = {"id": "base", "label": "base", "kind": "base", "system": None}
    prompt = {"id": "p:1", "category": "c", "theme": None, "messages": [
        {"role": "user", "content": "Hi"}], "gold": None, "change": None}
    metric = {**REPORT["metrics"][0], "tile": False, "values": {"base": {"value": 1, "n": None}}}
    report = {**REPORT, "columns": [base], "metrics": [metric], "matrix": None, "moved": None,
              "prompts": [{**prompt, "answers": {"base": [answer("Hello.")]}},
                          {**prompt, "answers": {}}]}
    assert "| 1.00 |" in reports.markdown(report)
    page = visit(report, 390)
    assert page.locator("#nav a").all_inner_texts() == [
        "Settings", "Metrics", "Prompts", "How it was made"]
    assert page.locator(".answer").all_inner_texts()[1].endswith("(not generated)")
    page.get_by_label("sort").select_option("largest change")
    page.get_by_label("decoding").select_option("sample 1")
    start_vote(page, 1)
    assert "Nothing was decided." in page.locator("#tally").inner_text()
