"""
Check that the numbers are right on this machine. Send its output with the report of a bug.

    python -m scripts.selftest                                   # a tiny random Llama, seconds
    python -m scripts.selftest --model.device=cpu --model.dtype=bfloat16
    python -m scripts.selftest --model smollm2-135m-instruct     # the same on a real model, minutes

Some kernels compute wrong numbers silently. It reads no data (scripts/doctor.py does) and no run
(scripts/verify.py does), and of config.json model.device and model.dtype. Exit code 1 if a check
fails. The gradient of a real model in float64 needs 8 bytes a parameter on the CPU.
"""

import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

import dataset
from inject import inject
from lora import adapter, loss, surgery
from lora.base import fetch, load
from lora.fast import flat, leaves, levers
from lora.optim import AdamW
from lora.run import cli, runlog

Make = Callable[..., torch.nn.Module]           # make(device, dtype): a fresh base model
Outcome = tuple[bool, str, str]                 # (ok, measured, bound)


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__, settings=True)
    parser.add_argument("--model", dest="model.name", metavar="NAME",
                        help="a known model, folder or hub id instead of the tiny one")
    options = parser.parse_args(argv)
    settings = cli.settings_of(options).model
    device = load.pick_device(settings.device)
    dtype = load.pick_dtype(settings.dtype, device)
    name = vars(options)["model.name"]
    folder = fetch.find(name) if name else None

    def make(device=device, dtype=dtype):
        return load.load_model(folder, device, dtype) if folder else load.tiny_model(device, dtype)
    info = runlog.run_info()
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"selftest: {name or 'a tiny random Llama'} in "
          f"{str(dtype).removeprefix('torch.')} on {device}{gpu}\n"
          f"  {info['machine']}; commit {info['commit']}; python {info['python']}, "
          + ", ".join(map(" ".join, info["versions"].items())))
    failed = 0
    for name, (check, hint) in CHECKS.items():
        try:
            ok, measured, bound = check(make)
        except Exception as error:                            # a failed row; the others still run
            ok, bound = False, "no error"
            measured = f"{type(error).__name__}: {error}".split("\n")[0]
        failed += not ok
        print(f"  {'ok  ' if ok else 'FAIL'}  {name:22}  {measured:44}  {bound}"
              + ("" if ok else f"\n        {hint}"))
    print(f"selftest: {failed} of {len(CHECKS)} checks failed; send all of this with your report"
          if failed else f"selftest: all {len(CHECKS)} checks passed")
    return int(failed > 0)


# ----- what the checks share ---------------------------------------------------------------------


def adapted(make: Make) -> torch.nn.Module:
    """Make a model with an adapter whose A and B are random, the same on every device."""
    model, random = make(), torch.Generator().manual_seed(0)
    inject(model, r=8, lora_alpha=16)
    with torch.no_grad():
        for p in surgery.adapter_parameters(model):
            p.copy_(0.05 * torch.randn(p.shape, generator=random))
    return model


def random_ids(model, b: int = 1, t: int = 90) -> torch.Tensor:
    """Token ids (b, t), on the CPU."""
    v = model.config.get_text_config().vocab_size
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(0))


