"""The five quantities of how people search that the paper stops training by, from object indices alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlattn.gaze.metrics import behaviour, make_paths
from vlattn.gaze.metrics.behaviour import BEHAVIOUR
from vlattn.gaze.metrics.behaviour import delta as relative_difference
from vlattn.gaze.oat_batch import Search


def mean_behaviour(searches: Sequence[Search], paths: Sequence[Sequence[int]]) -> dict[str, float]:
    """Means over paths of `vlattn.gaze.metrics.behaviour`, by name; empty paths do not count."""
    nowhere = [np.zeros((len(path), 2)) for path in paths]  # behaviour is of objects, wherever these are
    given = make_paths(nowhere, (1, 1), symbols=paths, targets=[one.target for one in searches])
    rows = behaviour(given)[~given.empty]
    means = rows.mean(0) if len(rows) else np.full(len(BEHAVIOUR), np.nan)
    return dict(zip(BEHAVIOUR, means.tolist(), strict=True))


def delta(model: dict[str, float], human: dict[str, float]) -> float:
    """The paper's relative difference of such means; lower is better, NaN where nothing can be compared."""
    return float(relative_difference(*(np.array([means[name] for name in BEHAVIOUR]) for means in (model, human))))
