"""
Print the numbers that docs/maths.md states, computed by the code that it explains.

    python -m scripts.show start
    python -m scripts.show all           # every part, in the order of the text; about a minute

All of it runs in float32 on one thread of a CPU, on small layers or on the tiny random Llama of
scripts/selftest.py. `labels` needs the tokenizer of the default model.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
from inject import inject
from lora import loss, surgery
from lora.base import fetch, load
from lora.fast import flat, leaves
from lora.layer import LoRALinear
from lora.optim import AdamW, lr_at
from lora.run import cli


def main(argv: list[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=[*PARTS, "all"], help="the part of the text")
    name = parser.parse_args(argv).name
    torch.set_num_threads(1)                               # more threads add in another order
    for part in PARTS if name == "all" else [name]:
        torch.manual_seed(0)
        PARTS[part]()


# ----- what the parts share ----------------------------------------------------------------------


def same(one: Tensor, other: Tensor) -> str:
    """Say whether two tensors are equal up to the rounding of float32."""
    apart = ((one - other).abs().max() / other.abs().max()).item()
    return "equal" if apart < 1e-4 else f"different by {apart:.0%} of the largest entry"


def numbers(tensor: Tensor) -> str:
    """Write a tensor's entries as a list, with four decimals at most."""
    return "[" + ", ".join(f"{round(x, 4) + 0.0:g}" for x in tensor.flatten().tolist()) + "]"


def tiny() -> nn.Module:
    """Make the tiny random Llama: two blocks, width 128, 512 tokens in its vocabulary."""
    return load.tiny_model(torch.device("cpu"), torch.float32)


def adapted(d_in: int, d_out: int, **lora: float) -> LoRALinear:
    """Make a layer whose base is frozen, as inject leaves it."""
    return LoRALinear(nn.Linear(d_in, d_out, bias=False).requires_grad_(False), **lora)


def backward(model: nn.Module, total: Tensor) -> list[Tensor]:
    """Put the gradients of total into .grad of every A and B; return them: of A, B, A, B, ..."""
    parameters = surgery.adapter_parameters(model)
    for p in parameters:
        p.grad = None
    total.backward()
    return [p.grad for p in parameters]


@torch.no_grad()
def descend(model: nn.Module, rate: float) -> None:
    """Take a step of plain gradient descent."""
    for p in surgery.adapter_parameters(model):
        p -= rate * p.grad


# ----- 1. the layer ------------------------------------------------------------------------------


def gradient() -> None:
    """Print the example that is computed by hand; compare LoRAFunction with autograd."""
    layer, x = adapted(3, 2, r=1, lora_alpha=2), torch.tensor([[1.0, 2.0, -1.0]])
    layer.lora_A.data = torch.tensor([[0.5, -1.0, 0.5]])
    print("h", numbers(F.linear(x, layer.lora_A)))
    for step in (1, 2):
        dA, dB = backward(layer, (torch.tensor([[0.1, -0.3]]) * layer(x)).sum())   # dL/dy is G
        descend(layer, 0.1)
        print(f"step {step}: dL/dB {numbers(dB)}, dL/dA {numbers(dA)}; "
              f"then B is {numbers(layer.lora_B)}")
    layer = adapted(576, 192, r=8, lora_alpha=32)
    nn.init.normal_(layer.lora_B)
    x, G, found = torch.randn(64, 576).requires_grad_(), torch.randn(64, 192), []
    for layer.fused in (True, False):                      # LoRAFunction, then plain autograd
        found.append(torch.autograd.grad((G * layer(x)).sum(), [layer.lora_B, layer.lora_A, x]))
    for name, by_hand, autograd in zip(("B", "A", "x"), *found, strict=True):
        shape = tuple(by_hand.shape)
        print(f"dL/d{name} {shape} by hand and by autograd: {same(by_hand, autograd)}")
    trained, whole = layer.lora_A.numel() + layer.lora_B.numel(), layer.weight.numel()
    print(f"numbers trained: {trained:,} instead of {whole:,}, {trained / whole:.1%}")


def start() -> None:
    """Print what a fresh adapter changes (nothing), how A starts, and the first gradients."""
    model, ids = tiny(), torch.randint(3, 512, (4, 16))
    before = model(input_ids=ids).logits
    inject(model, r=8, lora_alpha=32)
    apart = (model(input_ids=ids).logits - before).abs().max()
    print(f"logits without and with a fresh adapter: largest difference {apart:g}")
    A = torch.cat([layer.lora_A.flatten() for layer in surgery.lora_layers(model).values()
                   if layer.in_features == 128])
    print(f"A for d_in = 128: entries up to {A.abs().max():.3f}, 1/sqrt(d_in) = {128**-0.5:.3f}")
    print(f"standard deviation {A.std():.3f}, 1/sqrt(3 d_in) = {384**-0.5:.3f}")
    for case in ("B is 0", "one step later", "A and B are 0"):
        if case == "A and B are 0":
            for p in surgery.adapter_parameters(model):
                nn.init.zeros_(p)
        found = backward(model, model(input_ids=ids, labels=ids).loss)
        of_a, of_b = (max(g.abs().max() for g in found[i::2]) for i in (0, 1))
        print(f"{case:14}  largest entry of dL/dA {of_a:.3f}, of dL/dB {of_b:.3f}")
        descend(model, 0.01)


