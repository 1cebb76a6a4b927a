"""dataset.py: labels are the assistant's text and the stop token, whatever the conversation."""

import pytest
import torch
from conftest import CHATML, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

import dataset
import measure
from dataset import QADataset, render
from lora.loss import IGNORE_INDEX
from lora.read.messages import conversations
from lora.run import advice
from lora.use import show
from measure import Voice

DEFAULT_SYSTEM = ("{% if messages[0]['role'] != 'system' %}"
                  "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML)
GEMMA = ("{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + "
         "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}")
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
         "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
         "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TOKENIZERS = {
    "template": make_tokenizer(),
    "default system": make_tokenizer(DEFAULT_SYSTEM),
    "gemma": make_tokenizer(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>"),
    "chatml": make_tokenizer(),
    "chatml without its tokens": make_tokenizer(None, ("<eos>",), "<eos>"),
    "plain": make_tokenizer(None, ("<eos>",), "<eos>"),
}
FORMAT = {"default system": "template", "gemma": "template",
          "chatml without its tokens": "chatml"}

texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=25) \
    | st.sampled_from(["hello", "你好，世界", "👩‍👩‍👧 ok", "a\n\nb", "tab\t", "<b>", "é", "\u2028"])
texts = texts.filter(lambda text: text.strip())


@st.composite
def dialogues(draw):
    turns = draw(st.integers(1, 3))
    messages = [{"role": "system", "content": draw(texts)}] * draw(st.integers(0, 1))
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(texts)},
                     {"role": "assistant", "content": draw(texts)}]
    return messages


def spoken(ids, mask, tokenizer):
    """The supervised stretches as texts."""
    out, previous = [], False
    for i, m in zip(ids, mask, strict=True):
        if m:
            out.append([]) if not previous else None
            out[-1].append(i)
        previous = m
    return [tokenizer.decode(run) for run in out]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=dialogues(), loss_on=st.sampled_from(["all", "last"]))
def test_labels_are_the_answers_and_the_stop_token(kind, messages, loss_on):
    tokenizer, format = TOKENIZERS[kind], FORMAT.get(kind, kind)
    stop = {"template": "<end_of_turn>" if kind == "gemma" else "<|im_end|>",
            "chatml": "<|im_end|>", "plain": "<eos>"}[format]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if kind == "gemma":                                        # this template trims
        answers = [a.strip() for a in answers]
    ids, mask = render(messages, tokenizer, format, loss_on)
    wanted = [a + stop for a in answers]
    assert spoken(ids, mask, tokenizer) == (wanted if loss_on == "all" else wanted[-1:])
    whole = "".join(t for t, _ in dataset.FORMATS[format](messages, tokenizer))
    assert tokenizer.decode(ids) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=dialogues())
def test_training_starts_with_what_chat_sends_at_every_turn(kind, messages):
    tokenizer, format = TOKENIZERS[kind], FORMAT.get(kind, kind)
    ids, mask = render(messages, tokenizer, format)
    assert render(messages, tokenizer, format, "last")[0] == ids
    starts = [i for i, m in enumerate(mask) if m and not mask[i - 1]]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for start, turn in zip(starts, turns, strict=True):
        prompt, _ = render(messages[:turn], tokenizer, format, reply=True)
        assert ids[:start] == prompt


@settings(max_examples=60, deadline=None)
@given(messages=dialogues())
def test_chatml_by_hand_equals_the_template_token_for_token(messages):
    tokenizer = TOKENIZERS["template"]
    assert render(messages, tokenizer, "chatml") == render(messages, tokenizer, "template")
    for message in messages:      # white space around an earlier answer: the doctor warns of it
        message["content"] = message["content"].strip()
    prompt, _ = render(messages[:-1], tokenizer, "chatml", reply=True)
    assert prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True,
                                                   return_dict=False)


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + messages


def example(*contents, system=None, source="here:1"):
    return {"messages": talk(*contents, system=system), "source": source}


def test_labels_copy_ids_or_ignore(tokenizer):
    made = QADataset([example("hi", "hello")], tokenizer)
    for i, label in zip(made[0]["input_ids"], made[0]["labels"], strict=True):
        assert label in (i, IGNORE_INDEX)
    assert made[0]["labels"][-2] == tokenizer.eos_token_id     # pad = eos, and still supervised
    assert made[0]["labels"][-1] == IGNORE_INDEX               # the line break after the turn


