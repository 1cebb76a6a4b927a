"""lora/base/load.py: device, dtype, and what is never loaded."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from conftest import FAST_BFLOAT16, make_model, make_tokenizer

from lora.base import load
from lora.surgery import text_ids

CPU = torch.device("cpu")


def test_a_wanted_device_and_dtype_are_taken():
    assert load.pick_device("cpu") == CPU
    assert load.pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(load, "fast_bfloat16", FAST_BFLOAT16)
    assert load.pick_dtype("auto", CPU) == dtype


def test_a_card_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(load, "fast_bfloat16", lambda device: False)
    assert load.pick_dtype("auto", torch.device("cuda")) == torch.float32
    assert "no bfloat16" in capsys.readouterr().out
    assert load.pick_dtype("auto", CPU) == torch.float32 and not capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_weights_stay_in_their_file_until_they_are_used(tmp_path):
    """Where the file has the run's dtype. A base that is quantised is never whole in memory."""
    def own():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
    model = make_model(hidden_size=1024, intermediate_size=4096, vocab_size=2048)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    before = own()
    loaded = load.load_model(tmp_path, CPU, torch.float32)
    assert own() - before < size / 2
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_folder_loads_in_eval_mode_with_the_dtype_asked_for(tiny_folder):
    model = load.load_model(tiny_folder, CPU, torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert load.load_tokenizer(tiny_folder).eos_token == "<|im_end|>"


def test_a_pickle_is_not_read(tiny_folder):
    model = load.load_model(tiny_folder, CPU, torch.float32)
    torch.save(model.state_dict(), tiny_folder / "pytorch_model.bin")
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model: could not load .*safetensors"):
        load.load_model(tiny_folder, CPU, torch.float32)


def test_what_is_no_model_is_one_readable_error(tmp_path):
    with pytest.raises(ValueError, match="(?s)model: could not load .*Expected a model folder"):
        load.load_tokenizer(tmp_path)


# ----- a folder that was copied in part ----------------------------------------------------------


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, keep=100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def change(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(
        json.loads((folder / name).read_text()) | values))


def first_shard(spoil):
    return lambda folder: spoil(min(folder.glob("model-00001*")).name)(folder)


@pytest.mark.parametrize("spoil, words", [
    (remove("model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors is missing"),
    (first_shard(cut), "model-00001-of-00003.safetensors is damaged"),
    (cut("model-00003-of-00003.safetensors", 0), "model-00003-of-00003.safetensors is damaged"),
    (remove("model.safetensors.index.json"), "model.safetensors is missing"),
    (cut("model.safetensors.index.json"), "model.safetensors.index.json is damaged"),
    (change("model.safetensors.index.json", weight_map=5), "index.json is no index of weights"),
    (remove("config.json"), "config.json is missing"), (cut("config.json"), "config.json is damag"),
    (change("config.json", hidden_size="x"), "hidden_size"),
    (change("config.json", hidden_size=64), "of another shape"),
    (change("config.json", num_attention_heads=0), "Expected a model"),
    (change("config.json", model_type=["x"]), "Expected a model")])
def test_a_half_copied_model_is_named_by_file(tmp_path, spoil, words):
    make_model().save_pretrained(tmp_path, max_shard_size="60KB")
    make_tokenizer().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)model: could not load .*{words}") as error:
        load.load_model(str(tmp_path), CPU, torch.float32)
    assert " is " not in words or "Copy it again" in str(error.value) or "no index" in words


@pytest.mark.parametrize("spoil, words", [
    (remove("tokenizer.json"), "tokenizer.json is missing"),
    (cut("tokenizer.json"), "tokenizer.json is damaged"),
    (cut("tokenizer_config.json"), "tokenizer_config.json is damaged"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "Expected a model")])
def test_a_half_copied_tokenizer_is_named_by_file(tiny_folder, spoil, words):
    spoil(tiny_folder)
    with pytest.raises(ValueError, match=f"(?s)model: could not load .*{words}"):
        load.load_tokenizer(str(tiny_folder))


def test_a_missing_weight_is_never_replaced_by_random_numbers(tiny_folder):
    change("config.json", num_hidden_layers=3)(tiny_folder)
    with pytest.raises(ValueError, match="9 weights of config.json are missing .*model.layers.2"):
        load.load_model(str(tiny_folder), CPU, torch.float32)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "", "../..", "https://a.b/c"])
def test_a_name_that_cannot_be_one_is_one_readable_error(name):
    with pytest.raises(ValueError, match="model: could not load"):
        load.load_tokenizer(name)


@pytest.mark.parametrize("name, kind", [
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"), ("qwen3_5", "Qwen3_5ForCausalLM"),
    ("gemma3", "Gemma3ForConditionalGeneration"), ("mistral3", "Mistral3ForConditionalGeneration")])
def test_a_model_that_sees_is_loaded_for_its_text(tmp_path, name, kind):
    model = zoo.make(name)
    model.save_pretrained(tmp_path)
    loaded, ids = load.load_model(str(tmp_path), CPU, torch.float32), text_ids(model, 9)[None]
    assert type(loaded).__name__ == kind
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_of_another_kind_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="'vit' is no language model") as error:
        load.load_model(str(tmp_path), CPU, torch.float32)
    assert "tokenizer.json" not in str(error.value)
