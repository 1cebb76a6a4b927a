"""What somebody else's file cannot do: run code, leave its folder, reach the network.

The limits: a chat template runs in transformers' sandbox, which counts range() but not loops inside
loops, and does not bound memory; a model folder that was trusted by name may do anything.
"""

import ast
import contextlib
import io
import json
import os
import shutil
import socket

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_project import ROOT, imported, sources

import dataset
import train
from inject import inject
from lora import adapter, config, surgery
from lora.base import load
from lora.run import runlog

CPU = torch.device("cpu")
RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load",
             "np.load", "numpy.load", "torch.hub.load", "runpy.run_path"}
READS_CODE = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml"}


def calls(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


# ----- code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_source_reads_a_pickle_or_runs_a_text(path):
    assert not READS_CODE & set(imported(path))
    for name, keywords in calls(path):
        assert name not in RUNS_CODE and "shell" not in keywords, f"{path}: {name}"
        if name.endswith(".from_pretrained"):
            assert keywords.get("trust_remote_code", "None") in ("None", "trust_remote_code")
            assert "Model" not in name or keywords["use_safetensors"] == "True"


def test_templates_are_rendered_by_transformers_alone():
    for path in sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.count("jinja2") == text.count("from jinja2 import TemplateError"), path


@pytest.fixture
def with_code(tiny_folder, tmp_path, monkeypatch):
    """A model folder that brings Python code, which would write the file ran."""
    (tiny_folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig, "
        "LlamaForCausalLM, PreTrainedTokenizerFast\nclass Config(LlamaConfig):\n"
        "    model_type = 'own'\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n")
    for name, change in (
            ("config.json", {"model_type": "own", "auto_map": {
                "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}),
            ("tokenizer_config.json", {"tokenizer_class": "Tokenizer", "auto_map": {
                "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}})):
        file = tiny_folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(tmp_path / "m")
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("it was asked for"))
    return tiny_folder


LOADERS = [lambda folder, *trust: load.load_model(folder, CPU, torch.float32, *trust),
           load.load_tokenizer]


@pytest.mark.parametrize("load", LOADERS, ids=["model", "tokenizer"])
def test_code_of_a_model_is_run_only_if_asked_for_by_name(with_code, tmp_path, load):
    with pytest.raises(ValueError, match="(?s)custom code.*not run.*model.trust_remote_code=true"):
        load(str(with_code))
    assert not (tmp_path / "ran").exists() and not config.Config().model.trust_remote_code
    load(str(with_code), True)
    assert (tmp_path / "ran").exists()


# ----- paths -------------------------------------------------------------------------------------


def moved_out(folder, name):
    """Move a file out of its folder and leave a link to it."""
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_a_model_folder_is_refused(tiny_folder, name):
    moved_out(tiny_folder, name)
    with pytest.raises(ValueError, match=f"{name} leads out of the folder, to .*outside"):
        load.load_model(str(tiny_folder), CPU, torch.float32)


def test_a_folder_that_is_a_link_and_the_hubs_cache_are_read(tiny_folder, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    shutil.move(tiny_folder, cache / "snapshots" / "0123")
    shutil.move(cache / "snapshots" / "0123" / "model.safetensors", cache / "blob")
    (cache / "snapshots" / "0123" / "model.safetensors").symlink_to("../../blob")
    tiny_folder.symlink_to(cache / "snapshots" / "0123")
    assert load.load_model(str(tiny_folder), CPU, torch.float32)


@pytest.mark.parametrize("shard", ["../outside", "{}/outside", "x/../../outside"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tiny_folder, shard):
    shutil.move(tiny_folder / "model.safetensors", tiny_folder.parent / "outside")
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "model.norm.weight": shard.format(tiny_folder.parent)}}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        load.load_model(str(tiny_folder), CPU, torch.float32)


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter."""
    model = make_model()
    inject(model, r=2, lora_alpha=4)
    adapter.save(model, tmp_path / "run" / "adapter", "b")
    return tmp_path / "run" / "adapter"


@pytest.mark.parametrize("name", [adapter.WEIGHTS, adapter.CONFIG])
def test_a_link_out_of_an_adapter_is_refused(saved, name):
    moved_out(saved, name)
    with pytest.raises(ValueError, match=f"adapter: .*{name} leads out of the folder"):
        adapter.load(make_model(), saved)


def test_a_link_out_of_a_run_and_a_deeply_nested_run_json_are_refused(saved):
    run = saved.parent
    for name in ("run.json", "config.json"):
        (run / name).write_text("{}")
    assert runlog.read_run(run).adapter == saved
    (run / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="run.json cannot be read: .*recursion"):
        runlog.read_run(run)
    moved_out(run, "adapter")
    with pytest.raises(ValueError, match="run: .*adapter leads out of the folder"):
        runlog.read_run(run)


@pytest.mark.parametrize("run", [
    "", ".", "..", "../x", "a/b", "/tmp/x", "..\\x", "C:x", "a\0b", "a\nb", "x.", "x ", " x", ".x",
    "-x", "~", "x" * 61, "\ud800", "a*", "$HOME", "<b>"])
def test_a_run_is_a_name_and_no_path(tmp_path, run):
    (tmp_path / "c.json").write_text(json.dumps({"train": {"run": run}}))
    with pytest.raises(ValueError, match="train.run is .*; expected a folder name, not a path"):
        config.load(tmp_path / "c.json")


@pytest.mark.parametrize("run", ["r16", "bram+juno", "Übung 2", "你好", "v1.2_b-c", "x" * 60])
def test_names_that_runs_have_are_taken(tmp_path, run):
    (tmp_path / "c.json").write_text(json.dumps({"train": {"run": run}}))
    assert config.load(tmp_path / "c.json").train.run == run


@pytest.mark.parametrize("name", ["__class__", "model.embed_tokens", "model.layers.0.mlp", "", "..",
                                  "model.layers.0.self_attn.q_proj.weight", "model.norm"])
def test_an_adapter_file_touches_nothing_but_linear_layers(saved, name):
    file = saved / adapter.WEIGHTS
    tensors = load_file(file)
    tensors |= {f"{adapter.PREFIX}{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, file)
    model = make_model()
    with pytest.raises(ValueError, match="in the file, not in the model"):
        adapter.load(model, saved)
    assert not surgery.lora_layers(model)


# ----- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}", "{{ messages + 5 }}", "{% nonsense",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}", 5])
def test_a_template_that_breaks_out_or_fails_is_our_error(template):
    example = {"source": "here:1", "messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="here:1: the chat template refuses it|no supervised"):
        dataset.QADataset([example], make_tokenizer(template))


# ----- the network -------------------------------------------------------------------------------


def test_training_reaches_for_no_network(tiny_folder, tmp_path, monkeypatch):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert not os.environ.get("HF_HUB_OFFLINE") and not os.environ.get("TRANSFORMERS_OFFLINE")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (tmp_path / "config.json").write_text(json.dumps({
        "model": {"name": str(tiny_folder), "device": "cpu"}, "data": {"path": "d.jsonl"},
        "train": {"max_steps": 1, "max_new_tokens": 2, "batch_size": 2}}))
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        train.main([])
    assert (tmp_path / "runs" / "demo" / "adapter").is_dir() and not tried
