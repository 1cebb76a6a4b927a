"""A whole step with the model on another device than the CPU, which tests/elsewhere.py makes up."""

import contextlib

import pytest
import torch
from conftest import make_model
from elsewhere import DEVICE, Elsewhere, elsewhere
from test_flat import MODELS, samples

import dataset
from inject import inject
from lora import adapter, loss, surgery
from lora.base import load
from lora.fast import flat, leaves, memory
from lora.generate import Stop, generate
from lora.optim import AdamW
from measure import drift

NAMES = ["llama", "gemma3, window 8"]
LEVERS = {"plain": ("padded", False), "flat": ("flat", True), "shared": ("shared", True)}


def whole_step(name, device, layout, fast, folder):
    """What a run does with a model, in small: (loss, drift, answers, adapter) of it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(device)
    inject(model, r=4, lora_alpha=8)
    for layer in surgery.lora_layers(model).values():
        layer.fused = fast
        with torch.no_grad():
            layer.lora_B.add_(0.01)
    if fast:
        assert leaves.fuse(model) > 0
    if layout != "padded":
        flat.enable(model, load.use_attention)
    items = samples(20)
    batches = dataset.micro_batches(items, 4, 0, device, layout)
    assert "activations" in memory.report(model, batches[0], batches[-1], fast)
    optimizer = AdamW(surgery.adapter_parameters(model))
    n_tokens = sum(len(batch.targets) for batch in batches)
    total = 0.0
    for batch in batches:
        for teacher in (False, True):
            ce, _ = loss.ce_sum(model, batch, fast, teacher)
            (ce / n_tokens).backward()
            total += ce.item()
    torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
    optimizer.step(0.01)
    optimizer.zero_grad()
    adapter.save(model, folder, "tiny")
    adapter.load(model, folder)
    optimizer.restore(optimizer.tensors(), 1)
    prompts = [item["input_ids"] for item in items]
    said = generate(model, prompts, Stop(frozenset()), 6)
    drawn = generate(model, prompts, Stop(frozenset()), 6, temperature=1.0, top_p=0.5,
                     repetition_penalty=1.1)
    kl = drift(model, batches)
    evaluated = loss.evaluate(model, batches, fast)
    tensors = adapter.read(folder)[1]
    return [total, *kl, *evaluated], [said, drawn], tensors


@pytest.mark.parametrize("layout, fast", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_elsewhere_is_that_on_the_cpu(name, layout, fast, tmp_path):
    numbers, answers, tensors = whole_step(name, torch.device("cpu"), layout, fast, tmp_path / "a")
    with elsewhere():
        numbers_there, answers_there, tensors_there = whole_step(
            name, DEVICE, layout, fast, tmp_path / "b")
    assert numbers_there == pytest.approx(numbers, rel=1e-5)
    assert answers_there == answers
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensors_there[key], tensor, atol=1e-5, rtol=1e-4)


def stays_here(module, name):
    """Plant a mistake: module.name makes its tensors on the CPU whatever device is wanted."""
    own = getattr(module, name)

    @contextlib.contextmanager
    def planted():
        setattr(module, name, lambda *args, **kwargs: own(*[
            torch.device("cpu") if arg == DEVICE else arg for arg in args], **kwargs))
        try:
            yield
        finally:
            setattr(module, name, own)
    return planted()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout, fast, place", [
    ("padded", False, (dataset, "collate")), ("flat", True, (dataset, "flatten")),
    ("shared", True, (flat, "_cell"))], ids=["collate", "flatten", "cells"])
def test_a_tensor_that_stays_on_the_cpu_fails_it(name, layout, fast, place, tmp_path):
    with elsewhere(), stays_here(*place), pytest.raises(
            (RuntimeError, AssertionError, flat.Unsupported), match="one device"):
        whole_step(name, DEVICE, layout, fast, tmp_path)


def test_a_mask_made_without_a_device_fails_it(tmp_path, monkeypatch):
    own = flat.Plan.mask
    monkeypatch.setattr(flat.Plan, "mask", lambda self, i, window, like: own(
        self, i, window, torch.empty(0)))
    with elsewhere(), pytest.raises(RuntimeError, match="one device"):
        model = make_model(max_position_embeddings=512).to(DEVICE)
        try:
            flat.enable(model, load.use_attention)
        except flat.Unsupported as reason:
            raise RuntimeError(str(reason)) from reason


def test_the_rules_are_those_of_a_gpu():
    with elsewhere():
        there, here = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
        assert isinstance(there, Elsewhere) and there.device == DEVICE
        for mixed in (lambda: there + here, lambda: there @ here, lambda: torch.cat([there, here]),
                      lambda: there.addmm_(here, here), lambda: torch.where(here > 0, there, 0)):
            with pytest.raises(RuntimeError, match="one device"):
                mixed()
        assert (there + 1).device == (there * torch.tensor(2.0)).device == DEVICE
        assert there[torch.tensor([0])].device == DEVICE       # an index may be the CPU's
        assert here.to(DEVICE).device == DEVICE and there.cpu().device == here.device
        assert not isinstance(there.sum().item(), torch.Tensor)
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
