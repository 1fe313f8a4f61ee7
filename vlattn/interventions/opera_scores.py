"""What OPERA computes from attention rows: columns of over-trust, the penalty on candidates, and when to go back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

MOST = float(torch.finfo(torch.float16).max)
"""The largest penalty. The released code keeps scores in half precision; up to here the order is the same."""


def summary_rows(weights: torch.Tensor) -> torch.Tensor:
    """Attention rows as OPERA reads them: the strongest head at each key, then a sum of 1 again.

    Args:
        weights: post-softmax [R, H, Q, K], exactly 0 on keys that a row may not see.

    Returns:
        [R, Q, K].
    """
    strongest = weights.amax(1)  # [R, Q, K]; such rows exceed 1
    return strongest / strongest.sum(-1, keepdim=True)


def extend_columns(columns: torch.Tensor, row: torch.Tensor, scale: float) -> torch.Tensor:
    """The logarithms of column products, one row further down.

    Args:
        columns: [..., n - 1], the sum over rows i >= j of log(scale W_ij) for each generated token j.
        row: [..., n], what the next token's row has on the generated tokens and, last, on itself.
        scale: what weights are multiplied by; one above 1 / scale makes a product grow.

    Returns:
        [..., n]; -inf where some weight of a column is 0.
    """
    return F.pad(columns, (0, 1)) + (scale * row).log()


def over_trust(columns: torch.Tensor, score_scale: float, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest column score, at most `MOST`, and the place of its column, int64; both [...].

    Args:
        columns: [..., n] logarithms of column products.
        score_scale: a factor of every score.
        window: only the last `window` generated tokens count.
    """
    first = max(0, columns.shape[-1] - window)
    log, place = columns[..., first:].max(-1)
    return (log + math.log(score_scale)).exp().clamp(max=MOST), place + first


def most_common(values: torch.Tensor) -> torch.Tensor:
    """The most frequent of integers [..., C], the smallest of equally frequent ones [...]."""
    counts = (values[..., :, None] == values[..., None, :]).sum(-1)  # [..., C]
    best = counts == counts.amax(-1, keepdim=True)
    return values.masked_fill(~best, torch.iinfo(values.dtype).max).amin(-1)


def repeated_column(history: torch.Tensor, threshold: float, earliest: int) -> int | None:
    """The column that won more than `threshold` times on every beam; None while there is none.

    Args:
        history: int64 [K, n], the winning column of each step on each beam, the newest step last.
        threshold: how many wins are not yet too many.
        earliest: columns before this one do not count.
    """
    column = int(most_common(history[:, -1]))
    wins = (history == column).sum(1)  # [K]
    return column if column >= earliest and bool((wins > threshold).all()) else None


def rollback_place(column: int, length: int, free: Callable[[int], bool]) -> int | None:
    """How many generated tokens to go back to: up to the summary token, or else to right before it; None for neither.

    Args:
        column: the summary token's place among the generated ones.
        length: how many generated tokens there are.
        free: whether the search may go back to that many tokens.
    """
    if column + 1 >= length:  # nothing was chosen behind it yet
        return None
    return next((place for place in (column + 1, column) if place > 0 and free(place)), None)
