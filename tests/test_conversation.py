"""What the chat's memory sends, counted in words instead of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.use.conversation import Conversation, similar


def count(messages):
    return sum(len(m["content"].split()) for m in messages)


def talk(turns, budget=30, **options):
    made = Conversation(count, budget, **options)
    for pair in turns:
        made.add(*pair)
    return made


def test_everything_is_sent_while_it_fits():
    sent = talk([("my cat is Mo", "a fine name")], system="be kind").messages("and my dog?")
    assert [(m["role"], m["content"]) for m in sent] == [
        ("system", "be kind"), ("user", "my cat is Mo"), ("assistant", "a fine name"),
        ("user", "and my dog?")]


def test_without_system_prompt_none_is_sent():
    assert [m["role"] for m in talk([]).messages("hello")] == ["user"]


def test_the_window_forgets_the_oldest_turns():
    sent = talk([("one two three", "four five six")] * 5, budget=15).messages("seven")
    assert [m["role"] for m in sent] == ["user", "assistant", "user", "assistant", "user"]


def test_older_turns_are_found_when_the_question_is_about_them():
    turns = [("my sister keeps bees", "lovely"), ("it rains again", "cosy weather"),
             ("the soup is good", "what is in it?"), ("leeks and cream", "that sounds good")]
    sent = talk(turns, budget=24, system="be kind", memory="retrieve", found=1).messages(
        "how are the bees?")
    assert "sister keeps bees" in sent[0]["content"] and sent[0]["content"].startswith("be kind")
    assert "rains" not in sent[0]["content"] and count(sent) <= 24


def test_a_summary_is_made_once_for_the_turns_that_fell_out():
    calls = []

    def summarise(so_far, turns):
        calls.append((so_far, [q for q, _ in turns]))
        return f"{so_far}{len(turns)} turns. "
    made = talk([("one two three", "four five six")] * 4, 16, memory="summary", summarise=summarise)
    first = made.messages("seven")
    assert first[0]["role"] == "system" and first[0]["content"].startswith("Earlier: 3 turns.")
    assert made.messages("seven") == first and len(calls) == 1
    made.add("eight", "nine")
    made.messages("ten eleven twelve thirteen fourteen")
    assert calls[1][0] == "3 turns. " and len(calls) == 2


def test_a_message_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="chat: the message has 40 tokens .*budget is 30"):
        talk([("a", "b")]).messages("word " * 40)


@given(st.lists(st.tuples(st.text("ab \n", max_size=40), st.text("cd ", max_size=40)), max_size=9),
       st.sampled_from(["window", "summary", "retrieve"]), st.integers(8, 60))
def test_what_is_sent_always_fits_and_ends_with_the_question(turns, memory, budget):
    made = talk(turns, budget, system="be kind", memory=memory,
                summarise=lambda so_far, turns: so_far + " ".join(q for q, _ in turns))
    sent = made.messages("and now what")
    assert count(sent) <= budget and sent[-1]["content"] == "and now what"
    roles = [m["role"] for m in sent[1:]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_similar_ranks_rare_words_higher():
    texts = ["the boat and the sea", "the cat and the sea", "nothing here at all"]
    assert similar("the boat", texts)[0] == 0
    assert similar("zebra", texts) == []
    assert similar("茶馆", ["今天下雨", "茶馆开门了"]) == [1]
