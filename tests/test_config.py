"""The settings: defaults, overrides, errors, and that every key is read by somebody."""

import dataclasses
import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
from inject import inject
from lora import config
from lora.layer import LoRALinear
from lora.run import cli, runlog

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = get_type_hints(config.Config)
KEYS = [f"{section}.{key}" for section, cls in SECTIONS.items() for key in get_type_hints(cls)]


@pytest.fixture
def load(tmp_path):
    """load(content, *overrides) reads a file with that content: a value, or a text as it is."""
    def read(content, *overrides):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "c.json").write_text(text, encoding="utf-8")
        return config.load(tmp_path / "c.json", overrides)
    return read


def error_of(load, *arguments):
    with pytest.raises(ValueError) as caught:
        load(*arguments)
    return str(caught.value)


# ----- what is accepted --------------------------------------------------------------------------


def test_an_empty_object_gives_the_defaults(load):
    assert load({}) == config.Config()


def test_the_defaults_pass_their_own_checks(load):
    assert load(dataclasses.asdict(config.Config())) == config.Config()


def test_the_project_config_loads():
    assert config.load(ROOT / "config.json").train.run == "demo"


@pytest.mark.parametrize(("key", "text", "value"), [
    ("lora.r", "16", 16), ("train.lr", "1e-3", 1e-3), ("train.lr", "1", 1),
    ("train.schedule", "linear", "linear"), ("train.max_steps", "null", None),
    ("train.max_steps", "7", 7), ("lora.use_rslora", "true", True),
    ("lora.target_modules", '["q_proj", "v_proj"]', ("q_proj", "v_proj")),
    ("lora.layers", "4", 4), ("lora.layers", "[0, 5]", (0, 5)), ("lora.layers", "all", "all"),
    ("train.betas", "[0.8, 0.9]", (0.8, 0.9)), ("train.grad_accum", "auto", "auto"),
    ("train.eval_every", "3", 3), ("data.system", "Be kind = be brief.", "Be kind = be brief."),
    ("train.questions", '["Who?"]', ("Who?",)), ("model.name", '"16"', "16")])
def test_an_override_is_read_as_json_or_as_a_text(load, key, text, value):
    section, _, name = key.partition(".")
    assert getattr(getattr(load({}, f"--{key}={text}"), section), name) == value


def test_an_override_wins_over_the_file_and_the_last_one_over_others(load):
    made = load({"lora": {"r": 4, "lora_alpha": 9}}, "--lora.r=5", "--lora.r=6")
    assert (made.lora.r, made.lora.lora_alpha) == (6, 9)


def test_a_saved_config_loads_back(load):
    made = load({"lora": {"layers": [1, 2], "target_modules": ["q_proj"]},
                 "train": {"betas": [0.5, 0.6], "questions": ["a", "b"], "max_steps": 3}})
    assert load(dataclasses.asdict(made)) == made


def test_a_config_cannot_be_changed():
    made = config.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lora = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lora.r = 1


def test_a_byte_order_mark_is_ignored(load):
    assert load('\ufeff{"lora": {"r": 3}}').lora.r == 3


@pytest.mark.parametrize("naming", ["--config {}", "--config={}"])
def test_take_config_reads_the_named_file(tmp_path, naming):
    file = tmp_path / "c.json"
    file.write_text('{"lora": {"r": 3}}')
    made = cli.take_config([*naming.format(file).split(), "--lora.lora_alpha=5"])
    assert (made.lora.r, made.lora.lora_alpha) == (3, 5)


def test_take_config_reads_config_json_by_default(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"lora": {"r": 3}}')
    monkeypatch.chdir(tmp_path)
    assert cli.take_config([]).lora.r == 3


@pytest.mark.parametrize("argument, message", [
    ("my.jsonl", "unknown argument; python x.py --help lists all"),
    ("--lora.r", "expected one argument; python x.py --help lists all"),
    ("lora.r=4", "unknown argument; did you mean --lora.r?"),
    ("--r=4", "unknown option; did you mean --lora.r?"),
    ("--epochs=2", "unknown option; did you mean --train.epochs?"),
    ("--model=smollm2", "unknown option; did you mean --model.name?"),
    ("--train.save_steps=2", "unknown option; did you mean --train.save_every?"),
    ("--model.name_or_path=a", "unknown option; did you mean --model.name?"),
    ("-x", "unknown option; python x.py --help lists all")])
def test_a_wrong_argument_comes_first_and_then_the_nearest_right_one(argument, message):
    with pytest.raises(ValueError) as caught:
        cli.take_config(["--lora.r=4", argument], "    python x.py")
    assert str(caught.value) == f"{argument.partition('=')[0]}: {message}"


