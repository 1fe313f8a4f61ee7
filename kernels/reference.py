"""The definitions: every op of `vlattn.ops` in plain PyTorch, accumulated in fp32 (fp64 stays), written to be read."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale * q k^T) for a few query rows; see `vlattn.ops.query_row_attention`."""
    dtype = accumulation_dtype(q.dtype)
    logits = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale  # [B, H, R, N]
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return logits.softmax(-1)


def select_tokens(score: torch.Tensor, k: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Top-k per row in ascending order of position, and the rows gathered; see `vlattn.ops.select_tokens`."""
    # A stable sort, so that ties go to the lower position on every device.
    index = score.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values  # [B, k]
    gathered = [
        t.gather(1, index.reshape(*index.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])) for t in tensors
    ]
    return (index, *gathered)
