"""scripts/verify.py and scripts/merge.py on tiny runs: what is wrong is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import adapter
from lora.base import load
from scripts import merge, verify
from scripts.voices import Voices

pytestmark = pytest.mark.auto


@pytest.fixture
def copy(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    return shutil.copytree(home / "runs" / "a", tmp_path / "copy")


def change(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def tensors(run, edit):
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({k: edit(k, v) for k, v in load_file(file).items()}, file, {"format": "pt"})


def test_a_good_run_passes(copy, capsys):
    assert verify.main([str(copy), "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok ") == 6 and "ERROR" not in out and "verify: 0 errors" in out
    assert "14 modules, 14 with an update that is not zero" in out
    assert "system prompt: You are a." in out and "tuned: " in out


@pytest.mark.parametrize("damage, said", [
    (lambda r: change(r / "run.json", template="x"), "ERROR  chat template: it is"),
    (lambda r: change(r / "run.json", base_weights="x"), "ERROR  base weights: they are"),
    (lambda r: change(r / "run.json", base_model="x/y"), "ERROR  base model: the adapter is"),
    (lambda r: change(r / "run.json", systems=3), "ERROR  system prompt: training used 3 diff"),
    (lambda r: tensors(r, lambda k, v: v * 0 if "lora_B" in k else v), "every update is zero"),
    (lambda r: tensors(r, lambda k, v: v * 1e-9 if "lora_B" in k else v), "word for word")])
def test_what_is_wrong_is_an_error_and_the_exit_code_says_so(copy, capsys, damage, said):
    damage(copy)
    assert verify.main([str(copy), "--device=cpu", "--max-new-tokens=8"]) == 1
    assert said in capsys.readouterr().out


def test_the_system_prompt_of_a_server_is_compared(copy, capsys, tmp_path):
    (tmp_path / "system.txt").write_text("You are a.\n")
    args = [str(copy), "--device=cpu", "--max-new-tokens=8"]
    assert verify.main([*args, "--system", str(tmp_path / "system.txt")]) == 0
    assert verify.main([*args, "--system", "You are A."]) == 1
    assert "training used 'You are a.', this is 'You are A.'" in capsys.readouterr().out


def test_an_adapter_of_another_shape_is_one_line(copy):
    tensors(copy, lambda k, v: torch.zeros(v.shape[0] + 1, v.shape[1]))
    with pytest.raises(ValueError, match="does not fit this model"):
        verify.main([str(copy)])


# ----- merge -------------------------------------------------------------------------------------


def logits(model, voices, name=None):
    ids = torch.tensor([[5, 60, 61, 62, 63]])
    with torch.no_grad(), voices.bank.using(name):
        return model(input_ids=ids).logits


@pytest.fixture
def voices(home, monkeypatch):
    """In float32, in which a merge is exact."""
    monkeypatch.setattr(load, "fast_bfloat16", lambda device: False)
    monkeypatch.chdir(home)
    return Voices(["runs/a", "runs/b"], "cpu")


def test_a_merged_folder_is_a_plain_model_that_answers_like_base_and_adapter(voices, tmp_path,
                                                                            capsys):
    merge.main(["runs/a", "--out", str(tmp_path / "m"), "--device=cpu"])
    assert "the likeliest token is the same at 100.0%" in capsys.readouterr().out
    merged = load.load_model(tmp_path / "m", "cpu", torch.float32)
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(logits(merged, voices), logits(voices.model, voices, "a"), atol=1e-4)
    assert load.load_tokenizer(tmp_path / "m").chat_template == voices.tokenizer.chat_template


def test_a_weighted_sum_is_exact_as_model_and_as_adapter(voices, tmp_path):
    args = ["runs/a=0.7", "runs/b=0.3", "--device=cpu", "--out"]
    merge.main([*args, str(tmp_path / "model")])
    merge.main([*args, str(tmp_path / "mix"), "--adapter"])
    wanted = voices.model.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    for name, weight in (("a", 0.7), ("b", 0.3)):
        layers, _ = voices.bank.adapters[name]
        wanted += weight * layers["model.layers.1.mlp.up_proj"].delta_weight()
    merged = load.load_model(tmp_path / "model", "cpu", torch.float32)
    assert torch.allclose(merged.model.layers[1].mlp.up_proj.weight, wanted, atol=1e-6)
    mixed = Voices([tmp_path / "mix"], "cpu")
    assert mixed.problems == [] and len(next(iter(
        mixed.bank.adapters["mix"][0].values())).lora_A) == 8
    assert torch.allclose(logits(mixed.model, mixed, "mix"), logits(merged, voices), atol=1e-4)


def test_interpolation_ends_at_either_adapter(voices):
    for t, same in ((0, "a"), (1, "b")):
        voices.bank.mix(f"at {t}", {"a": 1 - t, "b": t})
        assert torch.allclose(logits(voices.model, voices, f"at {t}"),
                              logits(voices.model, voices, same), atol=1e-4)


def test_adapters_of_different_ranks_and_places_are_summed(home, tmp_path):
    from conftest import make_model

    from inject import inject
    from lora.use.bank import Bank
    bank = Bank(make_model())
    for name, lora in (("x", {"r": 2, "target_modules": ["q_proj"]}), ("y", {"r": 3, "layers": 1})):
        model = make_model()
        inject(model, lora_alpha=6, **lora)
        for layer in (m for m in model.modules() if hasattr(m, "lora_B")):
            torch.nn.init.normal_(layer.lora_B)
        adapter.save(model, tmp_path / name, "tiny")
        bank.add(name, tmp_path / name)
    bank.mix("both", {"x": 0.5, "y": -2})
    with bank.using("both"):
        adapter.save(bank.model, tmp_path / "both", "tiny")
    again = Bank(make_model())
    again.add("both", tmp_path / "both")
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                 "model.layers.1.mlp.up_proj"):
        parts = [w * bank.adapters[n][0][path].delta_weight() for n, w in (("x", 0.5), ("y", -2))
                 if path in bank.adapters[n][0]]
        assert torch.allclose(again.adapters["both"][0][path].delta_weight(), sum(parts), atol=1e-5)


def test_a_quantised_base_is_refused_with_the_fix(copy, home, tmp_path):
    tiny = shutil.copytree(home / "tiny", tmp_path / "nf4")
    change(tiny / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    settings = json.loads((copy / "config.json").read_text())
    settings["model"]["name"] = str(tiny)
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is quantised.*bfloat16 or float32"):
        merge.main([str(copy), "--out", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


def test_merge_refuses_what_it_cannot_do(copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty"):
        merge.main([str(copy), "--out", str(tmp_path / "full")])
    with pytest.raises(ValueError, match="expected RUN=WEIGHT"):
        merge.main([f"{copy}=much", "--out", str(tmp_path / "m")])
    with pytest.raises(ValueError, match="is no finished run"):
        merge.main(["runs/none", "--out", str(tmp_path / "m")])