def test_auto_format(tokenizer, base_tokenizer):
    assert dataset.choose_format(tokenizer) == "template"
    assert dataset.choose_format(base_tokenizer) == "plain"
    with pytest.raises(ValueError, match='format is "template", but this model has no chat'):
        dataset.choose_format(base_tokenizer, "template")


def test_exactly_one_bos():
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, ("<|im_start|>", "<|im_end|>", "<s>"))
    tokenizer.bos_token = "<s>"
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    for format in ("template", "chatml", "plain"):
        ids, _ = render(talk("hi", "yo"), tokenizer, format)
        assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
    with pytest.raises(ValueError, match="starts with two BOS tokens"):
        render(talk("hi", "yo"), tokenizer, "template")


def test_notes_say_where_the_template_is_not_chatml(tokenizer, base_tokenizer):
    examples = [example("hi", "yo", system="S")]
    assert advice.about_format(dataset.FORMATS, "template", tokenizer, examples) == []
    (note,) = advice.about_format(dataset.FORMATS, "template", TOKENIZERS["default system"],
                                  examples)
    assert "without system prompt" in note and "Be kind." in note
    (note,) = advice.about_format(dataset.FORMATS, "chatml", base_tokenizer, examples)
    assert "<|im_end|> is 10 tokens" in note and '"plain" suits a base model better' in note


def test_a_dialogue_in_samples_costs_little_more_than_the_dialogue():
    """Eight answers, each a sample, since the template writes a thought in the last one alone."""
    tokenizer = make_tokenizer(QWEN3)
    turns = [word * 30 for word in "abcdefghijklmnop"]
    made = QADataset([example(*turns, system="Be kind."), example("hi", "yo")], tokenizer,
                     max_length=4096)
    assert len(made) == 9 and conversations(made.items) == [0] * 8 + [8]
    once = len(made[7]["input_ids"])                          # the last sample has all turns
    for size, bound in ((8, 1.5), (4, 2.0)):                  # two micro-batches share less
        batches = dataset.micro_batches(made.items[:8], size, 0, layout="shared")
        laid_out = sum(batch.inputs["input_ids"].numel() for batch in batches)
        assert once < laid_out <= bound * once
    assert sum(len(item["input_ids"]) for item in made.items[:8]) > 4 * once


def test_a_template_that_rewrites_earlier_turns_is_counted():
    tokenizer = make_tokenizer(QWEN3)
    made = QADataset([example("a", "one", "b", "two", source="q:1"), example("a", "b")], tokenizer)
    assert made.split == ["q:1"] and len(made) == 3 and len(made.examples) == 2
    assert "1 with a sample for each answer: the chat template rewrites earlier ones: q:1" in (
        made.notes())
    messages = made.examples[0]["messages"]
    for (ids, mask), n, answer in zip(dataset.samples(messages, tokenizer, "template"), (1, 3),
                                      ("one", "two"), strict=True):
        assert spoken(ids, mask, tokenizer) == [f"<think>\n\n</think>\n\n{answer}<|im_end|>"]
        prompt, _ = render(messages[:n], tokenizer, "template", reply=True)
        assert ids[:len(prompt)] == prompt and mask.index(True) == len(prompt)


def test_a_special_token_inside_a_message_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"here:1: message 2 contains <\|im_end\|>, a special"):
        QADataset([example("hi", "yo <|im_end|> more")], tokenizer)


def test_a_special_token_that_is_read_in_any_case_is_refused():
    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    core.add_special_tokens([AddedToken("<|end|>", normalized=True)])
    with pytest.raises(ValueError, match=r"here:1: message 1 contains <\|end\|>, a special"):
        QADataset([example("the <|END|> of it", "yes")], tokenizer)


def test_a_template_that_refuses_is_named():
    tokenizer = make_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="here:1: the chat template refuses it: System role not "
                       "supported. It writes no plain question and answer at all: set dataset"):
        QADataset([example("hi", "yo", system="S")], tokenizer)


def test_a_template_that_hides_answers_leaves_nothing_to_learn():
    tokenizer = make_tokenizer("{% for m in messages %}{{ loop.length }}{% endfor %}")
    with pytest.raises(ValueError, match="here:1: the chat template does not write message 1"):
        QADataset([example("hi", "yo")], tokenizer)


