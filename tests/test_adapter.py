"""lora/adapter.py: what we write, PEFT reads with the same logits, and the other way round."""

import json

import peft
import pytest
import torch
import zoo
from conftest import assert_same_logits, make_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from inject import inject
from lora import adapter
from lora.surgery import adapter_parameters, lora_layers

IDS = torch.randint(5, 200, (2, 11), generator=torch.Generator().manual_seed(0))


def small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=256,
                                      bos_token_id=1, eos_token_id=1)).eval()


def adapted(make=make_model, seed=3, **choice):
    model = make()
    torch.manual_seed(seed)
    inject(model, **{"r": 4, "lora_alpha": 12, **choice})
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


@pytest.mark.parametrize("make", [make_model, small_gpt2])
@pytest.mark.parametrize("choice", [
    {}, {"use_rslora": True}, {"layers": 1}, {"lora_dropout": 0.1}])
def test_peft_opens_ours_and_we_open_what_peft_saves(tmp_path, make, choice):
    model = adapted(make, **choice)
    adapter.save(model, tmp_path / "ours", "some/base")
    with torch.no_grad():
        logits = model(IDS).logits
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        assert_same_logits(theirs(IDS).logits, logits)
        assert (theirs.base_model.model(IDS).logits - make()(IDS).logits).abs().max() > 1e-3
        theirs.save_pretrained(tmp_path / "theirs")
        again = make()
        assert adapter.load(again, tmp_path / "theirs") == list(lora_layers(model))
        assert_same_logits(again.eval()(IDS).logits, logits)


def test_what_peft_made_with_patterns_keeps_its_strength(tmp_path):
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make_model(), peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={"q_proj": 5}, rank_pattern={"down_proj": 2})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_model()
    adapter.load(ours, tmp_path / "theirs")
    with torch.no_grad():
        logits = theirs(IDS).logits
        assert_same_logits(ours.eval()(IDS).logits, logits)
        adapter.save(ours, tmp_path / "back", "some/base")
        back = peft.PeftModel.from_pretrained(make_model(), tmp_path / "back").eval()
        assert_same_logits(back(IDS).logits, logits)


def test_save_load_gives_the_same_logits_bit_for_bit(tmp_path):
    model = adapted()
    adapter.save(model, tmp_path, "b")
    for fresh in (make_model(), adapted(seed=9)):               # not injected yet, or already
        adapter.load(fresh, tmp_path)
        assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)


def test_the_files(tmp_path):
    model = adapted()
    adapter.save(model, tmp_path, "org/base")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["layers_to_transform"] is None
    assert config["lora_alpha"] == 12 and isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                        "up_proj", "v_proj"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (4, 48) and tensors[key.format("B")].shape == (32, 4)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_every_misfit_is_in_one_error_and_the_model_is_left_alone(tmp_path):
    model = adapted()
    adapter.save(model, tmp_path, "b")
    file = tmp_path / "adapter_model.safetensors"
    tensors, key = load_file(file), "base_model.model.model.layers.{}.lora_{}.weight"
    del tensors[key.format("0.self_attn.q_proj", "B")]
    tensors[key.format("1.mlp.up_proj", "A")] = torch.zeros(4, 31)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    tensors[key.format("7.mlp.up_proj", "A")] = torch.zeros(4, 32)
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    for fresh in (make_model(), adapted(seed=9)):
        before = [p.clone() for p in adapter_parameters(fresh)]
        with pytest.raises(ValueError) as error:
            adapter.load(fresh, tmp_path)
        for part in ("0.self_attn.q_proj.lora_B.weight: in the model, not in the file",
                     "1.mlp.up_proj.lora_A.weight: file has (4, 31), model wants (4, 32)",
                     "lm_head.weight: in the file, not in the model",
                     "layers.7.mlp.up_proj.lora_A.weight: in the file, not in the model",
                     "use_dora is True: not supported"):
            assert part in str(error.value)
        assert all(map(torch.equal, before, adapter_parameters(fresh)))


def test_another_strength_is_a_misfit(tmp_path):
    adapter.save(adapted(), tmp_path, "b")
    with pytest.raises(ValueError, match="q_proj: the file's lora_alpha or use_rslora differs"):
        adapter.load(adapted(lora_alpha=64), tmp_path)


@pytest.mark.parametrize("content, message", [
    (None, "has no adapter_config.json; expected a folder with"), ("{", "cannot be read")])
def test_no_adapter_there(tmp_path, content, message):
    if content:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        adapter.load(make_model(), tmp_path)


def test_a_truncated_file_is_an_error(tmp_path):
    adapter.save(adapted(), tmp_path, "b")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        adapter.load(make_model(), tmp_path)


@pytest.mark.parametrize("key, value", [
    ("lora_alpha", "8"), ("lora_alpha", 0), ("lora_alpha", float("nan")), ("lora_alpha", 10**400),
    ("lora_alpha", True), ("lora_dropout", 1), ("lora_dropout", "0"), ("use_rslora", "yes"),
    ("alpha_pattern", [1]), ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", {"(": 1}),
    ("alpha_pattern", {"((a+)+)+b": 1}), ("alpha_pattern", {".*.*.*.*.*b": 1})])
def test_a_setting_that_cannot_be_computed_is_a_misfit(tmp_path, key, value):
    """A pattern of nested repetitions would search for years; the others ended in a traceback."""
    adapter.save(adapted(), tmp_path, "b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    for fresh in (make_model(), adapted(seed=9)):
        with pytest.raises(ValueError, match=f"{key} is .*: not supported here"):
            adapter.load(fresh, tmp_path)


@pytest.mark.parametrize("wrong, words", [
    (torch.full((4, 32), float("nan")), "holds values that are not finite numbers"),
    (torch.zeros(4, 32, dtype=torch.int32), "holds values that are not finite numbers"),
    (torch.zeros(0, 32), "file has"), (torch.tensor(1.0), "file has")])
def test_a_tensor_that_cannot_be_an_adapter_is_a_misfit(tmp_path, wrong, words):
    adapter.save(adapted(), tmp_path, "b")
    file, key = tmp_path / "adapter_model.safetensors", "model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(load_file(file) | {f"base_model.model.{key}": wrong}, file)
    model = make_model()
    with pytest.raises(ValueError, match=f"{key}: {words}"):
        adapter.load(model, tmp_path)
    assert not lora_layers(model)


def test_a_deeply_nested_adapter_config_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        adapter.load(make_model(), tmp_path)


def test_names_that_other_modules_have_too_are_written_as_whole_paths(tmp_path):
    """PEFT would adapt a vision tower's q_proj by its name."""
    model = zoo.make("qwen3_vl")
    paths = inject(model, r=2, lora_alpha=2)
    adapter.save(model, tmp_path, "some/base")
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    towers = [n for n, m in model.named_modules() if n.rpartition(".")[2] in
              {p.rpartition(".")[2] for p in paths} and n not in paths]
    assert config["target_modules"] == (sorted(paths) if towers else sorted(
        {p.rpartition(".")[2] for p in paths}))
    theirs = peft.PeftModel.from_pretrained(zoo.make("qwen3_vl"), tmp_path)
    found = {n.removeprefix("base_model.model.").removesuffix(".lora_A.default")
             for n, _ in theirs.named_modules() if n.endswith(".lora_A.default")}
    assert found == set(paths)
