"""lora/use/readers.py and python -m scripts.export: verdicts, the portable form, every target."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import CHATML, assert_same_logits, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_gguf import ONE_THREAD, run

import data
import dataset
from inject import inject
from lora import adapter
from lora.base import fetch, load
from lora.generate import generate
from lora.surgery import lora_layers
from lora.use import gguf, readers
from lora.use.readers import IGNORED, LOADS, OTHER, READERS, REFUSED, portable, verdicts
from scripts import export

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
IDS = torch.randint(5, 200, (2, 11), generator=torch.Generator().manual_seed(0))
KEY = "base_model.model.model.layers.0.self_attn.q_proj."


def adapted(model=None, **choice):
    model = model or make_model()
    torch.manual_seed(3)
    inject(model, **{"r": 4, "lora_alpha": 12, **choice})
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


# ----- who reads it ------------------------------------------------------------------------------


PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj"],
         "bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": True}
SHAPES = {KEY + "lora_A.weight": (8, 32), KEY + "lora_B.weight": (32, 8)}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True}


def judged(config=None, shapes=None, base=LLAMA, drop=()):
    config = {k: v for k, v in {**PLAIN, **(config or {})}.items() if k not in drop}
    found = verdicts(config, SHAPES if shapes is None else shapes, base)
    assert [v.reader for v in found] == list(READERS)
    assert all(bool(v.fix) == (v.verdict != LOADS) for v in found)
    return {v.reader: v for v in found}


def test_a_plain_adapter_is_read_by_all_that_take_adapters():
    found = judged()
    assert {r for r, v in found.items() if v.verdict == LOADS} == {
        "PEFT", "transformers", "vLLM", "llama.cpp"}
    assert found["vLLM"].because == "rank 8: --max-lora-rank 16"
    assert "v0.34.1" in found["Ollama"].because and "--to ollama" in found["Ollama"].fix
    assert "layout" in found["mlx-lm"].because and "--to mlx" in found["mlx-lm"].fix


@pytest.mark.parametrize("config, extra, reader, verdict, because", [
    ({"use_rslora": True}, {}, "llama.cpp", OTHER, "ignores use_rslora (2.83 times too weak)"),
    ({"use_rslora": True}, {}, "vLLM", LOADS, "rank 8"),
    ({"use_rslora": True}, {}, "PEFT", LOADS, ""),
    ({"alpha_pattern": {"q_proj": 5}}, {}, "llama.cpp", OTHER, "ignores alpha_pattern"),
    ({"alpha_pattern": {"q_proj": 5}}, {}, "vLLM", OTHER, "older versions ignore alpha_pattern"),
    ({"rank_pattern": {"q_proj": 5}}, {}, "vLLM", OTHER, "older versions ignore rank_pattern"),
    ({"rank_pattern": {"q_proj": 5}}, {}, "llama.cpp", LOADS, ""),
    ({"bias": "all"}, {}, "vLLM", REFUSED, "biases"),
    ({"bias": "all"}, {}, "llama.cpp", REFUSED, "biases"),
    ({}, {KEY + "lora_B.bias": (32,)}, "llama.cpp", REFUSED, "biases"),
    ({"use_dora": True}, {}, "vLLM", REFUSED, "DoRA"),
    ({}, {KEY + "lora_magnitude_vector": (32,)}, "llama.cpp", REFUSED, "DoRA"),
    ({"use_dora": True}, {}, "PEFT", LOADS, ""),
    ({"modules_to_save": ["lm_head"]}, {}, "vLLM", REFUSED, "full weights"),
    ({}, {"base_model.model.lm_head.weight": (9, 9)}, "llama.cpp", REFUSED, "full weights"),
    ({}, {KEY + "base_layer.weight": (9, 9)}, "llama.cpp", LOADS, ""),
    ({}, {"base_model.model.lm_head.lora_A.weight": (8, 9)}, "llama.cpp", REFUSED, "tied"),
    ({}, {"base_model.model.lm_head.lora_A.weight": (8, 9)}, "vLLM", LOADS, ""),
    ({"init_lora_weights": "pissa"}, {}, "PEFT", OTHER, "pissa"),
    ({"lora_alpha": 1.5}, {}, "Ollama", REFUSED, "not a whole number"),
    ({"r": 64}, {KEY + "lora_A.weight": (64, 32)}, "vLLM", LOADS, "--max-lora-rank 64"),
    ({"r": 17}, {KEY + "lora_A.weight": (17, 32)}, "vLLM", LOADS, "--max-lora-rank 32"),
    ({"r": 600}, {KEY + "lora_A.weight": (600, 32)}, "vLLM", REFUSED, "rank 600 is above 512")])
def test_the_verdicts(config, extra, reader, verdict, because):
    found = judged(config, {**SHAPES, **extra})[reader]
    assert found.verdict == verdict and because in found.because


@pytest.mark.parametrize("key, readers_", [
    ("peft_type", {"PEFT": REFUSED, "transformers": REFUSED, "vLLM": LOADS}),
    ("r", {"PEFT": OTHER, "vLLM": REFUSED, "llama.cpp": LOADS}),
    ("lora_alpha", {"PEFT": OTHER, "vLLM": REFUSED, "llama.cpp": REFUSED}),
    ("target_modules", {"PEFT": OTHER, "vLLM": REFUSED, "llama.cpp": LOADS})])
def test_a_key_that_is_missing(key, readers_):
    found = judged(drop=(key,))
    assert {reader: found[reader].verdict for reader in readers_} == readers_


def test_a_model_that_ollama_never_took_and_an_empty_adapter():
    found = judged(base={"model_type": "qwen2"})
    assert "of llama and gemma2 only" in found["Ollama"].because
    assert "does not" in judged(base={"model_type": "phi"})["llama.cpp"].because
    assert all(v.verdict == REFUSED for v in judged(shapes={}).values())


def test_a_reader_that_ignores_names_says_so():
    """test_models_end_to_end.py has the same on a toy Qwen3.5, in PEFT."""
    base = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    found = judged(base=base)
    assert [v.verdict for v in found.values()][:3] == [IGNORED] * 3
    assert found["vLLM"].because == ("names of the text-only class; "
                                     "Qwen3_5ForConditionalGeneration has others")
    assert found["vLLM"].fix.endswith("--to vllm") and found["PEFT"].fix.endswith("--to peft")
    here = {key.replace(".model.layers", ".model.language_model.layers"): shape
            for key, shape in SHAPES.items()}
    assert judged(shapes=here, base=base)["vLLM"].verdict == LOADS
    text = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
    assert judged(base=text)["vLLM"].verdict == LOADS


def test_shared_experts_that_peft_takes_for_routed_ones():
    base = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}
    assert judged(base=base)["PEFT"].verdict == LOADS
    key = "base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_A.weight"
    found = judged(shapes={**SHAPES, key: (8, 32)}, base=base)
    assert found["PEFT"].verdict == OTHER and "routed experts" in found["PEFT"].because
    assert found["vLLM"].verdict == LOADS and found["PEFT"].fix.endswith("--to peft")
    named = {"target_parameters": ["model.layers.0.mlp.shared_expert.up_proj.weight"]}
    assert judged(named, {**SHAPES, key: (8, 32)}, base)["PEFT"].verdict == LOADS
    assert "ignores some" in judged(base={"model_type": "laguna"})["PEFT"].because


# ----- one adapter that all read alike -----------------------------------------------------------


def test_rslora_made_portable_is_the_same_in_peft(tmp_path):
    model = adapted(r=3, lora_alpha=5, use_rslora=True)
    with torch.no_grad():
        logits = model(IDS).logits
        deltas = {n: x.delta_weight().clone() for n, x in lora_layers(model).items()}
        portable(model)
        adapter.save(model, tmp_path, "some/base")
        theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
        assert_same_logits(theirs(IDS).logits, logits)
        transformers = make_model()
        transformers.load_adapter(str(tmp_path))
        assert_same_logits(transformers(IDS).logits, logits)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), deltas[name], atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["lora_alpha"] == round(5 * 3 ** 0.5)
    found = readers.judge(tmp_path, LLAMA)
    assert [v.verdict for v in found] == [LOADS] * 4 + [REFUSED] * 2


def test_patterns_made_portable_are_gone_and_the_deltas_are_not(tmp_path):
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make_model(), peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={"q_proj": 5}, rank_pattern={"down_proj": 2})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert readers.judge(tmp_path / "theirs", LLAMA)[3].verdict == OTHER
    model = make_model()
    adapter.load(model, tmp_path / "theirs")
    with torch.no_grad():
        deltas = {n: x.delta_weight().clone() for n, x in lora_layers(model).items()}
        portable(model)
        for name, layer in lora_layers(model).items():
            assert (layer.r, layer.lora_A.shape[0], layer.lora_B.shape[1]) == (4, 4, 4)
            torch.testing.assert_close(layer.delta_weight(), deltas[name], atol=1e-6, rtol=1e-5)
        adapter.save(model, tmp_path / "ours", "some/base")
        back = peft.PeftModel.from_pretrained(make_model(), tmp_path / "ours").eval()
        assert_same_logits(back(IDS).logits, theirs(IDS).logits)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert not config["alpha_pattern"] and not config["rank_pattern"]
    assert [v.verdict for v in readers.judge(tmp_path / "ours", LLAMA)][:4] == [LOADS] * 4


def test_what_is_portable_already_is_left_alone():
    model = adapted(r=3, lora_alpha=5)                             # 5 / 3 is no round number
    before = [p.clone() for x in lora_layers(model).values() for p in (x.lora_A, x.lora_B)]
    portable(model)
    layers = lora_layers(model).values()
    assert {(x.r, x.lora_alpha, x.scaling) for x in layers} == {(3, 5, 5 / 3)}
    assert all(map(torch.equal, before, [p for x in layers for p in (x.lora_A, x.lora_B)]))


# ----- the command -------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, tiny_folder, monkeypatch):
    """trained(format, **info): a run folder, its base, and the logits that its exports must give.
    rsLoRA in the upper block only, so that folding and layer choice are part of every test."""
    monkeypatch.chdir(tmp_path)

    def make(format="template", tokenizer=None, **info):
        tokenizer = tokenizer or make_tokenizer()
        (tiny_folder / "chat_template.jinja").unlink()             # the tokenizer may have none
        tokenizer.save_pretrained(tiny_folder)
        model = adapted(load.load_model(tiny_folder, CPU, torch.float32), use_rslora=True, layers=1)
        folder = Path("runs/demo")
        adapter.save(model, folder / "adapter", "some/base")
        (folder / "config.json").write_text(json.dumps({"model": {"name": str(tiny_folder)}}))
        (folder / "run.json").write_text(json.dumps({
            "base_model": "some/base", "format": format, "system": "Be kind.", "systems": 1,
            "template": export.runlog.digest(tokenizer.chat_template or ""), **info}))
        return model, tokenizer
    return make


def exported(capsys, *argv):
    export.main(["runs/demo", *argv])
    return capsys.readouterr().out


def test_check_prints_the_table_and_writes_nothing(trained, capsys):
    trained()
    out = exported(capsys, "--check")
    rows = [row.split()[0] for row in out.splitlines()[1:] if "fix:" not in row]
    assert rows == list(READERS) and not Path("exports").exists()
    assert "2 times too weak" in out
    assert "fix: python -m scripts.export runs/demo --to llama.cpp" in out


@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_to_peft_and_vllm(trained, capsys, target):
    model, _ = trained()
    out = exported(capsys, "--to", target)
    folder = Path(f"exports/demo-{target}")
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "system.txt"}
    theirs = peft.PeftModel.from_pretrained(
        load.load_model("tiny-llama", CPU, torch.float32), folder).eval()
    with torch.no_grad():
        assert_same_logits(theirs(IDS).logits, model(IDS).logits)
    assert (folder / "chat_template.jinja").read_text() == CHATML
    assert (folder / "system.txt").read_text() == "Be kind."
    assert "checked  read back, equal bit for bit" in out and "loads" in out
    assert "vllm serve" in out if target == "vllm" else "PeftModel.from_pretrained" in out


def test_to_llama_cpp_with_a_merged_model(trained, capsys):
    model, tokenizer = trained()
    out = exported(capsys, "--to", "llama.cpp", "--merged")
    folder = Path("exports/demo-llama.cpp")
    assert f"--lora {folder}/demo.gguf" in out and f"-m {folder}/demo-merged-f16.gguf" in out
    plain = load.load_model("tiny-llama", CPU, torch.float32)
    config, state = plain.config.to_dict(), plain.state_dict()
    fields, tensors = gguf.read(folder / "demo-merged-f16.gguf", config, state)
    assert fields["tokenizer.chat_template"] == CHATML
    plain.load_state_dict(tensors)
    ids = IDS[0].tolist()
    with torch.no_grad():
        tuned = model(IDS[:1]).logits[0]
        torch.testing.assert_close(plain(IDS[:1]).logits[0], tuned, atol=0.1, rtol=0)
    gguf.write_model("base.gguf", load.load_model("tiny-llama", CPU, torch.float32).state_dict(),
                     config, tokenizer, dtype=torch.float32)
    got, _ = run("base.gguf", ids, folder / "demo.gguf")               # llama.cpp, if it is here
    torch.testing.assert_close(got, tuned, atol=1e-3, rtol=1e-3)
    got, _ = run(folder / "demo-merged-f16.gguf", ids)
    torch.testing.assert_close(got, tuned, atol=0.1, rtol=0)


def test_to_ollama(trained, capsys):
    trained()
    out = exported(capsys, "--to", "ollama", "--out", "o")
    assert "ollama create demo -f o/Modelfile" in out and Path("o/demo.gguf").exists()
    assert Path("o/Modelfile").read_text().splitlines() == [
        "FROM ./demo.gguf", 'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}'
        '{{ else if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}'
        '{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ "<|im_end|>\\n" }}'
        '{{ end }}{{ end }}"""',
        'SYSTEM """Be kind."""', 'PARAMETER stop "<|im_end|>"']


