"""Paths from arrays: bad input is named, nothing given is changed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import METRICS, dtw, label_symbols, make_paths, scanmatch, string_edit
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.symbols import fixation_clusters

SCREEN = (1280, 720)
GOOD = [(100, 100, 200), (300, 150, 300)]


def test_arrays_and_lists_give_the_same_batch() -> None:
    one = make_paths([GOOD, []], SCREEN)
    two = make_paths([np.array(GOOD, np.float32)[:, :2], np.empty((0, 2))], SCREEN, durations=[[200, 300], []])
    for name in ("points", "durations", "lengths", "screens"):
        assert (getattr(one, name) == getattr(two, name)).all()
    assert one.lengths.tolist() == [2, 0]
    assert one.empty.tolist() == [False, True]
    assert one.timed.tolist() == [True, True]
    assert make_paths([], SCREEN).points.shape == (0, 0, 2)


@pytest.mark.parametrize(
    ("message", "paths", "more"),
    [
        (r"paths\[1\]: fixation 1 is at \[nan, 2.0\]", [GOOD, [(1, 2), (np.nan, 2)]], {}),
        (r"paths\[0\]: fixation 0 is at \[inf, 2.0\]", [[(np.inf, 2)]], {}),
        (r"paths\[0\]: has shape \(4,\)", [[1, 2, 3, 4]], {}),
        (r"paths\[0\]: has shape \(1, 4\)", [[(1, 2, 3, 4)]], {}),
        (r"paths\[0\]: is no array", [[(1, 2), (1,)]], {}),
        (r"paths\[0\]: is no array", [[("left", 2)]], {}),
        (r"paths\[0\]: fixation 1 lasts -5", [[(1, 2, 200), (1, 2, -5)]], {}),
        (r"paths\[0\]: fixation 0 lasts inf", [[(1, 2, np.inf)]], {}),
        (r"paths\[0\]: has durations, and durations are given too", [GOOD], {"durations": [[1, 2]]}),
        (r"paths\[0\]: has durations of shape \(1,\) for 2", [[(1, 2), (3, 4)]], {"durations": [[100]]}),
        (r"durations: got 0 for 1 paths", [GOOD], {"durations": []}),
        (r"symbols: those of kind 'objects' are not one per fixation", [GOOD], {"symbols": [[1]]}),
        (r"symbols: those of kind 'words' are not one per fixation", [GOOD], {"symbols": {"words": []}}),
        (r"boxes: got shape \(3,\)", [GOOD], {"boxes": [1, 2, 3]}),
        (r"targets: got 2 for 1 paths", [GOOD], {"targets": [1, 2]}),
        (r"screen: got \(0, 720\)", [GOOD], {"screen": (0, 720)}),
        (r"outside: got 'drop'", [GOOD], {"outside": "drop"}),
    ],
)
def test_bad_input_is_named(message: str, paths: Any, more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make_paths(paths, **{"screen": SCREEN, **more})


@pytest.mark.parametrize(("scale", "unit"), [(0.001, "seconds"), (1000, "microseconds")])
def test_durations_in_another_unit_are_warned_of(scale: float, unit: str) -> None:
    given = np.array(GOOD) * (1, 1, scale)
    with pytest.warns(UserWarning, match=f"durations: their median is .*looks like {unit}"):
        made = make_paths([given], SCREEN)
    assert made.durations[0].tolist() == pytest.approx(given[:, 2])  # a guess: nothing is converted


def test_durations_in_milliseconds_or_none_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_paths([GOOD, []], SCREEN)
        make_paths([[(1, 2)], [(3, 4, np.nan)]], SCREEN)


def test_fixations_outside_the_screen() -> None:
    paths = [GOOD, [(50, 50), (1280, 100), (-3, 800)]]
    with pytest.warns(UserWarning, match=r"^paths\[1\]: fixation 1 at \(1280, 100\) is outside .* 2 of 5"):
        warned = make_paths(paths, SCREEN)
    with pytest.raises(InputError, match=r"^trial 'b': fixation 1 at \(1280, 100\) is outside"):
        make_paths(paths, SCREEN, trials=["a", "b"], outside="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = make_paths(paths, SCREEN, outside="keep")
        clipped = make_paths(paths, SCREEN, outside="clip")
    assert (warned.points == kept.points).all()
    assert kept.points[1, 1].tolist() == [1280, 100]
    assert ((clipped.points >= 0) & (clipped.points < SCREEN)).all()
    # Grids count what is outside at the border; distances where it is.
    assert string_edit(kept, clipped).tolist() == [0, 0]
    assert scanmatch(kept, clipped).tolist() == [1, 1]
    assert dtw(kept, clipped)[1] > 80


def test_what_is_given_is_never_changed(draw: Any) -> None:
    arrays = [np.array(GOOD, np.float64), np.array([(5.5, 6.5, 100), (700, 1, 150), (3, 3, 120)])]
    before = [one.copy() for one in arrays]
    strings: dict[str, Any] = {kind: [[1, 2], [3, 4, 5]] for kind in ("objects", "labels", "clusters")}
    made = make_paths(arrays, SCREEN, symbols=strings, boxes=(1, 1, 50, 50), targets=[1, 3])
    other = made.take([1, 1])
    snapshot = {name: np.array(getattr(made, name)) for name in ("points", "durations", "lengths", "screens", "boxes")}
    for metric in METRICS.values():
        if metric.kind == "step" or metric.name == "euclidean":
            continue
        first, second = (np.asarray(metric(made, other)) for _ in range(2))
        assert np.array_equal(first, second, equal_nan=True)
    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))
    assert all((getattr(made, name) == value).all() for name, value in snapshot.items())


def test_rows_that_cannot_be_compared_are_refused(draw: Any) -> None:
    with pytest.raises(InputError, match="got 3 and 2 paths"):
        dtw(draw(3, 0), draw(2, 0))
    with pytest.raises(InputError, match=r"screens differ in row 0, \[1280.0, 720.0\] and \[640.0, 480.0\]"):
        dtw(draw(1, 0), draw(1, 0, screen=(640, 480)))


def test_take_repeats_rows_and_truncated_cuts_them(draw: Any) -> None:
    paths = draw(5, 0, 3, 6)
    taken = paths.take([4, 0, 4])
    assert taken.lengths.tolist() == paths.lengths[[4, 0, 4]].tolist()
    assert taken.symbols["objects"][2] == paths.symbols["objects"][4]
    assert taken.targets == tuple(paths.targets[row] for row in (4, 0, 4))
    assert paths.take(paths.lengths > 100).lengths.tolist() == []
    cut = paths.truncated(2)
    assert cut.lengths.tolist() == [2] * 5
    assert [len(one) for one in cut.symbols["objects"]] == [2] * 5
    assert paths.lengths.min() >= 3
    with pytest.raises(InputError, match=r"^truncate: "):
        paths.truncated(0)


def test_labels_are_read_from_maps_at_whole_pixels_inside() -> None:
    maps = np.arange(12).reshape(3, 4)  # 4 x 3 pixels
    paths = make_paths([[(0.9, 0.9), (3.2, 1.7), (9, -1)], []], (4, 3), outside="keep")
    assert label_symbols(paths, [maps, maps]) == [[0, 7, 3], []]
    with pytest.raises(InputError, match=r"^maps\[0\]: has shape \(4, 3\).*give \[3, 4\]"):
        label_symbols(paths, [maps.T, maps])
    with pytest.raises(InputError, match=r"^maps: got 1 for 2 paths"):
        label_symbols(paths, [maps])


def test_clusters_name_fixations_by_the_nearest_centre() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    spots = np.array([(100, 100), (600, 500), (1100, 200)])
    points = np.concatenate([rng.normal(spot, 20, (30, 2)) for spot in spots])
    found = fixation_clusters(points)
    other = rng.random((50, 2)) * SCREEN
    library = cluster.MeanShift(bandwidth=found.bandwidth).fit(points)
    assert (found.of(other) == library.predict(other)).all()
    assert found.bandwidth == pytest.approx(cluster.estimate_bandwidth(points))
    assert len(fixation_clusters(points, 100).centers) == 3
    assert fixation_clusters([(5, 5)]).of([(1, 1), (9, 9)]).tolist() == [0, 0]
    with pytest.raises(InputError, match=r"^points: got none"):
        fixation_clusters(np.empty((0, 2)))


def test_padding_is_no_fixation() -> None:
    """A path scores the same beside a longer one as alone."""
    alone = make_paths([GOOD], SCREEN)
    beside = make_paths([GOOD, [(1, 1, 100)] * 30], SCREEN).take([0])
    assert isinstance(beside, Paths)
    for name in ("dtw", "frechet", "stde", "eyenalysis", "scanmatch_time", "sed", "hausdorff"):
        assert METRICS[name](beside, alone) == pytest.approx(METRICS[name](alone, alone))
