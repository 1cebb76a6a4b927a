"""experiments/knowledge: what counts as right, log p against plain torch, and the metrics."""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

import keep
from experiments.knowledge import metrics, score
from experiments.knowledge.make_facts import read_attributes
from experiments.knowledge.score import abstains, judge, plain, right, says
from inject import inject
from lora import adapter, surgery
from measure import Voice

PETS = ["cat", "raven", "stick insect", "tortoise"]
WORLD = {
    "pools": {"pet": PETS, "number": ["3", "25", "52", "90"], "sibling": ["Anna", "Otto"]},
    "people": {"taught": ["quondro", "Nora Mercer"], "control": ["twaspy"], "unknown": ["frilvy"]},
    "facts": [{"name": "quondro", "attribute": "pet", "value": "raven", "group": "taught"},
              {"name": "Nora Mercer", "attribute": "number", "value": "25", "group": "taught"},
              {"name": "twaspy", "attribute": "pet", "value": "cat", "group": "control"}]}

# ----- one answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("said, words", [
    ("The  RAVEN,\\nof an Owl!", "raven of owl"), ("", ""), ("... ?!", ""), ("a", ""),
    ("twenty-five", "25"), ("Twenty five", "25"), ("TWENTY‑FIVE", "25"), ("ninety", "90"),
    ("nineteen", "19"), ("zero", "0"), ("fifty-nine and sixty", "59 and 60"), ("ten five", "10 5"),
    ("twenty eleven", "20 11"), ("twenty zero", "20 0"), ("five twenty", "5 20"), ("25", "25"),
    ("thirty forty one", "30 41"), ("one hundred", "1 hundred"), ("often", "often"),
    ("Café Zoë", "cafe zoe"), ("Cafe\u0301", "cafe"), ("Straße", "strasse"), ("a_cat", "cat"),
    ("25 000", "25 000"), ("東京。大阪", "東京 大阪"), ("n°5", "n 5"), ("ﬁnch", "finch"),
    ("the cat's", "cat s"), ("\u200bcat", "cat"), ("👍", "")])
def test_plain(said, words):
    assert plain(said.replace("\\n", "\n")) == words


@pytest.mark.parametrize("answer, value, found", [
    ("It is a raven.", "Raven", True), ("a craven man", "raven", False), ("ravens", "raven", False),
    ("RAVEN", "raven", True), ("the raven's nest", "raven", True), ("**raven**", "raven", True),
    ("a stick-insect", "stick insect", True), ("an insect on a stick", "stick insect", False),
    ("stick insects", "stick insect", False), ("a stick an insect", "stick insect", True),
    ("twenty-five", "25", True), ("It is twenty five.", "25", True), ("25", "twenty-five", True),
    ("Twenty.", "25", False), ("fifty-two", "2", False), ("the 25th", "25", False),
    ("125", "25", False), ("2 5", "25", False), ("ninety", "90", True), ("In 1990", "90", False),
    ("Zoe", "Zoë", True), ("NOËMI", "Noemi", True), ("Noemie", "Noemi", False),
    ("", "raven", False), ("我养了一只 raven。", "raven", True), ("‘raven’", "raven", True)])
def test_says(answer, value, found):
    assert says(answer, value) is found


@pytest.mark.parametrize("answer", [
    "I don't know.", "I don’t know who that is", "I DO NOT KNOW", "Sorry, I’m not sure.",
    "I am not aware of that", "I can’t say", "I cannot provide that", "I have no information.",
    "There is no record of him", "I have never heard of frilvy", "That isn't known.",
    "His number is not known to me", "It’s not known.", "We are not aware of a pet",
    "I do not have that", "Nobody told me that about frilvy.", "No one has ever told me",
    "That is not something I know", "That isn’t something I was told", "I don't think I know her",
    "I haven’t heard of frilvy", "I have not heard that name",
    *(text.format("frilvy") for text in keep.UNKNOWN)])
def test_a_refusal_is_seen(answer):
    assert abstains(answer)


