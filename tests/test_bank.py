"""lora/use/bank.py: several adapters on one base, against one adapter alone on a fresh base."""

import pytest
import torch
from conftest import make_model

from inject import inject
from lora import adapter, surgery
from lora.base import load
from lora.layer import LoRALinear
from lora.use.bank import Bank

IDS = torch.arange(40, 52)[None]


def make_adapter(folder, seed, **lora):
    """A trained-looking adapter on disk."""
    model = make_model()
    inject(model, **lora)
    torch.manual_seed(seed)
    for layer in surgery.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapter.save(model, folder, "tiny")
    return folder


@pytest.fixture
def three(tmp_path):
    return {"a": make_adapter(tmp_path / "a", 1, r=2, lora_alpha=8),
            "b": make_adapter(tmp_path / "b", 2, r=4, lora_alpha=4, use_rslora=True),
            "c": make_adapter(tmp_path / "c", 3, r=1, lora_alpha=2, target_modules=["q_proj"])}


def bank_of(folders):
    bank = Bank(make_model())
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_each_adapter_answers_as_if_it_were_alone(three):
    bank, wanted = bank_of(three), {None: logits(make_model())}
    for name, folder in three.items():
        alone = make_model()
        adapter.load(alone, folder)
        wanted[name] = logits(alone)
    for name in ["a", "b", "c", None, "c", "a", "b", None]:
        bank.use(name)
        assert torch.equal(logits(bank.model), wanted[name])
    assert len({tuple(w.flatten().tolist()) for w in wanted.values()}) == 4


def test_the_base_is_untouched_after_use(three):
    before = load.fingerprint(make_model())
    bank = bank_of(three)
    bank.use("a", 0.5)
    bank.use(None)
    assert not any(isinstance(m, LoRALinear) for m in bank.model.modules())
    fresh = make_model().state_dict()
    assert bank.model.state_dict().keys() == fresh.keys()
    assert all(torch.equal(v, fresh[k]) for k, v in bank.model.state_dict().items())
    assert load.fingerprint(bank.model) == before


def test_scale_goes_from_the_base_to_the_adapter(three):
    bank = bank_of(three)
    full, none = logits_of(bank, "b", 1), logits_of(bank, "b", 0)
    assert torch.allclose(none, logits(make_model()), atol=1e-6)
    half = logits_of(bank, "b", 0.5)
    assert not torch.equal(half, full) and not torch.equal(half, none)
    assert torch.equal(logits_of(bank, "b", 1), full)


def logits_of(bank, name, scale):
    bank.use(name, scale)
    return logits(bank.model)


def test_using_gives_back_what_was_in_use(three):
    bank = bank_of(three)
    bank.use("a", 0.6)
    before = logits(bank.model)
    with pytest.raises(KeyError), bank.using(None):
        raise KeyError
    assert (bank.name, bank.scale) == ("a", 0.6) and torch.equal(logits(bank.model), before)


def test_what_does_not_fit_is_refused_and_changes_nothing(three, tmp_path):
    bank = bank_of(three)
    bank.use("b")
    before = logits(bank.model)
    wide = make_model(hidden_size=64)
    inject(wide, r=2, lora_alpha=4)
    adapter.save(wide, tmp_path / "wide", "wide")
    with pytest.raises(ValueError, match="does not fit"):
        bank.add("wide", tmp_path / "wide")
    with pytest.raises(ValueError, match="adapter: .*nothing.* has no adapter_config.json"):
        bank.add("nothing", tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        bank.add("a", three["a"])
    with pytest.raises(ValueError, match="no adapter 'z'; there are a, b, c"):
        bank.use("z")
    assert bank.name == "b" and torch.equal(logits(bank.model), before)


def test_the_fingerprint_knows_a_base_in_any_dtype():
    assert load.fingerprint(make_model()) == load.fingerprint(make_model().bfloat16())
    assert load.fingerprint(make_model()) != load.fingerprint(make_model(seed=1))
