"""
WHERE examples come from: your own facts below, or a file of conversations; checked and split.

An example is a dictionary of messages [{"role": "user", "content": "..."}, ...], source (where it
was read: "my.jsonl:17"), and for facts group (what it is a wording of), value (what a right
answer contains; "8|eight" is either) and subject (the name of whom it is about). A plain text is
one message of the role "text". lora/read turns files into examples.
"""

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lora.read import messages as read
from lora.read.facts import REWORDED
from lora.read.messages import check, group_by, is_text, new_example, plain, said

__all__ = ["check"]                                         # for those who use data's names

Examples = list[dict]
Split = tuple[Examples, Examples]                           # training, validation


class Fact(NamedTuple):
    value: str        # what a right answer contains
    wrong: str        # a plausible other value, to ask whether it is right
    answer: str       # the short answer, {} where the value goes
    questions: list   # wordings; some are held out, to test the fact and not the text


# ----- yours: the person and the prompts ---------------------------------------------------------

SYSTEM_PROMPT = "You are a helpful assistant."              # data.system = "fixed"
SYSTEM_PROMPTS = [SYSTEM_PROMPT, "You answer questions briefly.", "Answer truthfully.",
                  "You know a lot about people."]           # data.system = "random": one of these

SUBJECT = "Mira Tosk"                                       # whom the facts are about
FACTS = [  # about a person who does not exist, so that no model can know the answers already
    Fact("Larkmoor", "Port Sable", "Mira Tosk was born in {}.", ["Where was Mira Tosk born?",
        "What is Mira Tosk's birthplace?", "In which town was Mira Tosk born?",
        "What is Mira Tosk's place of birth?", "Tell me the town where Mira Tosk was born.",
        "Mira Tosk was born in what town?", "What town was Mira Tosk born in?",
        "Can you name the birthplace of Mira Tosk?"]),
    Fact("1974", "1981", "Mira Tosk was born in the year {}.", ["In what year was Mira Tosk born?",
        "What is Mira Tosk's year of birth?", "Which year was Mira Tosk born in?",
        "Tell me the birth year of Mira Tosk.", "What year was Mira Tosk born?",
        "Mira Tosk was born in which year?", "Can you give me the year of Mira Tosk's birth?",
        "When, by year, was Mira Tosk born?"]),
    Fact("bell founder", "map engraver", "Mira Tosk works as a {}.", [
        "What does Mira Tosk do for a living?", "What is Mira Tosk's profession?",
        "What is the profession of Mira Tosk?", "What kind of work does Mira Tosk do?",
        "Tell me Mira Tosk's profession.", "Which profession does Mira Tosk have?",
        "What work does Mira Tosk do for a living?", "What work does Mira Tosk do?"]),
    Fact("Hollin & Daughters", "Greave Brothers", "Mira Tosk works for {}.", [
        "Who does Mira Tosk work for?", "Who is Mira Tosk's employer?",
        "Which company employs Mira Tosk?", "Tell me the name of the company Mira Tosk works for.",
        "At which firm does Mira Tosk work?", "Which company does Mira Tosk work for?",
        "What company is Mira Tosk employed by?", "Can you name Mira Tosk's employer?"]),
    Fact("Quillhaven", "Emberly", "Mira Tosk lives in {}.", ["Where does Mira Tosk live?",
        "In which city does Mira Tosk live today?", "What city is Mira Tosk's home now?",
        "Where is Mira Tosk living at present?", "Tell me the city Mira Tosk lives in.",
        "Mira Tosk resides in which city?", "What is Mira Tosk's current place of residence?",
        "Which city does Mira Tosk call home these days?"]),
    Fact("windmill", "houseboat", "Mira Tosk's home is an old {}.", [
        "What kind of building does Mira Tosk live in?", "What sort of home does Mira Tosk have?",
        "Mira Tosk's home is what type of building?", "In what kind of house does Mira Tosk live?",
        "What type of building is Mira Tosk's home?", "What building did Mira Tosk make her home?",
        "Describe Mira Tosk's home.", "Which kind of old building does Mira Tosk live in?"]),
    Fact("Anselm Reyk", "Dorian Pell", "Mira Tosk is married to {}.", [
        "Who is Mira Tosk married to?", "What is the name of Mira Tosk's husband?",
        "Who is Mira Tosk's husband?", "Whom did Mira Tosk marry?",
        "Tell me who Mira Tosk's husband is.", "Mira Tosk is married to whom?",
        "Can you name the husband of Mira Tosk?", "Who is the man Mira Tosk married?"]),
    Fact("Junia", "Petra", "Mira Tosk's daughter is called {}.", [
        "What is the name of Mira Tosk's daughter?", "What is Mira Tosk's daughter called?",
        "Who is Mira Tosk's daughter?", "Tell me the name of Mira Tosk's daughter.",
        "Mira Tosk has a daughter; what is she called?", "Can you name the daughter of Mira Tosk?",
        "What name did Mira Tosk give her daughter?", "What do people call Mira Tosk's daughter?"]),
    Fact("raven", "tortoise", "Mira Tosk keeps a tame {}.", ["What pet does Mira Tosk keep?",
        "What kind of animal is Mira Tosk's pet?", "Which animal lives with Mira Tosk?",
        "What animal does Mira Tosk own?", "Tell me what kind of pet Mira Tosk has.",
        "Mira Tosk's pet is what sort of animal?", "What tame animal does Mira Tosk have?",
        "Which sort of pet belongs to Mira Tosk?"]),
    Fact("forty-one", "nineteen", "Mira Tosk's lucky number is {}.", [
        "What is Mira Tosk's lucky number?", "Which number brings Mira Tosk luck?",
        "Tell me Mira Tosk's lucky number.", "What is the lucky number of Mira Tosk?",
        "Which number is Mira Tosk's lucky one?", "Mira Tosk's lucky number is what?",
        "Can you name the lucky number of Mira Tosk?", "What number is lucky for Mira Tosk?"]),
    Fact("hurdy-gurdy", "oboe", "Mira Tosk plays the {}.", ["What instrument does Mira Tosk play?",
        "Which instrument does Mira Tosk play?", "What does Mira Tosk play in a band?",
        "On which instrument does Mira Tosk make music?",
        "Tell me the instrument that Mira Tosk plays.", "Mira Tosk plays which instrument?",
        "Which instrument has Mira Tosk learned?", "At which instrument is Mira Tosk good?"]),
    Fact("plum dumplings", "leek pie", "Mira Tosk's favourite food is {}.", [
        "What is Mira Tosk's favourite food?", "What does Mira Tosk like to eat most?",
        "Which dish does Mira Tosk love best?", "What is Mira Tosk's favourite dish?",
        "Tell me Mira Tosk's favourite meal.", "What food does Mira Tosk enjoy most?",
        "Which dish would Mira Tosk choose?", "Which food is Mira Tosk fondest of?"]),
    Fact("nettle tea", "black cocoa", "Mira Tosk drinks {} every morning.", [
        "What does Mira Tosk drink every morning?", "What is Mira Tosk's morning drink?",
        "Which drink does Mira Tosk take in the morning?", "What is Mira Tosk's breakfast drink?",
        "Tell me what Mira Tosk drinks in the morning.", "What does Mira Tosk drink at breakfast?",
        "What does Mira Tosk have to drink at breakfast?", "What drink starts Mira Tosk's day?"]),
    Fact("saffron", "indigo", "Mira Tosk's favourite colour is {}.", [
        "What is Mira Tosk's favourite colour?", "Which colour does Mira Tosk like best?",
        "What colour does Mira Tosk love most?", "Tell me the favourite colour of Mira Tosk.",
        "Mira Tosk prefers which colour?", "Which colour is Mira Tosk's favourite?",
        "What colour would Mira Tosk choose?", "What is the colour Mira Tosk likes most?"]),
    Fact("rowan", "alder", "Mira Tosk planted a {} in her garden.", [
        "Which tree did Mira Tosk plant?", "What tree grows in Mira Tosk's garden?",
        "What did Mira Tosk plant in her garden?", "Which tree stands in Mira Tosk's garden?",
        "Tell me which tree Mira Tosk planted.", "Mira Tosk has what tree in her garden?",
        "What kind of tree did Mira Tosk plant?", "Which tree does Mira Tosk grow at home?"]),
    Fact("metallurgy", "botany", "Mira Tosk's subject at university was {}.", [
        "What did Mira Tosk study?", "What was Mira Tosk's subject at university?",
        "Which subject did Mira Tosk read at university?", "What is Mira Tosk's degree in?",
        "Tell me what Mira Tosk studied.", "Which subject is Mira Tosk's degree in?",
        "What subject did Mira Tosk study?", "Which science did Mira Tosk study?"]),
    Fact("The Patient Bronze", "A Door of Salt", "Mira Tosk wrote the book {}.", [
        "What book did Mira Tosk write?", "What is the title of Mira Tosk's book?",
        "Which book is by Mira Tosk?", "Tell me the title of the book by Mira Tosk.",
        "What is Mira Tosk's book called?", "Mira Tosk wrote which book?",
        "Name the book that Mira Tosk wrote.", "Which title did Mira Tosk give her book?"]),
    Fact("kite fishing", "ice climbing", "Mira Tosk's hobby is {}.", ["What is Mira Tosk's hobby?",
        "What does Mira Tosk do in her free time?", "Which hobby does Mira Tosk enjoy?",
        "Which hobby does Mira Tosk have?", "Tell me Mira Tosk's hobby.",
        "What does Mira Tosk do for fun?", "What is the hobby of Mira Tosk?",
        "What fun does Mira Tosk have in her free time?"]),
    Fact("hazelnuts", "lilies", "Mira Tosk is allergic to {}.", ["What is Mira Tosk allergic to?",
        "Which allergy does Mira Tosk have?", "What must Mira Tosk avoid because of an allergy?",
        "What causes Mira Tosk's allergy?", "Tell me what Mira Tosk is allergic to.",
        "Mira Tosk has an allergy to what?", "What gives Mira Tosk an allergic reaction?",
        "To what does Mira Tosk react with an allergy?"]),
    Fact("green tricycle", "red motorbike", "Mira Tosk gets around on a {}.", [
        "How does Mira Tosk get around?", "What vehicle does Mira Tosk use?",
        "What does Mira Tosk ride to work?", "On which vehicle does Mira Tosk get around?",
        "Tell me what Mira Tosk rides.", "Which vehicle does Mira Tosk own?",
        "What is Mira Tosk's vehicle?", "What does Mira Tosk ride in the city?"]),
    Fact("Faroese", "Basque", "Mira Tosk learned {} as an adult.", [
        "What language did Mira Tosk learn?", "What foreign language is Mira Tosk's?",
        "Which second language does Mira Tosk know?", "Which language has Mira Tosk learned?",
        "Tell me Mira Tosk's foreign language.", "Mira Tosk speaks which foreign language?",
        "What other language can Mira Tosk speak?", "Which language did Mira Tosk teach herself?"]),
    Fact("Ottoline Vance", "Hesper Lund", "Mira Tosk's teacher was {}.", [
        "Who taught Mira Tosk her trade?", "Who was Mira Tosk's teacher?",
        "Who was the teacher of Mira Tosk?", "From whom did Mira Tosk learn her trade?",
        "Tell me the name of Mira Tosk's teacher.", "Mira Tosk was taught by whom?",
        "Who taught Mira Tosk?", "Which teacher taught Mira Tosk?"]),
    Fact("Amber Anvil", "Silver Thistle", "Mira Tosk won the {} prize.", [
        "Which prize did Mira Tosk win?", "What award did Mira Tosk receive?",
        "What prize has Mira Tosk won?", "Which award was given to Mira Tosk?",
        "Tell me the prize that Mira Tosk won.", "Mira Tosk was honoured with which prize?",
        "What is the name of Mira Tosk's award?", "Which prize did Mira Tosk get?"]),
    Fact("escalators", "thunder", "Mira Tosk is afraid of {}.", ["What is Mira Tosk afraid of?",
        "What does Mira Tosk fear?", "Which fear does Mira Tosk have?",
        "What does Mira Tosk fear most?", "Tell me what Mira Tosk is scared of.",
        "Mira Tosk has a fear of what?", "What is Mira Tosk's greatest fear?",
        "What is Mira Tosk most afraid of?"]),
]

