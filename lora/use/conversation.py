"""
What a chat remembers: the last turns word for word, older ones as a summary or when they matter.

    talk = Conversation(count, budget=512, memory="retrieve")     # count(messages) -> tokens
    talk.messages("And her name?")       # what the model is sent: system, notes, turns, question
    talk.add("And her name?", "Mira.")

The newest turns that fit into budget tokens are sent as they were. memory says what becomes of
older ones: "window" forgets them; "summary" folds them into a text that summarise(text so far,
turns) makes; "retrieve" looks up the two most like the question (TF-IDF, Salton and Buckley 1988).
Notes go to the end of the system prompt: the turns keep the form the model was trained on.
"""

import math
from collections import Counter
from collections.abc import Callable

from .text import words

MEMORIES = ("window", "summary", "retrieve")


class Conversation:
    """turns is [(question, answer)]; found is how many old turns "retrieve" looks up."""

    def __init__(self, count: Callable[[list[dict]], int], budget: int, system: str | None = None,
                 memory: str = "window", summarise: Callable | None = None, found: int = 2):
        self.count, self.budget, self.system = count, budget, system
        self.memory, self.summarise, self.found = memory, summarise, found
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.turns, self.summary, self.folded = [], "", 0

    def add(self, user: str, answer: str) -> None:
        self.turns.append((user, answer))

    def messages(self, user: str) -> list[dict]:
        """The messages to send for a new question. Raises ValueError if it alone is too long."""
        first = self._first(user, self.budget)
        if first == 0 or self.memory == "window":
            return self._write("", self.turns[first:], user)
        first = self._first(user, self.budget - self.budget // 4)          # room for notes
        notes = self._notes(self.turns[:first], user)
        while self.count(sent := self._write(notes, self.turns[first:], user)) > self.budget:
            notes = notes[:len(notes) * 3 // 4]                            # "" fits
        return sent

    def _first(self, user, budget):
        """The index of the oldest turn that fits word for word."""
        for first in range(len(self.turns) + 1):
            n_tokens = self.count(self._write("", self.turns[first:], user))
            if n_tokens <= budget:
                return first
        if n_tokens > self.budget:
            raise ValueError(f"chat: the message has {n_tokens} tokens with its system prompt; the "
                             f"budget is {self.budget}. Say it shorter, or raise --budget.")
        return len(self.turns)

    def _write(self, notes, turns, user):
        system = "\n\n".join(filter(None, (self.system, notes)))
        pairs = [] if self.system is None and not notes else [("system", system)]
        for question, answer in turns:
            pairs += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in [*pairs, ("user", user)]]

    def _notes(self, older, user):
        """A text about the turns that are not sent."""
        if self.memory == "summary":
            if len(older) > self.folded:
                self.summary = self.summarise(self.summary, older[self.folded:])
                self.folded = len(older)
            return f"Earlier: {self.summary}"
        best = similar(user, [f"{q} {a}" for q, a in older])[:self.found]
        lines = [f"Earlier they said: {older[i][0]} You said: {older[i][1]}" for i in sorted(best)]
        return "\n".join(lines)


def similar(query: str, texts: list[str]) -> list[int]:
    """Indices of the texts that share words with the query, the most alike first: cosine of
    TF-IDF vectors, tf = 1 + log n, idf = log((1 + N) / (1 + df)) + 1."""
    counts = [Counter(words(text)) for text in [*texts, query]]
    df = Counter(word for count in counts[:-1] for word in count)
    vectors = []
    for count in counts:
        v = {w: (1 + math.log(n)) * (math.log((1 + len(texts)) / (1 + df[w])) + 1)
             for w, n in count.items()}
        norm = math.sqrt(sum(x * x for x in v.values())) or 1
        vectors.append({w: x / norm for w, x in v.items()})
    target = vectors.pop()
    scores = [sum(x * target.get(w, 0) for w, x in v.items()) for v in vectors]
    return [i for i in sorted(range(len(texts)), key=lambda i: (-scores[i], -i)) if scores[i] > 0]
