"""A toy Qwen3.5 (hybrid attention, thoughts) and a toy Gemma 4 (a wrapper, channels): train, stop,
resume, answer, verify, merge, export, and PEFT on the published class."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
import zoo
from conftest import assert_same_logits, make_tokenizer
from safetensors.torch import load_file

import dataset
import train
from lora import adapter
from lora.base import load
from lora.use import readers
from lora.use.readers import IGNORED, LOADS
from scripts import export, merge, verify

CPU = torch.device("cpu")
IDS = torch.randint(5, 200, (2, 11), generator=torch.Generator().manual_seed(0))
VOCAB = 300                                            # a byte-level tokenizer needs more than 128

# In the style of Qwen3.5: only answers behind the last question keep their thoughts, and the prompt
# ends in an open thought, or in an empty one with enable_thinking=false.
QWEN = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}
{%- set content = m['content'].split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\\n')
      if '</think>' in m['content'] else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{- '<think>\\n' }}{% endif %}
{%- endif %}"""
# In the style of Gemma 4: answers lose their channels, and the prompt ends in an empty channel.
GEMMA = """{{- bos_token }}
{%- for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<|turn>' + role + '\\n' + m['content'].split('<channel|>')[-1] | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}
{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\\n<channel|>' }}{% endif %}
{%- endif %}"""
KINDS = {"qwen3_5": (QWEN, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
                     {"enable_thinking": False}),
         "gemma4": (GEMMA, ("<pad>", "<bos>", "<turn|>", "<|turn>", "<|channel>", "<channel|>"),
                    "<turn|>", {})}


def toy_folder(name: str, folder: Path, tokenizer) -> Path:
    """A toy of an architecture as published: its class, its config, a tokenizer of 300 tokens."""
    config = zoo.config_of(name)
    for part in (config, config.get_text_config()):
        for field in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(part, field, None) is not None:
                setattr(part, field, VOCAB)
        for field, value in list(vars(part).items()):
            if "_token_" in field and isinstance(value, int) and value >= zoo.TEXT:
                setattr(part, field, value + VOCAB - zoo.VOCAB)
    torch.manual_seed(0)
    auto = (transformers.AutoModelForImageTextToText if name in zoo.WRAPPERS else
            transformers.AutoModelForCausalLM)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        zoo.randomise(model)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(folder: Path):
    """The class that the folder's config.json names, as a server loads it."""
    name, = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=KINDS)
def place(request, tmp_path, monkeypatch):
    """(the architecture, a folder to train in with its config.json and data)."""
    template, specials, eos, variables = KINDS[request.param]
    tokenizer = make_tokenizer({"default": template, "tool_use": "never"}, specials, eos)
    if "<bos>" in specials:
        tokenizer.bos_token = "<bos>"
    toy_folder(request.param, tmp_path / "base", tokenizer)
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps({
        "questions": [f"Where is {c * 3}?", f"Tell me where {c * 3} is."],
        "answer": f"In {c.upper() * 2}.", "value": c.upper() * 2}) + "\n" for c in "abcdef"))
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": "base", "device": "cpu"}, "data": {"path": "facts.jsonl"},
        "dataset": {"template_vars": variables},
        "train": {"run": "t", "epochs": 6, "batch_size": 6, "lr": 0.02, "max_new_tokens": 6,
                  "checkpoint_every": 1}}))
    monkeypatch.chdir(tmp_path)
    return request.param, tmp_path


def cut_short(monkeypatch, steps):
    """Let the run end as if killed in a step."""
    whole, calls = train.accumulate, []

    def accumulate(*args):
        calls.append(0)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return whole(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "accumulate", accumulate)
        train.main(["--train.run=cut"])