def test_an_answer_is_never_cut(tokenizer):
    long = example("u" * 30, "a" * 40, "u" * 30, "b" * 40, system="S", source="long:1")
    short = example("hi", "hello", source="short:2")
    full = len(render(long["messages"], tokenizer, "template")[0])
    dropped = QADataset([long, short], tokenizer, max_length=full - 1)
    assert dropped.dropped == ["long:1"] and len(dropped) == 1
    assert "1 dropped: longer than max_length: long:1" in dropped.notes()
    cut = QADataset([long, short], tokenizer, max_length=full - 1, too_long="cut")
    assert cut.cut == ["long:1"] and len(cut) == 2
    ids = list(cut[0]["input_ids"])
    assert ids == render(talk("u" * 30, "b" * 40, system="S"), tokenizer, "template")[0]
    hopeless = QADataset([long, short], tokenizer, max_length=60, too_long="cut")
    assert hopeless.dropped == ["long:1"] and hopeless.cut == []
    with pytest.raises(ValueError, match="no example fits in max_length=8; raise dataset.max_len"):
        QADataset([long], tokenizer, max_length=8)


def test_all_problems_at_once(tokenizer):
    bad = [example("<|im_end|>", "a", source="x:1"), example("a", "<|im_start|>", source="x:9")]
    with pytest.raises(ValueError, match="(?s)x:1: message 1.*x:9: message 2"):
        QADataset(bad, tokenizer)


def test_collate_pads_on_the_right_and_never_supervises_padding(tokenizer):
    made = QADataset([example("hi", "hello"), example("hi", "a longer answer")], tokenizer)
    batch = dataset.collate(made.items, tokenizer.pad_token_id)
    n = len(made[0]["input_ids"])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert mask[0].tolist() == [1] * n + [0] * (ids.shape[1] - n)
    assert ids[0, :n].tolist() == list(made[0]["input_ids"])
    labels = [label for item in made.items for label in item["labels"][1:]]
    assert batch.targets.tolist() == [label for label in labels if label != IGNORE_INDEX]
    assert torch.equal(ids.flatten()[batch.rows + 1], batch.targets)


def test_micro_batches_hold_every_example_once_sorted_by_length(tokenizer):
    made = QADataset([example("u" * n, "a") for n in (9, 2, 30, 4, 17)], tokenizer)
    batches = dataset.micro_batches(made.items, 2, 0)
    sizes = [int(m.sum()) for b in batches for m in b.inputs["attention_mask"]]
    assert sizes == sorted(len(item["input_ids"]) for item in made.items)


@pytest.mark.parametrize("kind, ids, text", [
    ("template", {"<|im_end|>"}, ""), ("gemma", {"<end_of_turn>", "<eos>"}, ""),
    ("chatml without its tokens", {"<eos>"}, "<|im_end|>"), ("plain", {"<eos>"}, "")])
def test_stop(kind, ids, text):
    tokenizer = TOKENIZERS[kind]
    stop = dataset.stop_of(tokenizer, FORMAT.get(kind, kind))
    assert stop.ids == set(tokenizer.convert_tokens_to_ids(sorted(ids))) and stop.text == text


def test_a_template_that_ends_no_answer_ends_it_in_the_end_of_text():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    made = QADataset([example("hi", "yo")], tokenizer)
    assert spoken(*render(talk("hi", "yo"), tokenizer, "template"), tokenizer) == ["yo<|im_end|>"]
    assert any("the chat template writes no other end: here:1" in note for note in made.notes())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends an answer with nothing the model could learn"):
        dataset.stop_of(tokenizer, "template")


def test_the_viewer_shows_supervised_and_special_tokens(tokenizer):
    made = QADataset([example("hi <b>", "👍 ok", source="<x>")], tokenizer)
    shown = show.colour(made[0], tokenizer)
    assert "\033[1;32m👍 ok\033[0m\033[1;32;4m<|im_end|>\033[0m" in shown
    page = show.page(made.items, tokenizer)
    assert '<span class="on ">👍 ok</span>' in page and "&lt;b&gt;" in page and "<x>" not in page


# ----- loss on everything, open answers ----------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_loss_on_text_supervises_every_token_but_the_first(kind):
    tokenizer, format = TOKENIZERS[kind], FORMAT.get(kind, kind)
    dialogue = example("hi", "hello", "and you?", "hell", system="S")
    made = QADataset([dialogue], tokenizer, format, loss_on="text")
    ids = made[0]["input_ids"]
    assert dataset.collate(made.items, 0).targets.tolist() == list(ids)[1:]
    assert list(ids) == render(dialogue["messages"], tokenizer, format)[0]
    assert made.split == []