def steps() -> None:
    """Print how a layer learns a change of rank 2 by plain gradient descent; then merge it."""
    layer, x = adapted(8, 6, r=4, lora_alpha=8), torch.randn(64, 8)
    U, V = (torch.linalg.qr(torch.randn(d, 2))[0] for d in (6, 8))
    goal = layer.base_layer(x) + x @ (U * torch.tensor([2.0, 1.0]) @ V.T).T
    print("step   loss  largest dL/dA  rank of dL/dB  singular values of s B A")
    for step in range(61):
        total = 0.5 * (layer(x) - goal).square().sum(1).mean()
        dA, dB = backward(layer, total)
        if step in (0, 1, 2, 3, 5, 8, 12, 20, 40, 60):
            values = torch.linalg.svdvals(layer.delta_weight())[:4]
            print(f"{step:4}  {total:5.3f}  {dA.abs().max():13.3f}  {rank_of(dB):13}  "
                  + "  ".join(f"{value:.2f}" for value in values))
        descend(layer, 0.05)
    fresh = adapted(8, 6, r=4, lora_alpha=8)
    for n in (1, 2, 3, 64):
        _, dB = backward(fresh, (torch.randn(n, 6) * fresh(x[:n])).sum())
        print(f"tokens {n:2}: the first dL/dB has rank {rank_of(dB)}")
    W, y = layer.weight.clone(), layer(x)
    layer.merge()
    print(f"merged: W changed: {not torch.equal(W, layer.weight)}; answers {same(layer(x), y)}")
    layer.unmerge()
    print(f"unmerged: W as before, bit for bit: {torch.equal(W, layer.weight)}")