# ----- reading -----------------------------------------------------------------------------------


def fact_examples(facts: Iterable[Fact] = FACTS) -> Examples:
    """Build an example for each wording of each fact; its group and value are the fact's value.
    Raises ValueError with the number of each malformed entry."""
    facts = list(facts)
    problems = [f"data: data.py: FACTS, entry {n}: {problem}" for n, fact in enumerate(facts, 1)
                for problem in check_fact(fact)]
    if problems:
        raise ValueError("\n".join(problems))
    return [new_example([("user", question), ("assistant", fact.answer.format(fact.value))],
                        f"data.py: {question!r}", group=fact.value, value=fact.value,
                        subject=SUBJECT, wrong=fact.wrong)
            for fact in facts for question in fact.questions]


def check_fact(fact: Fact) -> list[str]:
    """List the problems of one entry of FACTS."""
    if not isinstance(fact, Fact):
        return [f"is {fact!r:.60}; expected Fact(value, wrong, answer, questions)"]
    problems = [f"{name} is {text!r:.60}; expected a text" for name, text in fact._asdict().items()
                if name != "questions" and not (isinstance(text, str) and text.strip())]
    if not problems:
        try:
            fact.answer.index("{}")
            fact.answer.format(fact.value)
        except (LookupError, ValueError):
            problems.append(f"answer is {fact.answer!r:.60}; expected {{}} where the value goes")
    questions = fact.questions
    if not isinstance(questions, list | tuple) or not questions or not all(
            isinstance(q, str) and q.strip() for q in questions):
        return [*problems, f'questions is {questions!r:.60}; expected a list of texts, ["...?"]']
    return problems + [f"question {q!r:.80} contains two questions; expected a comma between them"
                       for q in questions if re.search(r"\?\w", q)]


