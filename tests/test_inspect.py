"""python -m scripts.inspect on tiny runs: planted updates are measured, planted examples found."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

import train
from lora import adapter, surgery
from lora.layer import LoRALinear
from scripts import inspect

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def injected(model):
    """The tiny model with a random update of rank 4 in every linear layer of its blocks."""
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and "layers" in n]
    surgery.wrap(model, names, r=4, lora_alpha=8)
    for layer in surgery.lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def measured(model):
    return {m["module"]: m for m in inspect.updates(model)}


def test_the_update_is_what_the_dense_matrices_say(injected):
    for name, m in measured(injected).items():
        layer = injected.get_submodule(name)
        delta, weight = layer.delta_weight().detach(), layer.weight.detach()
        assert m["ratio"] == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)
        assert m["spectral_ratio"] == pytest.approx((
            torch.linalg.matrix_norm(delta, 2) / torch.linalg.matrix_norm(weight, 2)).item(), 1e-4)
        sigma = torch.linalg.svdvals(delta)
        shares = (sigma / sigma.sum())[:4]
        assert m["effective_rank"] == pytest.approx(math.exp(-(shares @ shares.log())), rel=1e-4)
        assert m["stable_rank"] == pytest.approx((sigma.square().sum() / sigma[0]**2).item(), 1e-4)
        assert m["alarm"] is None
    assert (m["block"], m["projection"]) == (1, "mlp.down_proj")


def test_a_planted_update_of_rank_2_has_effective_rank_2(injected):
    layer = injected.get_submodule(NAME)
    with torch.no_grad():                             # two equal directions of four
        layer.lora_A.copy_(torch.eye(4, layer.in_features))
        layer.lora_B.copy_(torch.eye(layer.out_features, 4) * torch.tensor([3, 3, 0, 0]))
    m = measured(injected)[NAME]
    assert (m["effective_rank"], m["stable_rank"]) == (pytest.approx(2), pytest.approx(2))


@pytest.mark.parametrize("factor, alarm", [
    (0, "B is zero"), (1e-4, "B is under 1% of the others'"), (0.1, None),
    (math.nan, "A or B is not finite"), (math.inf, "A or B is not finite")])
def test_a_dead_b_is_alarmed_and_no_other(injected, factor, alarm):
    with torch.no_grad():
        injected.get_submodule(NAME).lora_B.mul_(factor)
    found = measured(injected)
    assert found.pop(NAME)["alarm"] == alarm
    assert not any(m["alarm"] for m in found.values())
    json.dumps(list(found.values()), allow_nan=False)


def test_a_fresh_adapter_is_dead_everywhere(injected):
    for layer in surgery.lora_layers(injected).values():
        nn.init.zeros_(layer.lora_B)
    assert all((m["alarm"], m["ratio"], m["effective_rank"]) == ("B is zero", 0, 0)
               for m in inspect.updates(injected))


def test_a_packed_weight_is_what_its_layer_computes():
    class Packed(nn.Module):                          # as a 4-bit layer: its weight is no matrix
        in_features, out_features = 600, 7

        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(600, 7)
            self.weight = nn.Parameter(torch.zeros(42, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return self.inside(x)
    packed = Packed()
    with torch.no_grad():
        weight = inspect.base_weight(LoRALinear(packed, 2, 4))
    torch.testing.assert_close(weight.T, packed.inside.weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, block, projection", [
    ("transformer.h.3.attn.c_proj", 3, "attn.c_proj"), ("lm_head", None, "lm_head"),
    ("model.layers.10.mlp.experts.7.up_proj", 10, "mlp.experts.up_proj")])
def test_block_and_projection_are_read_off_the_path(monkeypatch, name, block, projection):
    monkeypatch.setattr(surgery, "lora_layers", lambda _: {name: LoRALinear(nn.Linear(4, 4), 2, 2)})
    (m,) = inspect.updates(None)
    assert (m["block"], m["projection"]) == (block, projection)


# ----- the ledger --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with a run that learned line 1 first (steps/000001), then the others without it;
    lines 3 and 4 contradict each other."""
    folder = tmp_path_factory.mktemp("told")
    make_model(pad_token_id=2, eos_token_id=2).save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    lines = {"old": [("say a?", "red")],
             "new": [("tell me b!", "blue"), ("say c?", "green"), ("say c?", "black")]}
    lines["all"] = lines["old"] + lines["new"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, pairs in lines.items():
            Path(f"{name}.jsonl").write_text("".join(
                json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))

        def run(name, path, steps, **model):
            Path(f"{name}.json").write_text(json.dumps({
                "model": {"name": "tiny", "device": "cpu", "dtype": "float32", **model},
                "lora": {"r": 4}, "data": {"path": path, "val_fraction": 0}, "train": {
                    "run": name, "max_steps": steps, "batch_size": 4, "lr": 0.01,
                    "max_new_tokens": 2}}))
            train.main(["--config", f"{name}.json"])
        run("first", "old.jsonl", 60)
        run("second", "new.jsonl", 250, adapter="runs/first/adapter")
        run("told", "all.jsonl", 1)
        shutil.copytree("runs/first/adapter", "runs/told/steps/000001")
        for name in ("adapter", "last"):
            shutil.copytree("runs/second/adapter", f"runs/told/{name}", dirs_exist_ok=True)
    return folder


@pytest.fixture
def copy(told, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(told, tmp_path / "told"))
    return Path("runs/told")


def test_what_was_learned_forgotten_or_never_learned_is_found(copy, capsys):
    assert inspect.main([str(copy)]) == 0
    found = json.loads((copy / "inspect.json").read_text())["ledger"]
    by = {e["answer"]: e for e in found["examples"]}
    assert [e["source"] for e in found["examples"]] == [f"all.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert by["red"]["verdict"] == "forgotten" and by["blue"]["verdict"] == "learned"
    assert "never learned" in (by["green"]["verdict"], by["black"]["verdict"])
    states = by["red"]["nats_per_token"]
    assert list(states) == ["base", "steps/000001", "adapter", "last"]
    assert states["steps/000001"] < 0.2 < states["last"] and states["last"] == states["adapter"]
    out = capsys.readouterr().out
    assert "last           is adapter" in out
    assert "forgotten: 1 of 4; 0 of them contradicted\n    all.jsonl:1: base" in out
    assert [e["contradicted"] for e in found["examples"]] == [False, False, True, True]
    assert [[e["source"] for e in pair] for pair in found["contradictions"]] == [
        ["all.jsonl:3", "all.jsonl:4"]]
    assert "contradictions: 1\n    all.jsonl:3" in out and "   ≠all.jsonl:4" in out


def test_the_base_of_the_ledger_is_the_plain_model(copy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    inspect.main([str(copy)])
    (e, *_) = json.loads((copy / "inspect.json").read_text())["ledger"]["examples"]
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    text = [{"role": "user", "content": "say a?"}, {"role": "assistant", "content": "red"}]
    ids = tokenizer.apply_chat_template(text, return_dict=True, return_tensors="pt")["input_ids"]
    said = tokenizer("red<|im_end|>").input_ids
    start = ids.shape[1] - len(said) - 1              # a line break ends the turn
    assert ids[0, start:-1].tolist() == said
    labels = torch.full_like(ids, -100)
    labels[0, start:-1] = ids[0, start:-1]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained("tiny")(ids, labels=labels).loss
    assert e["tokens"] == len(said)
    assert e["nats_per_token"]["base"] == pytest.approx(loss.item(), rel=1e-4)


def test_data_that_has_changed_is_refused_and_the_updates_need_none(copy):
    Path("all.jsonl").write_text(Path("all.jsonl").read_text().replace("blue", "brown"))
    with pytest.raises(ValueError, match="all.jsonl gives examples .* has changed.*--no-ledger"):
        inspect.main([str(copy)])
    Path("all.jsonl").unlink()
    assert inspect.main([str(copy), "--no-ledger"]) == 0
    assert json.loads((copy / "inspect.json").read_text())["ledger"] is None
    assert (copy / "inspect.png").read_bytes() != (copy / "inspect-dark.png").read_bytes()


def test_a_dead_module_is_named_and_the_exit_code_says_so(copy, capsys):
    file = copy / "adapter" / adapter.WEIGHTS
    tensors = load_file(file)
    tensors[f"{adapter.PREFIX}{NAME}.lora_B.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    assert inspect.main([str(copy), "--no-ledger"]) == 1
    assert f"ERROR  1 modules: B is zero: {NAME}\n" in capsys.readouterr().out
    assert inspect.main([str(copy / "last"), "--no-ledger"]) == 0


def fact(value, group="mira: town", subject="mira", prompt=None, **more):
    return {"messages": [{"role": "user", "content": prompt or f"{value}?"},
                         {"role": "assistant", "content": f"It is {value}."}],
            "value": value, "group": group, "subject": subject, **more}


@pytest.mark.parametrize("one, other, against", [
    (fact("Rome"), fact("Oslo"), True),                        # one fact, two values
    (fact("Rome"), fact("ROME"), False),
    (fact("8|eight"), fact("eight"), False),
    (fact("Rome"), fact("Oslo", subject="juno"), False),
    (fact("Rome"), fact("Oslo", group="mira: birthplace"), False),
    (fact("Rome", prompt="Where?"), fact("Oslo", "b", prompt=" where? "), True)])
def test_two_values_of_one_fact_or_prompt_contradict(one, other, against):
    assert inspect.contradictions([one, other]) == [(one, other)] * against


def test_adapters_come_in_the_order_they_were_made(tmp_path):
    for name in ("last", "adapter", "steps/000100", "steps/000020", "steps/000060"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / adapter.WEIGHTS).touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "best": true}\n{"step": 60, "val_loss": '
                                            '1.0, "best": true}\n{"step": 100, "best": false}\n')
    assert list(inspect.kept(tmp_path)) == ["steps/000020", "steps/000060", "adapter",
                                            "steps/000100", "last"]


def test_the_command_does_not_hide_the_standard_library():
    done = subprocess.run([sys.executable, "-m", "scripts.inspect", "--help"], text=True,
                          capture_output=True, cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0 and "--no-ledger" in done.stdout, done.stderr
