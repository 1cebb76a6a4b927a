"""lora/optim.py against torch."""

import pytest
import torch

from lora.optim import AdamW, lr_at


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_equal_torchs(decay):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    by_hand = AdamW(ours, weight_decay=decay)
    reference = torch.optim.AdamW(theirs, lr=1.0, weight_decay=decay)
    for step in range(10):
        lr = lr_at(step, peak=0.05, warmup=3, total=10)
        for group in reference.param_groups:
            group["lr"] = lr
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10 ** (step % 4 - 2)
            q.grad = p.grad.clone()
        by_hand.step(lr)
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_gradient_is_left_alone():
    p = torch.ones(3, requires_grad=True)
    AdamW([p], weight_decay=0.5).step(0.1)
    assert p.tolist() == [1, 1, 1]


def test_zero_grad_drops_the_gradients():
    p = torch.ones(3, requires_grad=True)
    p.sum().backward()
    AdamW([p]).zero_grad()
    assert p.grad is None


def test_schedule():
    def rates(name, warmup=2, total=6):
        return [round(lr_at(s, peak=1.0, warmup=warmup, total=total, schedule=name), 4)
                for s in range(total + 2)]
    assert rates("constant") == [0.3333, 0.6667, 1, 1, 1, 1, 0, 0]
    assert rates("linear") == [0.3333, 0.6667, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates("cosine") == [0.3333, 0.6667, 1, 0.8536, 0.5, 0.1464, 0, 0]
    assert rates("cosine", warmup=0)[0] == 1                   # nothing divides by zero
    assert rates("linear", warmup=9)[5] == 0.6                 # a run shorter than its warm-up
