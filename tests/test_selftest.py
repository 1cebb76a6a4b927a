"""python -m scripts.selftest passes here, and whatever is sabotaged fails in its own row."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import dataset
from lora import adapter, loss
from lora.fast import flat, leaves
from lora.layer import LoRAFunction, LoRALinear
from lora.optim import AdamW
from scripts import selftest

SDPA = F.scaled_dot_product_attention


@pytest.fixture
def check(tmp_path, capsys):
    """check(*arguments): (exit code, names of the rows that failed, what was printed)."""
    (tmp_path / "c.json").write_text("{}")

    def run(*arguments):
        code = selftest.main(["--config", str(tmp_path / "c.json"), "--model.device=cpu",
                              "--model.dtype=float32", *arguments])
        out = capsys.readouterr().out
        return code, [name for name in selftest.CHECKS if f"  FAIL  {name}  " in out], out
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_is_well_here(check, dtype):
    code, failed, out = check(f"--model.dtype={dtype}")
    assert (code, failed) == (0, []) and out.count("\n  ok  ") == len(selftest.CHECKS)
    assert f"selftest: a tiny random Llama in {dtype} on cpu\n" in out
    assert f"torch {torch.__version__}" in out and "all 10 checks passed" in out


def test_a_real_model_by_folder_with_layers_stored_transposed_and_dropout(check, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=272,
                                       bos_token_id=1, eos_token_id=1, initializer_range=0.2))
    model.save_pretrained(tmp_path / "gpt2")
    for option in ("--model", "--model.name"):
        code, failed, out = check(f"{option}={tmp_path / 'gpt2'}")
        assert (code, failed) == (0, []) and f"selftest: {tmp_path / 'gpt2'} in float32" in out


def test_a_real_model_that_takes_no_flat_batches_passes_and_says_so(check, tiny_folder,
                                                                   monkeypatch):
    def enable(model, use_attention):
        raise flat.Unsupported("attention with a softcap")
    monkeypatch.setattr(flat, "enable", enable)
    code, failed, out = check("--model", str(tiny_folder))
    assert (code, failed) == (0, []) and "not flat: attention with a softcap" in out
    assert check()[1] == ["batches"]                          # the tiny one can


def wrong(function, change):
    """The function with its result changed."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def scaled(i, by=1.01):
    """Change entry i of a tuple of gradients by 1 %, where it has one."""
    return lambda results: tuple(by * x if j == i and x is not None else x
                                 for j, x in enumerate(results))


def in_bfloat16_if_large(a, b):
    """As TF32: nobody asked for it."""
    if a.shape == b.shape == (256, 256) and a.dtype == torch.float32:
        return torch.matmul(a.bfloat16(), b.bfloat16()).float()
    return torch.matmul(a, b)


def starts_at(value, init=LoRALinear.__init__):
    def start(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.lora_B.data.fill_(value)
    return start


def positions_go_on(items, device, share, flatten=flat.flatten):
    """As if a batch were one text: a sample does not start at 0."""
    batch = flatten(items, device, share)
    depth = batch.inputs["position_ids"]
    depth.copy_(torch.arange(depth.shape[1]))
    return batch


def looks_ahead(q, k, v, is_causal=False, **kwargs):
    """A few roundings of the next token, where nothing is padded."""
    out = SDPA(q, k, v, is_causal=is_causal, **kwargs)
    return out + 2e-7 * out.roll(-1, -2) if is_causal and q.shape[2] > 1 else out


def four_queries_one_mask(q, k, v, is_causal=False, attn_mask=None, **kwargs):
    """pytorch issue 195910, on float32."""
    if is_causal and q.dtype == torch.float32:
        last = torch.arange(q.shape[2])[:, None] // 4 * 4 + 3
        attn_mask, is_causal = torch.arange(k.shape[2]) <= last, False
    return SDPA(q, k, v, is_causal=is_causal, attn_mask=attn_mask, **kwargs)


def nan_for_nothing(q, k, v, attn_mask=None, **kwargs):
    """A query that sees no key."""
    out = SDPA(q, k, v, attn_mask=attn_mask, **kwargs)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        out = out.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)
    return out


def wrong_decoding(q, k, v, **kwargs):
    """Few queries over many keys have a kernel of their own on MPS."""
    return SDPA(q, k, v, **kwargs) * (1.01 if q.shape[2] < 8 < k.shape[2] else 1)


