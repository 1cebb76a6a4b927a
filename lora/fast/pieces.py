"""
Attention over a tree of samples on a CPU: piece by piece, put together by the sums of exponentials.

A chain's tokens attend to pieces of rows: its own, causally, and those of its path. A piece gives
out = softmax(q k^T) v and lse = log(sum(exp(q k^T))), and two pieces make one:

    w = sigmoid(lse_2 - lse_1)      out = (1 - w) out_1 + w out_2      lse = log(e^lse_1 + e^lse_2)

With the final out and lse, the backward pass of each piece is independent: p = exp(q k^T - lse) is
a piece's share of the whole softmax. So a shared prompt's keys are read where they are, by all its
samples in one call; nothing is copied for a sample, and no pair of tokens that is hidden is
computed. Dao 2023, arXiv:2307.08691, sections 2.3 and 3.1; Liu et al. 2023, arXiv:2310.01889,
section 3, does the same over devices.
"""

import torch

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Call = tuple[slice, slice, bool]          # rows of the queries, of the keys, whether causal


def calls(chains: list[tuple[int, int, tuple]]) -> list[Call]:
    """List the pieces of a Plan's chains: each chain's own rows, then each part of a path with all
    chains below it. These follow one another: chains are laid out as the tree is walked."""
    below = {}
    for start, stop, path in chains:
        for part in path:
            below.setdefault(part, []).append((start, stop))
    return [*((slice(start, stop), slice(start, stop), True) for start, stop, _ in chains),
            *((slice(parts[0][0], parts[-1][1]), slice(*keys), False)
              for keys, parts in below.items())]


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether PyTorch's attention for CPUs takes these."""
    return q.device.type == "cpu" and q.shape[-1] == k.shape[-1] == v.shape[-1]


class Attention(torch.autograd.Function):
    """q (1, heads, T, d), k and v (1, kv heads, T, d) -> (1, T, heads, d). In a half-precision
    dtype, pieces are put together, and gradients are computed, in float32."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: list[Call],
                scale: float | None) -> torch.Tensor:
        (b, heads, t, d), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(b, t, heads, d, dtype=wide).transpose(1, 2)
        lse = q.new_empty(b, t, heads, dtype=wide).transpose(1, 2)
        for rows, keys, causal in calls:
            piece, sums = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, causal,
                                    scale=scale)
            if causal:                                        # the first piece of these rows
                out[:, :, rows], lse[:, :, rows] = piece, sums
            else:
                so_far = lse[:, :, rows]
                share = torch.sigmoid(sums - so_far)[..., None]
                out[:, :, rows].lerp_(piece.to(wide), share)
                lse[:, :, rows] = torch.logaddexp(so_far, sums)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        dtype, kv_heads = q.dtype, k.shape[1]
        groups = q.shape[1] // kv_heads
        q, out, dy = (x.to(lse.dtype) for x in (q, out, dy.transpose(1, 2)))
        k, v = (x.to(lse.dtype).repeat_interleave(groups, 1) for x in (k, v))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for rows, keys, causal in ctx.calls:
            parts = gradient(dy[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
                             out[:, :, rows], lse[:, :, rows], 0.0, causal, scale=ctx.scale)
            for whole, at, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
                if causal:
                    whole[:, :, at] = part
                else:
                    whole[:, :, at] += part
        dk, dv = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in (dk, dv))
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None
