"""The definitions: every op of `vlattn.ops` in plain PyTorch, accumulated in fp32 (fp64 stays), written to be read."""

from __future__ import annotations

import torch

ROW_BLOCK = 128
"""Query rows whose weights exist at one time in `received_attention`."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale * q k^T) for a few query rows; see `vlattn.ops.query_row_attention`."""
    dtype = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    # Query heads that share a key head become rows of one product; keys are never repeated.
    grouped = q.to(dtype).reshape(batch, k.shape[1], -1, q.shape[-1])  # [B, Hkv, H / Hkv * R, D]
    logits = (grouped @ k.to(dtype).transpose(-1, -2)) * scale  # [B, Hkv, H / Hkv * R, N]
    logits = logits.view(batch, heads, rows, k.shape[2])  # [B, H, R, N]
    if key_mask is None:
        return logits.softmax(-1)
    seen = key_mask[:, None] if key_mask.ndim == 3 else key_mask[:, None, None]  # [B, 1, R or 1, N]
    # Filled again after the softmax, so that a row that may attend to nothing is 0 instead of NaN.
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Column sums of the attention matrix, a block of rows at a time; see `vlattn.ops.received_attention`."""
    batch, heads, rows, _ = q.shape
    keys, dtype = k.shape[2], accumulation_dtype(q.dtype)
    k = k.to(dtype)  # once, not for each block
    total = q.new_zeros(batch, heads, keys, dtype=dtype)  # [B, H, N]
    position = torch.arange(keys, device=q.device)
    for start in range(0, rows, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, rows)
        seen = None if key_mask is None else key_mask[:, None].expand(-1, stop - start, -1)  # [B, r, N]
        if causal:
            last = torch.arange(start, stop, device=q.device) + keys - rows
            past = (position <= last[:, None]).expand(batch, -1, -1)  # [B, r, N]
            seen = past if seen is None else seen & past
        weights = query_row_attention(q[:, :, start:stop], k, scale, seen)  # [B, H, r, N]
        if query_mask is not None:
            weights = weights.masked_fill(~query_mask[:, None, start:stop, None], 0)
        total += weights.sum(2)
    return total


def select_tokens(score: torch.Tensor, k: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Top-k per row in ascending order of position, and the rows gathered; see `vlattn.ops.select_tokens`."""
    # A stable sort, so that ties go to the lower position on every device.
    index = score.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values  # [B, k]
    gathered = [
        t.gather(1, index.reshape(*index.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])) for t in tensors
    ]
    return (index, *gathered)
