"""Recurrence of two paths: how often fixations of the one come back near those of the other."""

from __future__ import annotations

import numpy as np

from vlattn.checks import require_positive
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Degenerate, Floats, settle
from vlattn.gaze.metrics.sweep import blocks, distances

MEASURES = ("rate", "determinism")


def recurrence(
    predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", radius: float | None = None
) -> Floats:
    """Share of pairs i < j of a predicted and a human fixation within a radius, and of these the share in a row.

    "Recurrence quantification analysis of eye movements", Behavior Research Methods 2013. Both paths are cut to the
    shorter length N first. In a row: with a neighbour along the diagonal (i + 1, j + 1) or (i - 1, j - 1).

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        radius: pixels; a twentieth of the screen's diagonal by default.

    Returns:
        float64 [B, 2], in percent, higher is better. NaN where N < 2; determinism also where nothing recurs.
    """
    check_pairs(predicted, human)
    if radius is not None:
        require_positive("radius", radius)
    size = np.minimum(predicted.lengths, human.lengths)
    found = np.full((len(predicted), 2), np.nan)
    for rows in blocks(size, size, whole=True):
        n = size[rows]
        longest = int(n.max())
        limit = np.hypot(*predicted.screens[rows].T) / 20 if radius is None else radius
        apart = distances(predicted.points[rows, :longest], human.points[rows, :longest])
        place = np.arange(longest)
        inside = (place[:, None] < place)[..., None] & (place[:, None] < n)[None]  # i < j < N
        near = (apart <= limit) & inside
        beside = np.zeros_like(near)
        beside[1:, 1:] |= near[:-1, :-1]
        beside[:-1, :-1] |= near[1:, 1:]
        count, lined = near.sum((0, 1)), (near & beside).sum((0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            found[rows] = np.stack([100 * 2 * count / (n * (n - 1)), 100 * lined / count], 1)
    return settle("recurrence", found, predicted.empty | human.empty, on_degenerate)
