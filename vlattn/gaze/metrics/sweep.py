"""Dynamic programming over many pairs at once: all cells of an antidiagonal, of all pairs, in one operation.

A cell (i, j) needs those above, left and diagonally before it, so an antidiagonal i + j = s needs the two before it
alone: no table is kept unless asked for. Pairs lie along the last axis, so that all operands are contiguous. A pair
shorter than its block ends inside the table: cells depend on nothing below or right of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vlattn.gaze.metrics.policy import Floats, Ints

DIAGONAL = 1 << 15
"""Cells of a block's longest antidiagonal, over all its pairs: 256 kB, which stays in a processor's cache."""
AREA = 1 << 18
"""Cells of a block's whole table, for what needs all of it."""

Update = Callable[[Any, Any, Any, Any], Any]
"""Of the cells above, left, and diagonally before, and the price [cells, B] of each: the cells."""


def blocks(first: Ints, second: Ints, whole: bool = False) -> Iterator[Ints]:
    """Rows that are worth padding to one size: sorted by length, as many as fit.

    first, second: int64 [B], lengths; pairs of which one is empty are left out. whole: the table is kept.
    """
    short, long = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((short, long))
    order = order[short[order] > 0]
    start = 0
    while start < len(order):
        # Sorted by the longer length: the first of a block is at most as large as its last, so guess, then shrink.
        count = len(order) - start
        while True:
            longest = int(long[order[start + count - 1]]) + 1
            fits = max(1, AREA // longest**2 if whole else DIAGONAL // longest)
            if count <= fits:
                break
            count = min(max(fits, (count * 3) // 4), count - 1)
        yield order[start : start + count]
        start += count


def sweep(
    first: Any,
    second: Any,
    lengths: tuple[Ints, Ints],
    price: Callable[[Any, Any], Any],
    update: Update,
    borders: tuple[Any, Any],
    visit: Callable[[int, int, Any], None] | None = None,
) -> Any:
    """Each pair's last cell, [B].

    Args:
        first, second: [..., n, B] and [..., m, B], what is aligned. lengths: of each pair, [B] each.
        price: of elements [..., cells, B] that meet: [cells, B].
        borders: the cells of column 0, [n + 1], and of row 0, [m + 1].
        visit: is called with i + j, the least i, and the cells, of each antidiagonal; these are overwritten later.
    """
    n, m, count = first.shape[-2], second.shape[-2], first.shape[-1]
    column, row = borders
    back = np.ascontiguousarray(second[..., ::-1, :])  # j falls along an antidiagonal
    final = sum(lengths)
    before, last, this = (np.zeros((n + 1, count), column.dtype) for _ in range(3))
    before[0], last[0], last[1] = row[0], row[1], column[1]
    found = np.zeros(count, column.dtype)
    for total in range(2, n + m + 1):  # i + j
        low, high = max(1, total - m), min(n, total - 1)
        cost = price(first[..., low - 1 : high, :], back[..., m - total + low : m - total + high + 1, :])
        cells = update(last[low - 1 : high], last[low : high + 1], before[low - 1 : high], cost)
        this[low : high + 1] = cells
        if total <= m:
            this[0] = row[total]
        if total <= n:
            this[total] = column[total]
        if visit is not None:
            visit(total, low, this[low : high + 1])
        ended = np.flatnonzero(final == total)
        found[ended] = this[lengths[0][ended], ended]
        before, last, this = last, this, before
    return found


def coupling(n: int, m: int) -> tuple[Floats, Floats]:
    """Borders of a path that begins with the first pair: it costs nothing before, and leads along no border."""
    column, row = np.full(n + 1, np.inf), np.full(m + 1, np.inf)
    column[0] = row[0] = 0
    return column, row


def cheaper(up: Floats, left: Floats, diagonal: Floats, price: Floats) -> Floats:
    """The cheapest way to a cell, each step paying the price of where it leads."""
    return price + np.minimum(np.minimum(up, left), diagonal)


def transposed(points: Floats) -> Floats:
    """[B, n, 2] as [2, n, B]."""
    return np.ascontiguousarray(points.transpose(2, 1, 0))


def apart(first: Floats, second: Floats) -> Floats:
    """Euclidean distances of [2, ...] and [2, ...]: [...]."""
    across, down = first[0] - second[0], first[1] - second[1]
    across *= across
    down *= down
    across += down
    return np.sqrt(across, out=across)


def distances(first: Floats, second: Floats) -> Floats:
    """Euclidean distances of points [B, n, 2] and [B, m, 2]: [n, m, B]."""
    return apart(transposed(first)[:, :, None], transposed(second)[:, None])
