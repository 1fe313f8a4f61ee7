"""Time-delay embedding against loops over windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import stde, tde
from vlattn.gaze.metrics.paths import Paths


def delay(sim: np.ndarray, human: np.ndarray, k: int, mode: str = "mean") -> float:
    """Each simulated window's nearest human one, windows compared by the sum of their point distances."""
    if min(len(sim), len(human)) < k:
        return np.nan
    found = []
    for i in range(len(sim) - k + 1):
        totals = []
        for j in range(len(human) - k + 1):
            totals.append(sum(float(np.linalg.norm(sim[i + t] - human[j + t])) for t in range(k)) / k)
        found.append(min(totals))
    return float(np.mean(found)) if mode == "mean" else max(found)


def pairs(first: Paths, second: Paths) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (first.points[row, : first.lengths[row]], second.points[row, : second.lengths[row]])
        for row in range(len(first))
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["mean", "hausdorff"])
def test_tde_finds_each_predicted_window_in_the_human_path(draw: Any, k: int, mode: str) -> None:
    first, second = draw(60, 0), draw(60, 1)
    want = [delay(p, q, k, mode) for p, q in pairs(first, second)]
    assert tde(first, second, k=k, mode=mode) == pytest.approx(want, nan_ok=True)


def test_stde_averages_all_window_lengths(draw: Any) -> None:
    first, second = draw(60, 2), draw(60, 3)
    similar, distant = [], []
    for p, q in pairs(first, second):
        delays = [delay(p / 1280, q / 1280, k) for k in range(1, min(len(p), len(q)) + 1)]
        similar.append(np.mean(np.exp(-np.array(delays))))
        distant.append(np.mean(delays))
    assert stde(first, second) == pytest.approx(similar)
    assert stde(first, second, distance=True) == pytest.approx(distant)


def test_window_longer_than_a_path_is_undefined_and_not_zero(draw: Any) -> None:
    first, second = draw(5, 4, 4, 4), draw(5, 5, 2, 2)
    assert np.isnan(tde(first, second)).all()
    assert np.isnan(tde(second, first)).all()
    assert np.isnan(tde(first, second, k=30)).all()


def test_bad_settings_name_the_argument(draw: Any) -> None:
    first = draw(2, 0)
    for wrong, settings in (("k", {"k": 0}), ("mode", {"mode": "max"})):
        with pytest.raises(InputError, match=f"^{wrong}: "):
            tde(first, first, **settings)
    with pytest.raises(InputError, match=r"^distance: "):
        stde(first, first, distance=1)  # type: ignore[arg-type]
