"""Distances of points against loops over one pair, and against libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import dtw, euclidean, eyenalysis, frechet, hausdorff, recurrence
from vlattn.gaze.metrics.paths import Paths, make_paths

Points = np.ndarray


def rows(first: Paths, second: Paths) -> list[tuple[Points, Points]]:
    return [
        (first.points[row, : first.lengths[row]], second.points[row, : second.lengths[row]])
        for row in range(len(first))
    ]


def coupled(p: Points, q: Points, join: Callable[[float, float], float]) -> float:
    table: dict[tuple[int, int], float] = {}
    for i in range(len(p)):
        for j in range(len(q)):
            cost = float(np.linalg.norm(p[i] - q[j]))
            before = [table[at] for at in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if at in table]
            table[i, j] = join(cost, min(before)) if before else cost
    return table[len(p) - 1, len(q) - 1]


def nearest(p: Points, q: Points) -> list[float]:
    return [min(float(np.linalg.norm(one - other)) for other in q) for one in p]


def test_dtw_is_the_least_sum_along_a_path(draw: Any) -> None:
    first, second = draw(80, 0), draw(80, 1)
    want = np.array([coupled(p, q, lambda cost, before: cost + before) for p, q in rows(first, second)])
    assert dtw(first, second) == pytest.approx(want)
    assert dtw(first, second, over="length") == pytest.approx(want / (first.lengths + second.lengths))
    assert dtw(first, second, over="diagonal") == pytest.approx(want / np.hypot(1280, 720))


def test_frechet_is_the_least_longest_step(draw: Any) -> None:
    first, second = draw(80, 2), draw(80, 3)
    assert frechet(first, second) == pytest.approx([coupled(p, q, max) for p, q in rows(first, second)])


def test_hausdorff_and_eyenalysis_are_made_of_nearest_distances(draw: Any) -> None:
    first, second = draw(80, 4), draw(80, 5)
    both = [(nearest(p, q), nearest(q, p)) for p, q in rows(first, second)]
    assert hausdorff(first, second) == pytest.approx([max(a + b) for a, b in both])
    assert eyenalysis(first, second) == pytest.approx(
        [sum(d * d for d in a + b) / max(len(a), len(b)) for a, b in both]
    )
    assert eyenalysis(first, second, squared=False) == pytest.approx(
        [sum(a + b) / max(len(a), len(b)) for a, b in both]
    )


def test_euclidean_compares_point_by_point_and_refuses_other_lengths(draw: Any) -> None:
    first, second = draw(20, 6, 4, 4), draw(20, 7, 4, 4)
    want = [sum(float(np.linalg.norm(a - b)) for a, b in zip(p, q, strict=True)) / 4 for p, q in rows(first, second)]
    assert euclidean(first, second) == pytest.approx(want)
    with pytest.raises(InputError, match=r"row 0 has paths of 4 and \d fixations"):
        euclidean(first, draw(20, 8, 5, 9))


def test_recurrence_counts_near_pairs_before_the_diagonal(draw: Any) -> None:
    first, second = draw(60, 9, 1, 12), draw(60, 10, 1, 12)
    want = []
    for p, q in rows(first, second):
        n = min(len(p), len(q))
        near = {(i, j) for i in range(n) for j in range(i + 1, n) if np.linalg.norm(p[i] - q[j]) <= 400}
        lined = set()
        for i, j in near:
            if (i + 1, j + 1) in near:
                lined |= {(i, j), (i + 1, j + 1)}
        rate = 200 * len(near) / (n * (n - 1)) if n > 1 else np.nan
        want.append((rate, 100 * len(lined) / len(near) if near else np.nan))
    assert recurrence(first, second, radius=400) == pytest.approx(np.array(want), nan_ok=True)
    assert np.isfinite(want).all(1).sum() > 30


def test_default_radius_is_a_twentieth_of_the_diagonal(draw: Any) -> None:
    first, second = draw(60, 9, 5, 12), draw(60, 10, 5, 12)
    radius = float(np.hypot(1280, 720) / 20)
    assert recurrence(first, second) == pytest.approx(recurrence(first, second, radius=radius), nan_ok=True)


def test_dtw_agrees_with_dtw_python(draw: Any) -> None:
    library = pytest.importorskip("dtw")
    first, second = draw(30, 11, 2), draw(30, 12, 2)
    want = [
        library.dtw(p, q, dist_method="euclidean", step_pattern="symmetric1").distance for p, q in rows(first, second)
    ]
    assert dtw(first, second) == pytest.approx(want)


def test_frechet_agrees_with_similaritymeasures(draw: Any) -> None:
    library = pytest.importorskip("similaritymeasures")
    first, second = draw(30, 13, 2), draw(30, 14, 2)
    assert frechet(first, second) == pytest.approx([library.frechet_dist(p, q) for p, q in rows(first, second)])


def test_hausdorff_agrees_with_scipy(draw: Any) -> None:
    directed = pytest.importorskip("scipy.spatial.distance").directed_hausdorff
    first, second = draw(30, 15), draw(30, 16)
    want = [max(directed(p, q)[0], directed(q, p)[0]) for p, q in rows(first, second)]
    assert hausdorff(first, second) == pytest.approx(want)


def test_long_paths_beside_short_ones_do_not_disturb_them(draw: Any) -> None:
    """Blocks of rows, padded to one size, give what each row alone gives."""
    short, long = draw(3, 17, 1, 3), draw(3, 18, 150, 200)
    mixed = make_paths([p for pair in rows(short, long) for p in pair], (1280, 720))
    other = mixed.take([5, 4, 3, 2, 1, 0])
    for metric in (dtw, frechet, hausdorff, eyenalysis):
        together = metric(mixed, other)  # type: ignore[operator]
        alone = [metric(mixed.take([row]), other.take([row]))[0] for row in range(6)]  # type: ignore[operator]
        assert together == pytest.approx(alone, rel=1e-12)


def test_more_pairs_than_a_block_holds(draw: Any) -> None:
    first, second = draw(5000, 19, 1, 20), draw(5000, 20, 1, 20)
    found = dtw(first, second)
    for low, high in pairwise((0, 7, 1500, 1507, 4993, 5000)):
        if high - low < 10:
            some = range(low, high)
            want = [
                coupled(p, q, lambda cost, before: cost + before) for p, q in rows(first.take(some), second.take(some))
            ]
            assert found[low:high] == pytest.approx(want)
