"""The definitions: every op of `vlattn.ops` in plain PyTorch, accumulated in fp32 (fp64 stays), written to be read."""

from __future__ import annotations

import torch

ROW_BLOCK = 128
"""Query rows whose weights exist at one time where a method goes through a matrix in blocks of rows."""

CPU_BLOCK, DEVICE_BLOCK = 2**19, 2**25
"""Weights that exist at one time in `received_attention`: on a CPU what its cache holds, elsewhere more."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def softmax_over(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """softmax over the keys in `seen` (bool, broadcast to the logits); 0, not NaN, in a row that may attend to none."""
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale * q k^T) for a few query rows; see `vlattn.ops.query_row_attention`."""
    dtype = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    # Query heads that share a key head become rows of one product; keys are never repeated.
    grouped = q.to(dtype).reshape(batch, k.shape[1], -1, q.shape[-1])  # [B, Hkv, H / Hkv * R, D]
    # Contiguous at once: keys come as views of [B, N, H, D], which a batched product would copy again.
    keys = k.to(dtype, memory_format=torch.contiguous_format)
    logits = (grouped @ keys.transpose(-1, -2)) * scale  # [B, Hkv, H / Hkv * R, N]
    logits = logits.view(batch, heads, rows, k.shape[2])  # [B, H, R, N]
    if key_mask is None:
        return logits.softmax(-1)
    return softmax_over(logits, key_mask[:, None] if key_mask.ndim == 3 else key_mask[:, None, None])


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Column sums of the attention matrix, a block of rows at a time; see `vlattn.ops.received_attention`."""
    batch, heads, rows, width = q.shape
    groups, keys, dtype = k.shape[1], k.shape[2], accumulation_dtype(q.dtype)
    share = heads // groups
    # One leading dimension for prompts and key heads, so that a block is a few of them by a few rows.
    query = (q.to(dtype) * scale).reshape(batch * groups, share, rows, width)
    key = k.to(dtype).reshape(batch * groups, keys, width).transpose(1, 2)  # [B Hkv, D, N]
    total = query.new_zeros(batch * groups, share, keys)
    prompt = torch.arange(batch, device=q.device).repeat_interleave(groups)
    position = torch.arange(keys, device=q.device)
    limit = CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK
    step = min(rows, max(1, limit // max(share * keys, 1)))
    some = max(1, limit // max(share * step * keys, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # Under a causal mask no row of this block sees beyond its last.
        end = stop + keys - rows if causal else keys
        past = position[:end] <= torch.arange(start, stop, device=q.device)[:, None] + keys - rows  # [r, n]
        for first in range(0, batch * groups, some):
            here = slice(first, first + some)
            block = query[here, :, start:stop].flatten(1, 2) @ key[here, :, :end]
            weights = block.view(-1, share, stop - start, end)  # [p, H / Hkv, r, n]
            seen = None if key_mask is None else key_mask[prompt[here], None, None, :end]
            if causal:
                seen = past if seen is None else seen & past
            weights = weights.softmax(-1) if seen is None else softmax_over(weights, seen)
            if query_mask is not None:
                weights = weights.masked_fill(~query_mask[prompt[here], None, start:stop, None], 0)
            total[here, :, :end] += weights.sum(2)
    return total.view(batch, heads, keys)


def select_tokens(score: torch.Tensor, k: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Top-k per row in ascending order of position, and the rows gathered; see `vlattn.ops.select_tokens`."""
    # A stable sort, so that ties go to the lower position on every device.
    index = score.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values  # [B, k]
    gathered = [
        t.gather(1, index.reshape(*index.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])) for t in tensors
    ]
    return (index, *gathered)
