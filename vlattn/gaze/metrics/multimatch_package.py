"""The package `multimatch-gaze` behind the shapes of this room, so that its ageing stays in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlattn.checks import require_number
from vlattn.errors import InputError
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Floats

FIELDS = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]


@dataclass(frozen=True)
class Grouping:
    """Successive saccades become one if they turn less than `direction` degrees, or are shorter than `amplitude`
    pixels, and the fixation between is shorter than `duration` milliseconds. Often: 45, a tenth of the diagonal, 300.
    """

    direction: float
    amplitude: float
    duration: float

    def __post_init__(self) -> None:
        for name in ("direction", "amplitude", "duration"):
            require_number(name, getattr(self, name), 0)


def package_multimatch(predicted: Paths, human: Paths, grouping: Grouping | None) -> Floats:
    """float64 [B, 5] for paths of at least 3 fixations each; NaN where grouping leaves nothing to compare."""
    try:
        from multimatch_gaze import docomparison
    except ImportError:
        raise InputError(
            "engine: got 'multimatch-gaze', which is not installed; pip install 'vlattn[scanpath]', or give 'numpy'"
        ) from None
    merging: dict[str, Any] = {}
    if grouping is not None:
        merging = {"grouping": True, "TDir": grouping.direction, "TAmp": grouping.amplitude}
        merging["TDur"] = grouping.duration / 1000
    timed = predicted.timed & human.timed
    found = np.full((len(predicted), 5), np.nan)
    for row in range(len(predicted)):
        pair = [_records(paths, row, timed[row]) for paths in (predicted, human)]
        try:
            with np.errstate(invalid="ignore", divide="ignore"):
                found[row] = docomparison(*pair, screensize=predicted.screens[row].tolist(), **merging)
        except (ValueError, IndexError, ZeroDivisionError):
            if grouping is None:
                raise
            # Merging over a saccade of length 0, or all saccades into one, is more than the package can do.
    found[~timed, 4] = np.nan
    return found


def _records(paths: Paths, row: int, timed: bool) -> np.ndarray:
    length = paths.lengths[row]
    records = np.zeros(length, FIELDS)
    records["start_x"], records["start_y"] = paths.points[row, :length].T
    records["duration"] = paths.durations[row, :length] / 1000 if timed else 1.0  # seconds
    return records
