"""Sequence Score: how much of the longer path is in both, in order. With symbols of meaning, the semantic score."""

from __future__ import annotations

import numpy as np

from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Degenerate, Floats, settle
from vlattn.gaze.metrics.strings import Engine, align, coded, lcs, sizes


def sequence_score(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    symbols: str = "objects",
    time_bin: float | None = None,
    gap: float = 0.0,
    engine: Engine = "auto",
) -> Floats:
    """Needleman-Wunsch score with match 1 and mismatch 0, over the longer length; with gap 0, LCS / max(n, m).

    "Predicting Goal-directed Human Attention Using Inverse Reinforcement Learning", arXiv 2005.14310.

    Args:
        predicted, human: B paths each, compared row by row.
        on_degenerate: see `policy`.
        symbols: their kind: "objects", "clusters" (of `fixation_clusters`), "labels", or what the paths have.
        time_bin: milliseconds; a symbol then comes int(duration / time_bin) times. Published: 50.
        gap: of a symbol aligned with nothing, at most 0.
        engine: `rapidfuzz` or `numpy`, which give the same; `auto` takes the former if it is installed. A gap other
            than 0 is always done by numpy.

    Returns:
        float64 [B], 0 to 1 (with gap 0), higher is better. NaN where `time_bin` is given and durations are missing.

    Raises:
        InputError: symbols that paths do not have; another number of paths, or other screens, on both sides.
    """
    first, second = coded(predicted, human, symbols, time_bin)
    longer = np.maximum(sizes(first), sizes(second))
    if gap:
        common = align(first, second, lambda a, b: a == b, gap)
    else:
        common = lcs(first, second, engine)
    score = np.where(longer == 0, 1.0, common / np.maximum(longer, 1))
    if time_bin is not None:
        score = np.where(predicted.timed & human.timed, score, np.nan)
    return settle("sequence_score", score, predicted.empty | human.empty, on_degenerate)


def semantic_score(
    predicted: Paths,
    human: Paths,
    *,
    on_degenerate: Degenerate = "nan",
    symbols: str = "labels",
    time_bin: float | None = None,
    gap: float = 0.0,
    engine: Engine = "auto",
) -> Floats:
    """Sequence score of the classes that were looked at: of the fixated object's label, or of a segmentation map's at
    each fixation (`label_symbols`).

    "Target-absent Human Attention", arXiv 2207.01166. Arguments and result as for `sequence_score`.
    """
    return sequence_score(
        predicted, human, on_degenerate=on_degenerate, symbols=symbols, time_bin=time_bin, gap=gap, engine=engine
    )
