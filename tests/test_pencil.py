"""docs/pencil.md: its equations hold, its code gives its outputs, and each number of an output
stands in the arithmetic above the code."""

import contextlib
import io
import math
import re
from pathlib import Path

import numpy
import pytest

TEXT = (Path(__file__).parents[1] / "docs/pencil.md").read_text(encoding="utf-8")
HEAD, *SECTIONS = re.split(r"^## \d+\. ", TEXT, flags=re.M)
BLOCK = r"^```(\w*)\n(.*?)^```$"                            # language, text
ARITHMETIC = re.compile(r"(sqrt|\[[^\[\]]+,[^\[\]]+\]|[-+*/()\d. ])+")
THOUSANDS = r"(?<=\d),(?=\d{3})"


def numbers(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d+(?:\.\d+)?", re.sub(THOUSANDS, "", text))}


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of the equals signs between arithmetic alone: 2 * 4 = 8, [1, 2 - 2] = [1, 0]."""
    found = []
    for line in re.sub(THOUSANDS, "", text).splitlines():
        line = re.sub(r"([=*+-])\s+", r"\1 ", line)
        for part in re.split(r"\s{3,}(?=[^\s=])", line):     # columns, or words behind the result
            sides = [side.strip() for side in part.split("=")]
            found += [(a, b) for a, b in zip(sides, sides[1:], strict=False)
                      if ARITHMETIC.fullmatch(a) and ARITHMETIC.fullmatch(b)]
    return found


def value(side: str):
    """Lists are vectors."""
    side = re.sub(r"(\[.*?\])", r"array(\1)", side)
    return eval(side, {"array": lambda x: numpy.array(x, float), "sqrt": math.sqrt})


def test_the_equations_hold():
    assert len(SECTIONS) == 10
    pairs = [pair for language, text in re.findall(BLOCK, TEXT, re.S | re.M) if not language
             for pair in equations(text)]
    assert len(pairs) >= 25
    for a, b in pairs:
        assert numpy.allclose(value(a), value(b), rtol=4e-4), f"{a} is not {b}"


@pytest.fixture(scope="module")
def printed():
    """What the code of each section prints; the sections share one session, as the text says."""
    session, outputs = {}, []
    for section in SECTIONS:
        (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "docs/pencil.md", "exec"), session)
        outputs.append(out.getvalue())
    return outputs


@pytest.mark.parametrize("i", range(10))
def test_the_code_prints_the_numbers_of_the_text(printed, i):
    above, _, below = SECTIONS[i].partition("```python\n")
    (said,) = re.findall(r"^```\n\n```\n(.*?)```", below, re.S | re.M)
    assert printed[i] == said
    new = numbers(said) - numbers(HEAD + above)
    assert not new, f"not in the arithmetic: {new}"
