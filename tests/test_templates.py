"""Chat templates of every class that people use: each answer behind the prompt that chat sends."""

import shutil
from dataclasses import replace
from datetime import date

import pytest
from conftest import CHATML, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import dataset
import train
from dataset import QADataset
from lora import config
from lora.base import load, templates
from measure import Voice
from scripts import doctor

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
STRICT = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}"
          + PROMPT + "{% endif %}")

# as families write them: what chat sends, what stops an answer, what is special about the template
RIGHT = {
    "history rewritten": (  # Qwen3: only the last answer keeps its thought, if an empty one
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT + "{% endif %}"),
    "empty thought in the prompt": LOOP + PROMPT + "<think>\n\n</think>\n\n{% endif %}",
    "empty channel in the prompt": LOOP + PROMPT + "<|channel>thought\n<channel|>{% endif %}",
    "end only between turns": (  # Qwen1.5, GLM-4
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
        + PROMPT + "{% endif %}"),
    "the next turn ends it": (
        "{% for m in messages %}{{ '<|endoftext|>' if m['role'] == 'user' else '<|im_start|>' }}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"),
    "end of several tokens": (
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }} ~~end~~\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"),
    "two tokens end the text": (  # Phi-3: <|end|>\n<|endoftext|>, and <|end|> between turns
        LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>"
        "{% endif %}"),
    "no end": "{% for m in messages %}\n[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
              "{% if add_generation_prompt %}\n[assistant]{% endif %}",
    "no system turn": (  # Gemma 2
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + LOOP + PROMPT + "{% endif %}"),
    "system text vanishes": (
        "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + PROMPT
        + "{% endif %}"),
    "strict alternation": STRICT,                      # Mistral: no system turn either
    "system text moves": (  # Mistral v0.3: it stands in the last user's turn
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'user' %}{{ system }}{% endif %}{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}" + PROMPT + "{% endif %}"),
    "generation prompt ignored": LOOP,                 # Command-A, Hammer
    "generation prompt always": LOOP + "<|im_start|>assistant\n",          # Llama 3's first day
    "last answer not written": (  # YandexGPT
        "{% for m in messages %}{% if not (loop.last and m['role'] == 'assistant') %}" + TURN
        + "{% endif %}{% endfor %}<|im_start|>assistant\n"),
    "content trimmed": CHATML.replace("m['content']", "m['content'] | trim"),
    "content in parts": (  # SmolVLM, Idefics 3
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT + "{% endif %}"),
    "thoughts dropped": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")}


def talk(*contents, system=None):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text}
             for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


TALKS = [talk("Hi", "Hello"), talk("Hi", "Hello", system="Be kind"),
         talk("Hi", "Hello", "Why?", "So"), talk(*"abcdefgh"),
         talk(*"abcdefgh", system="Be kind"), talk(" Hi \n", "\n Hello \n"),
         talk("yes", "yes", "yes", "yes")]


def prepared(template, **options):
    tokenizer = make_tokenizer(template, MARKS, eos="<|endoftext|>")
    templates.prepare(tokenizer, **options)
    return tokenizer


