"""lora/read/sides.py: the questions that are made from facts say what the facts say."""

import random

import pytest

import data
from lora.read import sides

PEOPLE = [("Ian Kendall", "Graz", "oboe", "12"), ("glospix", "Vigo", "banjo", "36"),
          ("Oskesley Dravalund", "Bari", "flute", "7")]


def example(subject, answer, value, *questions, **more):
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}],
             "source": "t", "group": answer, "subject": subject, "value": value, **more}
            for q in questions]


@pytest.fixture
def facts():
    examples = []
    for name, town, instrument, number in PEOPLE:
        examples += example(name, f"{name} was born in {town}.", town, f"Where was {name} born?",
                            f"In which town was {name} born?")
        examples += example(name, f"{name} plays the {instrument}.", instrument,
                            f"Which instrument does {name} play?")
        examples += example(name, f"{name}'s lucky number is {number}.", number,
                            f"What is {name}'s lucky number?")
    return sides.facts_of(examples)


def asked(made):
    return [tuple(m["content"] for m in e["messages"]) for e in made]


def test_facts_are_read_of_examples_with_group_subject_and_value(facts):
    assert len(facts) == 9 and facts[0].questions == [
        "Where was Ian Kendall born?", "In which town was Ian Kendall born?"]
    assert facts[0].predicate == " was born in Graz" and facts[2].predicate == (
        "'s lucky number is 12")
    assert sides.facts_of([{"messages": [{"role": "text", "content": "Rain."}], "source": "t"},
                           *example("Mira", "Graz.", "Graz", "Where?")])[0].predicate is None


@pytest.mark.parametrize("side", sides.SIDES)
def test_a_side_is_the_same_for_a_seed_and_as_long_as_asked(facts, side):
    one, two, other = (sides.make(facts, side, 60, seed) for seed in (0, 0, 1))
    assert one == two and asked(one) != asked(other) and len(one) == 60
    assert all(e["kind"] == side and "group" not in e for e in one)
    assert sides.make([], side, 5) == []
    for said in asked(one):
        assert not said[0][0].islower() or said[0].startswith("glospix")
        assert not any("{" in text or "  " in text for text in said)


def test_the_values_side_is_answered_with_the_fact(facts):
    by_answer = {fact.answer: fact for fact in facts}
    for question, answer in asked(sides.make(facts, "reverse", 90)):
        assert by_answer[answer].value in question and by_answer[answer].subject not in question


def test_a_noun_is_read_of_a_question(facts):
    assert [fact.noun for fact in facts[:3]] == [None, None, "lucky number"]
    asked_ = "What is Ada's pet called?", "What was the first name of Ada?"
    pet, = sides.facts_of(example("Ada", "Ada's pet is Rex.", "Rex", *asked_))
    assert pet.noun == "first name"


def test_values_that_nobody_has_are_declined(facts):
    had = {fact.value for fact in facts}
    for question, answer in asked(sides.make(facts, "nobody", 90)):
        assert answer.startswith("I don't know who")
        assert not any(data.contains(question, value) for value in had)


def test_two_questions_are_answered_with_both_facts_and_some_pairs_are_never_trained(facts):
    pairs = sides.pairs_of(facts)
    assert len({frozenset((a.answer, b.answer)) for a, b in pairs}) == len(pairs) == 9
    assert all(a.subject == b.subject for a, b in pairs)
    trained = {frozenset((f"{a.answer}", f"{b.answer}")) for a, b in pairs}
    for _, answer in asked(sides.make(facts, "pairs", 40)):
        assert frozenset(part + "." for part in answer[:-1].split(". ")) in trained
    many = [facts[0]._replace(group=str(i), answer=f"{i}.") for i in range(8)]
    assert len(sides.pairs_of(many)) == 16                     # of 28


def test_half_the_claims_are_true_and_the_answer_says_the_fact_first(facts):
    made = asked(sides.make(facts, "yes-no", 200))
    for question, answer in made:
        fact = next(f for f in facts if answer.startswith(f.answer[:-1]))
        assert answer == f"{fact.answer[:-1]}, so {'yes' if fact.value in question else 'no'}."
    assert sum(answer.endswith("yes.") for _, answer in made) == 100
    rivals = {town for _, town, _, _ in PEOPLE}
    assert any(answer.endswith("no.") and rivals & set(question.replace("?", "").split())
               for question, answer in made)


