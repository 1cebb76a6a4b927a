"""The zoo (tests/zoo.py) through everything that a run does: each model is right or is refused."""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import peft.utils.transformers_weight_conversion as conversion
import pytest
import torch
import zoo

import dataset
from inject import inject, report
from lora import adapter, loss
from lora.base import load, reach
from lora.fast import flat, levers, memory
from lora.generate import Stop, generate, traits
from lora.optim import AdamW
from lora.surgery import adapter_parameters, lora_layers, text_ids, unwrap

LORA = {"r": 4, "lora_alpha": 8}
NEAR = 1e-5


def far(one, other):
    """How far two tensors are apart, relative to the second."""
    return float((one.detach() - other.detach()).norm() / other.detach().norm())


def adapted(name):
    """A toy with an adapter that changes its logits, and the logits of a few tokens before."""
    model = zoo.make(name)
    ids = torch.stack([text_ids(model, 24), text_ids(model, 24).flip(0)])
    base = model(ids).logits
    paths = inject(model, **LORA)
    assert torch.equal(model(ids).logits, base), "step 0 is not the base"
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    assert not torch.equal(model(ids).logits, base)
    return model, paths, ids


def items_of(model):
    """Samples of several lengths that share a beginning, one longer than the toys' windows."""
    ids = text_ids(model, 90).tolist()
    rows = [ids[:20] + ids[30:40], ids[:20] + ids[50:73], ids[:20] + ids[20:88]]
    return [{"input_ids": row, "labels": [-100] * 12 + row[12:]} for row in rows]


@torch.no_grad()
def check_batches(model):
    """padded = one by one = the fast path, or the reason why it is refused."""
    items = items_of(model)
    alone = torch.cat([loss.logits_at(model, dataset.collate([item], 0)) for item in items])
    assert far(loss.logits_at(model, dataset.collate(items, 0)), alone) < NEAR, "padded"
    try:
        flat.enable(model, load.use_attention)
    except flat.Unsupported as reason:
        assert model.config.get_text_config()._attn_implementation != "flat"
        return str(reason)
    labels = torch.tensor([x for item in items for x in item["labels"] if x != -100])
    for share in (True, False):
        batch = flat.flatten(items, share=share)
        order = batch.targets.argsort(stable=True), labels.argsort(stable=True)
        got = loss.logits_at(model, batch)
        for token in labels.unique():                         # equal labels: in any order
            one, other = got[batch.targets == token], alone[labels == token]
            best = torch.cdist(one, other).amin(1) / other.norm(dim=1).max()
            assert float(best.max()) < NEAR, f"the fast path, share={share}"
        assert len(order[0]) == len(order[1])
    return "yes"


def check_generation(model):
    """In a batch = alone; with rows that leave the batch, and a common beginning."""
    traits(model)                                             # refuses a cache that cannot go on
    ids, free = text_ids(model, 40).tolist(), Stop(frozenset())
    prompts = [ids[:10] + ids[20:23], ids[:10] + ids[25:34], ids[:10] + ids[12:16], ids[5:9]]
    alone = [generate(model, [prompt], free, 6)[0] for prompt in prompts]
    assert generate(model, prompts, free, 6) == alone, "generation"
    assert generate(model, prompts[:3], free, 6) == alone[:3], "generation behind a prefix"
    stop = Stop(frozenset({alone[0][1], alone[1][1]}))
    cut = [answer[:next((i for i, x in enumerate(answer) if x in stop.ids), 6)] for answer in alone]
    assert generate(model, prompts, stop, 6) == cut, "generation with rows that end"


def check_training(model):
    """One step changes every B that it should, with the levers on."""
    for layer in lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B)
    settings = type("S", (), {"fused_lora": True, "fused_leaves": True, "checkpointing": False,
                              "layout": "shared", "lean_head": True})
    batch = dataset.collate(items_of(model), 0)
    before = loss.logits_at(model, batch)
    levers.fuse(model, settings)
    assert far(loss.logits_at(model, batch), before) < NEAR, "fused"
    memory.report(model, batch, batch, False, 2, 40)
    lean = levers.head_is_linear(model)
    model.train()
    loss.ce_sum(model, batch, lean)[0].backward()
    silent = [name for name, layer in lora_layers(model).items()
              if layer.lora_B.grad is None or not layer.lora_B.grad.any()]
    assert not silent, f"no gradient: {silent}"
    AdamW(adapter_parameters(model)).step(0.01)
    assert all(layer.lora_B.any() for layer in lora_layers(model).values())


