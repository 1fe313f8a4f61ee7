"""Learning rates of a probe over its epochs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from vlattn.errors import InputError
from vlattn.probing.schedule import absolute_lr, lr_factor
from vlattn.probing.settings import ProbeSettings


def rate(epoch: float) -> float:
    """As published: blr 0.1, batches of 4096, 10 of 90 epochs of warm-up."""
    return absolute_lr(0.1, 4096) * lr_factor(epoch, 90, 10)


def test_the_rate_is_0_at_first_1_6_after_ten_epochs_and_0_at_the_end() -> None:
    assert rate(0) == 0
    assert rate(10) == pytest.approx(1.6)
    assert rate(90) == pytest.approx(0, abs=1e-12)


def test_fractions_of_epochs_count() -> None:
    assert rate(0.25) == pytest.approx(1.6 * 0.025)
    assert rate(5) == pytest.approx(0.8)
    assert rate(50) == pytest.approx(0.8)  # half way down
    assert rate(30) == pytest.approx(0.8 * (1 + math.cos(math.pi / 4)))


def test_the_rate_rises_in_a_line_and_then_falls_all_the_way() -> None:
    rates = [rate(step / 8) for step in range(721)]
    rises = [b - a for a, b in pairwise(rates[:81])]
    assert rises == pytest.approx([0.02] * 80)
    assert all(a > b for a, b in pairwise(rates[80:]))
    assert min(rates) >= 0


def test_without_a_warm_up_the_run_begins_at_the_full_rate() -> None:
    assert lr_factor(0, 5, 0) == 1


def test_the_rate_grows_with_the_batch() -> None:
    assert absolute_lr(0.1, 256) == pytest.approx(0.1)
    assert absolute_lr(0.3, 1024) == pytest.approx(1.2)


def test_settings_scale_blr_with_the_batch_and_leave_lr_as_it_is() -> None:
    assert ProbeSettings().rates(4096) == pytest.approx((1.6,))
    assert ProbeSettings(blr=(0.1, 0.5)).rates(512) == pytest.approx((0.2, 1.0))
    assert ProbeSettings(lr=(0.3, 0.4)).rates(512) == (0.3, 0.4)


@pytest.mark.parametrize("warmup", [5, 7.5, -1])
def test_a_warm_up_that_outlasts_the_run_is_refused(warmup: float) -> None:
    with pytest.raises(InputError, match=f"warmup_epochs: got {warmup:g} in a run of 5 epochs"):
        ProbeSettings(epochs=5, warmup_epochs=warmup)
