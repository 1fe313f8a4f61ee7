"""The functional face of the kernels: shapes, errors, dispatch. Today every op runs its PyTorch reference."""

from __future__ import annotations

import torch

from vlattn.errors import InputError
from vlattn.kernels import reference
from vlattn.op_checks import check_heads, check_mask


def query_row_attention(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention weights of a few query rows over all keys, without the other rows of the [N, N] matrix.

    Args:
        q: query rows [B, H, R, D].
        k: keys [B, Hkv, N, D] of the same dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        scale: factor on q k^T, usually D ** -0.5.
        key_mask: bool, True where a key may be attended: [B, N] for all rows, or [B, R, N]. A row that may attend to
            nothing gives 0 everywhere.

    Returns:
        Weights [B, H, R, N], fp32 for half-precision inputs, the input's dtype otherwise. O(B H R N D) multiply-adds.
    """
    check_heads(q, k)
    check_mask("key_mask", key_mask, (q.shape[0], k.shape[2]), (q.shape[0], q.shape[2], k.shape[2]))
    return reference.query_row_attention(q, k, scale, key_mask)


def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each key receives: the sum over queries of softmax(scale * q k^T), without the [R, N] matrix.

    Args:
        q: queries [B, H, R, D].
        k: keys [B, Hkv, N, D] of the same dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        scale: factor on q k^T, usually D ** -0.5.
        causal: let each query see keys up to its own place; the last query stands at the last key, so R <= N.
        key_mask: bool [B, N], True where a key may be attended. A query that sees no key adds nothing.
        query_mask: bool [B, R], True where a query counts; padded ones should not.

    Returns:
        Sums [B, H, N], not divided by the number of queries; fp32 for half-precision inputs, the input's dtype
        otherwise. O(B H R N D) multiply-adds, O(B H N) memory for each of a fixed number of rows.
    """
    check_heads(q, k)
    check_mask("key_mask", key_mask, (q.shape[0], k.shape[2]))
    check_mask("query_mask", query_mask, (q.shape[0], q.shape[2]))
    if causal and q.shape[2] > k.shape[2]:
        raise InputError(
            f"causal: {q.shape[2]} queries but only {k.shape[2]} keys; give the keys of every query, or causal=False"
        )
    return reference.received_attention(q, k, scale, causal, key_mask, query_mask)


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
