"""Arms are interleaved, warm-up does not count, and ratios are taken round by round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlattn.errors import InputError
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.timing import Spread, Timing, interleave


class Clock:
    """A clock that only arms move."""

    def __init__(self) -> None:
        self.now, self.log = 1_000, list[str]()

    def __call__(self) -> int:
        return self.now

    def arm(self, name: str, durations: list[int]) -> Callable[[], None]:
        left = iter(durations)

        def run() -> None:
            assert torch.is_inference_mode_enabled()
            self.log.append(name)
            self.now += next(left)

        return run

    def wait(self) -> None:
        self.log.append("|")


def test_arms_alternate_and_warm_up_is_left_out() -> None:
    clock = Clock()
    arms = {"a": clock.arm("a", [900, 10, 20, 30]), "b": clock.arm("b", [800, 5, 5, 10])}
    times = interleave(arms, repeats=3, warmup=1, clock=clock, wait=clock.wait)
    assert "".join(clock.log) == "|a||b|" * 4
    assert times == {"a": Timing((10, 20, 30)), "b": Timing((5, 5, 10))}
    seconds = times["a"].seconds
    assert (seconds.median, seconds.lower, seconds.upper) == pytest.approx((20e-9, 15e-9, 25e-9))


def test_a_ratio_is_the_median_of_rounds_not_the_ratio_of_medians() -> None:
    """A round that is slow for both arms, as when something else takes the machine, leaves the ratio alone."""
    slow = [1, 1, 50, 50, 1]
    clock = Clock()
    arms = {"a": clock.arm("a", [110 * s for s in slow]), "b": clock.arm("b", [100 * s for s in slow])}
    times = interleave(arms, repeats=5, warmup=0, clock=clock, wait=clock.wait)
    spread = times["a"].over(times["b"])
    assert (spread.median, spread.lower, spread.upper, spread.n) == (1.1, 1.1, 1.1, 5)
    assert times["b"].seconds.upper == pytest.approx(5e-6)


def test_waiting_for_the_device_is_inside_the_time() -> None:
    clock = Clock()

    def wait() -> None:
        clock.now += 7

    times = interleave({"a": clock.arm("a", [10])}, repeats=1, warmup=0, clock=clock, wait=wait)
    assert times["a"].nanoseconds == (17,)


def test_what_an_arm_returns_is_freed_outside_its_time() -> None:
    clock = Clock()

    class Heavy:
        def __del__(self) -> None:
            clock.now += 1_000

    times = interleave({"a": Heavy}, repeats=2, warmup=0, clock=clock, wait=clock.wait)
    assert times["a"].nanoseconds == (0, 0)


def test_an_arm_that_fails_is_not_hidden() -> None:
    def fail() -> None:
        raise RuntimeError("arm")

    with pytest.raises(RuntimeError, match="arm"):
        interleave({"a": fail}, repeats=1, warmup=0)
    assert not torch.is_inference_mode_enabled()


def test_quartiles() -> None:
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4, 5)
    assert Spread.of([2]) == Spread(2, 2, 2, 1)


def test_senseless_requests_are_refused() -> None:
    for wrong in (
        lambda: interleave({}),
        lambda: interleave({"a": lambda: None}, repeats=0),
        lambda: interleave({"a": lambda: None}, warmup=-1),
        lambda: Spread.of([]),
        lambda: Timing((1, 2)).over(Timing((1,))),
    ):
        with pytest.raises(InputError):
            wrong()


def test_the_machine_is_named() -> None:
    machine = describe_machine()
    assert machine["device"] == "cpu"
    assert machine["cpu"]
    assert machine["threads"] == torch.get_num_threads()
