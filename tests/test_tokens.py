"""lora/run/tokens.py: the tokens of a large data set, kept for a resumed run."""

import shutil

import pytest
from conftest import make_tokenizer

import dataset
import train
from lora.config import DatasetConfig
from lora.run import tokens


@pytest.fixture
def examples():
    long = "long " * 40
    return [{"messages": [{"role": "user", "content": f"who is {i}?"},
                          {"role": "assistant", "content": long if i == 3 else f"it is {i}"}],
             "source": f"a.jsonl:{i}"} for i in range(6)]


def test_what_was_kept_is_what_was_tokenised(tmp_path, monkeypatch, examples):
    monkeypatch.setattr(tokens, "LEAST", 5)
    s, tokenizer = DatasetConfig(max_length=60), make_tokenizer()
    made = train.tokenise(examples, tokenizer, s, "training")
    tokens.save(tmp_path, (made, None), (examples, []))
    monkeypatch.setattr(dataset, "samples", None)              # nothing is tokenised again
    again = train.tokenise(examples, tokenizer, s, "training", tmp_path)
    assert again.items == made.items and len(made) == 5
    assert again.examples == made.examples and again.notes() == made.notes()
    assert again.stop.ids == made.stop.ids


def test_other_tokens_and_damaged_files_are_not_taken(tmp_path, monkeypatch, examples):
    monkeypatch.setattr(tokens, "LEAST", 5)
    tokenizer = make_tokenizer()
    made = dataset.tokenise(examples, tokenizer, DatasetConfig())
    tokens.save(tmp_path, (made, None), (examples, []))

    def found(examples=examples, tokenizer=tokenizer, **settings):
        seen = []
        dataset.tokenise(examples, tokenizer, DatasetConfig(**settings), lambda key: seen.append(
            tokens.load(tmp_path, "training", examples, key)))
        return seen[0] is not None
    assert found()
    assert not found(max_length=100) and not found(loss_on="last")
    assert not found(examples[1:]) and not found(tokenizer=make_tokenizer(merges=()))
    file = tmp_path / "tokens" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert not found()
    shutil.rmtree(file.parent)
    assert not found()


def test_a_small_data_set_keeps_nothing(tmp_path, examples):
    made = dataset.tokenise(examples, make_tokenizer(), DatasetConfig())
    tokens.save(tmp_path, (made, None), (examples, []))
    assert not [*tmp_path.iterdir()]
