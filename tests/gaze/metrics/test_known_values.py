"""Every metric gives the values that are known for two paths."""

from __future__ import annotations

from typing import Any

import pytest

from vlattn.gaze.metrics import METRICS, grid_symbols, make_paths, scanmatch, tde
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.symbols import grid_cells

VALUES: dict[str, list[Any]] = {  # of (A, B) and (B, A), the first being predicted
    "sed": [1, 1],
    "scanmatch": [0.577556, 0.577556],
    "scanmatch_time": [0.496462, 0.496462],
    "multimatch": [[0.985963, 0.949098, 0.984803, 0.975449, 1.0]] * 2,
    "tde": [140.8044, 26.1606],
    "stde": [0.917278, 0.979139],
    "dtw": [361.3246, 361.3246],
    "frechet": [282.8427, 282.8427],
    "hausdorff": [233.2381, 233.2381],
    "eyenalysis": [14750, 14750],
}


@pytest.mark.parametrize("name", VALUES)
def test_known_paths_have_their_known_value(name: str, known: tuple[Paths, Paths]) -> None:
    for got, want in zip(METRICS[name](*known), VALUES[name], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5 if name not in ("tde", "dtw") else 1e-3)


@pytest.mark.parametrize(("name", "value"), [("ss", 0.6), ("semss", 0.6), ("ss_clusters", 0.6), ("ed", 2), ("fed", 2)])
def test_known_strings_have_their_known_value(name: str, value: float, symbols: tuple[Paths, Paths]) -> None:
    assert METRICS[name](*symbols) == pytest.approx([value])


def test_known_cells_of_both_grids(known: tuple[Paths, Paths]) -> None:
    assert grid_symbols(known[0]) == [[0, 6, 11, 10], [0, 6, 11]]
    cells = grid_cells(known[0].points, known[0].screens, (12, 8))
    assert cells[0].tolist() == [12, 14, 52, 49]
    assert cells[1, :3].tolist() == [13, 27, 52]


def test_hausdorff_mode_of_tde_takes_the_worst_window() -> None:
    line = make_paths([[(0, 0), (10, 0), (500, 0)]], (1000, 1000))
    other = make_paths([[(0, 0), (10, 0)]], (1000, 1000))
    assert tde(line, other, k=2) == pytest.approx([(0 + (10 + 490) / 2) / 2])
    assert tde(line, other, k=2, mode="hausdorff") == pytest.approx([(10 + 490) / 2])


def test_scanmatch_cuts_to_whole_pixels_and_milliseconds_unless_told_not_to() -> None:
    # 12 columns of 800 pixels: the border is at 66.67, so 66.9 is in column 1, and 66 in column 0.
    paths = [make_paths([[(x, 10, 100)]], (800, 600)) for x in (66.9, 10)]
    assert scanmatch(*paths) == [1]
    assert scanmatch(*paths, whole=False) == pytest.approx([2.5 / 3.5])
    # 20.3 ms of bins of 40 rounds to one symbol, 20 to none (ties to even).
    short, long = (make_paths([[(10, 10, ms)]], (800, 600)) for ms in (20.3, 100.2))
    assert scanmatch(short, long, time_bin=40) == [0]
    assert scanmatch(short, long, time_bin=40, whole=False) == pytest.approx([1 / 3])
    assert scanmatch(long, make_paths([[(10, 10, 80)]], (800, 600)), time_bin=40) == [1]
