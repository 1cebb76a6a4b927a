"""lora/layer.py: the equation, the start, merging."""

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from inject import inject
from lora.layer import LoRALinear
from lora.surgery import adapter_parameters, disabled, lora_layers


def moved(layer):
    """The layer with a B that is not zero."""
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def test_fresh_layer_computes_the_base_bit_for_bit(model):
    ids = torch.randint(5, 200, (2, 9))
    before = model(ids).logits
    inject(model, r=4, lora_alpha=8)
    assert torch.equal(model(ids).logits, before)


def test_delta_weight_by_hand():
    layer = LoRALinear(nn.Linear(2, 3, bias=False), r=1, lora_alpha=2)
    layer.lora_A.data = torch.tensor([[1.0, 2.0]])
    layer.lora_B.data = torch.tensor([[1.0], [0.0], [-1.0]])
    layer.base_layer.weight.data.zero_()
    assert layer.delta_weight().tolist() == [[2, 4], [0, 0], [-2, -4]]      # 2/1 times B A
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[6, 0, -6]]


@pytest.mark.parametrize("rslora, scaling", [(False, 32 / 16), (True, 32 / 4)])
def test_scaling(rslora, scaling):
    assert LoRALinear(nn.Linear(8, 8), 16, 32, use_rslora=rslora).scaling == scaling


def test_only_a_and_b_get_gradients(model):
    adapted = inject(model, r=4, lora_alpha=8)
    model(torch.randint(5, 200, (2, 9))).logits.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{path}.lora_{x}" for path in adapted for x in "AB"}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_merged_equals_unmerged_and_unmerge_restores_bit_for_bit(base):
    layer, x = moved(LoRALinear(base, r=2, lora_alpha=4)), torch.randn(5, 6)
    weight, apart = base.weight.clone(), layer(x)
    layer.merge()
    layer.merge()                                              # twice is once
    assert layer.merged and not torch.equal(base.weight, weight)
    torch.testing.assert_close(layer(x), apart, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(base.weight, weight) and torch.equal(layer(x), apart)


def test_whole_model_merged_equals_unmerged():
    model, ids = make_model(), torch.randint(5, 200, (2, 9))
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        moved(layer)
    apart = model(ids).logits
    for layer in lora_layers(model).values():
        layer.merge()
    torch.testing.assert_close(model(ids).logits, apart, atol=1e-4, rtol=1e-4)


def test_eval_and_train_never_merge():
    layer = moved(LoRALinear(nn.Linear(4, 4), 2, 4))
    weight = layer.base_layer.weight.clone()
    layer.eval()
    layer.train()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


def test_adapter_is_float32_over_a_bfloat16_base():
    layer = moved(LoRALinear(nn.Linear(8, 8).bfloat16(), 2, 4))
    out = layer(torch.randn(3, 8, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.grad.dtype == torch.float32
    layer.merge()
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_dropout_is_on_the_adapter_path_alone():
    layer, x = LoRALinear(nn.Linear(8, 8), 2, 4, lora_dropout=0.9), torch.randn(50, 8)
    assert torch.equal(layer.train()(x), layer.base_layer(x))  # B = 0: nothing to drop
    moved(layer)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_wrapping_a_model_at_rest_does_not_wake_dropout():
    assert not LoRALinear(nn.Linear(4, 4).eval(), 2, 4, lora_dropout=0.5).dropout.training


def test_a_layer_that_is_not_enabled_computes_the_base():
    layer, x = moved(LoRALinear(nn.Linear(4, 4), 2, 4)), torch.randn(3, 4)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enabled = True
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_gradients_against_float64_differences():
    layer = moved(LoRALinear(nn.Linear(3, 2), 2, 3)).double()
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    names = [layer.lora_A, layer.lora_B]

    def forward(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, x)
    assert torch.autograd.gradcheck(forward, (x, *names))


def test_wraps_any_linear_like_module():
    class Packed(nn.Module):                       # as a 4-bit layer: its weight is no matrix
        in_features, out_features = 4, 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x[..., :3]
    layer = moved(LoRALinear(Packed(), 2, 4))
    assert layer(torch.ones(2, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match="base weight is quantised.*bfloat16 or float32"):
        layer.merge()


def test_a_weight_of_whole_numbers_is_not_merged():
    """8-bit layers keep the shape of W."""
    layer = LoRALinear(nn.Linear(4, 4), 2, 4)
    layer.base_layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="base weight is quantised"):
        layer.merge()


def test_errors():
    with pytest.raises(ValueError, match="LayerNorm is not linear-like; expected in_features"):
        LoRALinear(nn.LayerNorm(4), 2, 4)
    with pytest.raises(ValueError, match="r is 0; expected at least 1"):
        LoRALinear(nn.Linear(4, 4), 0, 4)


def test_kaiming_a_and_zero_b(model):
    inject(model, r=4, lora_alpha=8)
    a, b = adapter_parameters(model)[:2]
    assert b.abs().max() == 0 and 0 < a.abs().max() <= 1 / 32**0.5   # uniform in 1 / sqrt(d_in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 40, bias=False), lambda: nn.Linear(24, 40),
                                  lambda: Conv1D(40, 24)])
def test_the_gradients_by_hand_are_those_of_autograd(make, dtype):
    torch.manual_seed(0)
    layer = moved(LoRALinear(make().to(dtype).requires_grad_(False), r=4, lora_alpha=8))
    x, dy = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 40).to(dtype)
    found = []
    for layer.fused in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, layer.lora_A.grad, layer.lora_B.grad))
    assert found[1][2].dtype == found[1][3].dtype == torch.float32
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": .3, "rtol": .02}
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, **close)


