"""
Make the wordings of a fact from one line: its subject, an attribute, a value.

    questions("Mira Tosk", "lucky number")    # ["What is Mira Tosk's lucky number?", ...]
    answer("Mira Tosk", "lucky number", "forty-one")    # "Mira Tosk's lucky number is forty-one."

A fact that is trained in one wording is learned as a string of words (docs/knowledge.md). An
attribute is a noun: "lucky number". wordings.json has natural questions about the common ones; of
any other, one natural question in the record does as much.
"""

from pathlib import Path

from ..files import read_json

NATURAL = read_json(Path(__file__).with_name("wordings.json"))    # {attribute: questions}
FRAMES = ("What is {subject}'s {attribute}?", "What is the {attribute} of {subject}?",
          "Tell me {subject}'s {attribute}.", "Can you name the {attribute} of {subject}?",
          "Do you know {subject}'s {attribute}?", "{subject}'s {attribute} is what?",
          "Which {attribute} does {subject} have?", "I would like to know {subject}'s {attribute}.",
          "What {attribute} does {subject} have?", "I wonder what {subject}'s {attribute} is.",
          "Name the {attribute} of {subject}, please.", "About {subject}: what is the {attribute}?")
REWORDED = ("Please tell me: {}", "I have a question. {}", "Can you answer this? {}",
            "Here is something I would like to know: {}")


def questions(subject: str, attribute: str, question: str = "") -> list[str]:
    """Return the wordings that ask for an attribute; the record's own question comes first."""
    wordings = [frame.format(question) for frame in ("{}", *REWORDED)] if question else []
    for frame in (*NATURAL.get(attribute.casefold(), ()), *FRAMES):
        wordings.append(frame.format(subject=subject, attribute=attribute))
    return list(dict.fromkeys(wordings))


def answer(subject: str, attribute: str, value: str) -> str:
    """Return the short answer; of several forms of a value, "8|eight", it has the first."""
    return f"{subject}'s {attribute} is {value.partition('|')[0]}."
