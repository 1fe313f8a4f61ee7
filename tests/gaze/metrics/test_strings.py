"""String metrics against loops over one pair, and both engines against each other."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.metrics import edit_distance, make_paths, scanmatch, semantic_score, sequence_score, string_edit
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.strings import align, lcs, levenshtein

ENGINES = ("numpy", "rapidfuzz")


def needleman_wunsch(p: Sequence[Any], q: Sequence[Any], match: Any, gap: float) -> np.ndarray:
    table = np.zeros((len(p) + 1, len(q) + 1))
    for i in range(len(p) + 1):
        for j in range(len(q) + 1):
            options = []
            if i:
                options.append(table[i - 1, j] + gap)
            if j:
                options.append(table[i, j - 1] + gap)
            if i and j:
                options.append(table[i - 1, j - 1] + match(p[i - 1], q[j - 1]))
            table[i, j] = max(options, default=0)
    return table


def edits(p: Sequence[Any], q: Sequence[Any], put: int = 1, remove: int = 1, change: int = 1) -> int:
    if not p or not q:
        return len(p) * remove + len(q) * put
    swap = edits(p[1:], q[1:], put, remove, change) + (0 if p[0] == q[0] else change)
    return min(swap, edits(p[1:], q, put, remove, change) + remove, edits(p, q[1:], put, remove, change) + put)


def equal(a: Any, b: Any) -> float:
    return float(a == b)


def longer(p: Sequence[Any], q: Sequence[Any]) -> int:
    return max(len(p), len(q))


def repeated(paths: Paths, row: int) -> list[Any]:
    found = []
    for place, symbol in enumerate(paths.symbols["objects"][row]):
        found += [symbol] * int(paths.durations[row, place] / 50)
    return found


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    if request.param == "rapidfuzz":
        pytest.importorskip("rapidfuzz")
    return request.param


def test_sequence_score_is_needleman_wunsch_without_gap_cost(draw: Any, engine: Any) -> None:
    first, second = draw(200, 0), draw(200, 1)
    want = [
        needleman_wunsch(p, q, equal, 0)[-1, -1] / longer(p, q)
        for p, q in zip(first.symbols["objects"], second.symbols["objects"], strict=True)
    ]
    assert sequence_score(first, second, engine=engine) == pytest.approx(want)
    assert semantic_score(first, second, engine=engine) == pytest.approx(want)


def test_sequence_score_with_gap_cost_is_needleman_wunsch(draw: Any) -> None:
    first, second = draw(100, 0), draw(100, 1)
    want = [
        needleman_wunsch(p, q, equal, -0.3)[-1, -1] / longer(p, q)
        for p, q in zip(first.symbols["objects"], second.symbols["objects"], strict=True)
    ]
    assert sequence_score(first, second, gap=-0.3) == pytest.approx(want)


def test_time_repeats_each_symbol_once_per_whole_bin(draw: Any, engine: Any) -> None:
    first, second = draw(60, 2, high=5), draw(60, 3, high=5)
    want = []
    for row in range(60):
        p, q = repeated(first, row), repeated(second, row)
        want.append(needleman_wunsch(p, q, equal, 0)[-1, -1] / longer(p, q))
    assert sequence_score(first, second, time_bin=50, engine=engine) == pytest.approx(want)


def test_fixations_too_short_for_a_bin_leave_an_empty_string() -> None:
    short = make_paths([[(1, 1, 49)]], (100, 100), symbols=[[1]])
    long = make_paths([[(1, 1, 149)]], (100, 100), symbols=[[1]])
    assert sequence_score(short, long, time_bin=50) == [0]
    assert edit_distance(short, long, time_bin=50) == [2]
    assert sequence_score(short, short, time_bin=50) == [1]


def test_missing_durations_are_undefined_only_where_time_counts() -> None:
    untimed = make_paths([[(1, 1)]], (100, 100), symbols=[[1]])
    for metric in (sequence_score, edit_distance):
        assert np.isnan(metric(untimed, untimed, time_bin=50)).all()  # type: ignore[operator]
        assert not np.isnan(metric(untimed, untimed)).any()  # type: ignore[operator]
    assert np.isnan(scanmatch(untimed, untimed, time_bin=50)).all()


def test_edit_distance_is_the_fewest_edits(draw: Any, engine: Any) -> None:
    first, second = draw(80, 4, low=0, high=5), draw(80, 5, low=0, high=5)
    pairs = list(zip(first.symbols["objects"], second.symbols["objects"], strict=True))
    for weights in ((1, 1, 1), (1, 1, 2), (2, 1, 3), (1, 4, 1)):
        want = [edits(p, q, *weights) for p, q in pairs]
        assert edit_distance(first, second, weights=weights, engine=engine).tolist() == want
    want = [edits(p, q) / max(longer(p, q), 1) for p, q in pairs]
    assert edit_distance(first, second, normalised=True, engine=engine) == pytest.approx(want)


def test_normalised_edit_distance_is_one_where_nothing_is_shared(engine: Any) -> None:
    first = make_paths([[(1, 1)] * 2], (9, 9), symbols=[[1, 2]])
    second = make_paths([[(1, 1)] * 5], (9, 9), symbols=[[3, 4, 5, 6, 7]])
    for weights in ((1, 1, 1), (1, 1, 2), (2, 3, 1), (1, 1, 9)):
        for pair in ((first, second), (second, first)):
            assert edit_distance(*pair, weights=weights, normalised=True, engine=engine) == [1]


def test_string_edit_counts_edits_of_grid_cells(draw: Any) -> None:
    first, second = draw(60, 6, high=5), draw(60, 7, high=5)

    def cells(paths: Paths, row: int) -> list[int]:
        points = paths.points[row, : paths.lengths[row]]
        return [min(int(x * 5 // 1280), 4) + 5 * min(int(y * 5 // 720), 4) for x, y in points]

    want = [edits(cells(first, row), cells(second, row)) for row in range(60)]
    assert string_edit(first, second).tolist() == want


def test_the_right_border_belongs_to_the_last_column() -> None:
    border = make_paths([[(1279.9, 0)]], (1279, 720), outside="keep")
    inside = make_paths([[(1200, 0)]], (1279, 720))
    assert string_edit(border, inside) == [0]


@pytest.mark.parametrize(("gap", "time_bin"), [(0.0, 0.0), (-0.7, 0.0), (0.0, 50.0), (-2.0, 50.0)])
def test_scanmatch_is_the_best_cell_of_the_alignment(draw: Any, gap: float, time_bin: float) -> None:
    first, second = draw(30, 8, high=6), draw(30, 9, high=6)

    def cells(paths: Paths, row: int) -> list[tuple[int, int]]:
        found = []
        for place in range(paths.lengths[row]):
            x, y = (int(value) for value in paths.points[row, place])
            count = round(int(paths.durations[row, place]) / time_bin) if time_bin else 1
            found += [(int(x * 12 / 1280), int(y * 8 / 720))] * count
        return found

    def worth(a: tuple[int, int], b: tuple[int, int]) -> float:
        return 3.5 - float(np.hypot(a[0] - b[0], a[1] - b[1]))

    want = []
    for row in range(30):
        p, q = cells(first, row), cells(second, row)
        want.append(needleman_wunsch(p, q, worth, gap).max() / (3.5 * longer(p, q)))
    assert scanmatch(first, second, gap=gap, time_bin=time_bin) == pytest.approx(want)


def test_any_hashable_is_a_symbol(engine: Any) -> None:
    first = make_paths([[(1, 1)] * 4], (9, 9), symbols=[["cup", ("a", 1), -1, -2]])
    second = make_paths([[(1, 1)] * 3], (9, 9), symbols=[["cup", ("a", 1), -2]])
    assert sequence_score(first, second, engine=engine) == [0.75]
    assert edit_distance(first, second, engine=engine) == [1]


def test_ragged_batches_larger_than_a_block_stay_in_order() -> None:
    rng = np.random.default_rng(0)
    first, second = ([rng.integers(0, 3, n) for n in rng.integers(0, 150, 700)] for _ in range(2))
    pytest.importorskip("rapidfuzz")
    assert (lcs(first, second, "numpy") == lcs(first, second, "rapidfuzz")).all()
    assert (levenshtein(first, second, engine="numpy") == levenshtein(first, second, engine="rapidfuzz")).all()
    assert (align(first, second, lambda a, b: a == b, 0.0, anywhere=True) == lcs(first, second)).all()


def test_engine_that_is_not_installed_is_an_error_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, symbols: tuple[Paths, Paths]
) -> None:
    real = builtins.__import__

    def block(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "rapidfuzz":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", block)
    assert sequence_score(*symbols) == pytest.approx([0.6])
    with pytest.raises(InputError, match=r"engine: got 'rapidfuzz'.*vlattn\[scanpath\]"):
        sequence_score(*symbols, engine="rapidfuzz")


def test_bad_settings_name_the_argument(symbols: tuple[Paths, Paths], known: tuple[Paths, Paths]) -> None:
    for wrong, call in (
        ("weights", lambda: edit_distance(*symbols, weights=(1, 1))),  # type: ignore[arg-type]
        ("weights", lambda: edit_distance(*symbols, weights=(1, 1, -1))),
        ("time_bin", lambda: sequence_score(*symbols, time_bin=0)),
        ("engine", lambda: sequence_score(*symbols, engine="fast")),  # type: ignore[arg-type]
        ("symbols", lambda: sequence_score(*symbols, symbols="words")),
        ("symbols", lambda: sequence_score(*known)),
        ("threshold", lambda: scanmatch(*known, threshold=0)),
        ("gap", lambda: scanmatch(*known, gap=0.5)),
        ("time_bin", lambda: scanmatch(*known, time_bin=-1)),
        ("grid", lambda: string_edit(*known, grid=(0, 5))),
    ):
        with pytest.raises(InputError, match=f"^{wrong}: "):
            call()