def test_a_commands_own_option_is_suggested_too():
    parser = cli.Parser("    python -m scripts.x runs/demo")
    parser.add_argument("run")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    assert vars(parser.parse_args(["runs/a"])) == {"run": "runs/a", "max_new_tokens": 8}
    for argv, message in ((["--max-tokens=3"], "--max-tokens: unknown option; did you mean "
                           "--max-new-tokens?"), ([], "required: run; python -m scripts.x --help"),
                          (["a", "--max-new-tokens=b"], "--max-new-tokens: invalid int value: 'b'"),
                          (["a", "b"], "b: unknown argument")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            parser.parse_args(argv)


def test_help_shows_the_doc_and_every_default(capsys):
    parser = cli.Parser("Do it.\n\n    python x.py my.jsonl", settings=True, file=True)
    parser.add_argument("--n", type=int, default=0, help="examples")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    assert not caught.value.code and "Do it.\n\n    python x.py my.jsonl" in out
    assert "examples (default: 0)" in out and "(default: config.json)" in out
    for key, default, _, comment in cli.described():
        assert re.search(re.escape(f"  --{key}={default}") + " +" + re.escape(comment), out)


def test_a_plain_argument_is_the_data_and_an_option_still_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert cli.take_config(["a.jsonl"], file=True).data.path == "a.jsonl"
    assert cli.take_config(["--data.path=b"], file=True).data.path == "b"
    assert cli.take_config(["--data.path", "b"], file=True).data.path == "b"


@pytest.mark.parametrize("text", ["Be kind.\nBe brief.\n", "\ufeffBe kind.\nBe brief."])
def test_a_text_file_as_system_prompt_is_read(load, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "system.txt").write_text(text, encoding="utf-8")
    made = load({}, "--data.system=system.txt")
    assert made.data.system == "Be kind.\nBe brief."
    assert load(dataclasses.asdict(made)) == made
    assert load({}, "--data.system=Read notes.txt").data.system == "Read notes.txt"
    assert "data.system is \"none.txt\"; expected a text, or a .txt file that exists" in error_of(
        load, {}, "--data.system=none.txt")


# ----- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "words"), [
    ({"lora": {"rank": 8}}, "unknown key lora.rank. Known: r, lora_alpha"),
    ({"lora": {"rank": 8}}, "Did you mean lora.r?"),
    ({"lora": {"lora_alpa": 8}}, "Did you mean lora.lora_alpha?"),
    ({"train": {"learning_rate": 1}}, "Did you mean train.lr?"),
    ({"train": {"save_steps": 1}}, "Did you mean train.save_every?"),
    ({"model": {"name_or_path": "a"}}, "Did you mean model.name?"),
    ({"train": {"max_length": 9}}, "Did you mean dataset.max_length?"),
    ({"trian": {}}, "Did you mean train?"),
    ({"lr": 1}, "Did you mean train.lr?"),
    ({"zzz": 1}, "unknown key zzz. Known: model, lora, data, dataset, keep, train.")])
def test_an_unknown_key_comes_with_a_suggestion(load, content, words):
    assert words in error_of(load, content)


def test_every_suggestion_from_other_trainers_exists():
    assert set(config.ELSEWHERE.values()) <= set(KEYS)


def test_every_range_is_of_a_setting_that_exists():
    assert set(config.RANGES) <= set(KEYS)


@pytest.mark.parametrize(("key", "value"), [
    ("lora.r", True), ("lora.r", 8.0), ("lora.r", "8"), ("lora.r", None), ("lora.r", [8]),
    ("train.lr", "1e-3 "), ("train.lr", True), ("train.lr", float("nan")),
    ("train.lr", float("inf")), ("train.lr", None), ("train.lr", {}),
    pytest.param("train.lr", 10**400, id="train.lr-too large for a float"),
    ("train.max_steps", 1.5), ("train.max_steps", False), ("train.max_steps", "null"),
    ("data.dedupe", 1), ("data.dedupe", "true"), ("data.system", 5), ("model.name", None),
    ("train.schedule", "cosin"), ("train.schedule", ["cosine"]), ("train.schedule", 1),
    ("train.betas", [0.9]), ("train.betas", [0.9, 0.9, 0.9]), ("train.betas", 0.9),
    ("train.betas", [0.9, True]), ("train.betas", [0.9, float("nan")]), ("train.betas", "ab"),
    ("lora.target_modules", "q_proj"), ("lora.target_modules", ["q_proj", 1]),
    ("lora.layers", "last"), ("lora.layers", [0.5]), ("lora.layers", True),
    ("train.questions", "Who?"), ("train.grad_accum", "Auto"), ("train.grad_accum", 2.0),
    ("data.path", "a\0b"), ("data.system", "\ud83d"), ("train.questions", ["a", "\ud83d"])])
def test_a_wrong_type_is_named_with_what_was_expected(load, key, value):
    section, _, name = key.partition(".")
    assert f"{key} is " in (message := error_of(load, {section: {name: value}}))
    assert "; expected " in message


