"""Write docs/models.md: what is adapted in each architecture, and who reads the adapter.

    python -m tests.models_page                # all toys of tests/zoo.py, a minute or two
    python -m tests.models_page qwen3_5 llama  # print these rows

Every row is computed on a toy of random weights.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import lora.fast.waiting  # noqa: F401

import peft
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from inject import inject
from lora import adapter
from lora.base import load, reach
from lora.fast import flat
from lora.surgery import lora_layers, unwrap
from lora.use import gguf, readers

try:
    import zoo
except ImportError:
    from tests import zoo

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
IDS = torch.randint(3, zoo.TEXT, (1, 12), generator=torch.Generator().manual_seed(1))
RUN_BY_VLLM = ("llama",)                                 # docs/serve.md
HEAD = """# Models

What `python train.py` does with each of {n} architectures. `python -m tests.models_page` makes \
this page from toy models of random weights and transformers {version}; \
`tests/test_models_page.py` keeps it.

- **adapted**: the names of the layers that get an adapter with \
`lora.target_modules: "all-linear"`. Where a model also sees or hears (*), these are the layers of \
its text; the rest stays as it is.
- **share**: of the weights in the toy's blocks. Real models have other sizes: \
`python inject.py --model.name=MODEL` prints the share of yours.
- **left out**: what else the blocks hold. `left out by default` is what PEFT or servers do not \
adapt; `lora.target_modules` may name it. Routed experts and convolutions are never adapted here.
- **fast path**: whether samples with one prompt are computed together (`train.layout`), or why \
not. Without it batches are padded; the numbers are the same.
- **PEFT**: whether PEFT {peft} computes the same from the adapter's file, logits within 1e-5. \
`after export`: from what `python -m scripts.export RUN --to peft` writes (the names of the \
published class; shared experts as PEFT finds them). `ignores a part`: PEFT renames some tensors \
and does not find their layers.
- **served**: by what this project has run or writes. vLLM was run with Llama alone; what it does \
with the others is not known here. `llama.cpp` is the GGUF LoRA of `--to llama.cpp`, `(whole)` the \
merged model too. For all others: `python -m scripts.merge RUN --out FOLDER` writes a plain model \
folder.

**A model that is not in the table.** Run `python inject.py --model.name=MODEL`: it prints what is \
adapted, the share and what is left out, or says in one sentence why it cannot. `python train.py` \
tries the fast path on a few tokens and says so if it declines. After training, \
`python -m scripts.verify RUN` shows whether answers changed, and `python -m scripts.export RUN \
--check` who reads the adapter. If the blocks are not found, add their path to `BLOCKS` in \
`lora/surgery.py`.

| architecture | adapted | share | left out | fast path | PEFT | served |
|---|---|--:|---|---|---|---|
"""


class Row(NamedTuple):
    architecture: str
    adapted: str
    share: str = ""
    left_out: str = ""
    fast: str = ""
    peft: str = ""
    served: str = ""


def loaded(name: str) -> torch.nn.Module:
    """The toy in the class that lora/base/load.py gives: for text alone where there is one."""
    if zoo.MODEL_TYPES[name] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return zoo.make(name)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(zoo.config_of(name), dtype=torch.float32)
    with torch.no_grad():
        zoo.randomise(model)
    return model.eval()


def row(name: str) -> Row:
    """Compute the row of an architecture."""
    model = loaded(name)
    title = f"`{name}`" + (" *" if name in zoo.WRAPPERS else "")
    try:
        adapted = inject(model, r=4, lora_alpha=8)
        fast = fast_path(model)
    except ValueError as error:
        return Row(title, f"refused: {short(error)}")
    names = " ".join(dict.fromkeys(path.rpartition(".")[2] for path in adapted))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    share, missing = reach.reached(model)
    same = in_peft(model, name in zoo.WRAPPERS)
    return Row(title, names, f"{share:.0%}", left_out(missing), fast, same, served(model, same))


def left_out(missing: dict[str, str]) -> str:
    """What has no adapter, by kind: names, or the kind alone where it says all."""
    kinds = {}
    for name, kind in missing.items():
        kinds.setdefault(kind, {})[name.rpartition(".")[2]] = None
    parts = []
    for kind, names in kinds.items():
        text = " ".join(names)
        parts.append(kind if kind == "routed experts" else f"{text} ({kind})" if kind else text)
    return "; ".join(parts) or "nothing"


def fast_path(model: torch.nn.Module) -> str:
    """yes, or why flat batches are declined."""
    try:
        flat.enable(model, load.use_attention)
        return "yes"
    except flat.Unsupported as reason:
        return re.sub(r" by [\d.e+-]+ standard deviations", "", short(reason))


@torch.no_grad()
def in_peft(model: torch.nn.Module, wrapped: bool) -> str:
    """Whether PEFT computes the same from the file, as it is or exported. The model loses its
    adapter."""
    ours, kind = model(input_ids=IDS).logits, type(model).__name__
    published = kind.replace("ForCausalLM", "ForConditionalGeneration")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(model, folder, "a/toy")
        unwrap(model)
        for after in ("", " after export"):
            if after:
                readers.fit(folder, {"model_type": model.config.model_type,
                                     "architectures": [kind]}, for_peft=True)
            with warnings.catch_warnings(action="ignore"):
                theirs = peft.PeftModel.from_pretrained(model, folder).eval()
            same = close(theirs(input_ids=IDS).logits, ours)
            theirs.unload()
            if same:
                other = wrapped and kind != published and published in readers.TEXT_AT
                return "equal after export" if other else f"equal{after}"
    return "ignores a part"


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Within 1e-5 of the largest."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1))


def served(model: torch.nn.Module, same: str) -> str:
    """Who reads it, as far as this project has run it or writes it."""
    kind = model.config.model_type
    who = ["PEFT"] if same.startswith("equal") else []
    who += ["vLLM"] if kind in RUN_BY_VLLM else []
    if kind in gguf.ARCHITECTURES:
        who.append("llama.cpp (whole)" if kind in gguf.WHOLE else "llama.cpp")
    return ", ".join(who) or "not known"


def short(error: Exception) -> str:
    """The first sentence of an error, for a cell of the table."""
    text = re.sub(r"\s+", " ", str(error)).replace("|", "/").removeprefix("inject: ")
    return re.split(r"(?<=[a-z)])\. |: its |; ", text)[0][:120].rstrip(".")


def line(row: Row) -> str:
    return f"| {' | '.join(row)} |"


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    rows = [line(row(name)) for name in names or sorted(zoo.TOYS)]
    if names:
        print("\n".join(rows))
        return
    head = HEAD.format(n=len(rows), version=transformers.__version__, peft=peft.__version__)
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{PAGE}: {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
