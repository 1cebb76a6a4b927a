"""
Warn before training about settings that have failed before, and say why.

    advice: adapters sit in 5 of 30 blocks; facts need the early and middle ones (docs/knowledge.md)

The rules come from experiments/knowledge, which takes a failed recipe apart. Nothing is forbidden:
an ablation must be able to make the mistake.
"""

import math
from collections.abc import Callable
from os.path import commonprefix

from ..optim import epochs_of
from ..surgery import block_numbers


def rule_lr(model, lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """Return the learning rate that works for a LoRA on this model's linear layers: 5e-4 (2000/d)^e
    for lora_alpha = 32, e = 0.0775 for Qwen and 0.781 for Llama's kind (Schulman et al. 2025, LoRA
    Without Regret, and its tinker-cookbook). Adam's first steps are proportional to lr scaling r
    (docs/maths.md, 1), which is lr lora_alpha, whatever r; with rsLoRA it grows with sqrt(r)."""
    config = model.config.get_text_config()
    e = 0.0775 if "qwen" in config.model_type else 0.781
    strength = lora_alpha * math.sqrt(r) if use_rslora else lora_alpha
    return 5e-4 * (2000 / config.hidden_size) ** e * 32 / strength


def sentences(settings, model, adapted: list[str], train: list[dict], val: list[dict]) -> list[str]:
    """List what is known to go wrong with these settings. adapted: module paths; train and val:
    examples."""
    notes = about_data(settings.train, train, val)
    if not any("group" in e for e in train):
        return notes                                          # the other rules are about facts
    blocks, lora = block_numbers(adapted), settings.lora
    rule = rule_lr(model, lora.lora_alpha, lora.r, lora.use_rslora)
    scaled = f"lora_alpha {lora.lora_alpha}"
    if lora.use_rslora:
        scaled += f", r {lora.r} and use_rslora"
    depth = model.config.get_text_config().num_hidden_layers
    return notes + _true([
        (len(blocks) < depth / 3, f"adapters sit in {len(blocks)} of {depth} blocks; facts are "
         "recalled in the early and middle ones (lora.layers=all)"),
        (settings.train.lr < rule / 4, f"lr {settings.train.lr:.1e} with {scaled} is "
         f"{rule / settings.train.lr:.0f} times below the rule, {rule:.1e}: facts may not be "
         "learned at all"),
        (settings.train.repetition_penalty > 1, "a repetition penalty lowers the tokens of the "
         "question too, and the name is one of them: facts that are known are then not said"),
    ])


def about_data(s, train: list[dict], val: list[dict]) -> list[str]:
    """List what goes wrong with examples and the train section s, whatever the model."""
    n = len(train)
    steps = s.max_steps or max(1, round(epochs_of(s, n) * math.ceil(n / s.batch_size)))
    notes, has_texts = [], any(e["messages"][0]["role"] == "text" for e in train)
    if steps <= s.warmup_steps and not has_texts:             # a text becomes many samples
        notes.append(f"{steps} steps are no more than the {s.warmup_steps} of the warm-up: the "
                     "learning rate never gets to its peak; more train.epochs, or "
                     "train.warmup_steps=0")
    facts = [e for e in train if "group" in e]
    if not facts:
        return notes
    taught = {e["group"] for e in facts}
    held = {e["group"] for e in val if "group" in e} - taught
    wordings = len({e["messages"][-2]["content"] for e in facts}) / len(taught)
    return notes + _true([
        (held, f"validation asks about {len(held)} facts that no training example teaches. Their "
               "loss cannot tell when the others are learned: hold out wordings "
               "(data.split_by=wording)"),
        (s.best_by == "loss", "the best adapter is chosen by validation loss, which "
         "follows wording; recall is what is wanted (train.best_by=recall)"),
        (val and s.best_by == "auto" and not any("value" in e for e in val), 'no fact has a '
         '"value", what a right answer contains: recall is not measured, and the best adapter is '
         "chosen by validation loss"),
        (wordings < 4, f"{wordings:.1f} wordings a fact: a fact trained in few wordings is learned "
                       "as a string of words; write at least 4"),
    ])


def about_format(formats: dict[str, Callable], format: str, tokenizer,
                 examples: list[dict]) -> list[str]:
    """List where a format does not suit the model or ChatML. formats: those of dataset.py."""
    sizes = [len(tokenizer.encode(mark, add_special_tokens=False))
             for mark in ("<|im_start|>", "<|im_end|>")]
    if format == "chatml" and sizes != [1, 1]:
        return ['format is "chatml", but this model has no ChatML tokens: <|im_end|> is '
                f'{sizes[1]} tokens it never saw end a turn. "plain" suits a base model better.']
    bare = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    first = next((e["messages"] for e in examples if not any(
        m["role"] in ("text", "tool") or "tool_calls" in m for m in e["messages"])), bare)
    sentences = []
    if format == "template" and sizes == [1, 1]:
        for label, messages in (("the first example", first),
                                ("a dialogue without system prompt", bare)):
            ours, theirs = ("".join(text for text, _ in write(messages, tokenizer))
                            for write in (formats["chatml"], formats["template"]))
            at = max(0, len(commonprefix([ours, theirs])) - 12)
            if ours != theirs:
                sentences.append(f"the model's template differs from plain ChatML for {label}: it "
                                 f"renders {theirs[at:at + 90]!r}, ChatML {ours[at:at + 40]!r}")
    return sentences


def _true(rules):
    """The texts of the rules (condition, text) whose condition holds."""
    return [f"{text} (docs/knowledge.md)" for holds, text in rules if holds]
