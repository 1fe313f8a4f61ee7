"""Student's t intervals against SciPy."""

from __future__ import annotations

import pytest
from scipy import stats

from vlattn.errors import InputError
from vlattn.probing.intervals import mean_interval, paired_difference, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30])
def test_quantiles_are_scipys(df: int) -> None:
    for level in (0.5, 0.95, 0.99):
        assert t_quantile(df, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, df), rel=1e-10)


def test_an_interval_is_scipys_and_one_run_has_none() -> None:
    values = [71.2, 70.4, 73.1]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert mean_interval([5.0]) == {"mean": 5.0, "low": None, "high": None, "values": [5.0]}


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired_difference({0: 10.0, 1: 21.0, 2: 33.0, 7: 0.0}, {2: 30.0, 1: 19.0, 0: 9.0})
    assert found["values"] == [1.0, 2.0, 3.0]
    assert found["mean"] == 2.0


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match="share none"):
        paired_difference({0: 1.0}, {1: 1.0})
    with pytest.raises(InputError, match="values: got none"):
        mean_interval([])
    with pytest.raises(InputError, match="df, level: got 0"):
        t_quantile(0)
