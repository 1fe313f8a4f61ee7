"""Intervals and tests for metrics over images.

The unit of resampling is the image, never the question: an image brings all its items along. Draws come from
`numpy.random.Generator(PCG64(seed))`, so a report repeats exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlattn.errors import InputError

Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Summed counts [..., K] -> metric values [...]; 0/0 is nan."""

_BLOCK = 4_000_000  # draws held at a time: 32 MB of indices


@dataclass(frozen=True)
class Interval:
    """A metric and its percentile interval. None stands for 0/0; n_undefined counts the resamples where it was 0/0."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    n_clusters: int
    n_undefined: int = 0


@dataclass(frozen=True)
class PairedDifference:
    """B minus A on the same items, resampled together."""

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    level: float
    n_clusters: int


def resample_totals(
    counts: ArrayLike, clusters: Sequence[Any] | NDArray[Any], n_boot: int = 10_000, seed: int = 0
) -> NDArray[np.float64]:
    """Summed counts of each bootstrap sample, [n_boot, K].

    counts: [n_items, K] sufficient statistics per item; clusters: [n_items], the image each item belongs to. One sample
    draws as many clusters as there are, with replacement, and sums the counts of all their items.
    """
    per_cluster = cluster_sums(counts, clusters)  # [C, K]
    if n_boot < 1:
        raise InputError(f"n_boot={n_boot} is not positive; use 10000")
    n = len(per_cluster)
    rng = np.random.Generator(np.random.PCG64(seed))
    totals = np.empty((n_boot, per_cluster.shape[1]))
    step = max(1, _BLOCK // n)
    for start in range(0, n_boot, step):
        rows = min(step, n_boot - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]  # one bin per (sample, cluster)
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        totals[start : start + rows] = weights.astype(np.float64) @ per_cluster
    return totals


def cluster_sums(counts: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> NDArray[np.float64]:
    """Counts summed per cluster, [C, K], clusters in sorted order."""
    table = np.asarray(counts, dtype=np.float64)
    groups = np.asarray(clusters)
    if table.ndim != 2 or groups.shape != table.shape[:1] or not len(table):
        raise InputError(
            f"counts has shape {table.shape} and clusters {groups.shape}; give [n_items, K] and [n_items], n_items > 0"
        )
    names, place = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, place, table)
    return sums


def cluster_bootstrap(
    counts: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    metric: Metric,
    n_boot: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a corpus metric, i.e. of one computed from counts summed over items."""
    totals = resample_totals(counts, clusters, n_boot, seed)
    sums = cluster_sums(counts, clusters)
    return interval(metric(sums.sum(axis=0)), metric(totals), len(sums), level)


def interval(value: ArrayLike, samples: NDArray[np.float64], n_clusters: int, level: float = 0.95) -> Interval:
    """The interval of one metric from its resampled values [n_boot]; resamples where it is 0/0 are left out."""
    if not 0 < level < 1:
        raise InputError(f"level={level} is not between 0 and 1; use 0.95")
    defined = samples[~np.isnan(samples)]
    low, high = _percentiles(defined, level)
    return Interval(plain(value), low, high, level, n_clusters, int(len(samples) - len(defined)))


def paired_bootstrap(
    counts_a: ArrayLike,
    counts_b: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    metric: Metric,
    n_boot: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """The difference B - A of a corpus metric on the same items, with the same draw for both.

    The p-value is twice the smaller share of resampled differences on either side of 0, at least 1/(n_boot + 1).
    """
    a, b = np.asarray(counts_a, dtype=np.float64), np.asarray(counts_b, dtype=np.float64)
    if a.shape != b.shape:
        raise InputError(f"counts_a has shape {a.shape} and counts_b {b.shape}; compare two runs of the same items")
    width = a.shape[-1]
    totals = resample_totals(np.concatenate([a, b], axis=-1), clusters, n_boot, seed)
    value_a, value_b = metric(a.sum(axis=0)), metric(b.sum(axis=0))
    return paired_difference(
        value_a,
        value_b,
        metric(totals[:, width:]) - metric(totals[:, :width]),
        len(np.unique(np.asarray(clusters))),
        level,
    )


def paired_difference(
    value_a: ArrayLike, value_b: ArrayLike, differences: NDArray[np.float64], n_clusters: int, level: float = 0.95
) -> PairedDifference:
    """The paired result of one metric from its resampled differences [n_boot]."""
    defined = differences[~np.isnan(differences)]
    low, high = _percentiles(defined, level)
    p_value = None
    if len(defined):
        tails = min(float(np.mean(defined <= 0)), float(np.mean(defined >= 0)))
        p_value = min(1.0, max(2 * tails, 1 / (len(defined) + 1)))
    a, b = plain(value_a), plain(value_b)
    gap = None if a is None or b is None else b - a
    return PairedDifference(a, b, gap, low, high, p_value, level, n_clusters)


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float | None, float | None]:
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def plain(value: ArrayLike) -> float | None:
    """A Python number; nan (0/0) is None."""
    number = float(np.asarray(value))
    return None if math.isnan(number) else number


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar p-value: b items only A has right, c only B. It takes items as independent."""
    if b < 0 or c < 0:
        raise InputError(f"b={b}, c={c} are not counts; give two numbers from 0 on")
    n = b + c
    tail = ways = 1  # exact integers, since n may be in the thousands: ways = n over i
    for i in range(min(b, c)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float] | None:
    """Wilson score interval of a proportion of independent items; None when n is 0."""
    if not 0 <= successes <= n:
        raise InputError(f"successes={successes} of n={n} is no proportion; give 0 <= successes <= n")
    if n == 0:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, scale = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values of one declared family, in the order given."""
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = reached
    return adjusted
