"""Time-delay embedding: how well each stretch of k predicted fixations is found anywhere in a person's path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlattn.checks import require_bool, require_choice, require_count
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle
from vlattn.gaze.metrics.sweep import blocks, distances


def tde(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", k: int = 3, mode: str = "mean") -> Floats:
    """For each window of k predicted fixations the nearest of the human's, in pixels per fixation; not symmetric.

    "Simulating Human Saccadic Scanpaths on Natural Images", CVPR 2011. The distance of two windows is the sum of their
    k point distances.

    Args:
        predicted, human, on_degenerate: as for `sequence_score`. predicted is what is called simulated there.
        k: length of a window.
        mode: `mean` over the predicted windows, or `hausdorff`, the worst of them.

    Returns:
        float64 [B], lower is better; NaN where a path has fewer than k fixations.
    """
    check_pairs(predicted, human)
    require_count("k", k)
    require_choice("mode", mode, ("mean", "hausdorff"))
    found = np.full(len(predicted), np.nan)
    for rows in blocks(predicted.lengths, human.lengths, whole=True):
        n, m = predicted.lengths[rows], human.lengths[rows]
        cost = distances(predicted.points[rows, : n.max()], human.points[rows, : m.max()])
        for size, apart in _windows(cost, n, m):
            if size == k:
                found[rows] = _delay(apart, n, size, mode)
                break
    return settle("tde", found, predicted.empty | human.empty, on_degenerate)


def stde(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", distance: bool = False) -> Floats:
    """Scaled time-delay embedding: the mean over all window lengths of exp(-`tde`), in shares of the longer side.

    "FixaTons: A collection of Human Fixations Datasets and Metrics for Scanpath Similarity", arXiv 1802.02534.

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        distance: the mean of `tde` itself, without exp: lower is better then.

    Returns:
        float64 [B], 0 to 1, higher is better; NaN where a path is empty. Not symmetric.
    """
    check_pairs(predicted, human)
    require_bool("distance", distance)
    found = np.full(len(predicted), np.nan)
    for rows in blocks(predicted.lengths, human.lengths, whole=True):
        n, m = predicted.lengths[rows], human.lengths[rows]
        scale = predicted.screens[rows].max(1)[:, None, None]
        cost = distances(predicted.points[rows, : n.max()] / scale, human.points[rows, : m.max()] / scale)
        total = np.zeros(len(rows))
        for size, apart in _windows(cost, n, m):
            delay = _delay(apart, n, size, "mean")
            total += np.where(np.isnan(delay), 0, delay if distance else np.exp(-delay))
        found[rows] = total / np.minimum(n, m)
    return settle("stde", found, predicted.empty | human.empty, on_degenerate)


def _windows(cost: Floats, n: Ints, m: Ints) -> Iterator[tuple[int, Floats]]:
    """By length, distances of all predicted to all human windows [windows, windows, B]; inf past a human's end."""
    apart = cost
    for size in range(1, min(cost.shape[:2]) + 1):
        if size > 1:  # one fixation more on each window of before
            apart = apart[:-1, :-1] + cost[size - 1 :, size - 1 :]
        yield size, np.where(np.arange(apart.shape[1])[:, None] <= m - size, apart, np.inf)


def _delay(apart: Floats, n: Ints, size: int, mode: str) -> Floats:
    """[B]; NaN for pairs of which a path is shorter than the window."""
    nearest = apart.min(1) / size  # [windows, B]
    windows = n - size + 1
    mine = np.arange(len(nearest))[:, None] < windows
    known = np.where(mine, nearest, 0.0)
    found = known.max(0) if mode == "hausdorff" else known.sum(0) / np.maximum(windows, 1)
    return np.where((windows > 0) & np.isfinite(found), found, np.nan)