def without_the_last(tensors, *metadata, save=adapter.serialise):
    return save(dict(list(tensors.items())[:-1]), *metadata)


def rounded(tensors, *metadata, save=adapter.serialise):
    return save({k: v.bfloat16().float() for k, v in tensors.items()}, *metadata)


def subtract(self):
    self.base_layer.weight.data -= self.delta_weight()
    self._frozen = None


def recomputed_otherwise(function, x, *args, checkpoint=torch.utils.checkpoint.checkpoint, **how):
    """As a dropout mask that is not the same again."""
    factors = iter((1, 1.1))
    return checkpoint(lambda x, *args: function(x * next(factors), *args), x, *args, **how)


def backward(change, function):
    return staticmethod(wrong(function.backward, change))


MODELING = transformers.modeling_utils
SABOTAGE = {
    "products rounded": ("matmul", torch.Tensor, "__matmul__", in_bfloat16_if_large),
    "B not zero": ("step 0 is the base", LoRALinear, "__init__", starts_at(1e-3)),
    "dx off": ("gradients by hand", LoRAFunction, "backward", backward(scaled(0), LoRAFunction)),
    "dA off": ("gradients by hand", LoRAFunction, "backward", backward(scaled(3), LoRAFunction)),
    "dB off": ("gradients by hand", LoRAFunction, "backward", backward(scaled(4), LoRAFunction)),
    "head off": ("gradients by hand", loss.LabelledCE, "backward",
                 backward(scaled(0), loss.LabelledCE)),
    "norm off": ("gradients by hand", leaves.RMSNorm, "backward",
                 backward(scaled(0), leaves.RMSNorm)),
    "gate off": ("gradients by hand", leaves.Gate, "backward",
                 backward(scaled(0), leaves.Gate)),
    "flat positions": ("batches", dataset, "flatten", positions_go_on),
    "flat paths": ("batches", flat.pieces, "calls",
                   wrong(flat.pieces.calls, lambda calls: [call for call in calls if call[2]])),
    "a leak": ("causality", F, "scaled_dot_product_attention", looks_ahead),
    "nan": ("answering", F, "scaled_dot_product_attention", nan_for_nothing),
    "cache": ("answering", F, "scaled_dot_product_attention", wrong_decoding),
    "tensor lost": ("save and load", adapter, "serialise", without_the_last),
    "saved rounded": ("save and load", adapter, "serialise", rounded),
    "merged off": ("merge and unmerge", LoRALinear, "delta_weight",
                   wrong(LoRALinear.delta_weight, lambda delta: 1.01 * delta)),
    "unmerged by subtraction": ("merge and unmerge", LoRALinear, "unmerge", subtract),
    "computed otherwise": ("checkpointing", MODELING, "checkpoint", recomputed_otherwise),
    "uphill": ("ten steps", AdamW, "step", lambda self, lr, step=AdamW.step: step(self, -lr)),
    "nan loss": ("ten steps", AdamW, "step",
                 lambda self, lr, step=AdamW.step: step(self, torch.nan))}


@pytest.mark.parametrize("what", SABOTAGE)
def test_what_is_wrong_fails_in_its_row_and_no_other(check, monkeypatch, what):
    row, *patch = SABOTAGE[what]
    monkeypatch.setattr(*patch)
    code, failed, out = check()
    assert (code, failed) == (1, [row]), out
    assert "1 of 10 checks failed; send all of this" in out
    assert out.count(f"        {selftest.CHECKS[row][1]}\n") == 1


def test_the_bug_of_mps_is_found(check, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", four_queries_one_mask)
    assert {"batches", "causality"} <= set(check()[1])


def test_a_check_that_raises_is_a_row_and_the_others_go_on(check, monkeypatch):
    def no_backward(ctx, *gradients):
        raise RuntimeError("not implemented for this device\nlong story")
    monkeypatch.setattr(LoRAFunction, "backward", staticmethod(no_backward))
    code, failed, out = check()
    assert code == 1 and failed == ["gradients by hand", "batches", "checkpointing", "ten steps"]
    assert "RuntimeError: not implemented for this device" in out and "long story" not in out


def test_settings_that_do_not_exist_are_an_error(check):
    with pytest.raises(ValueError, match="--model.devise: unknown.*did you mean --model.device"):
        check("--model.devise=cpu")
