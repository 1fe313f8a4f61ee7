"""Means over samples, people, trials and tasks, in that order, and their intervals.

Undefined values (NaN) are left out of a mean, never counted as 0; who averages reports how many were valid.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

from vlattn.checks import require_choice, require_count, require_number
from vlattn.gaze.metrics.policy import Floats, Ints

Over = Literal["mean", "best"]


def codes(labels: Sequence[Hashable]) -> tuple[Ints, list[Any]]:
    """Labels as integers from 0 in order of appearance, int64 [B], and what they stand for."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(one, len(known)) for one in labels], np.int64), list(known)


def group_mean(values: Floats, groups: Ints, count: int) -> Floats:
    """Of [B, K] by group: [count, K], NaN for groups without a valid value."""
    sums, valid = group_sums(values, groups, count)
    return np.divide(sums, valid, out=np.full(sums.shape, np.nan), where=valid > 0)


def group_sums(values: Floats, groups: Ints, count: int) -> tuple[Floats, Floats]:
    """Sums and numbers of valid values of [B, K] by group: [count, K] each."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0)
    columns = range(values.shape[1])
    sums = [np.bincount(groups, filled[:, k], count) for k in columns]
    valid = [np.bincount(groups, known[:, k].astype(np.float64), count) for k in columns]
    return np.stack(sums, 1), np.stack(valid, 1)


def group_best(values: Floats, groups: Ints, count: int, better: str) -> Floats:
    """The best of [B, K] by group: [count, K]. better: `higher` or `lower`."""
    sign = 1.0 if better == "higher" else -1.0
    found = np.full((count, values.shape[1]), -np.inf)
    np.maximum.at(found, groups, np.where(np.isnan(values), -np.inf, sign * values))
    return np.where(np.isinf(found), np.nan, sign * found)


def over_people(
    values: Floats, stimuli: Sequence[Hashable], people: Sequence[Hashable], over: Over = "mean", better: str = "higher"
) -> tuple[Floats, list[Any]]:
    """One value per image from pairs of samples and people: over the samples first, then over the people.

    Args:
        values: [B, K] of pairs. stimuli: of each pair, what was looked at (and for what). people: whose path it is.
        over: mean over people, or the `best` of them: most similar, or least distant.

    Returns:
        float64 [T, K], NaN where nothing was valid, and the stimuli in order of appearance.
    """
    require_choice("over", over, ("mean", "best"))
    image, names = codes(stimuli)
    person, seen = codes(list(zip(image.tolist(), people, strict=True)))
    sampled = group_mean(values, person, len(seen))
    owner = np.array([stimulus for stimulus, _ in seen], np.int64)
    if over == "best":
        return group_best(sampled, owner, len(names), better), names
    return group_mean(sampled, owner, len(names)), names


def over_tasks(sums: Floats, counts: Floats, tasks: Ints | None = None, weights: Floats | None = None) -> Floats:
    """The mean of sums / counts over tasks: [R, K].

    Args:
        sums, counts: [T, K], of each image. tasks: int64 [T], from 0; None takes all images as one.
        weights: [R, T], how often each image counts; once, R = 1, by default.
    """
    weigh = np.ones((1, len(sums))) if weights is None else weights
    of = np.zeros(len(sums), np.int64) if tasks is None else tasks
    total, valid = np.zeros((len(weigh), sums.shape[1])), np.zeros((len(weigh), sums.shape[1]))
    for task in range(int(of.max(initial=-1)) + 1):
        rows = of == task
        number = weigh[:, rows] @ counts[rows]
        known = number > 0
        total += np.divide(weigh[:, rows] @ sums[rows], number, out=np.zeros(number.shape), where=known)
        valid += known
    return np.divide(total, valid, out=np.full(total.shape, np.nan), where=valid > 0)


def resamples(count: int, n_boot: int, seed: int) -> Floats:
    """Bootstrap weights [n_boot, count]: how often each of `count` images is drawn with replacement."""
    require_count("n_boot", n_boot, 0)
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), n_boot).astype(np.float64) if count else np.zeros((0, 0))


def percentiles(samples: Floats, level: float) -> tuple[Floats, Floats]:
    """Lower and upper end [K] of the interval that holds `level` of samples [R, K]; NaN without a sample."""
    require_number("level", level, 0, 1)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        column = [samples[:, k] for k in range(samples.shape[1])]
        ends.append([np.quantile(c[~np.isnan(c)], share) if (~np.isnan(c)).any() else np.nan for c in column])
    return np.array(ends[0], np.float64), np.array(ends[1], np.float64)