def rank_of(matrix: Tensor) -> int:
    """Count the singular values that are no rounding errors."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-4 * values[0]).sum())


def rank() -> None:
    """Print how far the loss falls in ten steps, the mean of five seeds, by rank and optimizer."""
    model, ranks = tiny(), (2, 4, 8, 16, 32, 64)
    print("r                    " + "".join(f"{r:7}" for r in ranks))
    for name, use_rslora in (("s = 32 / r", False), ("s = 32 / sqrt(r)", True)):
        layers = [adapted(1, 1, r=r, lora_alpha=32, use_rslora=use_rslora) for r in ranks]
        print(f"{name:21}" + "".join(f"{layer.scaling:7.1f}" for layer in layers))
    print("fall of the loss in ten steps, lr 0.001 for SGD and 0.0001 for Adam")
    for name, optimizer, use_rslora in (
            ("SGD, alpha / r", "SGD", False), ("SGD, alpha / sqrt(r)", "SGD", True),
            ("Adam, alpha / r", "Adam", False), ("Adam, alpha / sqrt(r)", "Adam", True)):
        drops = [[drop(model, r, seed, optimizer, use_rslora) for seed in range(5)] for r in ranks]
        print(f"{name:21}" + "".join(f"{sum(of_r) / 5:7.3f}" for of_r in drops))


def drop(model: nn.Module, r: int, seed: int, optimizer: str, use_rslora: bool) -> float:
    """Train a fresh adapter for ten steps on random tokens; return how far the loss fell."""
    torch.manual_seed(seed)
    ids, losses = torch.randint(3, model.config.vocab_size, (4, 16)), []
    inject(model, r=r, lora_alpha=32, use_rslora=use_rslora)
    adam = AdamW(surgery.adapter_parameters(model))
    for _ in range(11):
        total = model(input_ids=ids, labels=ids).loss
        losses.append(total.item())
        backward(model, total)
        if optimizer == "Adam":
            adam.step(lr=0.0001)
        else:
            descend(model, 0.001)
    surgery.unwrap(model)
    return losses[0] - losses[-1]


# ----- 2. which tokens count ---------------------------------------------------------------------


def labels() -> None:
    """Print the labels of a short conversation; print a token across the border of an answer."""
    tokenizer = load.load_tokenizer(fetch.find("smollm2-135m-instruct"))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (item,) = dataset.QADataset([{"messages": talk, "source": "text"}], tokenizer, "chatml").items
    batch = dataset.collate([item], pad_id=tokenizer.pad_token_id)
    targets = dict(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))

    def word(token):
        return repr(tokenizer.decode([token])).strip("'")
    print("position  token         input_ids  labels  its output is scored against")
    for t, (token, label) in enumerate(zip(item["input_ids"], item["labels"], strict=True)):
        target = f"  {targets[t]} {word(targets[t])}" if t in targets else ""
        print(f"{t:8}  {word(token):12}  {token:9}  {label:6}{target}")
    print(f"the tokenizer's pad token is {tokenizer.pad_token_id}: {tokenizer.pad_token}")
    for text in ("Answer: ", "Answer: Larkmoor"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        print(f"{len(tokens)} tokens: " + " | ".join(word(t) for t in tokens) + " |")


# ----- 3. the loss -------------------------------------------------------------------------------


def split() -> None:
    """Print the loss of ten tokens by both rules, then the gradient of a window of a model."""
    nats = torch.tensor([3.0, 1.0] + 8 * [0.5]).requires_grad_()
    print(f"nats of ten tokens {numbers(nats)}\ntokens in micro-batches  by token  mean of means")
    for sizes in ([10], [2, 8], [1, 9], [5, 5]):
        parts = nats.split(sizes)
        by_token = sum(part.sum() for part in parts) / len(nats)
        of_means = sum(part.mean() for part in parts) / len(parts)
        print(f"{' + '.join(map(str, sizes)):23}  {by_token:8.2f}  {of_means:13.2f}")
        if sizes == [2, 8]:
            weights = torch.autograd.grad(of_means, nats)[0]
    print(f"weights of a token in the mean of means of 2 + 8: {weights[0]} and {weights[-1]}")
    model, whole = tiny(), None
    inject(model, r=8, lora_alpha=32)
    ids = [torch.randint(3, 512, (n,)).tolist() for n in (5, 9, 14, 30)]
    for size in (4, 2, 1):                                 # examples in a micro-batch
        found = []
        for rule in ("by token", "mean of means"):
            batches = dataset.micro_batches([{"input_ids": row, "labels": row} for row in ids],
                                            size, pad_id=0)
            n_tokens, total = sum(len(batch.targets) for batch in batches), 0
            for batch in batches:
                count = n_tokens if rule == "by token" else len(batches) * len(batch.targets)
                total = total + loss.ce_sum(model, batch)[0] / count
            found.append(torch.cat([g.flatten() for g in backward(model, total)]))
        whole = found[0] if whole is None else whole
        print(f"the window in {len(batches)}: gradient by token {same(found[0], whole)}, "
              f"of the mean of means {same(found[1], whole)}")


# ----- 4. the update -----------------------------------------------------------------------------


def adam() -> None:
    """Print two updates of one parameter by AdamW, beside torch's; in float64, to see eps."""
    p, q = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = AdamW([p], weight_decay=0.01), torch.optim.AdamW([q], 0.001, weight_decay=0.01)
    for t, g in ((1, 0.5), (2, -0.5)):
        p.grad, q.grad = torch.full_like(p, g), torch.full_like(q, g)
        decayed = p.item() * (1 - 0.001 * 0.01)
        ours.step(0.001)
        theirs.step()
        m, v = ours.m[0].item(), ours.v[0].item()
        print(f"t = {t}  g {g}  m {m:.3g}  m' = m / {1 - 0.9**t:.2g} = {m / (1 - 0.9**t):.3g}  "
              f"v {v:.5f}  v' {v / (1 - 0.999**t):.3g}  step {p.item() - decayed:.3g}")
        print(f"       p decayed {decayed:.12f}  p {p.item():.12f}  torch's {q.item():.12f}")
    m, v = 0.1 * 0.5, 0.001 * 0.5**2
    print(f"first step without correction: {m / v**0.5:.3g} lr; m is {0.5 / m:.3g} times too "
          f"small, sqrt(v) {0.5 / v**0.5:.3g} times")
    p, size = torch.zeros(3, requires_grad=True), [0.0, 1e-3, 1e3]
    p.grad = torch.tensor(size)
    AdamW([p]).step(0.001)
    print(f"first steps of gradients {size}: {numbers(p)}")


def descent() -> None:
    """Print the path of one parameter from 1 to its best value 0, for steep and flat losses."""
    print("step  plain, k = 10  plain, k = 0.1  AdamW, k = 10  AdamW, k = 0.1")
    plain, adaptive = (torch.ones(2, requires_grad=True) for _ in range(2))
    k, optimizer = torch.tensor([10.0, 0.1]), AdamW([adaptive])
    for step in range(31):
        if step in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30):
            columns = zip((plain[0], plain[1], *adaptive), (15, 16, 15, 16), strict=True)
            print(f"{step:4}" + "".join(f"{value:{width}.3f}" for value, width in columns))
        for p in (plain, adaptive):
            p.grad = k * p.detach()                        # of the loss k p^2 / 2
        plain.data -= 0.05 * plain.grad
        optimizer.step(0.05)


