"""The functional face of the kernels: shapes, errors, dispatch. Today every op runs its PyTorch reference."""

from __future__ import annotations

import torch

from vlattn.errors import InputError
from vlattn.kernels import reference


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention weights of a few query rows over all keys, without the other rows of the [N, N] matrix.

    Args:
        q: query rows [B, H, R, D].
        k: keys [B, H, N, D].
        scale: factor on q k^T, usually D ** -0.5.
        key_mask: bool [B, N], True where a key may be attended; each row needs at least one.

    Returns:
        Weights [B, H, R, N], fp32 for half-precision inputs, the input's dtype otherwise. O(B H R N D) multiply-adds.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise InputError(f"q and k: expected [B, H, R, D] and [B, H, N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    return reference.query_row_attention(q, k, scale, key_mask)


def select_tokens(score: torch.Tensor, k: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keep the `k` highest-scored tokens of each row in their original order.

    Args:
        score: [B, N]; ties go to the lower position.
        k: how many to keep, 1 <= k <= N.
        tensors: any tensors [B, N, ...] to gather along.

    Returns:
        (index, *gathered): int64 [B, k], ascending, and each tensor as [B, k, ...].
    """
    if score.ndim != 2 or not 1 <= k <= score.shape[1]:
        raise InputError(f"k: got {k} for scores of shape {tuple(score.shape)}; give 1 <= k <= N")
    return reference.select_tokens(score, k, *tensors)
