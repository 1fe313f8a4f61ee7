"""ScanMatch: paths as strings of grid cells, aligned so that near cells match in part."""

from __future__ import annotations

import numpy as np

from vlattn.checks import require_number, require_positive
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle
from vlattn.gaze.metrics.strings import align, sizes, stretched
from vlattn.gaze.metrics.symbols import grid_cells


def scanmatch(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    grid: tuple[int, int] = (12, 8),
    threshold: float = 3.5,
    gap: float = 0.0,
    time_bin: float = 0.0,
    whole: bool = True,
) -> Floats:
    """Best alignment of grid cells worth threshold - their distance in cells, over threshold x the longer length.

    "ScanMatch: A novel method for comparing fixation sequences", Behavior Research Methods 2010.

    Args:
        predicted, human, on_degenerate: as for `sequence_score`.
        grid: columns and rows of the screen. With threshold, gap and time_bin it belongs to the result.
        threshold: cells closer than this many cells are worth something, farther ones cost.
        gap: of a fixation aligned with nothing, at most 0.
        time_bin: milliseconds; above 0 a fixation counts round(duration / time_bin) times, ties to even, which can be
            never. Published: 50. 0 leaves time out.
        whole: put points on the screen's pixels and cut pixels and milliseconds to integers first, as the published
            code does.

    Returns:
        float64 [B], 0 to 1 (with gap 0), higher is better. NaN where time counts and durations are missing.
    """
    check_pairs(predicted, human)
    require_positive("threshold", threshold)
    require_number("gap", gap, -float("inf"), 0)
    require_number("time_bin", time_bin, 0)
    first, second = (_cells(paths, grid, time_bin, whole) for paths in (predicted, human))
    at = np.arange(grid[0] * grid[1])
    at = np.stack([at % grid[0], at // grid[0]], 1)
    worth = (threshold - np.sqrt(((at[:, None] - at[None]) ** 2).sum(2))).ravel()  # [cells x cells]

    def similarity(a: Ints, b: Ints) -> Floats:
        return worth.take(a * len(at) + b)

    longer = np.maximum(sizes(first), sizes(second))
    best = align(first, second, similarity, gap, anywhere=True)
    score = np.where(longer == 0, 1.0, best / (threshold * np.maximum(longer, 1)))
    if time_bin > 0:
        score = np.where(predicted.timed & human.timed, score, np.nan)
    return settle("scanmatch", score, predicted.empty | human.empty, on_degenerate)


def _cells(paths: Paths, grid: tuple[int, int], time_bin: float, whole: bool) -> list[Ints]:
    points = paths.points
    if whole:
        points = np.trunc(np.clip(points, 0, paths.screens[:, None] - 1))
    cells = grid_cells(points, paths.screens, grid)
    rows = [row[:n] for row, n in zip(cells, paths.lengths.tolist(), strict=True)]
    if time_bin == 0:
        return rows
    return stretched(rows, paths, lambda ms: np.round((np.trunc(ms) if whole else ms) / time_bin))