@pytest.mark.parametrize(("key", "value"), [
    ("lora.r", 0), ("lora.lora_alpha", 0), ("lora.lora_dropout", 1), ("lora.lora_dropout", -0.1),
    ("data.val_fraction", 1.0), ("dataset.max_length", 0), ("train.epochs", 0),
    ("train.max_steps", 0), ("train.batch_size", -1), ("train.grad_accum", 0), ("train.lr", 0),
    ("train.lr", 2), ("train.warmup_steps", -1), ("train.betas", [0.9, 1.0]),
    ("train.betas", [-0.1, 0.9]), ("train.eps", 0), ("train.weight_decay", -1),
    ("train.max_grad_norm", -1), ("train.log_every", 0), ("train.eval_every", 0),
    ("train.patience", -1), ("train.max_new_tokens", 0), ("lora.r", 10**12),
    ("lora.lora_alpha", 10**400), ("train.max_steps", 10**12), ("train.batch_size", 10**12)])
def test_a_number_out_of_range_is_named_with_the_range(load, key, value):
    section, _, name = key.partition(".")
    assert re.search(rf"{key} is .*; expected at least", error_of(load, {section: {name: value}}))


@pytest.mark.parametrize("run", ["", ".", "..", "a/b", "/tmp"])
def test_a_run_that_is_no_folder_name_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "kept").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder name"):
        with runlog.opened(run):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_all_problems_come_in_one_error(load, tmp_path):
    lines = error_of(load, {"lora": {"r": 0, "rank": 1}, "data": 5, "x": {}, "train": {"lr": "a"}},
                     "--dataset.max_length=x", "--train.nope=1").split("\n")
    assert len(lines) == 7
    assert all(line.startswith(f"{tmp_path / 'c.json'}: ") for line in lines)


@pytest.mark.parametrize("content", ["", "{", "{'a': 1}", "[" * 100_000, "1" * 5000])
def test_a_file_that_is_not_json_is_a_value_error(load, content):
    assert re.search(r"c\.json: not JSON", error_of(load, content))


@pytest.mark.parametrize("content", [
    '{"lora": {"r": 4, "r": 8}}', '{"lora": {"r": 4}, "data": {}, "lora": {}}'])
def test_a_key_that_is_there_twice_is_a_value_error(load, content):
    assert re.search(r"c\.json: not JSON: a key is there twice: ", error_of(load, content))


def test_a_value_too_deep_to_be_shown_is_a_value_error(load):
    assert "lora is " in error_of(load, '{"lora": ' + "[" * 900 + "]" * 900 + "}")


@pytest.mark.parametrize("content", ["[]", "5", "null", '"a"'])
def test_a_file_that_is_no_object_is_a_value_error(load, content):
    assert "expected an object" in error_of(load, content)


def test_a_missing_file_is_a_value_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no\.json: cannot be read .* --config"):
        config.load(tmp_path / "no.json")


@pytest.mark.parametrize("override", ["--x.y=1", "--lora.=1", "--lora.r", "--lora.r=", "x", "", "=",
                                      "--train.lr=" + "[" * 100_000])
def test_a_wrong_override_is_a_value_error(load, override):
    assert error_of(load, {}, override)


def test_run_cli_prints_a_value_error_without_traceback():
    def main(argv):
        raise ValueError(f"bad {argv}")
    with pytest.raises(SystemExit, match=r"error: bad \[1\]"):
        cli.run(main, [1])
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda argv: argv, 3)
    assert caught.value.code == 3


# ----- any input ---------------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=20)                # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3),
    max_leaves=8)
CONTENTS = JSON | st.fixed_dictionaries({}, optional={
    section: JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(get_type_hints(cls), JSON))
    for section, cls in SECTIONS.items()})
OVERRIDES = TEXT | st.builds("--{}={}".format, st.sampled_from(KEYS), JSON.map(json.dumps) | TEXT)


@settings(max_examples=200, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))
@given(CONTENTS, st.lists(OVERRIDES, max_size=2))
@example({"train": {"lr": 10**400}}, [])
@example({}, ["--train.lr=" + "[" * 5000])
def test_any_content_gives_a_config_or_a_value_error(content, overrides):
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(json.dumps(content))
        file.flush()
        try:
            made = config.load(file.name, overrides)
        except ValueError as error:
            assert file.name in str(error)
        else:
            assert isinstance(made, config.Config)
            json.dumps(dataclasses.asdict(made), allow_nan=False)


# ----- no dead keys ------------------------------------------------------------------------------


def parameters(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}


TAKEN = {"lora": parameters(inject, LoRALinear),     # train.py passes these sections on as **asdict
         "data": parameters(data.load)}
SOURCES = "\n".join(file.read_text(encoding="utf-8") for pattern in (
    "*.py", "lora/**/*.py", "scripts/*.py", "plots/*.py")
    for file in ROOT.glob(pattern) if file.name != "config.py")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read_by_somebody(key):
    section, _, name = key.partition(".")
    if section in TAKEN:
        assert re.search(rf"\*\*(dataclasses\.)?asdict\(\w+\.{section}\)|asdict\(wanted\)", SOURCES)
        assert name in TAKEN[section]
    else:                                          # s is settings or settings.train
        assert re.search(rf"\b((settings|s)\.{section}|s)\.{name}\b", SOURCES)


def test_every_key_says_what_it_is_for():
    lines = inspect.getsource(config).split("\n")
    for name in (key.partition(".")[2] for key in KEYS):
        assert any(re.match(rf"    {name}: .*  # \w+", line) for line in lines), name
