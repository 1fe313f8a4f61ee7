"""MultiMatch against loops over one pair, and against the package."""

from __future__ import annotations

import builtins
import math
import statistics
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import Grouping, make_paths, multimatch
from vlattn.gaze.metrics.paths import Paths


def one(p: np.ndarray, q: np.ndarray, screen: tuple[float, float]) -> list[float]:
    """p, q: [n, 3]. The cheapest path through all pairs of saccades by trying: predecessors of the least cost."""
    v, u = np.diff(p[:, :2], axis=0), np.diff(q[:, :2], axis=0)
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {}
    for i in range(len(v)):
        for j in range(len(u)):
            cost = float(np.linalg.norm(v[i] - u[j])) if (i, j) != (0, 0) else 0.0
            before = [best[at] for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if at in best]
            total, path = min(before, key=lambda found: found[0], default=(0.0, []))
            best[i, j] = total + cost, [*path, (i, j)]
    path = best[len(v) - 1, len(u) - 1][1]
    diagonal = math.hypot(*screen)
    parts: list[list[float]] = [[], [], [], [], []]
    for i, j in path:
        angle = abs(math.atan2(v[i][1], v[i][0]) - math.atan2(u[j][1], u[j][0]))
        parts[0].append(float(np.linalg.norm(v[i] - u[j])) / (2 * diagonal))
        parts[1].append(min(angle, 2 * math.pi - angle) / math.pi)
        parts[2].append(abs(math.hypot(*v[i]) - math.hypot(*u[j])) / diagonal)
        parts[3].append(float(np.linalg.norm(p[i, :2] - q[j, :2])) / diagonal)
        parts[4].append(abs(p[i, 2] - q[j, 2]) / max(p[i, 2], q[j, 2]))
    return [1 - statistics.median(part) for part in parts]


def full(paths: Paths, row: int) -> np.ndarray:
    n = paths.lengths[row]
    return np.concatenate([paths.points[row, :n], paths.durations[row, :n, None]], 1)


def test_five_values_are_medians_along_the_cheapest_alignment(draw: Any) -> None:
    first, second = draw(80, 0, 3, 10), draw(80, 1, 3, 10)
    want = [one(full(first, row), full(second, row), (1280, 720)) for row in range(80)]
    assert multimatch(first, second) == pytest.approx(np.array(want))


def test_agrees_with_the_package(draw: Any) -> None:
    pytest.importorskip("multimatch_gaze")
    first, second = draw(60, 2, 1, 12), draw(60, 3, 1, 12)
    found = multimatch(first, second)
    assert found == pytest.approx(multimatch(first, second, engine="multimatch-gaze"), nan_ok=True)
    assert 10 < np.isnan(found).all(1).sum() < 50


def test_paths_of_two_fixations_are_undefined_and_of_three_are_not(draw: Any) -> None:
    two, three = draw(3, 4, 2, 2), draw(3, 5, 3, 3)
    assert np.isnan(multimatch(two, three)).all()
    assert np.isnan(multimatch(three, two)).all()
    assert not np.isnan(multimatch(three, three)).any()


def test_missing_durations_leave_the_other_four_values(draw: Any) -> None:
    timed = draw(4, 6, 3, 6)
    untimed = make_paths([full(timed, row)[:, :2] for row in range(4)], (1280, 720))
    found = multimatch(untimed, timed)
    assert np.isnan(found[:, 4]).all()
    assert found[:, :4] == pytest.approx(multimatch(timed, timed)[:, :4])


def test_two_durations_of_zero_do_not_differ() -> None:
    still = make_paths([[(0, 0, 0), (5, 5, 0), (9, 1, 0)]], (10, 10))
    assert multimatch(still, still).tolist() == [[1, 1, 1, 1, 1]]


def test_stationary_saccades_are_defined() -> None:
    stays = make_paths([[(5, 5, 100)] * 4], (10, 10))
    moves = make_paths([[(5, 5, 100), (5, 9, 100), (1, 9, 100)]], (10, 10))
    assert multimatch(stays, stays).tolist() == [[1, 1, 1, 1, 1]]
    assert np.isfinite(multimatch(stays, moves)).all()


def test_equal_costs_align_a_path_with_itself_along_the_diagonal() -> None:
    """Saccades that repeat leave many cheapest alignments."""
    square = [(0, 0), (4, 0), (4, 4), (0, 4)] * 3
    paths = make_paths([[(x, y, 100 + place) for place, (x, y) in enumerate(square)]], (10, 10))
    assert multimatch(paths, paths).tolist() == [[1, 1, 1, 1, 1]]


def test_shifting_both_paths_changes_nothing_and_one_only_the_position(draw: Any) -> None:
    first, second = draw(20, 7, 3, 6), draw(20, 8, 3, 6)

    def shifted(paths: Paths) -> Paths:
        moved = [full(paths, row) + np.array([13.5, -20.25, 0]) for row in range(20)]
        return make_paths(moved, (1280, 720), outside="keep")

    found = multimatch(first, second)
    assert multimatch(shifted(first), shifted(second)) == pytest.approx(found)
    one_moved = multimatch(shifted(first), second)
    assert one_moved[:, [0, 1, 2, 4]] == pytest.approx(found[:, [0, 1, 2, 4]])
    assert (np.abs(one_moved[:, 3] - found[:, 3]) > 1e-4).all()


def test_grouping_merges_small_saccades_as_the_package_does(draw: Any) -> None:
    package = pytest.importorskip("multimatch_gaze")
    first, second = draw(10, 9, 6, 12), draw(10, 10, 6, 12)
    found = multimatch(first, second, engine="multimatch-gaze", grouping=Grouping(45, 150, 300))
    kinds = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    for row in range(10):
        records = [np.array([(x, y, ms / 1000) for x, y, ms in full(side, row)], kinds) for side in (first, second)]
        want = package.docomparison(*records, [1280, 720], grouping=True, TDir=45, TDur=0.3, TAmp=150)
        assert found[row] == pytest.approx(want)
    assert (found != multimatch(first, second)).any()


def test_grouping_what_the_package_cannot_is_undefined() -> None:
    pytest.importorskip("multimatch_gaze")
    stays = make_paths([[(5, 5, 100)] * 5], (10, 10))
    found = multimatch(stays, stays, engine="multimatch-gaze", grouping=Grouping(45, 3, 300))
    assert np.isnan(found).all()


def test_errors_say_what_to_do(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = draw(2, 0, 3, 4)
    with pytest.raises(InputError, match=r"^grouping: .*engine='multimatch-gaze'"):
        multimatch(paths, paths, grouping=Grouping(45, 100, 300))
    with pytest.raises(InputError, match=r"^engine: "):
        multimatch(paths, paths, engine="old")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^amplitude: "):
        Grouping(45, -1, 300)
    real = builtins.__import__

    def block(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "multimatch_gaze":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", block)
    with pytest.raises(InputError, match=r"^engine: .*vlattn\[scanpath\]"):
        multimatch(paths, paths, engine="multimatch-gaze")