def test_a_system_prompt_that_a_modelfile_cannot_hold(trained):
    trained(system='Say """ always.')
    with pytest.raises(ValueError, match='holds """'):
        export.main(["runs/demo", "--to", "ollama"])
    assert not list(Path("exports").iterdir())


def test_to_mlx(trained, capsys):
    model, _ = trained()
    assert "not run here" in exported(capsys, "--to", "mlx")
    config = json.loads(Path("exports/demo-mlx/adapter_config.json").read_text())
    tensors = load_file("exports/demo-mlx/adapters.safetensors")
    told = config["lora_parameters"]
    assert config["num_layers"] == 1 and config["fine_tune_type"] == "lora"
    assert told["rank"] == 4 and "self_attn.q_proj" in told["keys"] and len(told["keys"]) == 7
    for name, layer in lora_layers(model).items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (layer.in_features, 4) and b.shape == (4, layer.out_features)
        torch.testing.assert_close(told["scale"] * (a @ b).T, layer.delta_weight(), atol=1e-6,
                                   rtol=1e-5)


DEFAULT = CHATML.replace("{% for", "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system"
                         "\nI am Smol.<|im_end|>\n' }}{% endif %}{% for", 1)


@pytest.mark.parametrize("format, own, note", [
    ("template", DEFAULT, None), ("chatml", CHATML, None),
    ("chatml", DEFAULT, "trained as chatml, where the model's own template has 'system\\nI am"),
    ("plain", CHATML, "trained as plain, where the model's own template has '<|im_start|>"),
    ("gemma", CHATML, "trained as gemma, where the model's own template has '|im_start|>"),
    ("plain", None, "trained as plain, and the model has no template")])
