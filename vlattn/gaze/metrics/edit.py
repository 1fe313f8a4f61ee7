"""Edit distances: how many insertions, deletions and substitutions make one path of the other."""

from __future__ import annotations

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Degenerate, Floats, settle
from vlattn.gaze.metrics.strings import Engine, coded, levenshtein, sizes
from vlattn.gaze.metrics.symbols import grid_symbols


def edit_distance(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    symbols: str = "objects",
    time_bin: float | None = None,
    weights: tuple[int, int, int] = (1, 1, 1),
    normalised: bool = False,
    engine: Engine = "auto",
) -> Floats:
    """Levenshtein distance of symbols, a count by default.

    On objects, that of "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335; on
    clusters, the fixation edit distance of "Gazeformer: Scalable, Effective and Fast Prediction of Goal-Directed Human
    Attention", arXiv 2303.15274; on labels, its semantic sibling.

    Args:
        predicted, human, on_degenerate, symbols, time_bin, engine: as for `sequence_score`.
        weights: of inserting, deleting, substituting. With (1, 1, 2) the most is n + m instead of max(n, m).
        normalised: over the most there can be, which for weights of 1 is max(n, m); 0 for two empty paths.

    Returns:
        float64 [B], lower is better.

    Raises:
        InputError: as `sequence_score` does; weights that are no three integers of at least 0.
    """
    if len(weights) != 3 or not all(isinstance(one, int) and one >= 0 for one in weights):
        raise InputError(f"weights: got {weights!r}; give three integers of at least 0, to insert, delete, substitute")
    first, second = coded(predicted, human, symbols, time_bin)
    found = levenshtein(first, second, weights, engine)
    if normalised:
        n, m = sizes(first), sizes(second)
        shared, put, remove = np.minimum(n, m), weights[0] * np.maximum(m - n, 0), weights[1] * np.maximum(n - m, 0)
        most = put + remove + shared * min(weights[2], weights[0] + weights[1])
        found = found / np.maximum(most, 1)
    if time_bin is not None:
        found = np.where(predicted.timed & human.timed, found, np.nan)
    return settle("edit_distance", found, predicted.empty | human.empty, on_degenerate)


def string_edit(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    grid: tuple[int, int] = (5, 5),
    weights: tuple[int, int, int] = (1, 1, 1),
    normalised: bool = False,
    engine: Engine = "auto",
) -> Floats:
    """Levenshtein distance of the grid cells that were looked at.

    "Spontaneous Eye Movements During Visual Imagery Reflect the Content of the Visual Scene", Brandt and Stark, Journal
    of Cognitive Neuroscience 1997; with this grid in "FixaTons: A collection of Human Fixations Datasets and Metrics
    for Scanpath Similarity", arXiv 1802.02534, whose code takes whole pixels as the size of a cell and lets x near the
    right border begin the next row. Here the last column and row take what is left.

    Args:
        predicted, human, on_degenerate, weights, normalised, engine: as for `edit_distance`.
        grid: columns and rows.

    Returns:
        float64 [B], lower is better.
    """
    first = predicted.with_symbols("grid", grid_symbols(predicted, grid))
    second = human.with_symbols("grid", grid_symbols(human, grid))
    return edit_distance(
        first,
        second,
        on_degenerate=on_degenerate,
        symbols="grid",
        weights=weights,
        normalised=normalised,
        engine=engine,
    )
