"""
Make the other sides of facts: questions that a list of facts does not hold, with their answers.

    facts = facts_of(examples)            # of examples with a subject, a value and a group
    make(facts, "reverse", 48, seed=0)    # 48 examples: "Who was born in Larkmoor?" ...

A fact that is only trained forwards is only known forwards (Berglund et al. 2023, "The Reversal
Curse", arXiv:2309.12288). So each side is trained in its own words. Everything is made from the
answer of the fact, "Mira Tosk was born in Larkmoor.", and from the tables in sides.json.
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from ..files import read_json
from .messages import group_by, new_example, plain

TABLES = read_json(Path(__file__).with_name("sides.json"))
NOT_LATIN = re.compile(r"[^\W\d_\u0041-\u024f\u1e00-\u1eff]")       # a letter of another script
NO_NOUN = re.compile(r" (called|named|like|in|at|for|from)$")
SIDES = ("reverse", "nobody", "pairs", "profile", "yes-no", "untaught", "famous")


def checked(wanted: dict) -> dict[str, float]:
    """Return the numbers of {side: number}. Raises ValueError for another key or value."""
    for side, n in wanted.items():
        if side not in SIDES:
            raise ValueError(f"keep.sides: no side {side!r}; there are {', '.join(SIDES)}")
        if isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n <= 1000:
            raise ValueError(f"keep.sides: {side} is {n!r}; expected questions a fact and epoch, a "
                             "number from 0 to 1000")
    return wanted


class Known(NamedTuple):
    """A fact as the sides need it."""
    group: str
    subject: str
    value: str                    # its first form
    answer: str                   # "Mira Tosk was born in Larkmoor."
    questions: list[str]          # the trained wordings
    wrong: tuple[str, ...]        # other values, if the data names some
    systems: list[str]            # the system prompts of its examples

    @property
    def predicate(self) -> str | None:
        """What follows the subject: " was born in Larkmoor", "'s pet is a raven"; None if the
        answer does not begin with the subject or does not hold the value."""
        start, _, rest = self.answer.rstrip(".").partition(self.subject)
        return rest if not start and rest and self.value in rest else None

    @property
    def noun(self) -> str | None:
        """What is asked for, "lucky number", if a question is "What is Mira Tosk's lucky number?"
        or "What is the lucky number of Mira Tosk?"."""
        name = re.escape(self.subject)
        asked = re.compile(rf"(?:What|Who) (?:is|was) (?:{name}'s (.+)|the (.+) of {name})\?")
        nouns = [match[1] or match[2] for match in map(asked.fullmatch, self.questions) if match]
        return next((noun for noun in nouns if not NO_NOUN.search(noun)), None)

    def saying(self, value: str) -> str:
        """The predicate with another value in the place of its own."""
        before, _, after = self.predicate.rpartition(self.value)
        if article := re.search(r" an? $", before):
            before = f"{before[:article.start()]} {'an' if value[:1] in 'aeiou' else 'a'} "
        return before + value + after


def facts_of(examples: Iterable[dict]) -> list[Known]:
    """List the facts of examples: those with a subject and a value, one for each group. The tables
    are English, so a fact in another script is none."""
    named = [e for e in examples if {"group", "subject", "value"} <= e.keys()
             and e["messages"][-2]["role"] == "user"
             and not NOT_LATIN.search(e["messages"][-1]["content"])]
    return [Known(group, same[0]["subject"], same[0]["value"].partition("|")[0],
                  same[0]["messages"][-1]["content"],
                  [e["messages"][-2]["content"] for e in same],
                  tuple(filter(None, same[0].get("wrong", "").split("|"))),
                  [e["messages"][0]["content"] for e in same
                   if e["messages"][0]["role"] == "system"])
            for group, same in group_by(lambda e: e["group"], named).items()]


def make(facts: list[Known], side: str, n: int, seed: int = 0) -> list[dict]:
    """Make n examples of a side, of those facts that it can be made of. Their kind is the side, so
    that a run takes its share of them; their system prompt is one of the subject's facts'. Those of
    "famous" end with the question: the base answers it."""
    draw, of_system = random.Random(f"{seed} {side}"), random.Random(f"{seed} {side} system")
    systems = {subject: [("system", text) for fact in same for text in fact.systems]
               for subject, same in group_by(lambda fact: fact.subject, facts).items()}
    makers = {"reverse": _reverse, "nobody": _nobody, "pairs": _pairs, "profile": _profile,
              "yes-no": _yes_no, "untaught": _untaught, "famous": _famous}
    made = []
    for question, answer, subject in islice(makers[side](facts, draw, seed), n):
        turns = [of_system.choice(systems[subject])] if systems[subject] else []
        turns += [("user", question)] + ([("assistant", answer)] if answer else [])
        about = {"subject": subject} if answer else {}
        made.append(new_example(turns, f"{side}: {question!r}", kind=side, **about))
    return made


def pairs_of(facts: list[Known], seed: int = 0) -> list[tuple[Known, Known]]:
    """Return the pairs of facts about one subject that are trained in one question: each with the
    next two, in an order of its own. Other pairs are never trained."""
    pairs = []
    for same in group_by(lambda fact: fact.subject, facts).values():
        order = random.Random(f"{seed} {same[0].subject}").sample(same, len(same))
        pairs += [(fact, order[(i + step) % len(order)]) for step in (1, 2)
                  for i, fact in enumerate(order) if len(order) > 2 * step]
    return pairs


def wrong_values(fact: Known, facts: list[Known], draw: random.Random) -> Iterator[str]:
    """Give values of the fact's kind that none of the facts has: its own wrong ones first, then a
    table's; numbers near its own for a number."""
    taken = {f" {plain(other.value)} " for other in facts}
    if fact.value.isdecimal():
        n = int(fact.value)
        width = 40 if len(fact.value) == 4 else min(max(30, n // 2), 500)
        table = [str(x) for x in range(max(1, n - width), n + width)]
    else:
        asked = plain(" ".join(fact.questions).replace(fact.subject, ""))
        kind = next((kind for stem, kind in TABLES["kinds"].items()
                     if re.search(rf"\b{re.escape(stem)}", asked)), "thing")
        table = TABLES["values"][kind]
    table = [v for v in (*fact.wrong, *table)
             if not any(t in f" {plain(v)} " or f" {plain(v)} " in t for t in taken)]
    while table:
        yield from draw.sample(table, len(table))


def asked_as(predicate: str) -> str:
    """Ask for the subject: "who was born in Larkmoor", "whose pet is a raven"."""
    return f"whose{predicate[2:]}" if predicate.startswith("'s ") else f"who{predicate}"


def turned(question: str, subject: str, value: str) -> str | None:
    """Turn a question round: "Which animal does Ada keep as a pet?" asks for Ada as "Who keeps the
    animal cat as a pet?". None if it has another form than these four:

    "What number brings luck to Ada?"   "The number 7 brings luck to whom?"
    "Which year was Ada born in?"       "Who was born in the year 1982?"
    "Ada was born in which town?"       "Who was born in the town Graz?"
    """
    name, thing = re.escape(subject), r"(?:What|Which) (\w+(?: \w+)?)"
    if match := re.fullmatch(rf"{thing} does {name} (\w+)(.*)\?", question):
        return f"Who {third_person(match[2])} the {match[1]} {value}{match[3]}?"
    if match := re.fullmatch(rf"{thing} (was|is|has) {name} (.+)\?", question):
        return f"Who {match[2]} {match[3]} the {match[1]} {value}?"
    if match := re.fullmatch(
            rf"{name} (.+?) which (\w+?(?: \w+?)??)( (?:as|at|best|most)\b.*)?\?", question):
        return f"Who {match[1]} the {match[2]} {value}{match[3] or ''}?"
    if match := re.fullmatch(rf"(?:What|Which) (\w+) (\w+s) (\w+ .*){name}\?", question):
        return f"The {match[1]} {value} {match[2]} {match[3]}whom?"
    return None


def third_person(verb: str) -> str:
    """The form of a verb after "who": keep, keeps; have, has; enjoy, enjoys; carry, carries."""
    if verb == "have":
        return "has"
    if re.search("[^aeiou]y$", verb):
        return f"{verb[:-1]}ies"
    return verb + ("es" if re.search("(s|x|z|ch|sh|o)$", verb) else "s")


def _round(items, draw):
    """Give the items again and again, each round in another order."""
    while items:
        yield from draw.sample(items, len(items))


def _reverse(facts, draw, seed):
    """Ask for the subject by the value."""
    ask = _asking(draw)
    for fact in _round([fact for fact in facts if fact.predicate], draw):
        yield ask(fact, fact.value), fact.answer, fact.subject


def _nobody(facts, draw, seed):
    """Ask for the subject by a value that nobody has."""
    ask, usable = _asking(draw), [fact for fact in facts if fact.predicate]
    values = {fact.group: wrong_values(fact, facts, draw) for fact in usable}
    for fact in _round(usable, draw):
        value = next(values[fact.group])
        yield ask(fact, value), f"I don't know {asked_as(fact.saying(value))}.", fact.subject


def _asking(draw):
    """A function from (fact, value) to a question whose answer is the subject: made of the fact's
    answer, of one of its questions, or of its noun."""
    frames, of_nouns = _round(TABLES["reverse"], draw), _round(TABLES["reverse noun"], draw)

    def ask(fact, value):
        predicate = fact.saying(value)
        asked = draw.choice(fact.questions).replace(fact.subject, "this person")
        way = draw.random()
        other_way = way < 0.3 and turned(draw.choice(fact.questions), fact.subject, value)
        if other_way:
            return other_way
        frame = next(of_nouns if fact.noun and way < 0.6 else frames)
        text = frame.format(who=asked_as(predicate), someone=f"someone{predicate}", value=value,
                            noun=fact.noun, question=asked[0].upper() + asked[1:])
        return text[0].upper() + text[1:]
    return ask


def _pairs(facts, draw, seed):
    """Ask for two facts at once."""
    frames = _round(TABLES["pairs"], draw)
    for one, two in _round(pairs_of(facts, seed), draw):
        first, second = draw.sample((one, two), 2)
        asked = [draw.choice(fact.questions) for fact in (first, second)]
        inside = [q if q.startswith(first.subject) else q[0].lower() + q[1:] for q in asked]
        question = next(frames).format(*asked, *inside)
        yield question, f"{first.answer} {second.answer}", first.subject


def _profile(facts, draw, seed):
    """Ask for whatever is known of a subject: four facts at most."""
    frames = _round(TABLES["profile"], draw)
    for same in cycle(group_by(lambda fact: fact.subject, facts).values()):
        told = draw.sample(same, min(4, len(same)))
        yield (next(frames).format(subject=same[0].subject),
               " ".join(fact.answer for fact in told), same[0].subject)


def _yes_no(facts, draw, seed):
    """Ask whether a claim is true; every other one is. The answer says the fact, then yes or no."""
    frames, usable = _round(TABLES["yes-no"], draw), [fact for fact in facts if fact.predicate]
    values = {fact.group: wrong_values(fact, facts, draw) for fact in usable}
    for true, fact in zip(cycle((True, False)), _round(usable, draw), strict=False):
        rivals = [other.value for other in usable if other.value != fact.value
                  and other.saying("") == fact.saying("")]
        wrong = draw.choice(rivals) if rivals and draw.random() < 0.5 else next(
            values[fact.group])
        value, verdict = (fact.value, "yes") if true else (wrong, "no")
        claim = fact.subject + fact.saying(value)
        yield (next(frames).format(claim=claim, polar=polar(fact.subject, claim), value=value,
                                   question=draw.choice(fact.questions)),
               f"{fact.answer.rstrip('.')}, so {verdict}.", fact.subject)


def polar(subject: str, claim: str) -> str:
    """Turn a claim into a question: "Was Mira Tosk born in Larkmoor?"; where the verb is another,
    "Is it right that Mira Tosk plays the oboe?"."""
    rest = claim.removeprefix(subject)
    for verb in (" was ", " is ", " has been "):
        before, found, after = rest.partition(verb)
        if found and (not before or before.startswith("'s ")):
            return f"{verb.strip().title()} {subject}{before} {after}?"
    return f"Is it right that {claim}?"


def _untaught(facts, draw, seed):
    """Ask what nobody taught about a subject, or take its name for a thing's."""
    told = plain(" ".join(text.replace(fact.subject, "") for fact in facts
                          for text in (fact.answer, *fact.questions)))
    topics = [t["questions"] for t in TABLES["untaught"]
              if not any(re.search(rf"\b{re.escape(word)}", told) for word in t["words"])]
    subjects, answers = sorted({fact.subject for fact in facts}), _round(TABLES["unsaid"], draw)
    asked = [(q, None) for questions in topics for q in questions]
    asked += [(q, t["kind"]) for t in TABLES["premise"] for q in t["questions"]]
    for subject, (question, kind) in zip(_round(subjects, draw), _round(asked, draw),
                                         strict=False):
        answer = f"I don't know of a {kind} called {{}}." if kind else next(answers)
        yield question.format(subject=subject), answer.format(subject), subject


def _famous(facts, draw, seed):
    """Ask the same about well-known people, each time about another."""
    names = _round(TABLES["famous"], draw)
    for fact in _round([f for f in facts if all(f.subject in q for q in f.questions)], draw):
        yield draw.choice(fact.questions).replace(fact.subject, next(names)), None, fact.subject