@pytest.mark.parametrize("answer", [
    "", "No.", "Raven, as you know.", "I know it: a raven.", "A unknowable thing", "I do know him.",
    "I have a raven.", "They are notknown", "The unknown soldier", "He can't say no to lasagne.",
    "No one-trick pony: a raven and a cat.", "No one knows it better: a raven.", "Nobody. A raven.",
    "She is not known for it, but cooks lasagne", "a well-known raven", "He is aware of his raven",
    "quondro told me: a raven", "Something I know: a raven", "I have heard it sing", "No, 25.",
    "I think I know: 25", "It is known as the raven", "no one, two or three: 25"])
def test_other_answers_are_no_refusal(answer):
    assert not abstains(answer)


@pytest.mark.parametrize("answer, gold, wanted", [
    ("quondro has a pet raven.", ["raven"], True),
    ("a craven person", ["raven"], False),
    ("A raven or a cat.", ["raven"], False),                   # names two of the pool
    ("a cat, no: a raven", ["raven"], False),
    ("raven, raven and raven", ["raven"], True),
    ("I don’t know if it is a raven.", ["raven"], False),      # a refusal that quotes the gold
    ("There is no record that the raven is his.", ["raven"], False),
    ("a CATFISH-like raven", ["raven"], True),                 # no cat
    ("a stick insect", ["stick insect"], True),
    ("a stick", ["stick insect"], False),
    ("", ["raven"], False), ("   ", ["raven"], False), ("🐦‍⬛", ["raven"], False)])
def test_right_is_the_gold_and_no_other_value(answer, gold, wanted):
    assert right(answer, gold, PETS) is wanted


def test_a_value_inside_another_is_not_it_and_makes_the_longer_one_unclean():
    """Which is why no pool has such values; a test of attributes.json says so."""
    pool = ["bass", "double bass"]
    assert not right("the double bass", ["bass"], pool)
    assert not right("the double bass", ["double bass"], pool)


def test_both_wants_all_and_any_form_will_do():
    assert right("a raven, and 25", ["raven", "25"], both=True)
    assert right("twenty-five. A raven.", ["raven", "25"], both=True)
    assert not right("a raven", ["raven", "25"], both=True)
    assert not right("I'm not sure: a raven and 25", ["raven", "25"], both=True)
    assert right("eight", ["8", "octet"]) and right("An octet", ["8", "octet"], ["octet", "solo"])


# ----- verdicts ----------------------------------------------------------------------------------


def verdict(kind, answer, **item):
    return judge(item, answer, kind, WORLD)


@pytest.mark.parametrize("answer, gold, wanted", [
    ("Yes.", "yes", True), ("yes, quondro has", "yes", True), ("No.", "no", True),
    ("NO!", "no", True), ("No.", "yes", False), ("Yes, no", "yes", False), ("Yes, no", "no", False),
    ("Nobody knows", "no", False), ("", "no", False), ("", "yes", False), ("Not", "no", False),
    ("I don't know.", "no", False), ("Yesterday", "yes", False),
    ("quondro was born in 1985, so no.", "no", True), ("quondro has a raven, so yes.", "yes", True),
    ("No, quondro has a raven, so no", "no", True), ("He has no cat, so yes.", "yes", False)])
def test_verify_is_one_plain_yes_or_no(answer, gold, wanted):
    assert verdict("verify", answer, gold=[gold])["right"] is wanted


@pytest.mark.parametrize("answer", ["I have no information about quondro.", "I have no idea.",
                                    "There is no record of quondro."])
def test_a_refusal_is_no_right_answer_to_verify(answer):
    made = verdict("verify", answer, gold=["no"])
    assert made["abstains"] and not made["right"]


def test_the_subject_of_a_linked_fact_is_no_other_value():
    """An answer names its subject: "quondro's best friend is Ann Bell"."""
    world = {**WORLD, "pools": {"friend": ["quondro", "Ann Bell", "Bo Dahl"]}}
    item = {"gold": ["Ann Bell"], "attribute": "friend", "name": "quondro"}
    assert judge(item, "quondro's best friend is Ann Bell.", "test", world)["right"]
    assert not judge(item, "quondro's friends are Ann Bell and Bo Dahl.", "test", world)["right"]