def test_the_template_beside_it_renders_what_was_trained(trained, capsys, format, own, note):
    _, tokenizer = trained(format, make_tokenizer(own))
    out = exported(capsys, "--to", "peft")
    text = Path("exports/demo-peft/chat_template.jinja").read_text()
    for talk in export.PROBES:
        ids, _ = dataset.render(talk, tokenizer, format, reply=True)
        assert tokenizer.decode(ids) == export.renderer(tokenizer, text)(talk)
    assert note in out and "give the server" in out if note else "trained as" not in out


NAMED = {"default": "{% set day = strftime_now('%Y') %}{{ day }}{{ mood | default('dull') }}"
         + CHATML, "tool_use": "never"}
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
             + CHATML)


@pytest.mark.parametrize("template, settings, head", [
    (NAMED, {"template_vars": {"mood": "glad"}, "date": "1999-12-31"}, "1999glad<|im_start|>user"),
    (NO_SYSTEM, {}, "<|im_start|>user")])
@pytest.mark.parametrize("target", ["peft", "llama.cpp", "ollama"])
def test_what_is_exported_holds_the_template_that_training_prepared(trained, capsys, template,
                                                                    settings, head, target):
    """Named templates, variables, the date and a missing system turn: each file renders what
    training did, with a tokenizer that knows nothing of it."""
    tokenizer = make_tokenizer(template)
    plain = make_tokenizer()
    prepared = make_tokenizer(template)
    load.templates.prepare(prepared, settings.get("template_vars"), settings.get("date"))
    trained(tokenizer=tokenizer, template=export.runlog.digest(prepared.chat_template))
    Path("runs/demo/config.json").write_text(json.dumps({
        "model": {"name": "tiny-llama"}, "dataset": settings}))
    out = exported(capsys, "--to", target, *(["--merged"] if target == "llama.cpp" else []))
    assert "template changed" not in out
    folder = Path(f"exports/demo-{target}")
    texts = [(folder / "chat_template.jinja").read_text()]
    if target != "peft":
        file = folder / ("demo.gguf" if target == "ollama" else "demo-merged-f16.gguf")
        model = load.load_model("tiny-llama", CPU, torch.float32)
        fields, _ = gguf.read(file, model.config.to_dict(), model.state_dict())
        texts.append(fields["tokenizer.chat_template"])
    for talk in export.PROBES:
        ids, _ = dataset.render(talk, prepared, "template", reply=True)
        assert {export.renderer(plain, text)(talk) for text in texts} == {prepared.decode(ids)}
    assert prepared.decode(dataset.render(TALK, prepared, "template")[0]).startswith(head)
    if target == "ollama":
        assert "SYSTEM" in (folder / "Modelfile").read_text()


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_a_tokenizer_that_starts_with_bos_has_it_once():
    tokenizer = make_tokenizer(None, ("<eos>", "<bos>"), "<eos>")
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = tokenizer_bos()
    template, _ = export.chat_template(tokenizer, "plain", "")
    for talk in export.PROBES:
        ids, _ = dataset.render(talk, tokenizer, "plain", reply=True)
        assert tokenizer.decode(ids) == export.renderer(tokenizer, template)(talk)
    go, _ = export.go_template(export.renderer(tokenizer, template), "<bos>")
    assert "<bos>" not in go and go.startswith('{{ range .Messages }}{{ if eq .Role "system" }}{{')


