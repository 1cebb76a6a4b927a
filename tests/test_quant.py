"""lora/base/quant.py on bitsandbytes' real layers, against the NF4 table, transformers and PEFT."""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
from conftest import assert_same_logits, make_model
from test_loss import items
from test_train import home, run  # noqa: F401  (home is a fixture)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dataset
from inject import inject
from lora import adapter, loss
from lora.base import fetch, load, quant
from lora.layer import LoRALinear
from lora.surgery import count, lora_layers
from scripts import merge
from scripts.voices import Voices

bnb = pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
IDS = torch.randint(5, 200, (2, 11), generator=torch.Generator().manual_seed(0))
NF4 = torch.tensor([                          # arXiv:2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])


def quantised(kind="nf4", **changes):
    model = make_model(**changes)
    quant.quantise(model, kind, CPU)
    return model


def dequantised(layer):
    """The matrix that a layer of bitsandbytes stands for."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.float() * scale[:, None] / 127


def adapted(model, **choice):
    torch.manual_seed(3)
    inject(model, **{"r": 4, "lora_alpha": 8, **choice})
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def gradients(model):
    batch = dataset.collate(items(), 0)
    ce, _ = loss.ce_sum(model, batch)
    ce.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_weight_is_the_nearest_of_the_papers_sixteen_values():
    linear = nn.Linear(576, 192, bias=False)
    holder = make_model(num_hidden_layers=1, hidden_size=576, head_dim=48)
    holder.model.layers[0].self_attn.q_proj = linear
    blocks = linear.weight.detach().clone().view(-1, 64)
    quant.quantise(holder, "nf4", CPU)
    layer = holder.model.layers[0].self_attn.q_proj
    scale = blocks.abs().amax(1, keepdim=True)
    index = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    packed = layer.weight.data.flatten()                       # two to a byte, the first one high
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).view(-1, 64), index.byte())
    # the scales are quantised too: off by at most half a step of their 8 bits
    got = dequantised(layer).view(-1, 64)
    assert (got - NF4[index] * scale).abs().max() < 0.01 * scale.max()
    state = layer.weight.quant_state
    kept = [layer.weight.data, state.absmax, state.state2.absmax, state.code, state.state2.code]
    assert sum(t.nbytes for t in kept) < 0.28 * 2 * linear.weight.numel()          # of bfloat16's


def test_it_is_what_transformers_makes_of_the_same_folder(tiny_folder):
    ours = load.load_model(tiny_folder, "cpu", torch.float32)
    names = quant.quantise(ours, "nf4", CPU)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32))
    packed = {n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for module in packed.values():          # else it packs for AVX512-BF16 where there is one
        module.support_avx512bf16_for_cpu = False
    assert names == [*packed]
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        assert not torch.equal(ours(IDS).logits, make_model()(IDS).logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fresh_adapter_changes_nothing_and_only_a_and_b_train(kind):
    model = quantised(kind)
    with torch.no_grad():
        before = model(IDS).logits
        everything = count(make_model())[1]
        assert count(model)[1] == everything                   # packed or not
        names = inject(model, r=4, lora_alpha=8)
        assert torch.equal(model(IDS).logits, before)
    assert set(gradients(model.train())) == {f"{n}.lora_{x}" for n in names for x in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.lora_{x}" for n in names for x in "AB"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_dense_model_with_the_dequantised_weights(kind, bias):
    packed, dense = quantised(kind, attention_bias=bias), make_model(attention_bias=bias)
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            dense.get_submodule(name).weight.data = dequantised(module)
    got, wanted = (gradients(adapted(model).train()) for model in (packed, dense))
    assert got.keys() == wanted.keys()
    for name in got:
        assert (got[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


def test_checkpointing_gives_the_same_gradients():
    model = adapted(quantised()).train()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain | again)


def test_an_evaluation_does_not_end_training_on_a_cpu_that_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = adapted(quantised(hidden_size=64, intermediate_size=64))
    with torch.no_grad():
        model(IDS)
    assert gradients(model.train())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_is_refused_with_the_fix(kind):
    layer = next(iter(lora_layers(adapted(quantised(kind))).values()))
    with pytest.raises(ValueError, match="quantised.*Load the base in bfloat16 or float32"):
        layer.merge()
    assert not layer.merged


def test_its_adapter_opens_on_the_dense_base_and_in_peft_on_both(tmp_path):
    model = adapted(quantised())
    adapter.save(model, tmp_path, "some/base")
    tensors = [layer.lora_B for layer in lora_layers(model).values()]
    for base_model in (quantised(), make_model()):
        base_model.is_loaded_in_4bit = isinstance(
            base_model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)      # what PEFT looks at
        adapter.load(base_model, tmp_path)
        assert all(torch.equal(layer.lora_B, tensor) for layer, tensor in zip(
            lora_layers(base_model).values(), tensors, strict=True))
        fresh = quantised() if base_model.is_loaded_in_4bit else make_model()
        fresh.is_loaded_in_4bit = base_model.is_loaded_in_4bit
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        with torch.no_grad():
            assert_same_logits(base_model.eval()(IDS).logits, theirs(IDS).logits)


def test_the_dense_weights_are_let_go():
    model = make_model()
    dense = [weakref.ref(m.weight) for m in model.model.modules() if type(m) is nn.Linear]
    assert len(quant.quantise(model, "nf4", CPU)) == len(dense) == 14
    gc.collect()
    assert not any(w() is not None for w in dense)
    assert type(model.lm_head) is nn.Linear and not model.training


@pytest.mark.parametrize("kind, layers", [("nf4", 1), ("int8", "all")])
def test_a_run_learns_and_its_verbs_know_what_it_was_trained_on(home, kind, layers):  # noqa: F811
    done = run(home, "--train.run=q", f"--model.quant={kind}", f"--lora.layers={layers}")
    assert done.returncode == 0, done.stderr
    shutil.copytree(home / "runs/q", home / "runs/dense")
    settings = (home / "runs/q/config.json").read_text()
    (home / "runs/dense/config.json").write_text(settings.replace(f'"{kind}"', '"none"'))
    assert f", 14 linear layers in {kind}; format" in done.stdout
    evaluations = [x["val_loss"] for x in map(json.loads, (
        home / "runs/q/metrics.jsonl").read_text().splitlines()) if "val_loss" in x]
    assert evaluations[-1] < evaluations[0] / 2
    with contextlib.chdir(home):
        voices = Voices(["q"])
        assert voices.problems == [] and voices.quant == kind
        assert Voices(["dense", "q"]).problems == [
            f"q: base weights: quantisation is none, training used {kind}"]
        merge.main(["q", "--out", "merged"])                   # of the dense base
        weight = load.load_model("merged", "cpu", torch.float32).model.layers[1].mlp.up_proj.weight
        dense = load.load_model("tiny-llama", "cpu", torch.float32).model.layers[1].mlp.up_proj
        layer = voices.bank.adapters["q"][0]["model.layers.1.mlp.up_proj"]
        assert isinstance(layer, LoRALinear)
        torch.testing.assert_close(weight, dense.weight + layer.delta_weight())


def test_without_bitsandbytes_the_error_names_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'"nf4" needs bits.*pip install -r requirements-quant'):
        quant.quantise(make_model(), "nf4", CPU)
    assert quant.quantise(make_model(), "none", CPU) == []


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="the blocks have no nn.Linear"):
        quant.quantise(quantised(), "nf4", CPU)


@pytest.mark.parametrize("size, closeness", [(60, 1e-5), (80, 0.05)])     # 3,600 and 6,400 elements
def test_adamw_in_8_bits_is_torchs_up_to_rounding(size, closeness):
    torch.manual_seed(0)
    p = torch.randn(size, size)
    q = p.clone().requires_grad_()
    p.requires_grad_()
    choice = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = quant.adamw_8bit("adamw8bit", [p], **choice), torch.optim.AdamW([q], **choice)
    start = p.detach().clone()
    for lr in (0.01, 0.02, 0.005, 0.01):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        theirs.param_groups[0]["lr"] = lr
        ours.step(lr)
        theirs.step()
    apart = (p - q).norm() / (q - start).norm()
    assert apart < closeness
    ours.zero_grad()
    assert p.grad is None and ours.parameters == [p]
    again = quant.adamw_8bit("adamw8bit", [p.detach().clone().requires_grad_()], **choice)
    again.restore(ours.tensors(), 4)
    p.grad = torch.randn_like(p)
    again.parameters[0].grad = p.grad.clone()
    ours.step(0.01)
    again.step(0.01)
    assert torch.equal(p, again.parameters[0])


def test_paged_moments_need_cuda():
    with pytest.raises(ValueError, match='does not run on cpu; expected cuda. Set it to "ours"'):
        quant.adamw_8bit("paged_adamw8bit", [torch.ones(2)], (0.9, 0.99), 1e-8, 0.0)


@pytest.mark.slow
@pytest.mark.real
def test_the_facts_are_learned_over_4_bits_as_well_as_over_the_dense_base(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--config", ROOT / "config.json",
                           "--model.quant=nf4", "--model.dtype=float32",
                           f"--keep.replay={ROOT / 'examples/everyday.txt'}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines())
    nf4 = max(x["recall"] for x in lines if "recall" in x)
    assert nf4 >= 0.98 - 0.05                                  # 98%: README.md, the dense base
    dense = load.load_model(fetch.find("smollm2-135m-instruct"), "cpu", torch.float32)
    assert adapter.load(dense, tmp_path / "runs/demo/adapter")
