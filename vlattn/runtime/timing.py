"""Timing that two arms can be compared by: one process, interleaved, ratios taken round by round."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vlattn.errors import InputError

Clock = Callable[[], int]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n numbers."""

    median: float
    lower: float
    upper: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles interpolate linearly between the numbers, the smallest and largest being the 0 and 100 % points."""
        if not values:
            raise InputError("values: got none; give at least one number")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """As results keep it."""
        return {**self._quartiles(1, digits), "n": self.n}

    def milliseconds(self, digits: int = 2) -> dict[str, float]:
        """Of seconds: median and quartiles in thousandths, as results keep them."""
        return self._quartiles(1e3, digits)

    def _quartiles(self, factor: float, digits: int) -> dict[str, float]:
        return {name: round(getattr(self, name) * factor, digits) for name in ("median", "lower", "upper")}


@dataclass(frozen=True)
class Timing:
    """One arm's rounds. nanoseconds: raw times, warm-up rounds left out."""

    nanoseconds: tuple[int, ...]

    @property
    def seconds(self) -> Spread:
        return Spread.of([ns / 1e9 for ns in self.nanoseconds])

    def over(self, other: Timing) -> Spread:
        """This arm's time over the other's, round by round: what slows a whole round down cancels out."""
        return Spread.of([a / b for a, b in self._rounds(other)])

    def minus(self, other: Timing) -> Timing:
        """What is left of each round after the other's time, as decoding is what is left after the first token."""
        return Timing(tuple(a - b for a, b in self._rounds(other)))

    def _rounds(self, other: Timing) -> list[tuple[int, int]]:
        if len(self.nanoseconds) != len(other.nanoseconds):
            raise InputError(
                f"other: {len(other.nanoseconds)} rounds against {len(self.nanoseconds)}; give arms of one interleave"
            )
        return list(zip(self.nanoseconds, other.nanoseconds, strict=True))


def synchronize() -> None:
    """Wait for the accelerators that are there; nothing to do on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees on the CPU, for the rest of its life; for programs that measure.

    glibc hands each large tensor back to the system and fetches zeroed pages for the next one, which can take longer
    than filling it, and hits the arm with more short-lived tensors. Accelerators' allocators keep memory anyway.

    Returns:
        Whether it could be set; only glibc knows these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    most_mapped, trim_from = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(mallopt(most_mapped, 0)) and bool(mallopt(trim_from, 2**31 - 1))


def interleave(
    arms: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 5,
    *,
    clock: Clock = time.perf_counter_ns,
    wait: Callable[[], None] = synchronize,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every arm `repeats` times in this process, A B A B ..., after `warmup` rounds of the same.

    Args:
        arms: what to time, by name. Gradients are off (`torch.inference_mode`); what an arm returns is freed outside
            its time. Set-up does not belong in an arm: attach interventions before.
        repeats: rounds that count.
        warmup: rounds before them that do not (allocator, autotuning, lazy initialisation).
        clock: in nanoseconds.
        wait: called on both sides of each timed region.
        after_round: called between rounds, warm-up included, outside what is timed: to show progress.

    Returns:
        {name: Timing}; compare two of them by `a.over(b)`.
    """
    if not arms:
        raise InputError("arms: got none; give at least one function to time")
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats, warmup: got {repeats}, {warmup}; give at least 1 and 0")
    times: dict[str, list[int]] = {name: [] for name in arms}
    with torch.inference_mode():
        for turn in range(warmup + repeats):
            for name, arm in arms.items():
                wait()
                start = clock()
                result = arm()
                wait()
                stop = clock()
                del result
                if turn >= warmup:
                    times[name].append(stop - start)
            after_round()
    return {name: Timing(tuple(found)) for name, found in times.items()}