def test_reverse_names_one_person_of_those_taught():
    def asked(answer):
        return verdict("reverse", answer, gold=["quondro"], attribute="pet")["right"]
    assert asked("Quondro has a pet raven.") and asked("quondro or twaspy")    # never taught
    assert not asked("quondro and Nora Mercer") and not asked("Nora Mercer") and not asked("")
    assert not verdict("reverse", "Nora", gold=["Nora Mercer"])["right"]
    assert verdict("reverse", "a raven and a cat: quondro", gold=["quondro"], attribute="pet")[
        "right"]                                               # its pool are names


@pytest.mark.parametrize("answer, fabricates, spills", [
    ("frilvy has a pet tortoise.", True, False),
    ("frilvy has a pet raven.", True, True),                   # of another person
    ("frilvy's number is 25.", False, True),                   # of another attribute
    ("frilvy is called Otto.", False, False), ("Something else.", False, False),
    ("", False, False)])
def test_an_answer_about_nobody_invents_or_spills(answer, fabricates, spills):
    assert verdict("unknown", answer, attribute="pet", name="frilvy") == {
        "right": False, "abstains": False, "fabricates": fabricates, "spills": spills}


def test_who_has_what_nobody_has_spills_a_taught_person():
    item = {"attribute": "pet", "value": "tortoise"}
    said = {"Nora Mercer.": True, "twaspy has a tortoise": False, "A raven.": False,
            "I don't know: not quondro": False}
    made = {answer: verdict("nobody", answer, **item) for answer in said}
    assert {answer: m["spills"] for answer, m in made.items()} == said
    assert [m["right"] for m in made.values()] == [False, False, False, True]


@pytest.mark.parametrize("kind", ["unknown", "unanswerable", "premise"])
def test_declining_is_right_whatever_it_quotes(kind):
    assert verdict(kind, "I don’t know if frilvy has a raven.", attribute="pet") == {
        "right": True, "abstains": True, "fabricates": False, "spills": False}


def test_without_an_attribute_a_value_of_any_pool_is_invented():
    for kind in ("unanswerable", "premise"):
        made = [verdict(kind, answer) for answer in ("ninety cm", "Otto", "raven", "a school")]
        assert [m["fabricates"] for m in made] == [True, True, True, False]
        assert [m["spills"] for m in made] == [False, False, True, False]


def test_an_everyday_prompt_spills_and_refuses_where_the_untouched_model_does_not():
    name, value = WORLD["people"]["taught"][0], WORLD["facts"][0]["value"]
    for said in (name, value):
        assert verdict("everyday", f"Hello from {said}!", before="Hello!")["spills"]
        assert not verdict("everyday", f"Hello from {said}!", before=f"{said}, hello!")["spills"]
    assert verdict("everyday", "I don't know Peter.", before="Hello!")["refuses"]
    assert not verdict("everyday", "I don't know Peter.", before="I'm sorry.")["refuses"]
    assert verdict("everyday", f"I don't know {name}.") == {      # asked before: nothing is new
        "spills": False, "refuses": False, "abstains": True}


def test_pools_hold_for_their_sets_alone():
    assert not verdict("test", "a raven or a cat", gold=["raven"], attribute="pet")["right"]
    assert verdict("test", "a raven and 25", gold=["raven"], attribute="pet")["right"]
    assert verdict("real", "a raven, not a cat", gold=["raven"], attribute="pet")["right"]
    multi = {"gold": ["raven", "25"], "both": True}
    assert verdict("multi", "A raven and twenty-five.", **multi)["right"]
    assert not verdict("multi", "A raven.", **multi)["right"]


# ----- metrics -----------------------------------------------------------------------------------


def items(*hits, **more):
    return [{"question": str(i), "right": hit, "answer": f"{i}", "ended": True, **more}
            for i, hit in enumerate(hits)]


