"""lora/memory.py: what a step keeps, counted on a small one."""

from conftest import make_model
from test_flat import samples

import dataset
from inject import inject
from lora import flat, memory
from lora.surgery import adapter_parameters


def parts(model, lean=True, n=7):
    batch = dataset.collate(samples(20)[:n], 0)
    return memory.estimate(model, dataset.collate(samples(20)[:2], 0), batch, lean)


def test_the_parts_of_a_step():
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    found = parts(model)
    trained = sum(p.numel() for p in adapter_parameters(model))
    assert found["gradients and moments"] == 12 * trained     # a gradient and two moments, 4 bytes
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert parts(model, lean=False)["logits"] == 3 * found["logits"] > 0
    assert not model.training                                  # as it was


def test_activations_grow_with_tokens_and_checkpointing_keeps_less():
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    two, seven = parts(model, n=2)["activations"], parts(model)["activations"]
    assert seven == two / 100 * 7 * 50                        # 2 and 7 rows of 50 tokens
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert parts(model)["activations"] < seven / 5


def test_the_estimate_of_flat_batches_counts_their_tokens():
    model = make_model()
    inject(model, r=4, lora_alpha=8)
    assert flat.enable(model) is None
    small, large = flat.flatten(samples(20)[:2]), flat.flatten(samples(20))
    text = memory.report(model, small, large)
    assert text.startswith(f"memory: a step of {large.inputs['input_ids'].numel()} tokens needs")
