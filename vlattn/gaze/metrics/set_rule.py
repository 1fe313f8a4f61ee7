"""Metrics that compare two sets of paths rather than pairs of them: numbers per path, averaged, then compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlattn.gaze.metrics.average import codes, group_mean, over_tasks
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle

Combine = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class SetRule:
    """describe: [B, K] of paths, NaN where undefined. combine: of averages [..., K] of both sides, gives [...].

    by_task: averages are taken in each task first.
    """

    describe: Callable[[Paths], Floats]
    combine: Combine
    by_task: bool = True


def trial_means(values: Floats, paths: Paths) -> tuple[Floats, Ints, list[object]]:
    """Over samples: [T, K], the row of the first sample of each trial, and the trials."""
    trial, names = codes(paths.trials)
    _, first = np.unique(trial, return_index=True)
    return group_mean(values, trial, len(names)), first, names


def evaluate(rule: SetRule, name: str, predicted: Paths, human: Paths, on_degenerate: Degenerate) -> float:
    """The rule's value for two sets of paths, in which samples of a trial are averaged first."""
    means = []
    for paths in (predicted, human):
        values = settle(name, rule.describe(paths), paths.empty, on_degenerate)
        trials, first, _ = trial_means(values, paths)
        known = ~np.isnan(trials)
        tasks = codes([paths.tasks[row] for row in first])[0] if rule.by_task else None
        means.append(over_tasks(np.where(known, trials, 0), known.astype(np.float64), tasks)[0])
    return float(rule.combine(*means))
