"""Search efficiency against loops over paths."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import (
    make_paths,
    mean_step,
    probability_mismatch,
    scanpath_ratio,
    search_curve,
    search_steps,
    target_found,
    tfp_auc,
)
from vlattn.gaze.metrics.paths import Paths

BOX = (400, 400, 200, 200)
METRICS = (tfp_auc, probability_mismatch, target_found, mean_step, scanpath_ratio)


def first_hit(paths: Paths, row: int) -> float:
    x, y, w, h = paths.boxes[row]
    for place in range(paths.lengths[row]):
        px, py = paths.points[row, place]
        if x < px < x + w and y < py < y + h:
            return place + 1
    return math.inf


def by_task(paths: Paths, values: list[float]) -> float:
    """Mean over what is known, in each task, then over tasks."""
    found = defaultdict(list)
    for task, value in zip(paths.tasks, values, strict=True):
        if not math.isnan(value):
            found[task].append(value)
    return float(np.mean([np.mean(one) for one in found.values()]))


def with_tasks(paths: Paths) -> Paths:
    tasks = [f"task {row % 3}" for row in range(len(paths) - 5)] + ["task 0"] * 5  # uneven
    rows = [(paths.points[r, :n].copy(), n) for r, n in enumerate(paths.lengths)]
    return make_paths([points for points, _ in rows], (1280, 720), boxes=paths.boxes, tasks=tasks)


@pytest.fixture
def sets(draw: Any) -> tuple[Paths, Paths]:
    return with_tasks(draw(90, 0, 1, 10)), with_tasks(draw(70, 1, 1, 10))


def test_step_is_the_first_fixation_inside_and_infinite_without(sets: tuple[Paths, Paths]) -> None:
    want = [first_hit(sets[0], row) for row in range(90)]
    assert search_steps(sets[0]).tolist() == want
    assert 5 < sum(map(math.isinf, want)) < 85


def test_the_border_of_a_box_is_outside() -> None:
    paths = make_paths([[(400, 500)], [(600, 500)], [(500, 400)], [(400.001, 599.999)]], (1000, 1000), boxes=BOX)
    assert search_steps(paths).tolist() == [math.inf, math.inf, math.inf, 1]


def test_curve_is_the_share_on_target_by_each_fixation(sets: tuple[Paths, Paths]) -> None:
    paths = sets[0]
    steps = [first_hit(paths, row) for row in range(90)]
    want = [by_task(paths, [float(step <= k) for step in steps]) for k in range(1, 8)]
    curve = search_curve(paths)
    assert curve == pytest.approx(want)
    assert (np.diff(curve) >= 0).all()
    assert 0 <= curve[0] <= curve[-1] <= 1


def test_set_metrics_are_read_off_both_curves(sets: tuple[Paths, Paths]) -> None:
    model, human = (search_curve(paths, 4) for paths in sets)
    assert tfp_auc(*sets, max_step=4) == pytest.approx(sum(model))
    assert tfp_auc(*sets, max_step=4) <= 5
    assert target_found(*sets, max_step=4) == pytest.approx(model[-1])
    assert probability_mismatch(*sets, max_step=4) == pytest.approx(sum(abs(model - human)))
    assert probability_mismatch(sets[0], sets[0]) == 0


def test_mean_step_is_over_paths_that_find_the_target(sets: tuple[Paths, Paths]) -> None:
    steps = [first_hit(sets[0], row) for row in range(90)]
    want = by_task(sets[0], [step if step <= 7 else math.nan for step in steps])
    assert mean_step(*sets) == pytest.approx(want)


def test_scanpath_ratio_compares_the_straight_way_with_the_way_gone(sets: tuple[Paths, Paths]) -> None:
    paths, ratios = sets[0], []
    for row in range(90):
        step, n = first_hit(paths, row), paths.lengths[row]
        points = paths.points[row]
        if step > 7 or n == 1:
            ratios.append(math.nan)
            continue
        gone = sum(math.dist(points[k], points[k + 1]) for k in range(int(step) - 1))
        x, y, w, h = paths.boxes[row]
        straight = math.dist(points[0], (x + w / 2, y + h / 2))
        ratios.append(min(1, straight / gone) if gone else math.nan)
    assert scanpath_ratio(*sets) == pytest.approx(by_task(paths, ratios))


def test_a_path_that_starts_on_the_target_has_no_ratio() -> None:
    paths = make_paths([[(500, 500), (100, 100)]], (1000, 1000), boxes=BOX)
    assert math.isnan(scanpath_ratio(paths, paths))
    assert tfp_auc(paths, paths) == 7


def test_a_direct_path_has_a_ratio_of_at_most_one() -> None:
    paths = make_paths([[(100, 500), (450, 500)]], (1000, 1000), boxes=BOX)  # stops before the middle
    assert scanpath_ratio(paths, paths) == 1


def test_samples_of_a_trial_are_averaged_first() -> None:
    hit, miss = [(500, 500)], [(1, 1)]
    paths = make_paths([hit, hit, hit, miss], (1000, 1000), boxes=BOX, trials=["a", "a", "a", "b"])
    assert target_found(paths, paths) == 0.5


def test_a_batch_of_empty_paths_is_undefined() -> None:
    nothing = make_paths([[], []], (1000, 1000), boxes=BOX)
    for metric in METRICS:
        assert math.isnan(metric(nothing, nothing))  # type: ignore[operator]


def test_paths_without_box_or_fixation_are_left_out_and_not_failures() -> None:
    boxes = [BOX, [np.nan] * 4, BOX]
    paths = make_paths([[(500, 500)], [(1, 1)], []], (1000, 1000), boxes=boxes)
    assert target_found(paths, paths) == 1
    assert np.isnan(search_steps(paths)).tolist() == [False, True, True]
    for metric in METRICS:
        with pytest.raises(InputError, match="undefined for"):
            metric(paths, paths, on_degenerate="raise")  # type: ignore[operator]


def test_paths_longer_than_max_step_are_not_cut_in_place(sets: tuple[Paths, Paths]) -> None:
    before = sets[0].points.copy()
    assert tfp_auc(*sets, max_step=2) == tfp_auc(*sets, max_step=2)
    assert (sets[0].points == before).all()
    with pytest.raises(InputError, match=r"^max_step: "):
        tfp_auc(*sets, max_step=-1)
