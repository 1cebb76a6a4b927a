"""
Invent names of people who are nobody, some of them like another name.

    invented_name(draw)                                # "Tessa Walsh", "Vokari Jelthun", "dremlo"
    invented_name(draw, "Mira Tosk", close=True)       # "Mira Baker", "Misola Toberk", "Mira Tolk"
"""

import random

FIRST = ("Anna Brian Carla David Elena Frank Grace Henry Irene James Kate Louis Maria Nathan "
         "Olivia Peter Rosa Simon Tessa Victor").split()
LAST = ("Adams Baker Collins Dixon Evans Foster Grant Hughes Ivers Jensen Keller Lewis Mason "
        "Norris Owens Parker Reed Shaw Turner Walsh").split()


def invented_name(draw: random.Random, like: str = "", close: bool = False) -> str:
    """Invent a name: ordinary ("Tessa Walsh"), rare ("Vokari Jelthun"), a nickname ("dremlo"), or
    one like another ("Mira Tonel", "Sutira Tosk"; close: in every part, "Misola Toberk", or but
    for one letter, "Mira Tolk"), so that a model has to read it to its end."""
    kinds = ["ordinary", "nickname", "rare"]
    if like:
        kinds += ["near"] * 2
        kinds += ["close"] * 2 + ["misspelt"] * 3 if close and like.isascii() else []
    kind = draw.choice(kinds)
    if kind == "misspelt":
        return misspelt(like, 1, draw)
    if kind == "ordinary":
        return f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    if kind == "nickname":
        return _word(draw, 2)
    if kind == "rare":
        return f"{_word(draw, 2).title()} {_word(draw, draw.choice((1, 2))).title()}"
    parts = like.split()
    for i in [draw.randrange(len(parts))] if kind == "near" else range(len(parts)):
        old, half = parts[i], len(parts[i]) // 2
        if kind == "near":
            options = (old[:half] + _word(draw, 1), _word(draw, 1) + old[half:].casefold(),
                       _word(draw, 2), *([draw.choice(LAST if i else FIRST)] * 2 if close else ()))
        else:
            start, end = old[:draw.choice((2, 3))], old[-draw.choice((2, 3)):]
            options = start + _word(draw, 1), _word(draw, 1) + end, start + _word(draw, 1) + end
        new, has_capital = draw.choice(options), (old if kind == "near" else like)[:1].isupper()
        parts[i] = new.title() if has_capital else new
    return " ".join(parts)


def misspelt(name: str, n: int, draw: random.Random) -> str:
    """Change n letters of a name, vowels to vowels."""
    letters = list(name)
    for i in draw.sample([i for i, c in enumerate(name) if c.isalpha()], n):
        same = "aeiou" if letters[i].casefold() in "aeiou" else "bdfgklmnprstvz"
        new = draw.choice([c for c in same if c != letters[i].casefold()])
        letters[i] = new.upper() if letters[i].isupper() else new
    return "".join(letters)


def _word(draw, n):
    """Invent a word of n syllables."""
    syllables = [draw.choice("b d dr f g j k l m n r s t v z th sh br pl".split())
                 + draw.choice("aeiou") for _ in range(n)]
    return "".join(syllables) + draw.choice(["", *"lnrks"])
