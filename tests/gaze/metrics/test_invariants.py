"""What must hold for any paths: identity, symmetry, ranges, what shifts, scales and reversals leave unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlattn.gaze.metrics import METRICS, make_paths
from vlattn.gaze.metrics.paths import Paths

PAIRS = [name for name, metric in METRICS.items() if metric.kind == "pair" and name not in ("euclidean", "recurrence")]
SYMMETRIC = [name for name in PAIRS if name not in ("tde", "stde")]
SIMILAR = [name for name in PAIRS if METRICS[name].better == "higher"]


def remade(paths: Paths, scale: float = 1, back: bool = False) -> Paths:
    order = slice(None, None, -1 if back else 1)
    rows = [
        np.concatenate([scale * paths.points[r, :n], paths.durations[r, :n, None]], 1)[order]
        for r, n in enumerate(paths.lengths)
    ]
    symbols = {kind: [one[order] for one in found] for kind, found in paths.symbols.items()}
    return make_paths(rows, paths.screens * scale, symbols=symbols)


@pytest.mark.parametrize("name", PAIRS)
def test_a_path_is_like_itself(name: str, draw: Any) -> None:
    paths = draw(50, 0, 3)
    want = 1 if METRICS[name].better == "higher" else 0
    assert METRICS[name](paths, paths) == pytest.approx(np.full_like(METRICS[name](paths, paths), want), abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_only_time_delay_tells_predicted_from_human(name: str, draw: Any) -> None:
    first, second = draw(50, 1, 3), draw(50, 2, 3)
    same = np.allclose(METRICS[name](first, second), METRICS[name](second, first))
    assert same == (name in SYMMETRIC)


@pytest.mark.parametrize("name", SIMILAR)
def test_similarities_are_from_zero_to_one(name: str, draw: Any) -> None:
    found = METRICS[name](draw(300, 3, 3), draw(300, 4, 3))
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.ptp(found) > 0.05


def test_edit_distance_is_a_metric(draw: Any) -> None:
    a, b, c = (draw(300, seed) for seed in (5, 6, 7))
    ed = METRICS["ed"]
    assert (ed(a, c) <= ed(a, b) + ed(b, c)).all()
    assert (ed(a, b) >= abs(a.lengths - b.lengths)).all()
    assert (ed(a, b) <= np.maximum(a.lengths, b.lengths)).all()
    equal = [p == q for p, q in zip(a.symbols["objects"], b.symbols["objects"], strict=True)]
    assert ((ed(a, b) == 0) == np.array(equal)).all()


def test_common_and_edited_make_up_the_longer_path(draw: Any) -> None:
    a, b = draw(2000, 8), draw(2000, 9)
    longer = np.maximum(a.lengths, b.lengths)
    score = METRICS["ss"](a, b)
    assert (score * longer + METRICS["ed"](a, b) >= longer - 1e-9).all()
    assert (score <= np.minimum(a.lengths, b.lengths) / longer + 1e-12).all()


@pytest.mark.parametrize("name", ["multimatch", "scanmatch", "scanmatch_time", "stde", "sed"])
def test_scaling_path_and_screen_changes_nothing(name: str, draw: Any) -> None:
    first, second = draw(50, 10, 3), draw(50, 11, 3)
    settings = {"whole": False} if "scanmatch" in name else {}
    want = METRICS[name](first, second, **settings)
    assert METRICS[name](remade(first, 2), remade(second, 2), **settings) == pytest.approx(want)


@pytest.mark.parametrize("name", ["ss", "ed", "dtw", "frechet", "scanmatch", "sed"])
def test_reversing_both_paths_changes_nothing(name: str, draw: Any) -> None:
    first, second = draw(50, 12), draw(50, 13)
    want = METRICS[name](first, second)
    assert METRICS[name](remade(first, back=True), remade(second, back=True)) == pytest.approx(want)


@pytest.mark.parametrize("name", PAIRS)
def test_a_row_scores_the_same_in_any_batch(name: str, draw: Any) -> None:
    first, second = draw(40, 14, 0, 12), draw(40, 15, 0, 12)
    together = METRICS[name](first, second)
    order = np.random.default_rng(0).permutation(40)
    assert np.allclose(METRICS[name](first.take(order), second.take(order)), together[order], equal_nan=True)
    for row in range(5):
        alone = METRICS[name](first.take([row]), second.take([row]))
        assert np.allclose(alone[0], together[row], equal_nan=True)


def test_every_metric_has_the_same_signature() -> None:
    import inspect

    for metric in METRICS.values():
        given = inspect.signature(metric.compute).parameters
        assert list(given)[:3] == ["predicted", "human", "on_degenerate"]
        assert given["on_degenerate"].default == "nan"
        assert all(one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in list(given.values())[2:])
        assert set(metric.settings) <= set(given)
