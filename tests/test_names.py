"""docs/names.md: every name exists, here and in the PEFT that is installed."""

import importlib
import re
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_model

from inject import inject
from lora import adapter, config, surgery

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/names.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.+?`) \| (`.+?`|–) \|(.*)\|$", TEXT, re.M)
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One adapter, in a layer of ours and in PEFT's that loaded it; and its folder."""
    folder, model = tmp_path_factory.mktemp("names"), make_model()
    inject(model, r=2, lora_alpha=6, target_modules=TARGETS)
    for parameter in surgery.adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    adapter.save(model, folder, "tiny")
    other = peft.PeftModel.from_pretrained(make_model(), folder)
    path = "model.layers.1.self_attn.v_proj"
    return model.get_submodule(path), other.base_model.model.get_submodule(path), folder


def resolve(name: str):
    """The thing at a dotted path: the longest module in it, then attributes."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n:]:
            thing = getattr(thing, attribute)
        return thing
    raise ModuleNotFoundError(name)


def look_up(name: str, layer, folder: Path):
    """What one cell of the table names: of a layer, a setting, a file, or a path to import."""
    if name.startswith("--"):
        section, key = name.removeprefix("--").split(".")
        return getattr(getattr(config.Config(), section), key)
    if name.startswith("LoraConfig("):
        return eval(name, {"LoraConfig": peft.LoraConfig})
    if name.startswith("layer."):
        return eval(name, {"layer": layer})
    if name.startswith("adapter_"):
        return (folder / name).stat()
    return resolve(name)


@pytest.mark.parametrize(("here", "there", "difference"), ROWS)
def test_the_names_exist(both, here, there, difference):
    ours, theirs, folder = both
    if here == "`layer.unmerge()`":                          # PEFT warns if there is nothing to do
        ours.merge()
        theirs.merge()
    one = look_up(here.strip("`"), ours, folder)
    other = None if there == "–" else look_up(there.strip("`"), theirs, folder)
    if isinstance(one, torch.Tensor):
        assert torch.allclose(one, other)
    elif here.startswith("`layer.") and isinstance(one, int | float):
        assert one == (not other if difference.strip() == "The opposite" else other)
    elif isinstance(other, peft.LoraConfig) and not difference.strip():     # the same default
        assert one == getattr(peft.LoraConfig(), here.strip("`").removeprefix("--lora."))
    for layer in (ours, theirs):
        if layer.merged:
            layer.unmerge()


def test_the_table_is_whole():
    """Every setting of LoRA, and the version."""
    here = {row[0].strip("`") for row in ROWS}
    assert {f"--lora.{key}" for key in vars(config.LoraConfig())} <= here
    assert len(ROWS) == len([line for line in TEXT.splitlines() if line.startswith("| `")])
    assert f"version {peft.__version__}." in TEXT
    for name in re.findall(r"`(\w+/[\w/]+\.py)`", TEXT):
        assert (ROOT / name).exists()
