"""Text measures against brute force and against examples counted by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.use import text

LITTLE = st.text(alphabet="ab c", max_size=30)


def test_words_are_words_and_single_chinese_characters():
    assert text.words("Don't STOP, 你好 42!") == ["don't", "stop", "你", "好", "42"]
    assert text.words("…!?") == []


def test_rep_counts_what_was_said_before():
    assert text.rep("a b c d") == 0
    assert text.rep("a b c d a b c d") == pytest.approx(1 / 5)           # abcd bcda cdab dabc abcd
    assert text.rep("a b") == 0


@pytest.mark.parametrize("said, marked", [
    ("well well well", []), ("no no no no!", ["no no no no"]),
    ("I see. I see. I see. Yes.", ["I see. I see. I see"]), ("I see. I see. Yes.", []),
    ("oh you and me and me and me and", ["and me and me and me and"]),
    ("好的。好的。好的。", ["好的。好的。好的"]), ("", [])])
def test_loops_are_three_in_a_row(said, marked):
    assert [said[a:b] for a, b in text.loops(said)] == marked


@given(st.lists(st.sampled_from("ab"), max_size=14))
def test_loops_are_found_where_brute_force_finds_them(said):
    def brute():
        for n in range(1, len(said) + 1):
            for i in range(len(said)):
                times = 4 if n == 1 else 3
                if len(said[i:i + n * times]) == n * times and said[i:i + n] * times == \
                        said[i:i + n * times]:
                    return True
        return False
    assert bool(text.loops(" ".join(said))) == brute()


def test_echo_is_the_share_that_stands_in_the_prompt():
    assert text.echo("My cat is ill", "MY CAT IS ILL") == 1
    assert text.echo("abcd", "xxabcdxx") == 0.5
    assert text.echo("abcd", "") == 0


@pytest.mark.parametrize("said", ["As an AI, I", "I'm just an AI language model.",
                                  "Ask ChatGPT.", "I was created by OpenAI",
                                  "作为一个人工智能，我", "我是通义千问"])
def test_falling_out_of_character_is_seen(said):
    assert text.breaks(said)


@pytest.mark.parametrize("said", ["I am an old sailor.", "as an aim", "Ai ai ai, skipper.",
                                  "I can't help smiling.", "我是阿桂，开茶馆的。"])
def test_a_character_may_speak(said):
    assert not text.breaks(said)


def test_copies_name_their_source_and_are_as_long_as_they_can_be():
    sources = {"x:1": "the quick brown fox jumps over the lazy dog", "x:2": "a lazy dog lies there"}
    said = "He wrote: the quick brown fox jumps, and: lazy dog lies there."
    found = text.Copies(sources, 12).of(said)
    assert [(said[a:b], name) for a, b, name in found] == [
        (" the quick brown fox jumps"[1:], "x:1"), (" lazy dog lies there", "x:2")]


@given(st.lists(LITTLE, max_size=4), LITTLE, st.sampled_from([4, 5, 6]))
def test_copies_cover_what_brute_force_covers(sources, said, size):
    covered = {i for a in range(len(said)) for b in range(a + size, len(said) + 1)
               if any(said[a:b] in s for s in sources) for i in range(a, b)}
    found = text.Copies(dict(enumerate(sources)), size).of(said)
    assert {i for a, b, _ in found for i in range(a, b)} == covered
    assert all(said[a:b] in sources[name] for a, b, name in found)


def test_copies_of_one_length_that_overlap_are_all_found():
    copies = text.Copies(dict(enumerate(["a ac c", "aaaaaaaaaaaaaaaaaaaaac "])), 4)
    assert copies.of("aac c") == [(0, 4, 1), (1, 5, 0)]


@given(st.lists(LITTLE, max_size=8), st.sampled_from([0.3, 0.5, 0.6, 1.0]))
def test_near_duplicates_are_those_of_all_pairs(texts, threshold):
    sets = [set(text.ngrams(text.words(t), 2)) or {tuple(text.words(t))} for t in texts]
    wanted = {(i, j) for j in range(len(sets)) for i in range(j)
              if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold}
    assert {(i, j) for i, j, _ in text.near_duplicates(texts, threshold, 2)} == wanted


@given(st.lists(LITTLE, max_size=8), st.sampled_from([0.3, 0.6]))
def test_what_near_duplicates_first_names_can_go_and_the_rest_is_different(texts, threshold):
    pairs = text.near_duplicates(texts, threshold, 2, first=True)
    named = [j for _, j, _ in pairs]
    assert len(set(named)) == len(named) and not {i for i, _, _ in pairs} & {*named}
    rest = [t for j, t in enumerate(texts) if j not in named]
    assert text.near_duplicates(rest, threshold, 2) == []


def test_shared_ngrams_are_named():
    assert text.shared_ngrams(["I like green tea a lot", "no"], ["we like Green tea"], 3) == [
        (0, "like green tea")]


def test_distinct_compares_equal_amounts():
    assert text.distinct(["a b", "a b"], 1) == 0.5
    assert text.distinct(["a b", "a b"], 1, limit=2) == 1


def test_sameness_is_high_for_a_parrot():
    assert text.sameness(["a b c d", "a b c d", "x y z w"], 2) == [1, 1, 0]


def test_moved_words_are_those_that_changed():
    tuned, base = ["dear gently dear the"] * 20, ["list the step the"] * 20
    assert [w for w, _ in text.moved(tuned, base)][:2] == ["dear", "gently"]
    assert "the" not in [w for w, _ in text.moved(tuned, base)]


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    draw, hits = random.Random(1), 0
    for trial in range(200):
        sample = [draw.gauss(0, 1) for _ in range(40)]
        one = text.bootstrap(sample, rounds=200, seed=trial)
        hits += one.low <= 0 <= one.high
    assert 0.88 <= hits / 200 <= 0.99
    assert text.bootstrap([]) is None


def test_a_share_on_which_all_agree_has_the_exact_interval():
    none, every = text.share([0] * 24), text.share([True] * 24)            # Clopper and Pearson
    assert (none.value, none.low, round(none.high, 4), none.n) == (0, 0, 0.1425, 24)
    assert (every.value, round(every.low, 4), every.high) == (1, 0.8575, 1)
    assert (1 - none.high) ** 24 == pytest.approx(0.025)       # at this share 2.5 % see none of 24
    mixed = [0, 1, 0, 0.5]
    assert text.share(mixed) == text.bootstrap(mixed) and text.share([0.5] * 9).high == 0.5
    assert text.share([[1], [1]], lambda of: sum(map(sum, of)) / len(of)).low == every.low ** 12
    assert text.share([]) is None


def test_wilson_is_the_interval_of_the_book():
    one = text.wilson(8, 10)                                  # Newcombe 1998: 0.4902 to 0.9433
    assert (round(one.low, 4), round(one.high, 4)) == (0.4902, 0.9433)
    assert text.wilson(0, 0) is None