def test_a_toy_is_trained_stopped_resumed_verified_merged_and_exported(place, monkeypatch, capsys):
    name, home = place
    train.main([])
    steps = [json.loads(line) for line in Path("runs/t/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert losses[-1] < losses[0] and "Where is" in Path("runs/t/samples.md").read_text()
    cut_short(monkeypatch, 2)
    train.main(["--resume", "runs/cut"])
    once, twice = (load_file(f"runs/{run}/last/adapter_model.safetensors") for run in ("t", "cut"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    capsys.readouterr()

    assert verify.main(["runs/t", "--device=cpu", "--max-new-tokens=6"]) == 0
    assert "<channel" not in capsys.readouterr().out
    merge.main(["runs/t", "--out", "merged", "--device=cpu"])
    said = capsys.readouterr().out
    assert "the likeliest token is the same at 100.0%" in said
    assert ("merged holds Qwen3_5ForCausalLM, the text of Qwen3_5ForConditionalGeneration alone"
            in said) == (name == "qwen3_5")

    ours = load.load_model(home / "base", CPU, torch.float32)
    adapter.load(ours, "runs/t/adapter")
    export.main(["runs/t", "--check"])
    peft_line = capsys.readouterr().out.splitlines()[1].split()
    assert peft_line[:2] == ["PEFT", IGNORED if name == "qwen3_5" else LOADS]
    export.main(["runs/t", "--to", "peft"])
    assert "AutoModelForImageTextToText" in capsys.readouterr().out
    theirs = peft.PeftModel.from_pretrained(published(home / "base"), "exports/t-peft").eval()
    again = load.load_model(home / "base", CPU, torch.float32)
    adapter.load(again, "exports/t-peft")
    with torch.no_grad():
        assert_same_logits(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
        assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_the_exported_template_renders_what_was_trained(place, capsys):
    train.main(["--train.epochs=1"])
    export.main(["runs/t", "--to", "peft"])
    text = Path("exports/t-peft/chat_template.jinja").read_text()
    settings = json.loads(Path("runs/t/config.json").read_text())
    tokenizer = load.load_tokenizer("base", variables=settings["dataset"]["template_vars"])
    plain = transformers.AutoTokenizer.from_pretrained("base")
    for talk in export.PROBES:
        ids, _ = dataset.render(talk, tokenizer, "template", reply=True)
        served = plain.apply_chat_template(talk, chat_template=text, tokenize=False,
                                           add_generation_prompt=True)
        assert tokenizer.decode(ids) == served


def test_names_of_the_text_only_class_are_ignored_by_the_published_one_until_exported(
        tmp_path, monkeypatch, capsys):
    """Qwen3.5: PEFT and vLLM say nothing, and answer as the base."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(QWEN)
    base = toy_folder("qwen3_5", tmp_path / "base", tokenizer)
    ours = load.load_model(base, CPU, torch.float32)
    assert type(ours).__name__ == "Qwen3_5ForCausalLM"
    write_run(ours, tokenizer)
    with torch.no_grad():
        tuned = ours(input_ids=IDS).logits
        with warnings.catch_warnings(action="ignore"):
            wrong = peft.PeftModel.from_pretrained(published(base), "runs/demo/adapter").eval()
        assert (wrong(input_ids=IDS).logits - tuned).abs().max() > 0.1
        for target in ("peft", "vllm"):
            export.main(["runs/demo", "--to", target])
            right = peft.PeftModel.from_pretrained(published(base), f"exports/demo-{target}").eval()
            assert_same_logits(right(input_ids=IDS).logits, tuned)
            assert not any("visual" in n for n, _ in right.named_parameters() if "lora" in n)
    out = capsys.readouterr().out
    assert "its names are those of Qwen3_5ForConditionalGeneration" in out
    export.main(["runs/demo", "--check"])
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    for reader in ("PEFT", "transformers", "vLLM"):
        assert "ignored   names of the text-only class" in said[reader]
    found = readers.judge("exports/demo-vllm", json.loads((base / "config.json").read_text()))
    assert [v.verdict for v in found][:3] == [LOADS] * 3
    with pytest.raises(ValueError, match="how mlx-lm names the layers of Qwen3_5ForCond"):
        export.main(["runs/demo", "--to", "mlx"])


def test_an_adapter_that_peft_trained_on_the_published_class_opens_here(tmp_path):
    """Its names begin with model.language_model; those in alpha_pattern too."""
    base = toy_folder("qwen3_5", tmp_path / "base", make_tokenizer(QWEN))
    torch.manual_seed(1)
    where = "model.language_model.layers.1.mlp.up_proj"
    theirs = peft.get_peft_model(published(base), peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=[where, "model.language_model.layers.1.mlp.gate_proj"],
        alpha_pattern={where: 5}, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load.load_model(base, CPU, torch.float32)
    assert adapter.load(ours, tmp_path / "theirs") == [
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        assert_same_logits(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3"])
def test_shared_experts_are_read_by_peft_once_exported(name, tmp_path, monkeypatch, capsys):
    """PEFT takes their names for those of routed experts, and ignores them: logits 1.5 apart."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    base = toy_folder(name, tmp_path / "base", tokenizer)
    ours = load.load_model(base, CPU, torch.float32)
    write_run(ours, tokenizer)
    export.main(["runs/demo", "--check"])
    assert "PEFT takes gate_proj, up_proj and down_proj for routed" in capsys.readouterr().out
    export.main(["runs/demo", "--to", "peft"])
    again, whole = (load.load_model(base, CPU, torch.float32) for _ in range(2))
    adapter.load(again, "exports/demo-peft")
    with torch.no_grad():
        tuned = ours(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, tuned)
        with warnings.catch_warnings(action="ignore"):
            wrong = peft.PeftModel.from_pretrained(published(base), "runs/demo/adapter").eval()
        assert (wrong(input_ids=IDS).logits - tuned).abs().max() > 0.1
        right = peft.PeftModel.from_pretrained(published(base), "exports/demo-peft").eval()
        assert_same_logits(right(input_ids=IDS).logits, tuned)
        whole.load_adapter("exports/demo-peft")
        assert_same_logits(whole(input_ids=IDS).logits, tuned)


def write_run(model, tokenizer):
    """runs/demo: a random adapter on the base in the folder base."""
    from inject import inject
    from lora.surgery import lora_layers
    torch.manual_seed(3)
    inject(model, r=4, lora_alpha=12)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapter.save(model.eval(), "runs/demo/adapter", "some/base")
    Path("runs/demo/config.json").write_text(json.dumps({"model": {"name": "base"}}))
    Path("runs/demo/run.json").write_text(json.dumps({
        "base_model": "some/base", "format": "template", "system": None, "systems": 1,
        "template": export.runlog.digest(tokenizer.chat_template)}))


def test_the_table_of_text_only_classes_is_that_of_transformers():
    """Every model type that has both a class for text alone and one that sees."""
    auto = transformers.models.auto.modeling_auto
    names = {kind: seen for kind, seen in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
             if auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, seen) != seen}
    assert set(names.values()) == set(readers.TEXT_AT)
    for kind, seen in names.items():
        config = zoo.config_of(kind)
        with torch.device("meta"):
            whole = getattr(transformers, seen)(config)
            text = transformers.AutoModelForCausalLM.from_config(config)
        where = readers.published("model.layers.1", {"architectures": [seen]})
        assert type(whole.get_submodule(where)) is type(text.get_submodule("model.layers.1"))


def test_the_table_of_what_peft_takes_for_experts_is_pefts():
    from peft.utils import transformers_weight_conversion as conversion
    mixed = {kind for kind, like in conversion._MODEL_TO_CONVERSION_PATTERN.items()
             if like == "qwen2_moe" and kind == kind.lower()}
    assert mixed == set(readers.PEFT_MIXES)


def test_a_hub_id_tells_its_published_class_by_the_class_that_was_loaded(tmp_path):
    base = toy_folder("qwen3_5", tmp_path / "base", make_tokenizer(QWEN))
    model = load.load_model(base, CPU, torch.float32)
    shutil.rmtree(base)                                  # as of the hub: no config.json at hand
    assert export.base_config("some/base", model)["architectures"] == [
        "Qwen3_5ForConditionalGeneration"]
