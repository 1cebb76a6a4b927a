"""The examples in docstrings compute what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [".".join(path.relative_to(ROOT).with_suffix("").parts)
                 for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("lora/**/*.py")])
                 if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_compute_what_they_say(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed


def test_the_central_functions_have_an_example():
    assert {"data", "dataset", "lora.layer", "lora.optim"} <= {*WITH_EXAMPLES}