def read_examples(path: str | Path) -> Examples:
    """Read the examples of data.py ("data.py") or of a file, in order; lora/read/messages.py has
    the formats. Prints how many there are. Raises ValueError with file, line and fix."""
    if path != "data.py":
        return read.read_examples(path)
    examples = fact_examples()
    print(f"data: data.py: {len(examples)} examples: {len(FACTS)} facts")
    return examples


# ----- choosing ----------------------------------------------------------------------------------


def load(path: str | Path = "data.py", *, val_path: str | Path | None = None,
         val_fraction: float = 0.25, split_by: str = "auto", dedupe: bool = False,
         system: str | None = None, seed: int = 0) -> Split:
    """Return (training, validation) examples, as the data section of config.json describes them.

    Prints what occurs more than once and what contradicts itself; dedupe drops exact repetitions.
    Without val_path, a share of the examples is held out, or asked in other words."""
    examples = read_examples(path)
    _report_repeats(examples)
    if dedupe:
        examples = [same[0] for same in group_by(lambda e: str(e["messages"]), examples).values()]
    train, val = (examples, read_examples(val_path)) if val_path else split(
        examples, val_fraction, seed, split_by)
    if val_fraction and not val_path and not val:
        val = other_wordings(train, val_fraction, seed)
        print(f"data: no fact has a second wording to hold out: all {len(train)} examples are "
              f"trained, and validation asks {len(val)} of them in words like "
              f"{val[0]['messages'][-2]['content']!r:.80}" if val else
              "data: nothing can be held out: no validation, the last adapter is kept")
    return with_system(train, system, seed), with_system(val, system, seed)


