"""lora/base.py: device, dtype, and what is never loaded."""

import pytest
import torch

from lora import base

CPU = torch.device("cpu")


def test_a_wanted_device_and_dtype_are_taken():
    assert base.pick_device("cpu") == CPU
    assert base.pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert base.pick_dtype("auto", CPU) == dtype


def test_a_folder_loads_in_eval_mode_with_the_dtype_asked_for(tiny_folder):
    model = base.load_model(tiny_folder, CPU, torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert base.load_tokenizer(tiny_folder).eos_token == "<|im_end|>"


def test_a_pickle_is_not_read(tiny_folder):
    model = base.load_model(tiny_folder, CPU, torch.float32)
    torch.save(model.state_dict(), tiny_folder / "pytorch_model.bin")
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model: could not load .*safetensors"):
        base.load_model(tiny_folder, CPU, torch.float32)


def test_what_is_no_model_is_one_readable_error(tmp_path):
    with pytest.raises(ValueError, match="(?s)model: could not load .*Expected a model folder"):
        base.load_tokenizer(tmp_path)