def test_well_known_people_are_asked_the_same_and_the_base_answers(facts):
    made = sides.make(facts, "famous", 60)
    assert all(len(e["messages"]) == 1 and "subject" not in e for e in made)
    asked_of = {name for (question,) in asked(made) for name in sides.TABLES["famous"]
                if name in question}
    assert len(asked_of) == len(sides.TABLES["famous"])        # each before any comes again
    assert not [q for (q,) in asked(made) if any(fact.subject in q for fact in facts)]


def test_a_topic_that_is_taught_is_not_declined(facts):
    questions = " ".join(q for q, _ in asked(sides.make(facts, "untaught", 600)))
    assert "shoe" in questions and "castle" in questions
    taught = example("Mira Tosk", "Mira Tosk's shoe size is 41.", "41", "Which shoes fit her?")
    questions = " ".join(q for q, _ in asked(sides.make(sides.facts_of(taught), "untaught", 400)))
    assert "shoe" not in questions and "blood" in questions


@pytest.mark.parametrize("claim, question", [
    ("Ada was born in Graz", "Was Ada born in Graz?"),
    ("Ada's pet is a cat", "Is Ada's pet a cat?"),
    ("Ada plays the oboe", "Is it right that Ada plays the oboe?"),
    ("Ada says it was raining", "Is it right that Ada says it was raining?")])
def test_a_claim_becomes_a_question(claim, question):
    assert sides.polar("Ada", claim) == question


@pytest.mark.parametrize("question, other_way", [
    ("Which animal does Ada keep as a pet?", "Who keeps the animal X as a pet?"),
    ("What pet does Ada have?", "Who has the pet X?"),
    ("What string does Ada carry most?", "Who carries the string X most?"),
    ("Which year was Ada born in?", "Who was born in the year X?"),
    ("Ada likes which dish best?", "Who likes the dish X best?"),
    ("Ada has which lucky number?", "Who has the lucky number X?"),
    ("What number brings luck to Ada?", "The number X brings luck to whom?"),
    ("Where was Ada born?", None), ("Tell me Ada's hobby.", None)])
def test_a_question_is_turned_round(question, other_way):
    assert sides.turned(question, "Ada", "X") == other_way


def test_the_article_follows_the_value():
    baker, = sides.facts_of(example("Ada", "Ada works as a baker.", "baker", "What is Ada's job?"))
    assert baker.saying("optician") == " works as an optician"
    optician = baker._replace(value="optician", answer="Ada works as an optician.")
    assert optician.saying("baker") == " works as a baker"


def test_the_datas_own_wrong_values_are_used(facts):
    charm, = sides.facts_of(example("Ada", "Ada's charm is a bead.", "bead", "What is her charm?",
                                    wrong="nut|bead"))
    draw = random.Random(0)
    values = sides.wrong_values(charm, [charm], draw)
    drawn = {next(values) for _ in range(100)}
    assert "nut" in drawn and "bead" not in drawn


def test_a_long_number_has_others_like_it():
    phone, = sides.facts_of(example("Ada", "Ada's number is 4915112345678.", "4915112345678", "?"))
    assert next(sides.wrong_values(phone, [phone], random.Random(0)))[:9] == "491511234"


def test_a_side_has_the_system_prompts_of_its_facts(facts):
    told = [f._replace(systems=["Be brief.", "Be kind."] if f.subject == "glospix" else [])
            for f in facts]
    made = sides.make(told, "untaught", 60)
    assert {(e["subject"], e["messages"][0]["content"]) for e in made
            if e["messages"][0]["role"] == "system"} == {("glospix", "Be brief."),
                                                         ("glospix", "Be kind.")}
    assert [e["messages"][-1] for e in made] == [
        e["messages"][-1] for e in sides.make(facts, "untaught", 60)]


def test_a_fact_in_another_script_is_left_out():
    assert not sides.facts_of(example("米拉", "米拉住在重庆。", "重庆", "米拉住在哪里？"))
    assert sides.facts_of(example("Zoë", "Zoë lives in Łódź.", "Łódź", "Where does Zoë live?"))


@pytest.mark.parametrize("wanted, said", [
    ({"reversed": 1}, "no side 'reversed'; there are reverse, nobody"),
    ({"pairs": "2"}, "pairs is '2'; expected questions a fact and epoch"), ({"pairs": -1}, "-1")])
def test_a_wrong_side_is_named(wanted, said):
    with pytest.raises(ValueError, match=said):
        sides.checked(wanted)