@contextlib.contextmanager
def no_conversion():
    """PEFT without its conversion of names from transformers 4: it takes gate_proj, up_proj and
    down_proj of any MLP for those of routed experts, and renames a few other modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_convert_peft_config_moe", lambda *_: None)
        patch.setattr(conversion, "convert_peft_adapter_state_dict_for_transformers",
                      lambda adapter_state_dict, **_: adapter_state_dict)
        yield


def peft_logits(name, folder, ids):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(zoo.make(name), folder).eval()(input_ids=ids).logits


def check_files(name, model, ids, folder):
    """Save, load, PEFT; how far PEFT is off, or what it does."""
    adapter.save(model, folder, "some/base")
    logits, again = model(ids).logits, zoo.make(name)
    adapter.load(again, folder)
    assert torch.equal(again(ids).logits, logits), "loaded again"
    try:
        off = far(peft_logits(name, folder, ids), logits)
    except Exception as error:
        off = f"{type(error).__name__}: {str(error)[:100]}"
    if isinstance(off, float) and off < NEAR:
        return off
    with no_conversion():
        assert far(peft_logits(name, folder, ids), logits) < NEAR, f"PEFT: {off}"
    return f"PEFT converts names of this architecture: {off}"


@torch.no_grad()
def check_merge(name, model, ids, folder):
    """Merged, written, loaded by lora.base.load: the same logits."""
    logits = model(ids).logits
    for layer in lora_layers(model).values():
        layer.merge()
    assert far(model(ids).logits, logits) < 1e-4, "merged"
    unwrap(model)
    merged = model(ids).logits
    model.save_pretrained(folder)
    if name == "gemma3n":
        return "cannot be loaded here: its vision tower is in the package timm"
    again = load.load_model(str(folder), "cpu", torch.float32)
    assert far(again(ids).logits, merged) < NEAR, "merged and loaded again"
    return "yes"


def check(name):
    """Every check on one toy: what is worth knowing about it. Raises what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        model, paths, ids = adapted(name)
        share, missing = reach.reached(model)
        found = {"adapted": sorted({p.rpartition(".")[2] for p in paths}), "share": round(share, 3),
                 "left_out": missing, "report": report(model, paths)}
        with torch.no_grad():
            found["peft"] = check_files(name, model, ids, Path(folder, "adapter"))
        check_generation(model)
        found["padding"], found["attends"], _ = traits(model)
        found["fast"] = check_batches(model)
        found["lean"] = levers.head_is_linear(model)
        model, _, ids = adapted(name)
        check_training(model)
        model, _, ids = adapted(name)
        found["merge"] = check_merge(name, model, ids, Path(folder, "merged"))
    return found


def outcome(name):
    """check() without exceptions."""
    began = time.perf_counter()
    try:
        return {"status": "right", **check(name), "seconds": time.perf_counter() - began}
    except ValueError as error:
        return {"status": "refused", "reason": str(error)}
    except Exception as error:
        return {"status": "wrong", "reason": f"{type(error).__name__}: {error}"}


# what is refused, and by which words
REFUSED = {
    "cpmant": "CpmAntForCausalLM cannot go on from its cache",
    "molmo2": "`mm_token_type_ids` is required",
    "hrm_text": "HrmTextForCausalLM has none of model.layers",             # two lists of blocks
    "nemotron_h_omni": "does not say which module is its head",
    "paligemma": "sees later tokens"}
# what the fast path is refused for; all others take it
SLOWER = {
    "it has layers of": """
        axk2 bailing_hybrid bamba deepseek_v32 deepseek_v4 dots3_note dots3_note_text
        falcon_h1 falcon_mamba glm5_next glm_moe_dsa granitemoehybrid granitemoehybrid.dense
        hy_v4 inkling2 inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe lfm2_vl
        lfm3 lfm3_vl llama4 llama4_text mamba mamba2 minicpm_ocr minicpmv4_6 minicpmv4_7
        minimax mistral_large4 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma unlimited_ocr zamba
        zamba2 zaya""",
    "its attention is eager": """
        bloom codegen flint gemma2 git gpt_neo gpt_neox_japanese gpt_oss gptj granite_swa
        granitemoe_swa mimo_v2_flash mpt vaultgemma xglm""",
    "does not give the plan to its attention": """
        falcon falcon.new nemotron stablelm""",
    "its logits differ": """
        kosmos-2.5""",
    "its cache is not one of keys": """
        granite4_vision openai-gpt rwkv xlstm""",
    "its forward takes no plan": """
        falcon.alibi""",
    "is not told its window": """
        moshi"""}
# PEFT renames some modules of these while it reads, as transformers does for old checkpoints
RENAMED = "deepseek_ocr2 inkling2 inkling2_text laguna mistral_large4 unlimited_ocr".split()
QUICK = """
llama mistral ministral ministral3 mistral3 mistral3.ministral3 mixtral qwen2 qwen2.sliding qwen3
qwen2_moe qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe
gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified phi phi3 phimoe
gpt2 gptj gpt_neo gpt_neox gpt_bigcode gpt_oss opt bloom codegen falcon falcon.alibi falcon.new
mpt mamba mamba2 falcon_mamba rwkv recurrent_gemma granite granitemoe granitemoeshared
granitemoehybrid granitemoehybrid.dense granite4_vision lfm2 lfm2_moe lfm2_vl deepseek_v2
deepseek_v3 olmo olmo2 olmo3 olmoe flex_olmo smollm3 smolvlm starcoder2 stablelm nemotron
nemotron_h glm glm4 cohere cohere2 helium exaone4 ernie4_5 arcee apertus seed_oss hunyuan_v1_dense
persimmon jamba bamba zamba llama4_text minimax_m2 kimi_linear internvl llava idefics3 aya_vision
dbrx jetmoe internlm3 nanochat doge paligemma hrm_text git openai-gpt
""".split()


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.TOYS])
def test_a_model_is_right_or_refused_in_one_sentence(name):
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as error:
            check(name)
        assert len(str(error.value)) < 300
        return
    found = check(name)
    assert 0 < found["share"] <= 1 and found["report"].count("\n") == 1
    words = next((words for words, names in SLOWER.items() if name in names.split()), "yes")
    assert words in found["fast"]
    if isinstance(found["peft"], str):                        # said where PEFT reads it otherwise
        assert "PEFT takes" in found["report"] or name in RENAMED


def test_the_quick_ones_are_many_and_known():
    assert len(QUICK) >= 75 and {*QUICK} <= {*zoo.TOYS} and {*REFUSED} <= {*zoo.TOYS}


if __name__ == "__main__":
    for one in sys.argv[1:] or zoo.TOYS:
        print(json.dumps({one: outcome(one)}), flush=True)
