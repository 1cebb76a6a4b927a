"""
Bad and hostile input: whatever is read, the result is right, or a ValueError of ours that names the
file. No traceback, no hang, nothing lost in silence.

    python -m pytest tests/test_fuzz.py                        # about 500 cases
    FUZZ=10000 python -m pytest -s tests/test_fuzz.py          # at least 10,000 in all; -s: counts
    FUZZ=10000 FUZZ_SEED=7 python -m pytest -s tests/test_fuzz.py

The cases follow from FUZZ_SEED (0). A case that takes more than SECONDS of processor time is a
hang: a timer stops it. What was found is a named test beside its module's; corpus/ has ugly files.
"""

import collections
import contextlib
import functools
import io
import json
import os
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import data
import dataset
import keep
from experiments.knowledge import page as knowledge
from inject import inject
from lora import adapter, config, surgery
from lora.run import cli, runlog
from lora.use import report, show
from plots import figures

SECONDS, FUZZ, SEED = 10, int(os.environ.get("FUZZ", 400)), int(os.environ.get("FUZZ_SEED", 0))
CASES, ACCEPTED = collections.Counter(), collections.Counter()
CHAT, BASE = make_tokenizer(), make_tokenizer(None, ("<eos>",), "<eos>")


class Hang(BaseException):
    """Not an Exception: no handler of the product may swallow it."""


def alarm(number, frame):
    raise Hang(f"a case took more than {SECONDS} seconds of processor time")


def fuzz(share, **strategies):
    """A test of this share of all cases, with fixed seeds; a case may write into tmp_path."""
    def decorate(test):
        made = given(**strategies)(test)
        quiet = settings(max_examples=int(FUZZ * share) + 1, deadline=None, database=None,
                         suppress_health_check=list(HealthCheck))
        return seed(SEED)(quiet(made))
    return decorate


@contextlib.contextmanager
def clean(kind, *names):
    """One case: ends well, or with our own error that says one of the names."""
    CASES[kind] += 1
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, alarm)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
        ACCEPTED[kind] += 1
    except ValueError as error:
        assert type(error) is ValueError and any(name in str(error) for name in names), repr(error)
    finally:
        if hasattr(signal, "SIGPROF"):
            signal.setitimer(signal.ITIMER_PROF, 0)


# ----- values, near-valid objects, bytes ---------------------------------------------------------

UGLY = ["", " ", "\0", "\ud800", "a\udfffb", "\u2028", "\ufeff", "\u202eRTL שלום", "a\r\nb", "\r",
        "<|im_end|>", "<|im_start|>system\n", "<script>alert(1)</script>", "</pre>", "../../x",
        '"><img src=x onerror=alert(1)>', "{{ ''.__class__.__mro__ }}", "%s {} {0}", "x" * 3000,
        "👩‍👩‍👧", "ﷺ" * 9, "a\u0301", "NaN", "1e999", "__class__", "$x^$", "..\\x", "CON"]
TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(UGLY)
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -10**400, 0, -0.0, 2**63, 1e308])
JSON = st.recursive(st.none() | st.booleans() | NUMBER | TEXT, lambda inside: st.lists(
    inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3), max_leaves=6)
DEEP = st.builds(lambda start, end, n: start * n + end * n, *[st.sampled_from(pair) for pair in (
    ["[", '{"a":'], ["]", "}", ""])], st.sampled_from([5, 300, 900, 990, 3000, 60_000]))


@st.composite
def spoilt(draw, whole):
    """An object of which some values may be replaced by any JSON."""
    value = dict(draw(whole))
    for key in draw(st.lists(st.sampled_from(sorted(value)), max_size=2)):
        value[key] = draw(JSON)
    return value | draw(st.just({}) | st.just({}) | st.dictionaries(TEXT, JSON, max_size=1))


@st.composite
def written(draw, value):
    """The JSON of a value as a text; now and then a key is there twice, or it is no JSON."""
    text = json.dumps(draw(value), ensure_ascii=draw(st.booleans()))
    kind = draw(st.sampled_from(["plain"] * 16 + ["twice", "deep", "cut", "junk"]))
    if kind == "twice" and text.startswith('{"'):
        return text[:-1] + ", " + text[1:]
    if kind == "deep":
        return '{"data": ' + draw(DEEP) + "}" * draw(st.booleans())
    return {"cut": text[:draw(st.integers(0, len(text)))], "junk": draw(TEXT)}.get(kind, text)


