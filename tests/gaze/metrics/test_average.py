"""Means over samples, people, stimuli and tasks against loops."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics.average import over_people, over_tasks, percentiles, resamples


def nested(values: Any, stimuli: Any, people: Any, reduce: Any) -> dict[Any, float]:
    pairs: dict[Any, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for value, stimulus, person in zip(values, stimuli, people, strict=True):
        if not np.isnan(value):
            pairs[stimulus][person].append(value)
    return {one: reduce([np.mean(samples) for samples in by.values()]) for one, by in pairs.items()}


@pytest.mark.parametrize(("over", "better"), [("mean", "higher"), ("best", "higher"), ("best", "lower")])
def test_samples_first_then_people(over: Any, better: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.random(300)
    values[rng.random(300) < 0.2] = np.nan
    stimuli, people = rng.integers(0, 12, 300).tolist(), rng.integers(0, 4, 300).tolist()
    reduce = np.mean if over == "mean" else max if better == "higher" else min
    want = nested(values, stimuli, people, reduce)
    found, names = over_people(values[:, None], stimuli, people, over, better)
    assert dict(zip(names, found[:, 0], strict=True)) == pytest.approx(want)


def test_a_stimulus_without_a_valid_value_is_undefined_and_left_out_above() -> None:
    values = np.array([[np.nan], [0.5], [np.nan]])
    for over in ("mean", "best"):
        found, _ = over_people(values, ["a", "b", "a"], [0, 0, 1], over)  # type: ignore[arg-type]
        assert found == pytest.approx(np.array([[np.nan], [0.5]]), nan_ok=True)
    assert over_tasks(np.array([[0.0], [0.5]]), np.array([[0.0], [1.0]])).tolist() == [[0.5]]


def test_tasks_count_alike_however_many_stimuli_they_have() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    counts = np.ones((4, 1))
    assert over_tasks(values, counts, np.array([0, 0, 0, 1])).tolist() == [[0.5]]
    assert over_tasks(values, counts).tolist() == [[0.75]]


def test_weights_count_stimuli_as_often_as_they_were_drawn() -> None:
    rng = np.random.default_rng(0)
    values, tasks = rng.random((10, 2)), np.repeat([0, 1], 5)
    weights = resamples(10, 6, seed=3)
    assert weights.sum(1).tolist() == [10] * 6
    found = over_tasks(values, np.ones((10, 2)), tasks, weights)
    for row, weigh in enumerate(weights):
        drawn = np.repeat(np.arange(10), weigh.astype(int))
        parts = [values[drawn[tasks[drawn] == task]].mean(0) for task in (0, 1) if (tasks[drawn] == task).any()]
        assert found[row] == pytest.approx(np.mean(parts, 0))


def test_intervals_leave_undefined_samples_out() -> None:
    samples = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = percentiles(samples, 0.5)
    assert low[0] == np.quantile([1, 2, 3], 0.25)
    assert high[0] == np.quantile([1, 2, 3], 0.75)
    assert np.isnan([low[1], high[1]]).all()


def test_bad_settings_name_the_argument() -> None:
    with pytest.raises(InputError, match=r"^over: got 'median'"):
        over_people(np.ones((1, 1)), ["a"], ["b"], "median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^n_boot: "):
        resamples(3, -1, 0)
    with pytest.raises(InputError, match=r"^level: "):
        percentiles(np.ones((2, 1)), 2)