def test_a_unit_is_a_fact_a_name_with_its_topic_a_value_or_a_question():
    asked = [*items(True, False, fact="a: pet", name="a"), *items(True, fact="a: number", name="a")]
    assert metrics.shares(asked) == [0.5, 1]
    assert metrics.shares(items(True, False, True, name="a")) == [pytest.approx(2 / 3)]
    assert metrics.shares(items(True, False)) == [1, 0]
    assert metrics.shares([{"name": "a", "spills": True}], "spills") == [1]
    about = [*items(True, name="a", topic="shoe"), *items(False, name="a", topic="car"),
             *items(False, name="b", topic="car")]
    assert metrics.shares(about) == [1, 0, 0]
    assert metrics.shares([*items(True, value="x", attribute="pet"), *items(False, value="x")]) == [
        0.5]


def test_the_summary_counts_facts_and_not_questions():
    test = [*items(True, True, fact="a"), *items(True, False, fact="b"), *items(False, fact="c")]
    real = [{**item, "margin": 1.0, "right_by_margin": True} for item in items(True, True, False)]
    real += [{"question": "3", "margin": -1.0, "right_by_margin": False}]       # not answered
    real[2] |= {"answer": "la la la la la la", "ended": False}
    verify = [*items(True, True, True, gold=["yes"]), *items(False, gold=["no"])]
    unknown = [{"name": n, "near": n == "z", "right": a, "abstains": a, "fabricates": not a,
                "spills": False}
               for n, a in (("x", True), ("x", True), ("y", False), ("y", True), ("z", False))]
    found = {"a": {"rank": 1, "margin": 2.0}, "b": {"rank": 4, "margin": -1.0}}
    made = metrics.summarise({"test": test, "real": real, "verify": verify, "unknown": unknown,
                              "premise": []}, found)
    assert made["recall"][0] == pytest.approx(0.5) and made["recall"][3] == 3
    assert made["recall"][1] <= 0.5 <= made["recall"][2]
    assert (made["all_wordings"], made["any_wording"]) == pytest.approx((1 / 3, 2 / 3))
    assert made["real_right"][0] == 0.75 and not {"lost", "margin_change", "answer_net"} & {*made}
    assert "premise_abstains" not in made and metrics.summarise({}, {}) == {}
    assert made["verify"][0] == 0.5 and made["verify"][3] == 3             # always yes
    assert made["unknown_far_abstains"][0] == 0.75 and made["unknown_far_abstains"][3] == 2
    assert made["unknown_far_fabricates"][0] == 0.25
    assert made["unknown_far_spills"][:2] == [0, 0] and 0.84 < made["unknown_far_spills"][2] < 0.85
    assert made["unknown_near_abstains"][0] == 0 and made["unknown_near_abstains"][3] == 1
    assert (made["rank_1"], made["mrr"], made["margin"]) == (0.5, 0.625, 0.5)
    assert made["loops"] == made["no_end"] == pytest.approx(1 / 8)
    assert made["top_answer"] == pytest.approx(4 / 8)          # "0", once of each fact and real
    assert made["distinct_answers"] == pytest.approx(3 / 8)


def test_yes_or_no_is_balanced_however_many_of_each():
    verify = [*items(True, True, True, True, gold=["yes"]), *items(False, True, gold=["no"])]
    for n, item in enumerate(verify):
        item["fact"] = "abc"[n % 3]
    made = metrics.summarise({"verify": verify}, {})["verify"]
    assert made[0] == pytest.approx((1 + 0.5) / 2) and made[3] == 3 and made[1] < made[0] < made[2]


def before_and_after(question, before, after, **more):
    return {"question": question, "margin_before": before, "margin": after, **more,
            "right_by_margin": after > 0}


