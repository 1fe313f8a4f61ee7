"""MultiMatch: saccades of two paths aligned by their vectors, then compared in five ways."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.metrics.multimatch_package import Grouping, package_multimatch
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle
from vlattn.gaze.metrics.sweep import apart, blocks, cheaper, coupling, sweep, transposed

DIMENSIONS = ("vector", "direction", "length", "position", "duration")


def multimatch(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    engine: Literal["numpy", "multimatch-gaze"] = "numpy",
    grouping: Grouping | None = None,
) -> Floats:
    """Similarity of vector (shape), direction, length, position and duration.

    "It depends on how you look at it: Scanpath comparison in multiple dimensions with MultiMatch, a vector-based
    approach", Behavior Research Methods 2012. Chance is high: random paths reach about 0.85 in shape, length and
    position, so show a random baseline beside it. Search papers average the first four, others all five: say which.

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        engine: `numpy` does all pairs at once; `multimatch-gaze` asks that package for one after the other. They agree
            but where several alignments cost the same (this one takes the diagonal first) and where both durations are
            0 (no difference here, NaN there).
        grouping: merge small or straight successive saccades before; the package does it, so it needs that engine.

    Returns:
        float64 [B, 5], 0 to 1 for fixations on the screen, higher is better. A row is NaN where a path has fewer than
        3 fixations, its last column where durations are missing.

    Raises:
        InputError: `multimatch-gaze` is asked for and not installed; grouping with the numpy engine.
    """
    check_pairs(predicted, human)
    require_choice("engine", engine, ("numpy", "multimatch-gaze"))
    if engine == "numpy" and grouping is not None:
        raise InputError("grouping: is done by the package alone; give engine='multimatch-gaze', or grouping=None")
    usable = np.flatnonzero((predicted.lengths >= 3) & (human.lengths >= 3))
    found = np.full((len(predicted), 5), np.nan)
    if engine == "multimatch-gaze":
        found[usable] = package_multimatch(predicted.take(usable), human.take(usable), grouping)
    else:
        for rows in blocks(predicted.lengths[usable] - 1, human.lengths[usable] - 1, whole=True):
            found[usable[rows]] = _block(predicted, human, usable[rows])
    return settle("multimatch", found, predicted.empty | human.empty, on_degenerate)


def _block(predicted: Paths, human: Paths, rows: Ints) -> Floats:
    n, m = predicted.lengths[rows] - 1, human.lengths[rows] - 1  # saccades
    mine, theirs = predicted.points[rows, : n.max() + 1], human.points[rows, : m.max() + 1]
    step, other = np.diff(mine, axis=1), np.diff(theirs, axis=1)  # [B, n, 2], [B, m, 2]
    at, to = _cheapest(step, other, n, m)  # [K, B]
    pair = np.arange(len(rows))
    there = at >= 0

    def along(first: Floats, second: Floats) -> tuple[Floats, Floats]:
        return first[pair, np.maximum(at, 0)], second[pair, np.maximum(to, 0)]

    v, u = along(step, other)  # [K, B, 2]
    turn = np.abs(np.arctan2(v[..., 1], v[..., 0]) - np.arctan2(u[..., 1], u[..., 0]))
    starts, targets = along(mine, theirs)
    lasting, wanted = along(predicted.durations[rows], human.durations[rows])
    longest = np.maximum(lasting, wanted)
    lateness = np.abs(lasting - wanted) / np.where(longest == 0, 1, longest)
    diagonal = np.hypot(*predicted.screens[rows].T)
    return np.stack(
        [
            1 - _median(np.linalg.norm(v - u, axis=2), there) / (2 * diagonal),
            1 - _median(np.minimum(turn, 2 * np.pi - turn), there) / np.pi,
            1 - _median(np.abs(np.linalg.norm(v, axis=2) - np.linalg.norm(u, axis=2)), there) / diagonal,
            1 - _median(np.linalg.norm(starts - targets, axis=2), there) / diagonal,
            np.where(predicted.timed[rows] & human.timed[rows], 1 - _median(np.nan_to_num(lateness), there), np.nan),
        ],
        1,
    )


def _cheapest(step: Floats, other: Floats, n: Ints, m: Ints) -> tuple[Ints, Ints]:
    """Saccades along the cheapest path from the last pair back to the first: int64 [K, B] each, -1 once it has ended.

    step, other: vectors [B, n, 2] and [B, m, 2]. That the first pair is charged here and not in the paper adds the same
    to every path.
    """
    count = len(n)
    size = step.shape[1] + other.shape[1] + 1
    table = np.full((size, step.shape[1] + 1, count), np.inf)  # [i + j, i, B]
    table[0, 0] = 0

    def keep(total: int, low: int, cells: Floats) -> None:
        table[total, low : low + len(cells)] = cells

    borders = coupling(step.shape[1], other.shape[1])
    sweep(transposed(step), transposed(other), (n, m), apart, cheaper, borders, keep)
    i, j, pair = n.copy(), m.copy(), np.arange(count)
    path = np.full((2, size - 2, count), -1, np.int64)
    for place in range(size - 2):
        live = i > 0
        path[0, place, live], path[1, place, live] = i[live] - 1, j[live] - 1
        a, b = np.maximum(i - 1, 0), np.maximum(j - 1, 0)
        diagonal, up, left = table[a + b, a, pair], table[a + j, a, pair], table[i + b, i, pair]
        straight = diagonal <= np.minimum(up, left)
        upward = ~straight & (up <= left)
        # From the first pair the way back is diagonal, to (0, 0), where it stays.
        i = np.where(straight | upward, a, i)
        j = np.where(straight | ~upward, b, j)
    return path[0], path[1]


def _median(values: Floats, there: np.ndarray) -> Floats:
    """Along the first axis, of what is there: [B]. Far faster than nanmedian."""
    ordered = np.sort(np.where(there, values, np.inf), axis=0)
    count, pair = there.sum(0), np.arange(values.shape[1])
    return (ordered[(count - 1) // 2, pair] + ordered[count // 2, pair]) / 2
