"""Means over a few seeds, with Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlattn.errors import InputError

LEVEL = 0.95


def t_quantile(df: int, level: float = LEVEL) -> float:
    """The t beyond which a Student variable with `df` degrees of freedom lies, in either direction, with probability
    1 - level. By bisection of the exact series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    if df < 1 or not 0 < level < 1:
        raise InputError(f"df, level: got {df} and {level}; give at least 1, and a number between 0 and 1")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(df)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < level else (low, middle)
    return math.tan(low) * math.sqrt(df)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "low", "high", "values"}: the mean of independent runs and its 95% t interval; one run has none."""
    values = list(values)
    if not values:
        raise InputError("values: got none; give at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "values": values}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """`mean_interval` of value minus base, run by run, over the seeds that both have.

    Raises:
        InputError: they share none.
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        raise InputError(f"values: seeds {sorted(values)} and {sorted(base)} share none; run both on the same seeds")
    return mean_interval([values[seed] - base[seed] for seed in shared])


def _within(angle: float, df: int) -> float:
    """Probability that |t| < sqrt(df) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if df % 2 else 1.0
    total = 0.0 if df == 1 else term
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (angle + sine * total) * 2 / math.pi if df % 2 else sine * total