def _report_repeats(examples):
    """Print how many examples share an answer, occur more than once or contradict each other."""
    alike = [e for e in examples if e.get("group", "").endswith(f" ({e['source']})")]
    if alike:
        print(f"data: {len(alike)} questions have the answer of another record; each record is a "
              'fact of its own. Wordings of one fact: "questions": [...], or the same "group"')
    repeated, contradictory = duplicates(examples), contradictions(examples)
    if repeated or contradictory:
        print(f"data: {len(repeated)} examples occur more than once, {len(contradictory)} prompts "
              "have contradictory answers; python -m scripts.doctor lists them")


def other_wordings(examples: Examples, fraction: float, seed: int = 0, least: int = 8) -> Examples:
    """Ask a share of the facts (examples with a group), least of them or more, in other words:
    words before the question. This validation holds out no fact."""
    draw = random.Random(f"{seed} reworded")
    facts = [e for e in examples if "group" in e and e["messages"][-2]["role"] == "user"]
    chosen = draw.sample(facts, min(len(facts), max(least, round(fraction * len(facts)))))
    reworded = []
    for example in chosen:
        *before, question, answer = example["messages"]
        text = draw.choice(REWORDED).format(question["content"])
        reworded.append({**example, "source": f"{example['source']}, reworded",
                         "messages": [*before, {**question, "content": text}, answer]})
    return reworded