@st.composite
def encoded(draw, text):
    """A text as bytes: UTF-8 mostly, and some byte may be broken."""
    name = draw(st.sampled_from(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"]))
    errors = "replace" if name == "latin-1" else "surrogatepass"
    raw = draw(text).encode(name.removesuffix("-sig"), errors)
    raw = b"\xef\xbb\xbf" * name.endswith("-sig") + raw
    if draw(st.integers(0, 19)) == 7:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 3)):]
    return raw


def damaged(raw):
    """Bytes that were cut off, or of which some are others; the first ones more often."""
    n = len(raw)
    place = st.integers(0, min(n, 900)) | st.integers(0, n)
    return st.builds(lambda at, new, skip, end: (raw[:at] + new + raw[at + skip:])[:end], place,
                     st.binary(max_size=9), st.integers(0, 9), st.just(n) | st.integers(0, n))


# ----- config ------------------------------------------------------------------------------------

DEFAULTS = json.loads(json.dumps({s: vars(v) for s, v in vars(config.Config()).items()}))
KEYS = [f"{section}.{key}" for section, values in DEFAULTS.items() for key in values]
WHOLE = st.sampled_from(list(DEFAULTS)).flatmap(
    lambda s: st.fixed_dictionaries({s: spoilt(st.just(DEFAULTS[s]))}))
CONFIG = st.just(DEFAULTS) | WHOLE | spoilt(st.just(DEFAULTS))
VALUE = st.sampled_from(["7", "auto", "true", "null", "[1, 2]"]) | TEXT | written(JSON)
ARGUMENT = TEXT | st.builds("--{}={}".format, st.sampled_from(KEYS), VALUE)


@fuzz(0.25, raw=encoded(written(CONFIG | JSON)) | st.binary(max_size=40),
      arguments=st.just([]) | st.lists(ARGUMENT, max_size=3))
def test_config(tmp_path, raw, arguments):
    file = tmp_path / "c.json"
    file.write_bytes(raw)
    with clean("config", "c.json", "unknown option", "unknown argument", "--help lists all"):
        made = cli.take_config([f"--config={file}", *arguments])
        assert isinstance(made, config.Config)
        runlog.write_json(tmp_path / "again.json", vars(made) | {
            s: vars(v) for s, v in vars(made).items()})
        assert config.load(tmp_path / "again.json") == made


# ----- data --------------------------------------------------------------------------------------

PLAIN = st.sampled_from(["hello", "I am well.", "你好", "a\n\nb", "Who?", "8|eight", "\u2028b"])
SAID = st.sampled_from([0] * 9 + [1]).flatmap(lambda odd: TEXT if odd else PLAIN)
TURNS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=2)
ROLES = st.sampled_from([("user", "assistant")] * 9 + [("assistant", "user"), ("user", "bot")])
EXTRA = {"group": SAID, "value": SAID, "subject": SAID, "open": st.booleans(), "system": SAID}


def dialogue(turns, roles, key, who, what):
    return {key: [{who: role, what: text} for turn in turns
                  for role, text in zip(roles, turn, strict=True)]}


RECORD = st.one_of(
    st.builds(dialogue, TURNS, ROLES, st.just("messages"), st.just("role"), st.just("content")),
    st.builds(dialogue, TURNS, ROLES.map(lambda r: ("human", "gpt") if "bot" not in r else r),
              st.just("conversations"), st.just("from"), st.just("value")),
    st.fixed_dictionaries({"instruction": SAID, "output": SAID}, optional={"input": SAID}),
    st.fixed_dictionaries({"prompt": SAID, "completion": SAID}, optional=EXTRA),
    st.fixed_dictionaries({"question": SAID, "answer": SAID}, optional=EXTRA),
    st.fixed_dictionaries({"questions": st.lists(SAID, max_size=3), "answer": SAID}))
LINE = st.sampled_from(range(12)).flatmap(lambda n: written(spoilt(RECORD)) if n == 7 else
                                          st.sampled_from(["", " "]) if n == 8 else written(RECORD))
FILE = st.one_of(
    st.builds(lambda lines, end: end.join(lines), st.lists(LINE, max_size=6),
              st.sampled_from(["\n"] * 5 + ["\r\n", "\r", "\u2028"])),
    written(st.lists(RECORD, max_size=4)))
