"""lora/fast/leaves.py: the forward to the bit, autograd's gradient, and less is kept."""

import pytest
import torch
from conftest import make_model
from test_flat import MODELS, adapted, samples
from test_loss import assert_same_step, step

import dataset
from inject import inject
from lora import loss
from lora.fast import leaves, memory


@pytest.mark.parametrize("name, changed", [("llama", 7), ("gpt2", 0), ("qwen3", 11),
                                           ("mistral, window 8", 7), ("gemma3, window 8", 15)])
def test_every_norm_and_gate_of_a_model_is_found_and_changes_no_number(name, changed):
    model, batch = adapted(name), dataset.collate(samples(5), 0)
    logits, plain = loss.logits_at(model, batch), step(model, [batch])
    assert leaves.fuse(model) == changed
    assert torch.equal(loss.logits_at(model, batch), logits)
    assert_same_step(step(model, [batch]), plain)


def test_a_bfloat16_gate_is_tried_with_its_own_dtype_not_its_adapters():
    model, batch = MODELS["llama"]().bfloat16(), dataset.collate(samples(5), 0)
    inject(model, r=4, lora_alpha=8)                         # in float32
    logits = loss.logits_at(model, batch)
    assert leaves.fuse(model) == 7
    assert torch.equal(loss.logits_at(model, batch), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norms_gradient_is_autograds(dtype, plus_one):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16).to(dtype).requires_grad_(), torch.randn(16).to(dtype)
    dy = torch.randn(5, 16).to(dtype)
    leaves.RMSNorm.apply(x, weight, 1e-6, plus_one).backward(dy)
    got, x.grad = x.grad, None
    rows = x.float()
    (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
     * (weight.float() + plus_one)).backward(dy.float())
    torch.testing.assert_close(got, x.grad)


def test_norms_that_train_or_compute_something_else_keep_their_forward():
    model = MODELS["llama"]()
    assert leaves.fuse(model) == 2                           # the gates; its norms would train
    inject(model, r=2, lora_alpha=2)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x: x * 2
    assert leaves.fuse(model) == 2


def test_a_step_keeps_less():
    model, batch = adapted("llama"), dataset.collate(samples(30), 0)
    before = memory.estimate(model, batch, batch)["activations"]
    leaves.fuse(model)
    assert memory.estimate(model, batch, batch)["activations"] < 0.95 * before


def test_a_bfloat16_model_with_float32_adapters_in_its_mlps_is_fused():
    model = make_model().bfloat16()
    inject(model, r=2, lora_alpha=2)
    assert leaves.fuse(model) == 7


class RMSNorm(torch.nn.Module):
    """What models have under this name, and fuse() must leave alone."""

    eps = 1e-6

    def __init__(self, weight, takes_gate):
        super().__init__()
        self.weight = weight
        if takes_gate:
            self.forward = lambda x, gate=None: self.norm(x)
        else:
            self.forward = self.norm

    def norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("weight, takes_gate", [
    (None, False), (torch.ones(8), False),                   # Gemma 4, Falcon Mamba: of any width
    (torch.nn.Parameter(torch.ones(8), requires_grad=False), True)])      # Qwen3-Next: gated
def test_a_norm_without_a_weight_of_its_own_or_with_a_gate_keeps_its_forward(weight, takes_gate):
    assert leaves.fuse(torch.nn.Sequential(torch.nn.Linear(8, 8), RMSNorm(weight, takes_gate))) == 0