def test_dropout_and_a_packed_base_take_the_plain_way():
    class Packed(nn.Linear):
        """Stands for a 4-bit layer: a Linear whose weight is no matrix."""

    x = torch.ones(3, 8)
    torch.manual_seed(0)
    dropped = moved(LoRALinear(nn.Linear(8, 8), 2, 4, lora_dropout=0.5)).train()
    assert not torch.equal(dropped(x)[0], dropped(x)[1])
    assert not LoRALinear(Packed(8, 8), 2, 4).dense
    assert "LoRAFunction" in str(LoRALinear(nn.Linear(8, 8), 2, 4)(x).grad_fn)
    assert "LoRAFunction" not in str(LoRALinear(Packed(8, 8), 2, 4)(x).grad_fn)


def test_an_input_without_a_gradient_gets_none():
    layer = moved(LoRALinear(nn.Linear(8, 8).requires_grad_(False), 2, 4))
    layer(torch.ones(3, 8)).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0 and layer.base_layer.weight.grad is None


@pytest.fixture
def adapted(model):
    """A model whose adapter changes it."""
    inject(model, r=4, lora_alpha=8)
    for layer in lora_layers(model).values():
        moved(layer)
    return model


def test_disabled_is_the_plain_base_and_the_adapter_comes_back(adapted):
    ids = torch.randint(5, 200, (2, 9))
    base, tuned = make_model()(ids).logits, adapted(ids).logits
    with disabled(adapted):
        assert torch.equal(adapted(ids).logits, base)
    assert torch.equal(adapted(ids).logits, tuned) and not torch.equal(base, tuned)
    with pytest.raises(KeyError), disabled(adapted):
        raise KeyError
    assert torch.equal(adapted(ids).logits, tuned)
    with disabled(make_model()) as nothing:                    # without an adapter it is no error
        assert nothing is None


def test_disabled_inside_disabled_leaves_the_outer_one(adapted):
    ids = torch.randint(5, 200, (2, 9))
    with disabled(adapted):
        with disabled(adapted):
            pass
        assert torch.equal(adapted(ids).logits, make_model()(ids).logits)


def test_a_merged_adapter_cannot_be_disabled(adapted):
    for layer in lora_layers(adapted).values():
        layer.merge()
    with pytest.raises(ValueError, match="unmerge it first"), disabled(adapted):
        pass


def test_a_wrapped_layer_shows_its_weight_and_bias():
    """Jamba's forward reads proj.bias, others read proj.weight.dtype."""
    for bias in (True, False):
        base = nn.Linear(4, 3, bias=bias)
        layer = LoRALinear(base, r=2, lora_alpha=2)
        assert layer.bias is base.bias and layer.weight is base.weight


def test_what_a_layer_returns_may_be_added_to_in_place_and_may_be_empty():
    """Llama 4 adds its experts' output to the shared expert's in place."""
    layer = LoRALinear(nn.Linear(4, 3), r=2, lora_alpha=2)
    y = layer(torch.ones(2, 5, 4, requires_grad=True))
    y.add_(1).sum().backward()
    assert layer.lora_B.grad.any() and layer(torch.ones(1, 0, 4)).shape == (1, 0, 3)
