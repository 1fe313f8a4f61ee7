"""Paths as strings of symbols: longest common subsequence, edit distance, alignment score, for many pairs at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.metrics.paths import Paths, check_pairs
from vlattn.gaze.metrics.policy import Floats, Ints
from vlattn.gaze.metrics.sweep import blocks, sweep

Engine = Literal["auto", "rapidfuzz", "numpy"]
Strings = list[Ints]


def coded(predicted: Paths, human: Paths, kind: str, time_bin: float | None) -> tuple[Strings, Strings]:
    """Symbols as integers from 0 that both sides share.

    time_bin: milliseconds; each symbol comes int(duration / time_bin) times. A path without all durations is one of
        None's only: callers mask it.
    """
    check_pairs(predicted, human)
    codes: dict[Hashable, int] = {}
    made = []
    for paths in (predicted, human):
        seen: dict[tuple[Hashable, ...], Ints] = {}  # rows repeat: a path is compared with many
        rows = []
        for symbols in paths.symbols_of(kind):
            if symbols not in seen:
                seen[symbols] = np.array([codes.setdefault(one, len(codes)) for one in symbols], np.int64)
            rows.append(seen[symbols])
        made.append(rows if time_bin is None else stretched(rows, paths, truncating(time_bin)))
    return made[0], made[1]


def truncating(time_bin: float) -> Callable[[Floats], Floats]:
    """How often a fixation counts, as Gazeformer counts it."""
    if not time_bin > 0:
        raise InputError(f"time_bin: got {time_bin!r}; give milliseconds above 0")
    return lambda durations: np.trunc(durations / time_bin)


def stretched(rows: Sequence[Ints], paths: Paths, counts: Callable[[Floats], Floats]) -> Strings:
    """Each symbol as often as `counts` says for its duration."""
    known = np.where(np.isnan(paths.durations), 0, paths.durations)
    repeats = counts(known).astype(np.int64)
    return [np.repeat(row, repeats[place, : len(row)]) for place, row in enumerate(rows)]


def sizes(rows: Strings) -> Ints:
    return np.array([len(row) for row in rows], np.int64)


def padded(rows: Strings, chosen: Ints) -> Ints:
    """int64 [L, B] of the chosen rows."""
    out = np.zeros((max(len(rows[i]) for i in chosen), len(chosen)), np.int64)
    for place, i in enumerate(chosen):
        out[: len(rows[i]), place] = rows[i]
    return out


def lcs(first: Strings, second: Strings, engine: Engine = "auto") -> Floats:
    """Lengths of the longest common subsequences, [B]."""
    fuzz = rapidfuzz(engine)
    if fuzz is not None:
        return _fuzzy(fuzz.distance.LCSseq.similarity, fuzz, first, second)
    return align(first, second, lambda a, b: a == b, 0.0)


def levenshtein(
    first: Strings, second: Strings, weights: tuple[int, int, int] = (1, 1, 1), engine: Engine = "auto"
) -> Floats:
    """Edit distances, [B]. weights: of inserting, deleting and substituting, to make the second of the first."""
    put, remove, change = weights
    fuzz = rapidfuzz(engine)
    if fuzz is not None:
        return _fuzzy(fuzz.distance.Levenshtein.distance, fuzz, first, second, weights=weights)
    n, m = sizes(first), sizes(second)
    found = (n * remove + m * put).astype(np.float64)  # right where one is empty

    def cheapest(up: Any, left: Any, diagonal: Any, price: Any) -> Any:
        return np.minimum(np.minimum(up + remove, left + put), diagonal + price)

    for rows in blocks(n, m):
        a, b = padded(first, rows), padded(second, rows)
        borders = np.arange(len(a) + 1) * remove, np.arange(len(b) + 1) * put
        found[rows] = sweep(a, b, (n[rows], m[rows]), lambda x, y: (x != y) * change, cheapest, borders)
    return found


def align(
    first: Strings, second: Strings, similarity: Callable[[Ints, Ints], Any], gap: float, anywhere: bool = False
) -> Floats:
    """Needleman-Wunsch scores, [B]: the best sum of similarities of aligned symbols, `gap` for each left alone.

    similarity: of codes that meet, elementwise.
    anywhere: the best cell of the whole table, as ScanMatch takes it, not the last; without gaps they are the same.
    """
    n, m = sizes(first), sizes(second)
    longer = np.maximum(n, m)
    found = np.zeros(len(longer)) if anywhere else longer * gap  # right where one is empty

    def best(up: Any, left: Any, diagonal: Any, price: Any) -> Any:
        alone = np.maximum(up, left)
        return np.maximum(alone + gap if gap else alone, diagonal + price)

    for rows in blocks(n, m):
        a, b = padded(first, rows), padded(second, rows)
        borders = np.arange(len(a) + 1) * float(gap), np.arange(len(b) + 1) * float(gap)
        ends = n[rows], m[rows]
        if anywhere and gap:
            most = np.zeros(len(rows))  # the cell (0, 0)
            sweep(a, b, ends, similarity, best, borders, _Most(most, ends))
            found[rows] = most
        else:
            found[rows] = sweep(a, b, ends, similarity, best, borders)
    return found


class _Most:
    """Keeps the largest cell of each pair's own table."""

    def __init__(self, most: Floats, ends: tuple[Ints, Ints]) -> None:
        self.most, self.ends = most, ends

    def __call__(self, total: int, low: int, cells: Any) -> None:
        i = np.arange(low, low + len(cells))[:, None]
        inside = (i <= self.ends[0]) & (total - i <= self.ends[1])
        np.maximum(self.most, np.where(inside, cells, -np.inf).max(0), out=self.most)


def rapidfuzz(engine: Engine) -> Any:
    """The package, None where numpy is to do it. Both give the same; the package is faster on long strings."""
    require_choice("engine", engine, ("auto", "rapidfuzz", "numpy"))
    if engine == "numpy":
        return None
    try:
        import rapidfuzz
        import rapidfuzz.process
    except ImportError:
        if engine == "rapidfuzz":
            raise InputError(
                "engine: got 'rapidfuzz', which is not installed; pip install 'vlattn[scanpath]', or give 'numpy'"
            ) from None
        return None
    return rapidfuzz


def _fuzzy(scorer: Any, fuzz: Any, first: Strings, second: Strings, **settings: Any) -> Floats:
    lists: list[list[list[int]]] = [[row.tolist() for row in rows] for rows in (first, second)]
    return np.asarray(fuzz.process.cpdist(*lists, scorer=scorer, scorer_kwargs=settings), np.float64)