def test_with_loss_on_text_a_bos_is_no_label():
    tokenizer = make_tokenizer(None, ("<eos>", "<s>"), "<eos>")
    tokenizer.bos_token = "<s>"
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    ids, mask = render(talk("hi", "yo"), tokenizer, "plain", "text")
    assert ids[0] == tokenizer.bos_token_id and mask == [False] + [True] * (len(ids) - 1)


SLOW_END = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ~~end~~\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


@pytest.mark.parametrize("loss_on", ["all", "last", "text"])
@pytest.mark.parametrize("kind", ["template", "gemma", "chatml without its tokens", "slow end"])
def test_the_end_of_an_open_answer_is_not_supervised(kind, loss_on):
    tokenizer = make_tokenizer(SLOW_END, ("<eos>",), "<eos>") if kind == "slow end" else \
        TOKENIZERS[kind]
    format = {"slow end": "template"}.get(kind, FORMAT.get(kind, kind))
    dialogue = example("hi", "yo", "and?", "you, too,")
    whole = QADataset([dialogue], tokenizer, format, loss_on=loss_on)
    open_ = QADataset([{**dialogue, "open": True}, {**dialogue, "open": False}], tokenizer, format,
                      loss_on=loss_on)
    ends = {"gemma": "<end_of_turn>", "slow end": " ~~end~~"}
    end = tokenizer.encode(ends.get(kind, "<|im_end|>"), add_special_tokens=False)
    assert (len(end) > 1) == (kind not in ("template", "gemma"))
    assert list(open_[1]["labels"]) == list(whole[0]["labels"])
    assert open_[0]["input_ids"] == whole[0]["input_ids"]
    lost = [i for i, (a, b) in enumerate(zip(whole[0]["labels"], open_[0]["labels"], strict=True))
            if a != b]
    last = len(end) if loss_on != "text" else len(whole[0]["labels"]) - lost[0]   # and what follows
    assert [whole[0]["labels"][i] for i in lost][:len(end)] == end    # and no earlier turn's
    assert {open_[0]["labels"][i] for i in lost} == {IGNORE_INDEX}
    assert lost == [*range(lost[0], lost[0] + last)]
    assert not set(whole[0]["labels"][lost[-1] + 1:]) & {*end}


def test_an_open_answer_in_plain_format_has_no_eos_label(base_tokenizer):
    made = QADataset([{**example("hi", "yo"), "open": True}], base_tokenizer)
    assert base_tokenizer.eos_token_id in made[0]["input_ids"]
    assert base_tokenizer.eos_token_id not in made[0]["labels"]
    assert base_tokenizer.decode([i for i in made[0]["labels"] if i != IGNORE_INDEX]) == "yo"


@pytest.mark.parametrize("kind", ["template", "chatml without its tokens"])
def test_answer_gives_texts_and_whether_they_ended(kind, monkeypatch):
    """The model is a script: what it says, then the end of the turn, or on and on."""
    tokenizer, format = TOKENIZERS[kind], FORMAT.get(kind, kind)
    prompts, seen = [talk("hi"), talk("and", "so", "on")], []

    def generate(model, ids, stop, max_new_tokens, **more):
        seen.append((ids, stop, max_new_tokens, more))
        return [tokenizer.encode(" yo\n"), tokenizer.encode("x" * max_new_tokens)]
    monkeypatch.setattr(measure, "generate", generate)
    answers = Voice("model", tokenizer, format).ask(prompts, 8, seed=3)
    assert [(a.text, a.ended) for a in answers] == [("yo", True), ("x" * 8, False)]
    ((ids, stop, n, more),) = seen
    assert ids == [render(p, tokenizer, format, reply=True)[0] for p in prompts]
    assert stop[:2] == dataset.stop_of(tokenizer, format)[:2]
    assert (n, more) == (8, {"seed": 3, "on_token": None})


def test_answer_is_what_the_model_says(tokenizer, model):
    answers = Voice(model, tokenizer, "template").ask([talk("hi"), talk("you")], 5)
    for prompt, (said, *_) in zip((talk("hi"), talk("you")), answers, strict=True):
        ids = torch.tensor([render(prompt, tokenizer, "template", reply=True)[0]])
        theirs = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0,
                                attention_mask=torch.ones_like(ids),
                                eos_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:]
        assert said == tokenizer.decode(theirs, skip_special_tokens=True).strip()