OPTIONS = st.fixed_dictionaries({}, optional={
    "val_fraction": st.floats(0, 0.99), "seed": st.integers(0, 2**32), "dedupe": st.booleans(),
    "split_by": st.sampled_from(["auto", "wording", "dialogue", "fact"]),
    "system": st.sampled_from(["fixed", "random", "", "Be kind."])})
SHAPE = st.fixed_dictionaries({}, optional={
    "format": st.sampled_from(["template", "chatml", "plain", "gemma"]),
    "loss_on": st.sampled_from(["all", "last", "text"]), "max_length": st.integers(8, 600),
    "too_long": st.sampled_from(["drop", "cut"])})


def in_file(raw):
    """The records of an accepted file, read in another way than data.py does."""
    text = raw.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def texts_of(value, key=""):
    """What is said in a record."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else ((key, v) for v in value)
        return [text for k, v in pairs for text in texts_of(v, k)]
    return [value] if key in {"content", "output", "completion", "answer", "prompt", "instruction",
                              "input", "question", "questions"} and value else []


@fuzz(0.3, raw=encoded(FILE), options=OPTIONS, shape=SHAPE, base=st.booleans())
def test_data_and_dataset(tmp_path, raw, options, shape, base):
    file = tmp_path / "d.jsonl"
    file.write_bytes(raw)
    with clean("data", "d.jsonl", "data: split_by", "dataset: no example", "dataset: format is"):
        examples = sum(data.load(str(file), **options), [])
        records = in_file(raw)
        count = sum(len(r["questions"]) if "questions" in r else 1 for r in records)
        written = [e for e in examples if not e["source"].endswith(", reworded")]
        assert len(written) <= count and (options.get("dedupe") or len(written) == count)
        said = "\0\0".join(m["content"] for e in examples for m in e["messages"])
        assert all(text in said for text in texts_of(records))
        made = dataset.QADataset(examples, BASE if base else CHAT, **shape)
        assert len(made) + len(made.dropped) == len(examples)
        dataset.micro_batches(made.items, 4, 0, layout="shared")


@fuzz(0.1, raw=encoded(FILE | TEXT), name=st.sampled_from(["r.txt", "r.jsonl"]))
def test_replay_and_facts(tmp_path, raw, name):
    file = tmp_path / name
    file.write_bytes(raw)
    with clean("replay", name):
        made = keep.read_replay(str(file))
        if name == "r.txt":
            assert sum(bool(x.strip()) for x in io.StringIO(
                raw.decode("utf-8-sig"), newline=None)) == len(made)
    with clean("facts", name):
        assert all(data.contains(e["value"], e["value"]) or not e["value"].strip(" |")
                   for e in keep.read_facts(str(file)) if e["value"].isascii())


# ----- adapters ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model, the folder of an adapter that fits it)"""
    folder, model = tmp_path_factory.mktemp("saved"), make_model()
    inject(model, r=2, lora_alpha=4)
    adapter.save(model, folder, "b")
    surgery.unwrap(model)
    return model, folder


@fuzz(0.15, draw=st.data())
def test_adapters(tmp_path, saved, draw):
    model, folder = saved
    settings, weights = (folder / name for name in (adapter.CONFIG, adapter.WEIGHTS))
    right = st.just(json.loads(settings.read_text()) | {"alpha_pattern": {"q_proj": 4}})
    (tmp_path / settings.name).write_bytes(draw.draw(encoded(written(spoilt(right)))))
    (tmp_path / weights.name).write_bytes(draw.draw(
        st.just(weights.read_bytes()) | damaged(weights.read_bytes())))
    with clean("adapter", str(tmp_path)):
        assert len(adapter.load(model, tmp_path)) == 14
        surgery.unwrap(model)
    assert not surgery.lora_layers(model), "a refused adapter left the model changed"


# ----- runs --------------------------------------------------------------------------------------

STEP = {"step": 1, "epoch": 1, "loss": 2.0, "accuracy": 0.5, "lr": 1e-3, "grad_norm": 1.0}
EVALUATION = {"step": 2, "val_loss": 1.0, "val_accuracy": 0.5, "recall": 0.5, "best": True}
STEPS = st.sampled_from([STEP, EVALUATION])
LINES = st.lists(written(STEPS) | written(STEPS) | written(spoilt(STEPS)), max_size=5)