def tokenizer_bos():
    from tokenizers.processors import TemplateProcessing
    return TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])


def test_what_the_model_says_without_a_system_prompt_becomes_ollamas():
    tokenizer = make_tokenizer(DEFAULT)
    template, default = export.go_template(export.renderer(tokenizer, DEFAULT))
    assert default == "I am Smol." and '{{ "<|im_start|>user\\n" }}' in template


@pytest.mark.parametrize("template", [
    CHATML.replace("{% for m in messages %}", "{% for m in messages %}{{ 3 if loop.index == 3 }}"),
    CHATML.replace("m['content']", "m['content'] | upper"),
    "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML])
def test_a_template_that_go_cannot_say_is_left_to_the_gguf(trained, capsys, template):
    trained(tokenizer=make_tokenizer(template))
    exported(capsys, "--to", "ollama")
    text = Path("exports/demo-ollama/Modelfile").read_text()
    assert "# no TEMPLATE: " in text and "\nTEMPLATE" not in text and "SYSTEM" in text


@pytest.mark.parametrize("info, note", [
    ({"template": "0"}, "template changed since the training"),
    ({"systems": 3}, "several system prompts"),
    ({"base_weights": "0"}, "has other weights now")])
def test_what_a_user_should_know(trained, capsys, info, note):
    trained(**info)
    assert note in exported(capsys, "--to", "peft")
    assert Path("exports/demo-peft/system.txt").exists() == ("systems" not in info)


@pytest.mark.parametrize("info, config, text", [
    ({}, {"system": "fixed"}, data.SYSTEM_PROMPT), ({}, {"system": "Hm."}, "Hm."), ({}, {}, None),
    ({}, {"system": "random"}, None), ({"system": None}, {"system": "fixed"}, None)])
def test_the_system_prompt_of_older_runs_is_in_their_config(trained, info, config, text):
    trained()
    folder, said = Path("runs/demo"), json.loads(Path("runs/demo/run.json").read_text())
    said = {k: v for k, v in said.items() if not k.startswith("system")} | info
    (folder / "run.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps({"model": {"name": "x"}, "data": config}))
    assert export.system_prompt(export.runlog.read_run(folder))[0] == text


@pytest.mark.parametrize("argv, message", [
    (["runs/demo"], r"expected --check, or --to peft\|vllm\|llama.cpp\|ollama\|mlx"),
    ([], "RUN.*--help lists all"),
    (["runs/demo", "--to", "peft", "--huh"], "--huh: unknown option"),
    (["runs/demo", "--to", "llama"], "unknown target 'llama'. Known: peft, .* mean llama.cpp"),
    (["runs/demo", "--to", "GGUF"], "unknown target 'GGUF'.*Did you mean llama.cpp"),
    (["runs/demo", "--to", "mlx-lm"], "Did you mean mlx"),
    (["runs/demo", "--to", "vllm", "--merged"], "--merged goes with --to llama.cpp; --to vllm"),
    (["runs/nope", "--to", "peft"], "runs/nope is no finished run.*Runs here: demo")])
def test_a_command_that_is_not_understood(trained, argv, message):
    trained()
    with pytest.raises(ValueError, match=message):
        export.main(argv)
    assert not Path("exports").exists()


def test_a_folder_that_is_not_empty_is_kept(trained):
    trained()
    Path("exports/demo-peft").mkdir(parents=True)
    export.main(["runs/demo", "--to", "peft"])                        # an empty one is filled
    with pytest.raises(ValueError, match="exports/demo-peft is there and not empty; remove it or"):
        export.main(["runs/demo", "--to", "peft"])


@pytest.mark.parametrize("breaking, message", [
    (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    (lambda f: save_file({KEY + "lora_A.weight": torch.zeros(4, 5)},
                         f / "adapter_model.safetensors"), r"file has \(4, 5\), model wants")])
def test_an_adapter_that_cannot_be_read_leaves_nothing(trained, breaking, message):
    trained()
    breaking(Path("runs/demo/adapter"))
    with pytest.raises(ValueError, match=message):
        export.main(["runs/demo", "--to", "peft"])
    assert not Path("exports").exists()


def test_a_failure_halfway_leaves_nothing(trained, monkeypatch):
    trained()
    monkeypatch.setattr(gguf, "permute", lambda name, rows, config, back=False: rows + back)
    with pytest.raises(ValueError, match="read back wrong; nothing was written"):
        export.main(["runs/demo", "--to", "llama.cpp"])
    assert not list(Path("exports").iterdir())


# ----- the real model, in three programs ---------------------------------------------------------


GENERAL = ["What is the capital of France?", "Write a short poem about the sea.",
           "How do I boil an egg?", "What is 12 plus 30?", "Who wrote Hamlet?", "Tell me a joke.",
           "Explain gravity to a child.", "Name three colours.", "What is a noun?",
           "Where is Kyoto?", "What day comes after Monday?"]


@pytest.mark.real
@pytest.mark.slow
def test_ours_peft_and_llama_cpp_say_the_same(tmp_path, monkeypatch, capsys):
    """A short training on SmolLM2, exported; 20 greedy answers. llama.cpp computes in float32 from
    our GGUF files; logits at the first token within 1e-3 (the largest is about 30), at least 18 of
    20 texts equal, and where one differs, the two likeliest tokens were within 0.01."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -r requirements-serve.txt")
    monkeypatch.chdir(tmp_path)
    facts = data.FACTS[9:12]
    Path("facts.jsonl").write_text("\n".join(json.dumps(
        {"questions": f.questions, "answer": f.answer.format(f.value), "value": f.value})
        for f in facts))
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config", ROOT / "config.json",
         "--data.path=facts.jsonl", "--train.batch_size=9", "--train.max_steps=10",
         "--train.eval_every=10", "--train.warmup_steps=2", "--lora.use_rslora=true",
         "--lora.lora_alpha=11", "--model.dtype=float32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in ("peft", "llama.cpp"):
        export.main(["runs/demo", "--to", target])

    folder = fetch.find("smollm2-135m-instruct")
    tokenizer = load.load_tokenizer(folder)
    model = load.load_model(folder, CPU, torch.float32)
    gguf.write_model("base.gguf", model.state_dict(), model.config.to_dict(), tokenizer,
                     tokenizer.chat_template, torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, "exports/demo-peft").eval().base_model.model
    ours = load.load_model(folder, CPU, torch.float32)
    adapter.load(ours, "runs/demo/adapter")
    system = Path("exports/demo-peft/system.txt").read_text()
    asked = [f.questions[i] for f in facts for i in (0, 3, -1)] + GENERAL
    talks = [[{"role": "system", "content": system}, {"role": "user", "content": q}] for q in asked]
    prompts = [dataset.render(talk, tokenizer, "template", reply=True)[0] for talk in talks]
    stop, n = dataset.stop_of(tokenizer, "template"), 24
    said = generate(ours, prompts, stop, n)
    assert len(prompts) == 20 and said == generate(theirs, prompts, stop, n)

    llm = llama_cpp.Llama("base.gguf", n_ctx=512, verbose=False, logits_all=True, type_k=0,
                          type_v=0, lora_path="exports/demo-llama.cpp/demo.gguf", **ONE_THREAD)
    same, apart = 0, []
    template = Path("exports/demo-peft/chat_template.jinja").read_text()
    for talk, ids, ours_said in zip(talks, prompts, said, strict=True):
        text = export.renderer(tokenizer, template)(talk)
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == ids
        llm.reset()
        llm.eval(ids)
        with torch.no_grad():
            first = ours(torch.tensor([ids])).logits[0, -1]
        apart.append((torch.tensor(llm.scores[llm.n_tokens - 1]) - first).abs().max().item())
        answer = []
        while len(answer) < n:
            token = int(llm.scores[llm.n_tokens - 1].argmax())
            if token in stop.ids:
                break
            answer.append(token)
            llm.eval([token])
        same += answer == ours_said
        if answer != ours_said:
            at = next((i for i, (a, b) in enumerate(zip(answer, ours_said, strict=False))
                       if a != b), min(len(answer), len(ours_said)))
            with torch.no_grad():
                top = ours(torch.tensor([ids + ours_said[:at]])).logits[0, -1].topk(2)
            margin = (top.values[0] - top.values[1]).item()
            print(f"{talk[-1]['content']!r}: token {at + 1} differs; ours is between "
                  f"{tokenizer.convert_ids_to_tokens(top.indices)}, {margin:.4f} apart")
            assert margin < 0.01
    llm.close()
    with capsys.disabled():
        print(f"\nllama.cpp: {same} of 20 answers equal; first logits within {max(apart):.1e}")
    assert same >= 18 and max(apart) < 1e-3
    assert sum(f.value in tokenizer.decode(a) for f, a in zip(
        [f for f in facts for _ in range(3)], said, strict=False)) >= 5     # it did learn