def rate() -> None:
    """Print the schedule, a clipped gradient, and how long an outlier is remembered."""
    print("step  learning rate, for peak 0.001, warmup 5, total 36")
    for step in (0, 1, 4, 5, 20, 21, 35):
        print(f"{step:4}  {lr_at(step, peak=0.001, warmup=5, total=36):.7f}")
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0])
    norm = torch.nn.utils.clip_grad_norm_([p], 1.0)
    print(f"gradient [3, 4]: norm {norm:g}, clipped to 1: {numbers(p.grad)}")
    print("updates after an outlier of 100  size of a step / lr  with clipping at 1")
    paths = []
    for outlier in (100.0, 1.0):
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer, path = AdamW([p]), []
        for t in range(3000):
            p.grad = torch.full_like(p, outlier if t == 100 else 1.0)
            before = p.item()
            optimizer.step(1.0)
            path.append(before - p.item())
        paths.append(path)
    for after in (30, 100, 1000, 2800):
        print(f"{after:31}{paths[0][100 + after]:22.2f}{paths[1][100 + after]:20.2f}")


# ----- 5. the fast path --------------------------------------------------------------------------


def shared() -> None:
    """Print the mask of two samples that share a prompt; compare sixteen with a padded batch."""
    texts = [[ord(letter) for letter in text] for text in ("stabc.", "std.")]
    few = flat.flatten([{"input_ids": ids, "labels": ids} for ids in texts], share=2).inputs
    names, positions = [chr(i) for i in few["input_ids"][0]], few["position_ids"][0].tolist()
    print("query  position  sees " + " ".join(names))
    for name, position, seen in zip(names, positions, visible(few["plan"], 6), strict=True):
        print(f"{name:>5}  {position:8}       " + " ".join("x" if on else "." for on in seen))
    model, found = tiny(), []
    inject(model, r=8, lora_alpha=32)
    flat.enable(model, load.use_attention)
    ids, n_shared = torch.randint(3, 512, (16, 166)), 100
    ids[:, :n_shared] = ids[0, :n_shared]
    print(f"sixteen samples: {n_shared} shared tokens, {166 - n_shared} of each sample's own")
    items = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    for name, batch in (("padded", dataset.collate(items, 0)), ("shared", flat.flatten(items))):
        total = loss.ce_sum(model, batch)[0] / len(batch.targets)
        found.append(torch.cat([g.flatten() for g in backward(model, total)]))
        n = batch.inputs["input_ids"].numel()
        each = f" = {n_shared} + 16 * {(n - n_shared) // 16}" if name == "shared" else ""
        print(f"{name}: {n:,}{each} tokens, {len(batch.targets):,} labels, loss {total:.4f}")
    print(f"gradients of padded and shared: {same(*found)}")


def visible(plan: flat.Plan, n: int) -> list[list[bool]]:
    """Return for each of n tokens in flat order which of them its query sees."""
    seen = [n * [False] for _ in range(n)]
    for i, (path, grid, real) in enumerate(plan.cells):
        mask = plan.mask(i, None, torch.zeros(1))
        for at in real.tolist():
            sample, t = divmod(at, grid.shape[1])
            keys = [row for part in path for row in range(*part)] + grid[sample].tolist()
            for key, hidden in zip(keys, mask[t].tolist(), strict=True):
                seen[grid[sample, t]][key] |= hidden == 0
    return seen


def head() -> None:
    """Compare the gradients of the head and of a norm by hand with autograd; print sizes."""
    e, H = torch.randn(5, 16).requires_grad_(), torch.randn(40, 16)
    targets = torch.randint(40, (5,))
    by_hand = loss.LabelledCE.apply(e, H, None, targets, True)[0]
    autograd = F.cross_entropy(e @ H.T, targets, reduction="sum")
    print("dL/de of the head, by hand and by autograd: " + same(
        *(torch.autograd.grad(total, e)[0] for total in (by_hand, autograd))))
    c, out = torch.randn(16), torch.randn(5, 16)
    by_hand = leaves.RMSNorm.apply(e, c, 1e-6, False)
    autograd = c * e * (e.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    print("dL/de of the norm, by hand and by autograd: " + same(
        *(torch.autograd.grad((out * y).sum(), e)[0] for y in (by_hand, autograd))))
    v = 262_144                                            # Gemma's vocabulary; 4 bytes a number
    print(f"a row of {v:,} logits: {4 * v / 2**20:g} MiB; 500 rows: {500 * 4 * v / 2**30:.2f} GiB")


PARTS = {part.__name__: part for part in (gradient, start, steps, rank, labels, split, adam,
                                          descent, rate, shared, head)}

if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