def assert_trained_as_sent(tokenizer, messages):
    """Every answer is supervised once, behind exactly the prompt that chat sends, with its end."""
    prompts = {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            ids, _ = dataset.render(messages[:i], tokenizer, "template", reply=True)
            prompts[tuple(ids)] = message["content"].strip()
    stop = dataset.stop_of(tokenizer, "template")
    answers = []
    for ids, mask in dataset.samples(messages, tokenizer, "template"):
        for start in [t for t, on in enumerate(mask) if on and not mask[t - 1]]:
            end = next((t for t in range(start, len(ids)) if not mask[t]), len(ids))
            answer = tokenizer.decode(ids[start:end])
            assert tuple(ids[:start]) in prompts, tokenizer.decode(ids[:start])
            answers.append(prompts[tuple(ids[:start])])
            assert answers[-1] in answer
            assert ids[end - 1] in stop.ids or (stop.text and answer.endswith(stop.text))
            assert ids[start:end].count(ids[end - 1]) == 1 or stop.text
    assert answers == list(prompts.values())


@pytest.mark.parametrize("name", RIGHT)
def test_every_answer_is_behind_the_prompt_that_chat_sends(name):
    tokenizer = prepared(RIGHT[name])
    for messages in TALKS:
        assert_trained_as_sent(tokenizer, messages)


@pytest.mark.parametrize("name", RIGHT)
def test_what_follows_a_plain_answer_does_not_change_it(name, monkeypatch):
    """A steady template is rendered less often, to the same samples."""
    tokenizer = prepared(RIGHT[name])
    talks = [*TALKS, talk("Hi", "Yo", "<think>a</think> b", "<think>a</think> b", "c", "[/think]d")]

    def found(messages):
        try:
            return templates.samples(messages, tokenizer)
        except ValueError as error:
            return str(error)
    steady, frame = [*map(found, talks)], templates.frame
    monkeypatch.setattr(templates, "frame", lambda t: frame(t)._replace(steady=False))
    assert steady == [*map(found, talks)]


def test_a_template_that_writes_answers_alike_is_rendered_once_an_answer(monkeypatch):
    tokenizer, own, seen = prepared(CHATML), templates.write, []
    messages = talk(*"abcdefgh")
    templates.frame(tokenizer)
    monkeypatch.setattr(templates, "write", lambda *args, **kwargs: seen.append(1) or own(
        *args, **kwargs))
    templates.samples(messages, tokenizer)
    assert len(seen) == 1 + 4


@pytest.mark.parametrize("name", ["no system turn", "system text vanishes", "strict alternation"])
def test_a_system_prompt_without_a_turn_begins_the_first_users(name):
    tokenizer = prepared(RIGHT[name])
    messages = talk("Hi", "Hello", system="Be kind")
    (ids, _), = dataset.samples(messages, tokenizer, "template")
    assert "user\nBe kind\n\nHi<|im_end|>" in tokenizer.decode(ids)
    made = QADataset([{"messages": messages, "source": f"a:{n}"} for n in range(9)], tokenizer)
    (note,) = made.notes()
    assert note == ("9 whose system prompt begins the first user's turn: the chat template has no "
                    "turn for it: a:0, a:1, a:2, a:3, a:4 and 4 more")


OPEN = LOOP + PROMPT + "<think>\n{% endif %}"          # R1, QwQ, Qwen3-Thinking


def test_an_open_thought_takes_answers_with_thoughts():
    tokenizer = prepared(OPEN)
    messages = talk("Hi", "<think>\nhm\n</think>\n\nHello")
    (ids, mask), = dataset.samples(messages, tokenizer, "template")
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == (
        "hm\n</think>\n\nHello<|im_end|>")
    prompt, _ = dataset.render(messages[:1], tokenizer, "template", reply=True)
    assert ids[:mask.index(True)] == prompt and tokenizer.decode(prompt).endswith("<think>\n")


def test_an_answer_may_hold_thoughts_whose_marks_are_special():
    tokenizer = make_tokenizer(OPEN, (*MARKS, "<think>", "</think>"), eos="<|endoftext|>")
    assert dataset.samples(talk("Hi", "<think>\nhm\n</think>\n\nHello"), tokenizer, "template")
    with pytest.raises(ValueError, match="message 1 contains <think>, a special token"):
        dataset.samples(talk("<think>", "Hello"), tokenizer, "template")


def test_an_open_thought_refuses_answers_without_once():
    examples = [{"messages": talk(f"Hi {n}", f"It's {n}"), "source": f"a.jsonl:{n}"}
                for n in range(1, 193)]
    with pytest.raises(ValueError) as caught:
        QADataset(examples, prepared(OPEN))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("dataset: a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5 and 187 "
                           "more: the prompt ends in ")
    assert "<think>\\n', where the history holds \"It's 1<|im_end|>" in line
    assert "Write it into the data" in line and "template_vars (the template reads none)" in line


def test_a_variable_switches_thoughts_off_everywhere():
    switch = OPEN.replace("<think>\n", "{% if enable_thinking is defined and enable_thinking is "
                          "false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}")
    tokenizer = prepared(switch, variables={"enable_thinking": False})
    for messages in TALKS:
        assert_trained_as_sent(tokenizer, messages)
    with pytest.raises(ValueError, match=r"does not read thinking; it reads enable_thinking"):
        prepared(switch, variables={"thinking": True})
    with pytest.raises(ValueError, match="this model has no chat template"):
        prepared(None, variables={"thinking": True})


def test_variables_keep_their_type():
    template = "{{ effort ~ n ~ (flag is true) ~ (none_ is none) }}" + LOOP + PROMPT + "{% endif %}"
    tokenizer = prepared(template, variables={"effort": "it's \"low\"", "n": 2, "flag": True,
                                              "none_": None})
    assert templates.write(talk("Hi"), tokenizer).startswith("it's \"low\"2TrueTrue<|im_start|>")


def test_what_a_template_leaves_out_is_said():
    tokenizer = prepared(RIGHT["thoughts dropped"])
    told = talk("Hi", "<think>hm</think>Hello")
    made = QADataset([{"messages": told, "source": "a:1"},
                      {"messages": talk("Hi", "Hello"), "source": "a:2"}], tokenizer)
    assert made.notes() == ["1 with text that the chat template does not write: a:1"]


def test_an_answer_that_the_template_does_not_write_is_refused():
    hidden = CHATML.replace("m['content']", "(m['content'] if loop.first else '5')")
    with pytest.raises(ValueError, match="a:1: the chat template does not write the answer"):
        QADataset([{"messages": talk("Hi", "Hello"), "source": "a:1"}], prepared(hidden))


def test_the_date_is_the_runs():
    dated = "{{ strftime_now('%d %b %Y') }}{% set d = strftime_now(\"%Y\") %}{{ d }}" + LOOP
    tokenizer = prepared(dated, day="2026-01-31")
    assert not templates.prints_date(tokenizer)
    assert templates.write(talk("Hi"), tokenizer).startswith("31 Jan 20262026<|im_start|>")
    today = prepared(dated)
    assert templates.prints_date(today)
    assert templates.write(talk("Hi"), today).startswith(date.today().strftime("%d %b %Y"))


def test_of_named_templates_the_default_is_taken():
    tokenizer = make_tokenizer({"tool_use": "x", "default": CHATML})
    templates.prepare(tokenizer)
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = {"rag": CHATML}
    templates.prepare(tokenizer)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("loss_on, wanted", [("all", 4), ("last", 1)])
def test_a_dialogue_on_a_rewriting_template_trains_all_its_answers(loss_on, wanted):
    tokenizer = prepared(RIGHT["history rewritten"])
    made = QADataset([{"messages": talk(*"abcdefgh"), "source": "a:1"}], tokenizer, loss_on=loss_on)
    assert len(made) == wanted and len(made.examples) == 1
    assert doctor.count_answers(made) == wanted
    assert [e["messages"][-1]["content"] for e in made.examples] == ["h"]


def test_an_answer_may_begin_as_the_prompt_goes_on():
    tokenizer = prepared(LOOP + PROMPT + "Here are my reasons:\n{% endif %}")
    (ids, mask), = dataset.samples(talk("Hi", "Hello"), tokenizer, "template")
    assert tokenizer.decode(ids).endswith("reasons:\nHello<|im_end|>")
    assert_trained_as_sent(tokenizer, talk("Hello", "Hello", "Hi", "Here it is"))


def test_a_question_that_the_template_does_not_write_is_refused():
    tokenizer = prepared("{% for m in messages if m['role'] != 'user' %}" + TURN + "{% endfor %}"
                         + PROMPT + "{% endif %}")
    with pytest.raises(ValueError, match="does not write message 1, 'Hi'"):
        dataset.samples(talk("Hi", "Hello"), tokenizer, "template")


# ----- SentencePiece -----------------------------------------------------------------------------


def sentencepiece():
    """A tokenizer that marks the beginning of a text as that of a word, as Llama 2's does."""
    letters = [chr(n) for n in range(33, 127)] + ["▁", "\n"]
    merges = [("▁", letter) for letter in "HSabcdefgh"]
    words = [*MARKS, *letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="!"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                            normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    core.add_special_tokens(list(MARKS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.chat_template = ("{% for m in messages %}{{ '[INST]' if m['role'] == 'user' else '' "
                               "}}{{ m['content'] }}{{ '[/INST]' if m['role'] == 'user' else "
                               "'<|im_end|>' }}{% endfor %}")
    return tokenizer


def test_sentencepiece_encodes_the_whole_text_once():
    tokenizer = sentencepiece()
    alone = tokenizer.encode("Hello", add_special_tokens=False)
    messages = talk("Hi", "Hello", "Why?", "So")
    (ids, mask), = dataset.samples(messages, tokenizer, "template")
    assert ids == tokenizer.encode(templates.write(messages, tokenizer), add_special_tokens=False)
    assert ids[mask.index(True):][:len(alone)] != alone       # no "▁" inside the text
    assert_trained_as_sent(tokenizer, messages)


def test_sentencepiece_whose_prompt_is_no_beginning_gets_a_sample_an_answer():
    tokenizer = sentencepiece()
    tokenizer.chat_template = tokenizer.chat_template.replace("'[/INST]'", "'[/INST] '")
    messages = talk("Hi", "Hello", "Why?", "So")
    assert len(dataset.samples(messages, tokenizer, "template")) == 2
    assert_trained_as_sent(tokenizer, messages)


# ----- what is shown -----------------------------------------------------------------------------

HARMONY = (  # GPT-OSS: channels; the last answer ends in another token than the earlier ones
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant<chan>final<msg>"
    "{{ m['content'] }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% else %}<|im_start|>"
    "{{ m['role'] }}<msg>{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")


@pytest.mark.parametrize("template, written, seen", [
    (RIGHT["history rewritten"], "<think>\n\n</think>\n\nHello", "Hello"),
    (RIGHT["history rewritten"], "<think>\nhm\n</think>\n\nHello", "Hello"),
    (RIGHT["history rewritten"], "Hello", "Hello"),
    (RIGHT["history rewritten"], "<think>\nhm", "<think>\nhm"),
    (OPEN, "hm\n</think>\n\nHello", "Hello"),
    (HARMONY, "<chan>final<msg>Hello", "Hello"),
    (HARMONY, "<chan>analysis<msg>hm<|im_end|><|im_start|>assistant<chan>final<msg>Hello", "Hello"),
    (CHATML, "<think>x</think> Hello", "<think>x</think> Hello")])
def test_chat_shows_the_answer_without_thought_and_channel(template, written, seen):
    tokenizer = make_tokenizer(template, (*MARKS, "<chan>", "<msg>"), eos="<|endoftext|>")
    templates.prepare(tokenizer)
    ids = tokenizer.encode(written, add_special_tokens=False)
    assert Voice(None, tokenizer).text(ids) == seen
    thinking = [templates.is_thinking(ids[:n], tokenizer) for n in range(1, len(ids) + 1)]
    assert thinking == sorted(thinking, reverse=True)          # first, then no more
    assert thinking[-1] == (seen == "<think>\nhm")


def test_harmony_trains_every_answer():
    tokenizer = make_tokenizer(HARMONY, (*MARKS, "<chan>", "<msg>"), eos="<|endoftext|>")
    templates.prepare(tokenizer)
    for messages in TALKS:
        assert_trained_as_sent(tokenizer, messages)


# ----- a run -------------------------------------------------------------------------------------


def test_a_run_keeps_the_date_of_its_first_day(tmp_path, tiny_folder):
    folder = tmp_path / "dated"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load.load_tokenizer(folder)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    tokenizer.save_pretrained(folder)
    settings = config.Config()
    first, pinned = train.load_tokenizer(str(folder), settings)
    assert pinned.dataset.date == str(date.today()) and settings.dataset.date is None
    old = replace(pinned, dataset=replace(pinned.dataset, date="2026-01-31"))
    again, kept = train.load_tokenizer(str(folder), old)       # a run that is resumed
    assert kept == old and templates.write(talk("Hi"), again).startswith("2026-01-31<|im_start|>")
    assert templates.write(talk("Hi"), first).startswith(pinned.dataset.date)
    _, plain = train.load_tokenizer(str(tiny_folder), settings)
    assert plain == settings                                   # no date, no setting
