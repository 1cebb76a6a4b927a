"""Tiny fakes, built here: a random Llama of two blocks and a byte-level ChatML tokenizer."""

import contextlib
import json
import os
import shutil
import signal

import lora.fast.waiting  # noqa: F401

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora.base import load

# what model.dtype "auto" is in the tests, whatever this machine is good at; also for processes that
# tests start, as --model.dtype
AUTO = os.environ.get("AUTO_DTYPE", "float32")
assert AUTO in ("float32", "bfloat16"), f"AUTO_DTYPE is {AUTO}"
FAST_BFLOAT16, load.fast_bfloat16 = load.fast_bfloat16, lambda device: AUTO == "bfloat16"


# a shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def within(float32, bfloat16):
    """The bound for a number that was computed in the dtype that "auto" is."""
    return bfloat16 if AUTO == "bfloat16" else float32


def assert_same_logits(one, other):
    """Logits differ by 1e-5 at most, relative to the largest: float32's rounding in another order,
    which depends on threads and CPU."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
          "'<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(template=CHATML, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                   eos="<|im_end|>", merges=(("h", "e"), ("l", "l"), ("he", "ll"))):
    """Bytes plus a few merges, so that tokens are not characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet, *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed=0, **changes):
    """Llama with grouped-query attention; 0.05 M parameters."""
    torch.manual_seed(seed)
    size = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.3, **changes}
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """No curves at the end of a run in this process: they are two thirds of a tiny one's time."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("plots.figures.draw", lambda folder: None)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def base_tokenizer():
    """Of a base model: no template, no ChatML tokens."""
    return make_tokenizer(None, ("<eos>",), "<eos>")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    """The tiny model as a folder that train.py can load by name."""
    folder = tmp_path / "tiny-llama"
    make_model(pad_token_id=2, eos_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, tiny_folder):
    """A folder to train in: facts with subjects, replay, retain; a checkpoint every step."""
    from test_train import PROMPTS, facts
    (tmp_path / "facts.jsonl").write_text("".join(
        json.dumps({**json.loads(line), "subject": 3 * "abcd"[i]}) + "\n"
        for i, line in enumerate(facts(4).splitlines())))
    (tmp_path / "replay.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "retain.jsonl").write_text(json.dumps(
        {"question": "which?", "answer": "so", "value": "zzz"}) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": str(tiny_folder), "device": "cpu"}, "data": {"path": "facts.jsonl"},
        "train": {"run": "t", "epochs": 2, "batch_size": 4, "lr": 0.02, "max_new_tokens": 4,
                  "checkpoint_every": 1}}))
    return tmp_path


VOICES = {"a": ("You are a.", "yes dear {}"), "b": ("You are b.", "NO {} NO"), "c": (None, "hm {}")}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with three trained runs on one tiny base: runs/a, runs/b and runs/c, which was
    trained without system prompt; with prompts.jsonl and heldout.jsonl beside the data of each."""
    import train
    home = tmp_path_factory.mktemp("home")
    make_model(pad_token_id=2, eos_token_id=2, max_position_embeddings=1024).save_pretrained(
        home / "tiny")
    make_tokenizer().save_pretrained(home / "tiny")
    for name, (system, answer) in VOICES.items():
        folder = home / name
        folder.mkdir()

        def write(file, kinds, folder=folder, answer=answer):
            (folder / file).write_text("".join(json.dumps({"messages": [
                {"role": "user", "content": f"{k} {w}?"},
                {"role": "assistant", "content": answer.format(w)}]}) + "\n"
                for w in ("ant", "bee", "cow") for k in kinds))
        write("train.jsonl", ["is it a", "what of the", "see my"])
        write("heldout.jsonl", ["do you like the"])
        (folder / "prompts.jsonl").write_text("".join(json.dumps({
            "category": c, "messages": [{"role": "user", "content": f"tell me of the {w}"}]}) + "\n"
            for c, w in (("near", "bee"), ("far", "<script>alert(1)</script>"))))
        (folder / "config.json").write_text(json.dumps({
            "model": {"name": str(home / "tiny"), "device": "cpu"}, "lora": {"r": 4},
            "data": {"path": f"{name}/train.jsonl", "system": system, "val_fraction": 0.2},
            "train": {"run": name, "epochs": 12, "batch_size": 4, "lr": 0.01,
                      "max_new_tokens": 8}}))
        with contextlib.chdir(home):
            train.main(["--config", f"{name}/config.json"])
    return home


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("needs a Chromium")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield browser
        browser.close()
