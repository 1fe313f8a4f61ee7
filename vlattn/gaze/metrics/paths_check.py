"""Whether given paths can be scored; errors and warnings name the path, what is wrong, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.metrics.policy import Floats, Ints
from vlattn.gaze.trial_check import MICROSECONDS, SECONDS


def read_path(path: Any, durations: Any, index: int) -> tuple[Floats, Floats]:
    """Copies: float64 [n, 2] in pixels, and [n] in milliseconds, NaN where unknown."""
    where = f"paths[{index}]"
    try:
        given = np.array(path, np.float64)
        times = None if durations is None else np.array(durations, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where}: is no array of numbers; give [n, 2], or [n, 3] with durations") from None
    if given.size == 0:
        given = given.reshape(0, 2)
    if given.ndim != 2 or given.shape[1] not in (2, 3):
        raise InputError(f"{where}: has shape {given.shape}; give [n, 2], or [n, 3] with durations")
    if given.shape[1] == 3:
        if times is not None:
            raise InputError(f"{where}: has durations, and durations are given too; give them once")
        times = given[:, 2]
    points = given[:, :2]
    if not np.isfinite(points).all():
        place = int(np.flatnonzero(~np.isfinite(points).all(1))[0])
        raise InputError(
            f"{where}: fixation {place} is at {points[place].tolist()}; give finite pixels, or leave it out"
        )
    if times is None:
        return points, np.full(len(points), np.nan)
    if times.shape != (len(points),):
        raise InputError(
            f"{where}: has durations of shape {times.shape} for {len(points)} fixations; give one for each"
        )
    if np.isinf(times).any() or (times < 0).any():
        place = int(np.flatnonzero(np.isinf(times) | (times < 0))[0])
        raise InputError(
            f"{where}: fixation {place} lasts {times[place]}; give milliseconds of at least 0, NaN for none"
        )
    return points, times


def check_units(durations: Floats) -> None:
    """Warn where the median says that durations are not in milliseconds. A guess: nothing is converted."""
    known = durations[~np.isnan(durations)]
    if not len(known):
        return
    middle = float(np.median(known))
    if 0 < middle < SECONDS or middle > MICROSECONDS:
        unit, factor = ("seconds", "1000") if middle < SECONDS else ("microseconds", "0.001")
        warnings.warn(
            f"durations: their median is {middle:g}, which looks like {unit}; metrics take milliseconds, so multiply "
            f"by {factor}",
            stacklevel=3,
        )


def handle_outside(
    points: Floats, lengths: Ints, screens: Floats, outside: str, names: Sequence[Hashable] | None = None
) -> Floats:
    """Points as `outside` wants them. names: of trials, for errors.

    The screen has its left and top border, not the other two.
    """
    real = np.arange(points.shape[1]) < lengths[:, None]
    beyond = ((points < 0) | (points >= screens[:, None])).any(2) & real
    if outside == "keep" or not beyond.any():
        return points
    if outside == "clip":
        return np.clip(points, 0, np.nextafter(screens, 0)[:, None])
    row, place = np.argwhere(beyond)[0]
    x, y = points[row, place]
    width, height = screens[row]
    called = f"paths[{row}]" if names is None else f"trial {names[row]!r}"
    told = f"{called}: fixation {place} at ({x:g}, {y:g}) is outside the screen of {width:g} x {height:g}"
    if outside == "raise":
        raise InputError(f"{told}; check units and order of the coordinates, or give outside='clip' or 'keep'")
    warnings.warn(
        f"{told}, as are {beyond.sum()} of {real.sum()} fixations; they are kept where they are. Check units and order "
        "of the coordinates, or give outside='clip' or 'keep'",
        stacklevel=3,
    )
    return points


def named(name: str, given: Sequence[Hashable] | None, default: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """One label per path."""
    if given is not None and len(given) != len(default):
        raise InputError(f"{name}: got {len(given)} for {len(default)} paths; give one for each")
    return tuple(default if given is None else given)
