"""Behaviour over objects: known path, loops, and the distance of two sets."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import behaviour, behaviour_delta, make_paths
from vlattn.gaze.metrics.paths import Paths


def of(strings: list[list[Any]], targets: list[Any], trials: list[str] | None = None) -> Paths:
    points = [[(1, 1)] * len(one) for one in strings]
    return make_paths(points, (9, 9), symbols=strings, targets=targets, trials=trials)


def five(path: tuple[Any, ...], target: Any) -> list[float]:
    runs = [key for key, _ in groupby(path)]
    search = len(set(runs))
    revisit = len(runs) - search
    n = len(path)
    return [float(path[-1] == target), n, search / n, (n - len(runs)) / n, revisit / n]


def test_known_path() -> None:
    assert behaviour(of([[4, 4, 2, 4, 7]], [7])) == pytest.approx(np.array([[1, 5, 0.6, 0.2, 0.2]]))


def test_runs_are_search_revisit_or_refixation(draw: Any) -> None:
    paths = draw(100, 0, 1, 12)
    rows = zip(paths.symbols["objects"], paths.targets, strict=True)
    found = behaviour(paths)
    assert found == pytest.approx(np.array([five(path, target) for path, target in rows]))
    assert found[:, 2:].sum(1) == pytest.approx(1)


def test_delta_is_the_mean_relative_difference_of_averages(draw: Any) -> None:
    model, human = draw(60, 1, 1, 12), draw(40, 2, 1, 9)
    a, b = behaviour(model).mean(0), behaviour(human).mean(0)
    assert behaviour_delta(model, human) == pytest.approx(np.mean(abs(a - b) / b))
    assert behaviour_delta(human, human) == 0


def test_samples_of_a_trial_are_averaged_first() -> None:
    model = of([[1], [1], [1], [1, 1, 1]], [1] * 4, ["a", "a", "a", "b"])
    human = of([[1, 2]], [2])
    lengths, shares = (1 + 3) / 2, (1 + 1 / 3) / 2
    assert behaviour_delta(model, human) == pytest.approx(((1 - 1) + abs(lengths - 2) / 2 + abs(shares - 1)) / 3)


def test_averages_that_are_zero_for_people_are_left_out() -> None:
    model, human = of([[1, 1, 2, 1]], [1]), of([[1, 2]], [2])
    # people: 1, 2, 1, 0, 0; model: 1, 4, 1/2, 1/4, 1/4
    assert behaviour_delta(model, human) == pytest.approx((0 + 1 + 0.5) / 3)


def test_it_does_not_notice_predictions_swapped_between_trials(draw: Any) -> None:
    model, human = draw(60, 1, 1, 12), draw(40, 2, 1, 9)
    order = np.random.default_rng(0).permutation(60)
    swapped = model.take(order)
    blind = (Paths(**{**vars(one), "targets": (None,) * 60}) for one in (model, swapped))
    first, second = (behaviour_delta(one, human) for one in blind)
    assert first == pytest.approx(second)


def test_without_a_target_correct_is_unknown() -> None:
    found = behaviour(of([[1, 2]], [None]))
    assert np.isnan(found[0, 0])
    assert found[0, 1:].tolist() == [2, 1, 0, 0]


def test_empty_paths_are_undefined_and_do_not_repeat_the_row_before() -> None:
    paths = of([[1, 2], []], [2, 2])
    assert np.isnan(behaviour(paths)[1]).all()
    assert behaviour_delta(paths, paths) == 0
    with pytest.raises(InputError, match="undefined for 1 of 2 rows, the first of them 1"):
        behaviour_delta(paths, paths, on_degenerate="raise")