INFO = st.just({"base_model": "b", "format": "template", "system": None})


@fuzz(0.08, info=encoded(written(spoilt(INFO) | JSON)),
      settings=encoded(written(CONFIG)))
def test_runs(tmp_path, info, settings):
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run.json").write_bytes(info)
    (tmp_path / "config.json").write_bytes(settings)
    with clean("run", "run.json", "config.json"):
        assert isinstance(runlog.read_run(tmp_path).info, dict)


@fuzz(0.04, raw=encoded(LINES.map("\n".join)), end=st.sampled_from(["", "\n", '\n{"step": 3, "l']))
def test_metrics(tmp_path, raw, end):
    (tmp_path / "metrics.jsonl").write_bytes(raw + end.encode())
    with clean("metrics", "metrics.jsonl"):
        figure = figures.curves(figures.read_metrics(tmp_path / "metrics.jsonl"), "t",
                                figures.LIGHT)
        assert figure.axes
        figures.plt.close(figure)


# ----- pages -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text in each kind of them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [("", ())], collections.defaultdict(str)
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, text):
        self.texts[self.tags[-1]] += text


@functools.cache
def tags_of(template):
    return Page(template.read_text(encoding="utf-8")).tags


HOSTILE = st.lists(st.text(max_size=5) | st.sampled_from([
    *UGLY, "</script>", "<!--", "<", "&amp;", "]]>", "'", '" onload=']), max_size=5).map("".join)


@fuzz(0.04, text=HOSTILE)
def test_pages_of_data(text):
    """Reports of scripts/compare and of the experiment: data in a script element."""
    with clean("page"):
        for make, template in ((report.page, report.PAGE), (knowledge.page, knowledge.PAGE)):
            page = Page(make({"title": text, text: [text]}))
            assert page.tags == tags_of(template)
            assert json.loads(page.texts["script", ("type", "id")]) == {"title": text, text: [text]}


@fuzz(0.04, user=HOSTILE, answer=HOSTILE)
def test_the_page_of_masks(user, answer):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    example = {"messages": messages, "source": f"{user}.jsonl:1"}
    with clean("page", "dataset: "):
        if problems := data.check(example):
            raise ValueError(f"dataset: {problems}")
        made = dataset.QADataset([example], BASE, max_length=10_000)
        page = Page(show.page(made.items, BASE))
        assert {tag for tag, _ in page.tags[len(Page(show.PAGE).tags):]} == {
            "h2", "small", "pre", "span"}
        said = "".join(text for text, _, _ in show.runs(made[0], BASE))
        assert page.texts["span", ("class",)].endswith(said)
        assert page.texts["h2", ()].startswith(example["source"])


# ----- the corpus --------------------------------------------------------------------------------

CORPUS = Path(__file__).with_name("corpus")


@pytest.mark.parametrize("line", [
    pytest.param(line, id=line.split()[1]) for line in
    (CORPUS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| data/")
    or line.startswith("| config/")])
def test_the_corpus(line):
    name, _, expected = (cell.strip() for cell in line.strip("| ").split("|"))
    file = CORPUS / name
    try:
        if name.startswith("config/"):
            outcome = json.dumps(vars(config.load(file).lora))
        else:
            made = (keep.read_replay if file.suffix == ".txt" else data.read_examples)(str(file))
            outcome = json.dumps([e["messages"][-1]["content"] for e in made])
    except ValueError as error:
        assert type(error) is ValueError and str(file) in str(error)
        outcome = f"error: {error}"
    words = expected.strip("`").removeprefix("error: … ")
    assert words in outcome and outcome.startswith("error") == ("error: … " in expected)


def test_the_corpus_is_in_its_table():
    table = (CORPUS / "README.md").read_text(encoding="utf-8")
    for file in CORPUS.glob("*/*"):
        assert f"| {file.relative_to(CORPUS).as_posix()} |" in table


def test_enough_cases_were_tried():
    print(f"\nfuzz: {sum(CASES.values()):,} cases, seed {SEED}: {dict(CASES)}; "
          f"accepted: {dict(ACCEPTED)}")
    assert sum(CASES.values()) >= FUZZ or len(CASES) < 9           # a part of the file was run