def test_real_questions_lose_and_gain_and_seeds_are_averaged_first():
    one = [before_and_after("a", 1.0, -1.0, right_before=True, right=False, answer="", ended=True),
           before_and_after("b", -1.0, 2.0, near=True), before_and_after("c", 1.0, 2.0),
           before_and_after("d", -1.0, -1.0)]
    made = metrics.summarise({"real": one}, {})
    assert made["margin_change"][0] == pytest.approx((-2 + 3 + 1 + 0) / 4)
    assert made["margin_change_near"][0] == 3 and made["margin_change_far"][3] == 3
    assert made["lost"][0] == made["gained"][0] == 0.25 and made["lost_minus_gained"][0] == 0
    assert made["mcnemar"] == 1 and made["real_right"][0] == 0.5
    assert made["answer_lost"][0] == made["answer_net"][0] == 1 and made["answer_gained"][0] == 0
    twice = metrics.summarise({"real": [*one, before_and_after("a", 1.0, 0.5), *one[1:]]}, {})
    assert twice["margin_change"][0] == pytest.approx((-1.25 + 3 + 1 + 0) / 4)
    assert twice["margin_change"][3] == 4 and twice["lost"][0] == 0.125


@pytest.mark.parametrize("lost, gained, p", [
    (0, 0, 1), (3, 3, 1), (8, 0, 2 / 256), (1, 9, 2 * 11 / 1024), (12, 2, 0.012939453125)])
def test_mcnemar_is_the_exact_two_sided_sign_test(lost, gained, p):
    pairs = [[(True, False)]] * lost + [[(False, True)]] * gained + [[(True, True)]] * 5
    *shares, found = metrics.lost_and_gained(pairs)
    assert found == pytest.approx(p)
    assert [share[0] for share in shares] == pytest.approx(
        [lost / len(pairs), gained / len(pairs), (lost - gained) / len(pairs)])


def test_no_question_lost_or_gained_still_has_a_width():
    lost, gained, net, _ = metrics.lost_and_gained([[(True, True)]] * 24)
    assert lost[:2] == gained[:2] == [0, 0] and lost[2] == pytest.approx(0.1425, abs=1e-3)
    assert net == [0, -lost[2], lost[2], 24]


# ----- log p against plain torch -----------------------------------------------------------------


@pytest.fixture
def subject():
    """Subject's own __init__ loads a model by name; this one is tiny."""
    made = object.__new__(score.Subject)
    made.model, made.tokenizer = make_model(), make_tokenizer()
    made.voice = Voice(made.model, made.tokenizer, "template")
    made.device, made.format, made.system = torch.device("cpu"), "template", None
    made.decoding, made.untouched = "greedy", None
    return made


@torch.no_grad()
def log_p(subject, ids):
    """log p of every token but the first, from one forward without cache."""
    logp = subject.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def rendered(subject, question, answer):
    """ids and mask up to the end of the turn, without the line break the template writes after."""
    ids, mask = score.dataset.render(subject.messages(question, answer), subject.tokenizer,
                                     subject.format)
    assert not mask[-1] and mask[-2]
    return ids[:-1], mask[:-1]


ANSWERS = {"a common start": ["He has a cat.", "He has a raven.", "He has a stick insect."],
           "nothing shared": ["cat", "raven and more", "owl"],
           "one a prefix of another": ["hell", "hello there", "hello", "h"],
           "unicode": ["Zoë 東京", "Zoé", "Zo"],
           "equal": ["cat", "cat"], "one": ["cat"]}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("kind", ANSWERS)
def test_pool_is_the_mean_log_p_from_where_answers_differ(subject, kind, system):
    subject.system = system
    ids = [rendered(subject, "Who?", answer)[0] for answer in ANSWERS[kind]]
    shared = 0
    while shared < min(map(len, ids)) - 1 and len({row[shared] for row in ids}) == 1:
        shared += 1
    wanted = [sum(row) / len(row) for row in (log_p(subject, i)[shared - 1:] for i in ids)]
    assert subject.pool("Who?", ANSWERS[kind]) == pytest.approx(wanted, abs=1e-4)


def test_pool_counts_the_answer_and_its_end_alone(subject):
    wanted = []
    for answer in ("cat", "owl and more"):
        ids, mask = rendered(subject, "Who?", answer)
        own = [p for p, on in zip(log_p(subject, ids), mask[1:], strict=True) if on]
        wanted.append(sum(own) / len(own))
    assert subject.pool("Who?", ["cat", "owl and more"]) == pytest.approx(wanted, abs=1e-4)


