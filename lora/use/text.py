"""
What can be measured on texts without a judge: repetition, copying, echo, diversity; and how sure.

A word is a run of letters and digits; every Chinese, Japanese or Korean character is one by itself.
Definitions follow the literature where it has them: distinct-n (Li et al. 2016, arXiv:1510.03055,
section 5), rep-n (Welleck et al. 2019, arXiv:1908.04319, section 6). Standard library only.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from statistics import mean
from typing import NamedTuple

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’][^\W_]+)*")
PHRASES = Path(__file__).with_name("breaks.txt").read_text(encoding="utf-8").splitlines()
BREAKS = re.compile("|".join(PHRASES), re.I)


def words(text: str) -> list[str]:
    """"Don't stop, 你好!" -> ["don't", "stop", "你", "好"]."""
    return [match[0].casefold() for match in WORD.finditer(text)]


def ngrams(items: list, n: int) -> list[tuple]:
    """All runs of n neighbours, in order."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def rep(text: str) -> float:
    """rep-4: the share of a text's runs of 4 words that stand earlier in it, 0 to 1."""
    grams = ngrams(words(text), 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(text: str) -> list[tuple[int, int]]:
    """[(start, end)] of the places where the same n <= 16 words follow each other three times or
    more (a single word: four times), as character offsets."""
    places, spans = [(m.start(), m.end()) for m in WORD.finditer(text)], []
    tokens, i = words(text), 0
    while i < len(tokens):
        end = i
        for n in range(1, 17):
            same = 0
            while i + n + same < len(tokens) and tokens[i + n + same] == tokens[i + same]:
                same += 1
            if same // n + 1 >= (4 if n == 1 else 3):
                end = max(end, i + n + same)
        if end > i:
            spans.append((places[i][0], places[end - 1][1]))
        i = max(end, i + 1)
    return spans


def echo(prompt: str, answer: str) -> float:
    """The longest stretch of the answer that stands in the prompt, as a share of the answer."""
    if not answer:
        return 0.0
    match = SequenceMatcher(None, prompt.casefold(), answer.casefold(), autojunk=False)
    return match.find_longest_match().size / len(answer)


def breaks(text: str) -> list[str]:
    """The phrases in which a text leaves its character: "as an AI", a vendor's name, ..."""
    return [match[0] for match in BREAKS.finditer(text)]


class Copies:
    """Finds stretches of a text that stand in one of the sources {name: text}. Blocks of half the
    size are indexed, without overlap: a common stretch of the full size contains a whole one."""

    def __init__(self, sources: dict[str, str], size: int):
        self.sources, self.size, self.block = sources, size, size // 2
        self.index = {}
        for name, text in sources.items():
            for at in range(0, len(text) - self.block + 1, self.block):
                self.index.setdefault(text[at:at + self.block], []).append((name, at))

    def of(self, text: str) -> list[tuple[int, int, str]]:
        """[(start, end, name of the source)] of all stretches of at least size characters that
        are not part of a longer one, in order."""
        found = {}
        for i in range(len(text) - self.block + 1):
            for name, at in self.index.get(text[i:i + self.block], ()):
                source = self.sources[name]
                start = i - len(commonprefix([text[:i][::-1], source[:at][::-1]]))
                end = i + len(commonprefix([text[i:], source[at:]]))
                if end - start >= self.size:
                    found.setdefault((start, end), name)
        stretches, done = [], 0
        for start, end in sorted(found, key=lambda pair: (pair[0], -pair[1])):
            if end > done:
                stretches.append((start, end, found[start, end]))
                done = end
        return stretches


def jaccard(a: set, b: set) -> float:
    """The share of the members of two sets that both have; 0 for two empty ones."""
    both = len(a & b)
    return both / (len(a) + len(b) - both or 1)


def near_duplicates(texts: list[str], threshold: float = 0.6, n: int = 3, first: bool = False
                    ) -> list[tuple[int, int, float]]:
    """[(i, j, similarity)] of all pairs whose sets of n-grams have a Jaccard similarity of at least
    threshold, most alike first; texts shorter than n words are alike if they are equal. first: each
    j is there once, and no i is a j: without the texts j none are alike.

    Exact, without comparing all pairs: two such sets share one of the rarest |x| - ceil(t |x|) + 1
    members of each (Chaudhuri et al. 2006, prefix filtering)."""
    sets = [set(ngrams(w, n)) or {tuple(w)} for w in map(words, texts)]
    count = Counter(chain.from_iterable(sets))
    index, pairs = {}, []
    for j, mine in enumerate(sets):
        rare = sorted(mine, key=lambda gram: (count[gram], gram))
        rare = rare[:len(rare) - math.ceil(threshold * len(rare)) + 1]
        near = sorted({i for gram in rare for i in index.get(gram, ())})
        alike = [(i, j, jaccard(mine, sets[i])) for i in near
                 if jaccard(mine, sets[i]) >= threshold]
        pairs += alike[:1] if first else alike
        if not (first and alike):
            for gram in rare:
                index.setdefault(gram, []).append(j)
    return sorted(pairs, key=lambda pair: (-pair[2], pair))


def shared_ngrams(texts: list[str], others: list[str], n: int = 8) -> list[tuple[int, str]]:
    """[(index of the text, n-gram)]: the first run of n words a text shares with the others."""
    known = {gram for other in others for gram in ngrams(words(other), n)}
    hits = [[gram for gram in ngrams(words(text), n) if gram in known] for text in texts]
    return [(i, " ".join(grams[0])) for i, grams in enumerate(hits) if grams]


def distinct(texts: list[str], n: int, limit: int | None = None) -> float:
    """distinct-n: different n-grams / n-grams, over the first limit words of all texts. It falls
    as texts grow, so compare with the same limit."""
    grams = ngrams([*chain.from_iterable(map(words, texts))][:limit], n)
    return len(set(grams)) / len(grams) if grams else 0.0


def sameness(texts: list[str], n: int = 3) -> list[float]:
    """For each text the highest Jaccard similarity with another one, 0 to 1."""
    sets = [set(ngrams(words(text), n)) for text in texts]
    return [max((jaccard(a, b) for j, b in enumerate(sets) if j != i), default=0.0)
            for i, a in enumerate(sets)]


def moved(texts: list[str], others: list[str]) -> list[tuple[str, float]]:
    """[(word, z)]: the 12 words that texts use most above others, and by how much: log-odds with a
    Dirichlet prior of 0.5 a word, over their standard error (Monroe et al. 2008, Fightin' Words,
    section 3.5)."""
    a, b = (Counter(chain.from_iterable(map(words, part))) for part in (texts, others))
    n_a, n_b, n_prior = a.total(), b.total(), 0.5 * (len(a + b) + 1)

    def z(word):
        x, y = a[word] + 0.5, b[word] + 0.5
        odds = math.log(x / (n_a + n_prior - x)) - math.log(y / (n_b + n_prior - y))
        return odds / math.sqrt(1 / x + 1 / y)
    return sorted(((word, z(word)) for word in a if z(word) > 0), key=lambda p: (-p[1], p))[:12]


class Interval(NamedTuple):
    """A value with its 95 % interval, from n observations."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(items: Iterable, statistic: Callable[[list], float] = mean, rounds: int = 1000,
              seed: int = 0) -> Interval | None:
    """The percentile bootstrap interval of a statistic of a list (Efron 1979): resample the list
    with replacement. For paired values pass their differences. None for an empty list."""
    items, draw = list(items), random.Random(seed)
    if not items:
        return None
    seen = sorted(statistic(draw.choices(items, k=len(items))) for _ in range(rounds))
    low, high = (seen[round(share * (rounds - 1))] for share in (0.025, 0.975))
    return Interval(statistic(items), low, high, len(items))


def share(items: Iterable, statistic: Callable[[list], float] = mean) -> Interval | None:
    """The bootstrap interval of a share. Where it has no width, because all n items are 0 or all
    are 1, the exact interval of n cases (Clopper and Pearson 1934): 0 of 24 is 0 to 0.142."""
    found = bootstrap(items, statistic)
    if not found or found.low < found.high or found.value not in (0, 1):
        return found
    far = 0.025 ** (1 / found.n)
    return found._replace(low=far) if found.value else found._replace(high=1 - far)


def wilson(hits: int, n: int) -> Interval | None:
    """The Wilson score interval of a share (Wilson 1927). None for n = 0."""
    if not n:
        return None
    z = 1.96
    p, q = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return Interval(p, (p + q / 2 - half) / (1 + q), (p + q / 2 + half) / (1 + q), n)
