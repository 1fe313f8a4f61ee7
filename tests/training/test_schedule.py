"""Learning rates over a run."""

from __future__ import annotations

import math

import pytest

from vlattn.training.schedule import cosine_with_warmup


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    factors = [cosine_with_warmup(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert cosine_with_warmup(0, 5, 0.0) == 1


def test_the_warm_up_of_a_short_run_is_at_least_one_whole_step() -> None:
    assert cosine_with_warmup(0, 10, 0.03) == 1
    assert cosine_with_warmup(1, 10, 0.03) == 1
    assert cosine_with_warmup(9, 10, 0.03) == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 9)))