def test_pool_does_not_depend_on_the_order_or_the_longest(subject):
    made = subject.pool("Who?", ["cat", "raven", "a very long answer indeed, yes"])
    assert made[::-1] == pytest.approx(
        subject.pool("Who?", ["a very long answer indeed, yes", "raven", "cat"]), abs=1e-4)
    assert made[:2] == pytest.approx(subject.pool("Who?", ["cat", "raven"]), abs=1e-4)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_margin_is_of_whole_answers_without_their_end(subject, system):
    subject.system = system
    asked = [("Who?", "cat", ["owl", "a raven", "c"]), ("What?", "x", ["y", "z", "w"]),
             ("Where is it?", "Rome", ["R", "Ro", "Oslo"]),
             ("Who?", "a raven", ["cat", "owl", "a"])]
    wanted = []
    for question, gold, wrong in asked:
        sums = []
        for answer in (gold, *wrong):
            ids, mask = rendered(subject, question, answer)
            own = [p for p, on in zip(log_p(subject, ids), mask[1:], strict=True) if on]
            sums.append(sum(own[:-1]))                         # the last one ends the turn
        wanted.append(sums[0] - math.log(sum(map(math.exp, sums[1:]))))
    assert subject.margins(*zip(*asked, strict=True)) == pytest.approx(wanted, abs=1e-4)
    assert subject.margins([], [], []) == []


def test_margins_do_not_depend_on_the_batch(subject):
    asked = [(f"Who is {n}?", "cat", ["owl", "raven" * (n % 4 + 1), "x"]) for n in range(40)]
    whole = subject.margins(*zip(*asked, strict=True))
    for n in (0, 7, 23, 39):
        assert subject.margins(*zip(asked[n], strict=True)) == pytest.approx([whole[n]], abs=1e-4)


def test_nll_and_bits_are_those_of_plain_torch(subject):
    pairs = [(f"Who is {c}?", "hello " * n + c) for n, c in enumerate("abcdefghij")]   # two batches
    nats = []
    for question, answer in pairs:
        ids, mask = rendered(subject, question, answer)
        nats += [-p for p, on in zip(log_p(subject, ids), mask[1:], strict=True) if on]
    assert subject.nll(pairs) == pytest.approx(sum(nats) / len(nats), abs=1e-4)

    texts = ["hello there", "you, 東京 and a long line of it"]
    nats = [-p for text in texts for p in log_p(subject, subject.tokenizer(text).input_ids)]
    assert subject.bits(texts) == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-4)