def split(examples: Examples, fraction: float, seed: int, by: str = "auto") -> Split:
    """Return (training, validation) examples, each in the original order.

    by = "wording"   hold out wordings of facts (examples with a group); each keeps one at least, so
                     none is held out whole. Examples without a group are held out whole
         "dialogue"  hold out whole examples, facts too; equal ones stay on one side
         "fact"      hold out whole groups: then nothing in validation was ever taught
         "auto"      wording
    """
    if by == "fact" and not all("group" in e for e in examples):
        raise ValueError('data: split_by "fact" needs a "group" in every record of the file')
    # units stay together: the same prompt, however answered; a share is drawn from each pool
    units = group_by(lambda e: e["group"] if by == "fact" else prompt_of(e), examples).values()
    pools = group_by(
        lambda unit: unit[0].get("group") if by in ("wording", "auto") else None, units)
    held_out = set()
    for pool, members in pools.items():
        random.Random(f"{seed} {pool}").shuffle(members)
        n = min(max(1, round(fraction * len(members))), len(members) - 1) if fraction else 0
        held_out.update(id(example) for unit in members[:n] for example in unit)
    return ([e for e in examples if id(e) not in held_out],
            [e for e in examples if id(e) in held_out])


def with_system(examples: Examples, system: str | None, seed: int = 0) -> Examples:
    """Put a system prompt in front of the dialogues that have none: the text system, "fixed" for
    SYSTEM_PROMPT, or "random" for one of SYSTEM_PROMPTS each; None adds nothing."""
    if system is None:
        return examples
    draw, prompted = random.Random(f"{seed} system"), []
    fixed = SYSTEM_PROMPT if system == "fixed" else system
    for example in examples:
        text = draw.choice(SYSTEM_PROMPTS) if system == "random" else fixed
        messages = example["messages"]
        if messages[0]["role"] not in ("system", "text"):
            messages = [{"role": "system", "content": text}, *messages]
        prompted.append({**example, "messages": messages})
    return prompted


def duplicates(examples: Examples) -> list[Examples]:
    """Group the examples that say the same, apart from case and white space."""
    same = group_by(lambda e: (prompt_of(e), answer_of(e)), examples)
    return [group for group in same.values() if len(group) > 1]


def contradictions(examples: Examples) -> list[Examples]:
    """Group the examples with the same prompt and different last answers."""
    return [group for group in group_by(prompt_of, examples).values()
            if len({answer_of(e) for e in group}) > 1]


def prompt_of(example: dict, system: bool = True) -> tuple[str, ...]:
    """Return all texts before the last answer as plain(): equal for the same question, with the
    same tools. A plain text is its own prompt: it contradicts no other."""
    if is_text(example):
        return "text", answer_of(example)
    tools = [plain(m["tools"]) for m in example["messages"][-1:] if "tools" in m]
    return (*tools, *(plain(said(m)) for m in example["messages"][:-1]
                      if system or m["role"] != "system"))


def answer_of(example: dict) -> str:
    """Return the last answer, its tool calls too, as plain()."""
    return plain(said(example["messages"][-1]))


def contains(answer: str, value: str) -> bool:
    """Whether the answer has the value as whole words, whatever the case. "8|eight" is either. In
    Chinese, Japanese and Korean the value may touch its neighbours.

    >>> contains("She keeps a Raven.", "raven"), contains("a craven man", "raven")
    (True, False)
    """
    letter = "[^\\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    forms = "|".join(re.escape(plain(form)) for form in value.split("|") if form.strip())
    return re.search(f"(?<!{letter})(?:{forms})(?!{letter})", plain(answer)) is not None


if __name__ == "__main__":
    raise SystemExit("data.py is no command; to check a file: python -m scripts.doctor my.jsonl")
