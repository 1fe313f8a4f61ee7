"""Distances between the points of two paths: dynamic time warping, Frechet, Hausdorff, Eyenalysis, point by point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle
from vlattn.gaze.metrics.sweep import Update, apart, blocks, cheaper, coupling, distances, sweep, transposed


def dtw(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", over: str = "none") -> Floats:
    """Dynamic time warping: the least sum of point distances along a path through all pairs, in pixels.

    Steps right, down and diagonal weigh 1; no window. (Other packages weigh the diagonal 2, or give the root of summed
    squares.)

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        over: `none`; `length`, divided by n + m; `diagonal`, divided by the screen's.

    Returns:
        float64 [B], lower is better; NaN where a path is empty.
    """
    require_choice("over", over, ("none", "length", "diagonal"))
    found = _coupled(predicted, human, cheaper)
    if over == "length":
        found = found / np.maximum(predicted.lengths + human.lengths, 1)
    elif over == "diagonal":
        found = found / np.hypot(*predicted.screens.T)
    return settle("dtw", found, predicted.empty | human.empty, on_degenerate)


def frechet(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan") -> Floats:
    """Discrete Frechet distance: the least longest step distance of such a path, in pixels.

    "Computing Discrete Frechet Distance", Eiter and Mannila, TU Wien 1994. Arguments and result as for `dtw`.
    """
    found = _coupled(
        predicted, human, lambda up, left, diag, cost: np.maximum(cost, np.minimum(np.minimum(up, left), diag))
    )
    return settle("frechet", found, predicted.empty | human.empty, on_degenerate)


def hausdorff(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan") -> Floats:
    """The farthest that a point of either path is from the other path's nearest, in pixels. As for `dtw`."""

    def farthest(near: Floats, back: Floats, n: Ints, m: Ints) -> Floats:
        return np.maximum(np.nanmax(near, 0), np.nanmax(back, 0))

    return settle("hausdorff", _nearest(predicted, human, farthest), predicted.empty | human.empty, on_degenerate)


def eyenalysis(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", squared: bool = True) -> Floats:
    """Distances from each point to the other path's nearest, summed both ways, over the longer length.

    "A simple way to estimate similarity between pairs of eye movement sequences", Journal of Eye Movement Research
    2012.

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        squared: pixels squared, as first published; some papers use plain pixels.

    Returns:
        float64 [B], lower is better; NaN where a path is empty.
    """
    power = 2 if squared else 1

    def total(near: Floats, back: Floats, n: Ints, m: Ints) -> Floats:
        return (np.nansum(near**power, 0) + np.nansum(back**power, 0)) / np.maximum(n, m)

    return settle("eyenalysis", _nearest(predicted, human, total), predicted.empty | human.empty, on_degenerate)


def euclidean(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan") -> Floats:
    """The mean distance of points at the same place of paths that are equally long, in pixels.

    Arguments and result as for `dtw`.

    Raises:
        InputError: lengths differ.
    """
    check_pairs(predicted, human)
    odd = np.flatnonzero(predicted.lengths != human.lengths)
    if len(odd):
        row = odd[0]
        raise InputError(
            f"euclidean: row {row} has paths of {predicted.lengths[row]} and {human.lengths[row]} fixations; give "
            "equally long ones (Paths.truncated), or use dtw"
        )
    longest = int(predicted.lengths.max(initial=0))
    between = np.linalg.norm(predicted.points[:, :longest] - human.points[:, :longest], axis=2)  # padding is 0 in both
    found = np.where(predicted.empty, np.nan, between.sum(1) / np.maximum(predicted.lengths, 1))
    return settle("euclidean", found, predicted.empty, on_degenerate)


def _coupled(predicted: Paths, human: Paths, update: Update) -> Floats:
    """The best path through all pairs of points, by a rule for a cell."""
    check_pairs(predicted, human)
    found = np.full(len(predicted), np.nan)
    for rows in blocks(predicted.lengths, human.lengths):
        n, m = predicted.lengths[rows], human.lengths[rows]
        first, second = predicted.points[rows, : n.max()], human.points[rows, : m.max()]
        borders = coupling(first.shape[1], second.shape[1])
        found[rows] = sweep(transposed(first), transposed(second), (n, m), apart, update, borders)
    return found


def _nearest(predicted: Paths, human: Paths, combine: Callable[[Floats, Floats, Ints, Ints], Floats]) -> Floats:
    """combine: of nearest distances [n, B] and [m, B], NaN beyond the end, and lengths [B]."""
    check_pairs(predicted, human)
    found = np.full(len(predicted), np.nan)
    for rows in blocks(predicted.lengths, human.lengths, whole=True):
        n, m = predicted.lengths[rows], human.lengths[rows]
        between = distances(predicted.points[rows, : n.max()], human.points[rows, : m.max()])
        mine, theirs = (np.arange(size.max())[:, None] < size for size in (n, m))
        between[~(mine[:, None] & theirs[None])] = np.inf
        near, back = np.where(mine, between.min(1), np.nan), np.where(theirs, between.min(0), np.nan)
        found[rows] = combine(near, back, n, m)
    return found