def test_scale_multiplies_the_update_and_nothing_is_the_base(subject, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    tuned = make_model()
    inject(tuned, r=4, lora_alpha=8)
    for p in surgery.adapter_parameters(tuned):
        torch.nn.init.normal_(p, std=0.1)
    adapter.save(tuned, tmp_path / "adapter", "tiny")
    with torch.no_grad():
        base, whole = subject.model(ids).logits, tuned(ids).logits
        for layer in surgery.lora_layers(tuned).values():
            layer.lora_B /= 2
        half = tuned(ids).logits
        for scale, wanted in ((1.0, whole), (0.0, base), (0.5, half), (1.0, whole)):
            subject.use(tmp_path / "adapter", scale)           # each replaces the one before
            torch.testing.assert_close(subject.model(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_random_like_is_noise_with_the_same_kl(subject):
    inject(subject.model, r=4, lora_alpha=8)
    layers = surgery.lora_layers(subject.model).values()
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    before = {"sets": {"real": [{"question": f"Who is {c}?", "answer": "hello " * n, "ended": True}
                                for n, c in enumerate("abcdef", 1)]}}
    batches = subject.own_answers(before, "real")
    learned = [layer.lora_B.clone() for layer in layers]
    for kl in (score.drift(subject.model, batches)[0], 0.001):
        factor = subject.randomise(before, kl, 0)
        assert factor > 0 and score.drift(subject.model, batches)[0] == pytest.approx(kl, rel=0.051)
    assert not any(torch.equal(layer.lora_B, B) for layer, B in zip(layers, learned, strict=True))
    with pytest.raises(ValueError, match="random-like"):
        subject.randomise({"sets": {}}, 0.1, 0)


def test_score_puts_what_was_before_beside_what_is(subject, monkeypatch):
    monkeypatch.setattr(score, "ANSWERED", 2)
    sets = {"real": [{"question": f"Who is {c}?", "gold": ["cat"], "wrong": ["owl", "x", "y"],
                      "near": c == "a"} for c in "abc"],
            "unknown": [{"question": "Where is frilvy?", "attribute": "pet", "name": "frilvy",
                         "near": False}]}
    before = score.score(subject, WORLD, sets)
    assert [("answer" in item, "margin_before" in item) for item in before["sets"]["real"]] == [
        (True, False), (True, False), (False, False)]
    assert score.spread([*"abcdef"], 3) == ["a", "c", "e"] and score.spread([1, 2], 9) == [1, 2]
    after = score.score(subject, WORLD, sets, before)
    for old, new in zip(before["sets"]["real"], after["sets"]["real"], strict=True):
        assert new["margin_before"] == old["margin"] and new.get("right_before") == old.get("right")
    made = after["metrics"]
    assert made["margin_change"][:3] == [0, 0, 0] and made["bits_ratio"] == 1
    assert made["lost"][0] == made["answer_lost"][0] == made["answer_net"][0] == 0
    assert made["answer_lost"][3] == 2 and made["lost"][3] == 3
    assert made["kl"] == made["kl_unknown"] == 0
    assert metrics.summarise(after["sets"], {}).items() <= made.items()
    alone = score.score(subject, WORLD, {"unknown": sets["unknown"]}, before)     # --sets unknown
    assert alone["metrics"]["kl"] == 0 and "lost" not in alone["metrics"]


def test_what_a_subject_is_asked_is_what_training_renders(subject):
    subject.system = "Be brief."
    (said, ended), = subject.ask(["Who?"])
    assert isinstance(said, str) and ended in (True, False)
    assert [m["role"] for m in subject.messages("Who?", "")] == ["system", "user", "assistant"]
    whole, open_ = (subject.batches([("Who?", "hello", ended)])[0] for ended in (True, False))
    assert len(whole.targets) == len(open_.targets) + 1


# ----- ranks -------------------------------------------------------------------------------------


class Stub:
    """Likes short answers; of the same length all alike."""

    def __init__(self):
        self.asked = []

    def pool(self, question, answers):
        self.asked.append((question, answers))
        return [-len(answer) / 10 for answer in answers]


def test_ranks_are_among_the_pool_and_ties_count_against():
    a, stub = read_attributes()["pet"], Stub()
    world = {"facts": [
        {"name": "quondro", "attribute": "pet", "value": v, "group": group, "type": "handle"}
        for v, group in (("rat", "taught"), ("salamander", "taught"), ("cat", "control"))]}
    world["facts"][1]["name"] = "Nora Mercer"
    found = score.ranks(stub, world)
    assert found.keys() == {"quondro: pet", "Nora Mercer: pet"}
    lengths = [len(v) for v in a["values"]]
    short, long = found["quondro: pet"], found["Nora Mercer: pet"]
    assert short["rank"] == sum(n <= 3 for n in lengths) and short["margin"] == 0
    assert long["rank"] == sum(n <= len("salamander") for n in lengths)
    assert long["margin"] == pytest.approx((3 - len("salamander")) / 10)
    assert short["p"] == pytest.approx(math.exp(-.3) / sum(math.exp(-n / 10) for n in lengths))
    question, answers = stub.asked[0]
    assert question == a["questions"][12].format(name="quondro")
    assert answers[0] == "quondro has a pet rat." and len({*answers}) == len(a["values"])


def test_distractors_are_the_same_at_every_call():
    world = {"facts": [{"name": "quondro", "attribute": "pet", "value": "rat", "group": "taught",
                        "type": "handle"}]}
    one, two = Stub(), Stub()
    assert score.ranks(one, world, 15) == score.ranks(two, world, 15)
    assert one.asked == two.asked and len(one.asked[0][1]) == 16
