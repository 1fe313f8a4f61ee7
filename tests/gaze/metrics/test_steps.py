"""Scores of single steps against loops over steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import METRICS, step_auc, step_cc, step_gain, step_nll, step_nss, step_overlap

STEPS = [name for name, metric in METRICS.items() if metric.kind == "step"]


@pytest.fixture
def steps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(12), 40)
    return maps, rng.integers(0, 12, 40)


def test_probability_scores_read_the_next_location(steps: Any) -> None:
    maps, at = steps
    onehot = np.eye(12)[at]
    assert step_overlap(*steps) == pytest.approx([sum(np.minimum(p, t)) for p, t in zip(maps, onehot, strict=True)])
    assert step_nll(*steps) == pytest.approx([-math.log(p[k]) for p, k in zip(maps, at, strict=True)])
    base = np.random.default_rng(1).dirichlet(np.ones(12))
    eps = 2.220446049250313e-16
    want = [math.log2(p[k] + eps) - math.log2(base[k] + eps) for p, k in zip(maps, at, strict=True)]
    assert step_gain(*steps, base=base) == pytest.approx(want)
    assert step_gain(*steps, base=np.tile(base, (40, 1))) == pytest.approx(want)
    assert step_gain(*steps) == pytest.approx([math.log2(p[k] * 12) for p, k in zip(maps, at, strict=True)])


def test_nss_is_in_standard_deviations(steps: Any) -> None:
    maps, at = steps
    assert step_nss(*steps) == pytest.approx([(p[k] - np.mean(p)) / np.std(p) for p, k in zip(maps, at, strict=True)])
    assert step_nss(np.full((1, 7), 0.1), [3]) == [0]


def test_auc_counts_lower_values_and_ties_against_the_model() -> None:
    maps = np.array([[0.1, 0.5, 0.5, 0.9, 0.2]] * 3)
    assert step_auc(maps, [1, 3, 0], form="share").tolist() == [0.5, 1, 0]
    assert step_auc(maps, [1, 3, 0]).tolist() == [0.75, 1, 0.5]


def test_auc_is_the_area_under_three_points(steps: Any) -> None:
    maps, at = steps
    want = []
    for p, k in zip(maps, at, strict=True):
        fp = (sum(value >= p[k] for value in p) - 1) / (len(p) - 1)
        corners = [(0, 0), (fp, 1), (1, 1)]
        want.append(sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(corners)))
    assert step_auc(*steps) == pytest.approx(want)


def test_cc_is_pearsons_and_zero_for_constant_maps(steps: Any) -> None:
    maps, at = steps
    want = [np.corrcoef(p, np.eye(12)[k])[0, 1] for p, k in zip(maps, at, strict=True)]
    assert step_cc(*steps) == pytest.approx(want)
    truth = np.random.default_rng(2).random((40, 3, 4))
    want = [np.corrcoef(p, t.ravel())[0, 1] for p, t in zip(maps, truth, strict=True)]
    assert step_cc(maps.reshape(40, 3, 4), truth) == pytest.approx(want)
    assert step_cc(np.full((1, 12), 0.1), at[:1]) == [0]


@pytest.mark.parametrize("name", STEPS)
def test_steps_to_leave_out_are_undefined(name: str, steps: Any) -> None:
    maps, at = steps[0], steps[1].copy()
    at[[3, 7]] = -1
    found = METRICS[name](maps, at)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 7]
    assert np.delete(found, [3, 7]) == pytest.approx(np.delete(METRICS[name](*steps), [3, 7]))
    with pytest.raises(InputError, match=f"^{name}: undefined for 2 of 40"):
        METRICS[name](maps, at, on_degenerate="raise")


def test_an_impossible_step_costs_infinitely_much() -> None:
    assert step_nll([[1.0, 0.0]], [1]).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("wrong", "maps", "at"),
    [
        ("predicted", [0.5, 0.5], [0]),
        ("predicted", [[0.5, 0.6]], [0]),
        ("predicted", [[1.5, -0.5]], [0]),
        ("predicted", [[0.5, np.nan]], [0]),
        ("human", [[0.5, 0.5]], [2]),
        ("human", [[0.5, 0.5]], [-2]),
        ("human", [[0.5, 0.5]], [0, 1]),
        ("human", [[0.5, 0.5]], [0.0]),
    ],
)
def test_bad_input_names_the_argument(wrong: str, maps: Any, at: Any) -> None:
    with pytest.raises(InputError, match=f"^{wrong}: "):
        step_overlap(maps, at)


def test_bad_settings_name_the_argument(steps: Any) -> None:
    with pytest.raises(InputError, match=r"^base: row 0 is no distribution"):
        step_gain(*steps, base=np.ones(12))
    with pytest.raises(InputError, match=r"^base: got shape"):
        step_gain(*steps, base=np.ones((2, 2)))
    with pytest.raises(InputError, match=r"^form: "):
        step_auc(*steps, form="area")
    with pytest.raises(InputError, match=r"^human: got maps of shape"):
        step_cc(steps[0], np.ones((40, 3)))
