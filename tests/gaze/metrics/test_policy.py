"""Every cell of the table of edge cases, for every metric of its family; and the table itself, where it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import METRICS, Metric, behaviour, make_paths, tde
from vlattn.gaze.metrics import policy as policy_module
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import FAMILIES, POLICY, policy_table
from vlattn.gaze.metrics.registry import metric_table

POINTS = [(100.0, 100.0, 200.0), (300.0, 150.0, 300.0), (520.0, 410.0, 250.0), (200.0, 380.0, 220.0)]
CASES = {
    "both empty": [(0, 0)],
    "one empty": [(0, 3), (3, 0)],
    "length 1": [(1, 1), (1, 3)],
    "length 2": [(2, 2), (2, 3)],
}
PAIRS = [metric for metric in METRICS.values() if metric.kind == "pair"]
NORMALISED = ("ed_norm",)


def path(n: int) -> Paths:
    strings = [list(range(n))]
    kinds = dict.fromkeys(("objects", "labels", "clusters"), strings)
    return make_paths([POINTS[:n]], (1280, 720), symbols=kinds, targets=[0])


def cell(case: str, metric: Metric) -> str:
    assert metric.family is not None
    return POLICY[case][FAMILIES.index(metric.family)]


def length(metric: Metric, n: int) -> int:
    """In symbols: of metrics that count time, fixations of 200, 300 and 250 ms are 4, 6 and 5 bins."""
    return sum((4, 6, 5)[:n]) if "time_bin" in metric.settings else n


@pytest.mark.parametrize("case", POLICY)
@pytest.mark.parametrize("metric", PAIRS, ids=lambda metric: metric.name)
def test_pairs_follow_the_table(case: str, metric: Metric) -> None:
    for n, m in CASES[case]:
        if metric.name == "euclidean" and n != m:
            with pytest.raises(InputError):
                metric(path(n), path(m))
            continue
        value = metric(path(n), path(m))
        want = cell(case, metric)
        if want == "NaN":
            assert np.isnan(value).all()
        elif want == "length of the other":
            assert value == (1 if metric.name in NORMALISED else length(metric, max(n, m)))
        elif want in ("0", "1"):
            assert value == float(want)
        elif metric.name == "tde":  # k = 3
            assert np.isnan(value).all() == (min(n, m) < 3)
        elif metric.name == "recurrence":  # counts pairs i < j; here none is near, so that there is nothing in a row
            assert np.isnan(value[0, 0]) == (min(n, m) < 2)
        else:
            assert want.startswith("defined")
            assert np.isfinite(value).all()


@pytest.mark.parametrize(("case", "n"), [("length 1", 1), ("length 2", 2)])
def test_tde_is_defined_for_windows_as_long_as_the_path(case: str, n: int) -> None:
    assert str(n) in POLICY[case][FAMILIES.index("geometric")]
    for k in (1, 2, 3):
        assert np.isfinite(tde(path(n), path(3), k=k)).all() == (k <= n)


@pytest.mark.parametrize("case", POLICY)
def test_behaviour_follows_the_table(case: str) -> None:
    want = POLICY[case][FAMILIES.index("behaviour")]
    for n in {min(pair) for pair in CASES[case]}:
        found = behaviour(path(n))[0]
        if want == "NaN":
            assert np.isnan(found).all()
        else:
            assert np.isfinite(found).all()
        if want.startswith("search"):
            assert want == "search {2:g}, refix {3:g}, revisit {4:g}".format(*found)


@pytest.mark.parametrize("metric", PAIRS, ids=lambda metric: metric.name)
def test_raise_refuses_empty_and_undefined_and_nothing_else(metric: Metric) -> None:
    for n, m in ((0, 0), (0, 3), (3, 0)):
        with pytest.raises(InputError, match=r"undefined for 1 of 1 rows, the first of them 0|equally"):
            metric(path(n), path(m), on_degenerate="raise")
    full = make_paths([POINTS], (1280, 720), symbols={k: [[1, 2, 1, 3]] for k in ("objects", "labels", "clusters")})
    assert np.isfinite(np.asarray(metric(full, full, on_degenerate="raise")).ravel()[0])
    with pytest.raises(InputError, match=r"^on_degenerate: "):
        metric(full, full, on_degenerate="zero")


def test_raise_names_the_first_row_that_is_undefined(known: tuple[Paths, Paths]) -> None:
    short = known[0].truncated(2)
    with pytest.raises(InputError, match=r"^tde: undefined for 2 of 2 rows, the first of them 0, .*too short"):
        tde(short, known[1], on_degenerate="raise")


def test_the_table_is_the_same_in_code_docstring_and_documentation() -> None:
    written = (Path(__file__).parents[3] / "docs" / "scanpath_metrics.md").read_text(encoding="utf-8")
    assert policy_table() in (policy_module.__doc__ or "")
    assert policy_table() in written
    assert metric_table() in written