def samples(model) -> list[dict]:
    """Six samples of 30 to 90 tokens that share the first 20; their second halves have labels."""
    ids = random_ids(model, 6)
    ids[:, :20] = ids[0, :20]
    return [{"input_ids": row[:n], "labels": [loss.IGNORE_INDEX] * (n // 2) + row[n // 2:n]}
            for row, n in zip(ids.tolist(), range(30, 91, 12), strict=True)]


def micro_batches(model, items: list[dict], size: int = 3, layout: str = "padded") -> list:
    return dataset.micro_batches(items, size, 0, model.device, layout)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The logits (t, v) of ids (1, t)."""
    return model(ids.to(model.device), use_cache=False).logits[0]


def step(model, batches: list, lean: bool = False) -> list[torch.Tensor]:
    """[loss, gradient of every A and B], summed over batches."""
    model.zero_grad()
    total = 0
    for batch in batches:
        ce, _ = loss.ce_sum(model, batch, lean)
        ce.backward()
        total = total + ce.detach()
    return [total, *(p.grad.clone() for p in surgery.adapter_parameters(model))]


def apart(tensors: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest relative difference of the pairs, |x - y| / |y|; nan stays nan."""
    pairs = [[x.detach().cpu().double() for x in pair] for pair in zip(tensors, exact, strict=True)]
    return torch.stack([(x - y).norm() / y.norm() for x, y in pairs]).max().item()


def within(model, difference: float) -> Outcome:
    """Compare a difference with rounding. A block rounds to the model's dtype a few times, 8 eps,
    and sums in float32, 32 eps of that; over blocks this adds up like a random walk."""
    eps = 8 * torch.finfo(model.dtype).eps + 32 * torch.finfo(torch.float32).eps
    bound = eps * model.config.get_text_config().num_hidden_layers ** 0.5
    return difference <= bound, f"{difference:.1e}", f"{bound:.1e}"


def same_bits(after: torch.Tensor, before: torch.Tensor) -> Outcome:
    n = int((after != before).sum())
    return n == 0, f"{n} logits differ", "0"


# ----- the checks --------------------------------------------------------------------------------


def matmul(make: Make) -> Outcome:
    """Compare a product of matrices with float64."""
    model = make()
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    product = a.to(model.device) @ b.to(model.device)
    return within(model, apart([product], [a.double() @ b.double()]))


def step_0(make: Make) -> Outcome:
    """B = 0: an injected model computes what its base does."""
    model = make()
    ids = random_ids(model)
    before = logits(model, ids)
    inject(model, r=8, lora_alpha=16)
    return same_bits(logits(model, ids), before)


def gradients(make: Make) -> Outcome:
    """Compare loss and gradients by hand (LoRAFunction, LabelledCE, RMSNorm, Gate) with autograd of
    the equation: weights W + scaling B A in float64 on the CPU, a sample at a time. (The norms of
    transformers compute in float32 even there.)"""
    model, total, weights, pairs = adapted(make), 0, {}, []
    plain = make(torch.device("cpu"), torch.float64)
    plain.load_state_dict({name.replace(".base_layer.", "."): tensor.cpu()
                           for name, tensor in model.state_dict().items() if ".lora_" not in name})
    for name, layer in surgery.lora_layers(model).items():
        A, B = (p.detach().cpu().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        delta = layer.scaling * (B @ A)
        weights[f"{name}.weight"] = plain.get_submodule(name).weight.detach() + (
            delta.T if layer.transposed else delta)
        pairs += [A, B]
    for item in samples(model):
        ids, labels = (torch.tensor([item[key]]) for key in ("input_ids", "labels"))
        z = torch.func.functional_call(plain, weights, (ids,), {"use_cache": False}).logits[0, :-1]
        total = total + F.cross_entropy(z, labels[0, 1:], reduction="sum")
    total.backward()
    leaves.fuse(model)
    by_hand = step(model, micro_batches(model, samples(model)), levers.head_is_linear(model))
    return within(model, apart(by_hand, [total, *(p.grad for p in pairs)]))


def flat_refusal(model) -> str:
    """Why the model cannot take flat batches; "" if it can, and from now on does."""
    try:
        flat.enable(model, load.use_attention)
    except flat.Unsupported as reason:
        return str(reason)
    return ""


def batches(make: Make) -> Outcome:
    """Compare loss and gradients of samples one by one with batches of every layout."""
    model = adapted(make)
    items = samples(model)
    alone = step(model, micro_batches(model, items, 1))
    reason = flat_refusal(model)
    outcomes = {how: within(model, apart(step(model, micro_batches(model, items, 3, how)), alone))
                for how in (["padded"] if reason else ["padded", "flat", "shared"])}
    ok = all(ok for ok, _, _ in outcomes.values())
    measured = ", ".join(f"{how} {value}" for how, (_, value, _) in outcomes.items())
    if reason:                                 # the tiny model, which has no name, must have none
        ok, measured = ok and bool(model.name_or_path), f"{measured}, not flat: {reason}"
    return ok, measured, outcomes["padded"][2]


@torch.no_grad()
def causality(make: Make) -> Outcome:
    """Change a token in each sample, at positions of every remainder modulo 4: the logits before it
    keep their bits. On MPS, bfloat16 saw up to three tokens ahead where nothing was padded, for
    four queries had one mask (pytorch issue 195910)."""
    model, items, other, later = adapted(make), [], [], 0
    for i, item in enumerate(samples(model)):
        ids, k = item["input_ids"], len(item["input_ids"]) - 5 - i
        items.append({"input_ids": ids, "labels": ids})
        other.append({"input_ids": [*ids[:k], abs(ids[k] - 1), *ids[k + 1:]], "labels": ids})
        later += len(ids) - 1 - k
    changed = []
    ways = [(1, "padded"), (3, "padded")]
    if not flat_refusal(model):
        ways += [(3, "flat"), (3, "shared")]
    for how in ways:
        one, two = (torch.cat([loss.logits_at(model, batch) for batch in
                               micro_batches(model, some, *how)]) for some in (items, other))
        changed.append(int((one != two).any(1).sum()))
    return set(changed) == {later}, f"{changed} of {len(one)} positions change", f"{later} each"


@torch.no_grad()
def answering(make: Make) -> Outcome:
    """Compare logits padded on the left and then token by token with a cache, as in generate(),
    with no padding and no cache. Some attention turns pads, which see nothing, into nan; MPS read
    beyond a cache whose length was no multiple of 32 (pytorch pull request 169222)."""
    model, parts, past, pads = adapted(make), [], None, 25
    ids = random_ids(model, 2).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    places, t = (mask.cumsum(1) - 1).clamp(min=0), ids.shape[1]
    for i, j in [(0, t - 8), *((i, i + 1) for i in range(t - 8, t))]:
        out = model(ids[:, i:j], attention_mask=mask[:, :j], position_ids=places[:, i:j],
                    past_key_values=past, use_cache=True)
        parts, past = [*parts, out.logits], out.past_key_values
    cached = torch.cat(parts, 1)                              # (2, t, v)
    n = int((~cached.isfinite()).any(-1).sum())
    ok, measured, bound = within(model, apart(
        [cached[0, pads:], cached[1]], [logits(model, ids[:1, pads:]), logits(model, ids[1:])]))
    return ok and not n, f"{measured}, {n} positions not finite", f"{bound}, 0"


def save_load(make: Make) -> Outcome:
    """Save an adapter and load it into a fresh model: it computes the same."""
    model = adapted(make)
    ids = random_ids(model)
    before = logits(model, ids)
    with TemporaryDirectory() as folder:
        adapter.save(model, folder, "selftest")
        model = make()
        adapter.load(model, folder)
    return same_bits(logits(model, ids), before)


def merge_unmerge(make: Make) -> Outcome:
    """Merged, a model computes the same up to rounding; unmerged, to the bit."""
    model = adapted(make)
    ids, layers = random_ids(model), surgery.lora_layers(model).values()
    before = logits(model, ids)
    for layer in layers:
        layer.merge()
    ok, merged, bound = within(model, apart([logits(model, ids)], [before]))
    for layer in layers:
        layer.unmerge()
    same, unmerged, _ = same_bits(logits(model, ids), before)
    return ok and same, f"{merged}, unmerged {unmerged}", f"{bound}, 0"


def checkpointing(make: Make) -> Outcome:
    """Blocks computed twice give the same gradients."""
    model, steps = adapted(make).train(), []
    for _ in range(2):
        torch.manual_seed(0)                                  # for a model with dropout
        steps.append(step(model, micro_batches(model, samples(model))))
        model.activation_checkpointing_enable({"use_reentrant": False})
    return within(model, apart(steps[1], steps[0]))


def ten_steps(make: Make) -> Outcome:
    """A fresh adapter learns six samples by heart, on the fast path of train.py."""
    torch.manual_seed(0)
    model = make()
    inject(model, r=8, lora_alpha=16)
    leaves.fuse(model)
    layout, lean = "padded" if flat_refusal(model) else "shared", levers.head_is_linear(model)
    window = micro_batches(model, samples(model), 3, layout)
    optimizer, losses = AdamW(surgery.adapter_parameters(model)), []
    for _ in range(11):
        total, *_ = step(model, window, lean)
        optimizer.step(0.01)
        losses.append(total.item())
    left = losses[-1] / losses[0]
    return left < 0.7, f"the loss falls to {left:.0%}", "70%"


OTHER = "is it right with --model.device=cpu or --model.dtype=float32, or with another torch?"
CHECKS = {
    "matmul": (matmul, "TF32 or another shortcut may be on; " + OTHER),
    "step 0 is the base": (step_0, "python inject.py shows the wrapped layers"),
    "gradients by hand": (gradients, "fused_lora, lean_head or fused_leaves = false; " + OTHER),
    "batches": (batches, "train.layout=padded, train.batch_size=1; " + OTHER),
    "causality": (causality, OTHER),
    "answering": (answering, OTHER),
    "save and load": (save_load, "is the disk full?"),
    "merge and unmerge": (merge_unmerge, "keep the adapter apart; " + OTHER),
    "checkpointing": (checkpointing, "train.checkpointing=false"),
    "ten steps": (ten_steps, "the rows above; else a smaller train.lr")}

if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
