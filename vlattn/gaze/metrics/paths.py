"""Scanpaths by the batch: what every metric takes, for what is predicted and for what people did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.gaze.metrics.paths_check import check_units, handle_outside, named, read_path
from vlattn.gaze.metrics.policy import Floats, Ints

Symbols = tuple[Hashable, ...]
Outside = Literal["warn", "keep", "clip", "raise"]


@dataclass(frozen=True, eq=False)
class Paths:
    """B scanpaths, padded to the longest, L. Metrics never change them.

    points: float64 [B, L, 2], x and y in pixels, origin at the top left; 0 after the end of a path.
    lengths: int64 [B]. Paths of 0 fixations are allowed; `policy` says what they score.
    durations: float64 [B, L] in milliseconds, NaN where none was measured, 0 after the end.
    screens: float64 [B, 2], width and height.
    symbols: by kind ("objects", "labels", "clusters", ...), for each path one hashable per fixation.
    boxes: float64 [B, 4], the target's x, y, width, height; NaN where there is none.
    targets: the target's symbol of the kind "objects", None where there is none.
    tasks, trials: what means are taken over: the target that was looked for; what samples are samples of.
    """

    points: Floats
    lengths: Ints
    durations: Floats
    screens: Floats
    symbols: Mapping[str, tuple[Symbols, ...]] = field(default_factory=dict)
    boxes: Floats = field(default_factory=lambda: np.empty((0, 4)))
    targets: tuple[Hashable, ...] = ()
    tasks: tuple[Hashable, ...] = ()
    trials: tuple[Hashable, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def empty(self) -> NDArray[np.bool_]:
        """bool [B]: paths without a fixation."""
        return self.lengths == 0

    @property
    def real(self) -> NDArray[np.bool_]:
        """bool [B, L]: fixations, not padding."""
        return np.arange(self.points.shape[1]) < self.lengths[:, None]

    @property
    def timed(self) -> NDArray[np.bool_]:
        """bool [B]: paths of which every fixation has a duration."""
        return np.logical_not(np.isnan(self.durations).any(axis=1))

    def symbols_of(self, kind: str) -> tuple[Symbols, ...]:
        """Raises InputError where paths have no symbols of that kind."""
        if kind not in self.symbols:
            known = ", ".join(map(repr, self.symbols)) or "none"
            raise InputError(f"symbols: got {kind!r}, which the paths do not have; they have {known}")
        return self.symbols[kind]

    def take(self, rows: ArrayLike) -> Paths:
        """Some rows, in the order given; a row may come often."""
        index = np.asarray(rows)
        chosen = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        places = chosen.tolist()
        arrays = ("points", "lengths", "durations", "screens", "boxes")
        labels = ("targets", "tasks", "trials")
        changes: dict[str, Any] = {name: getattr(self, name)[chosen] for name in arrays}
        changes.update({name: tuple(getattr(self, name)[i] for i in places) for name in labels})
        symbols = {kind: tuple(found[i] for i in places) for kind, found in self.symbols.items()}
        return Paths(**changes, symbols=symbols)

    def truncated(self, longest: int) -> Paths:
        """The first `longest` fixations of each path."""
        require_count("truncate", longest)
        cut = np.minimum(self.lengths, longest)
        symbols = {kind: tuple(one[:longest] for one in found) for kind, found in self.symbols.items()}
        return replace(
            self,
            points=self.points[:, :longest],
            durations=self.durations[:, :longest],
            lengths=cut,
            symbols=symbols,
        )

    def with_symbols(self, kind: str, symbols: Sequence[Sequence[Hashable]]) -> Paths:
        """The same paths with symbols of one more kind.

        Raises:
            InputError: not one symbol per fixation.
        """
        given = tuple(map(tuple, symbols))
        if len(given) != len(self) or any(len(s) != n for s, n in zip(given, self.lengths.tolist(), strict=True)):
            raise InputError(f"symbols: those of kind {kind!r} are not one per fixation; give a sequence for each path")
        return replace(self, symbols={**self.symbols, kind: given})


def make_paths(
    paths: Sequence[ArrayLike],
    screen: ArrayLike,
    *,
    durations: Sequence[ArrayLike | None] | None = None,
    symbols: Sequence[Sequence[Hashable]] | Mapping[str, Sequence[Sequence[Hashable]]] | None = None,
    boxes: ArrayLike | None = None,
    targets: Sequence[Hashable] | None = None,
    tasks: Sequence[Hashable] | None = None,
    trials: Sequence[Hashable] | None = None,
    outside: Outside = "warn",
) -> Paths:
    """A batch of paths from arrays or lists, which are copied.

    Args:
        paths: per path [n, 2], x and y, or [n, 3] with durations in milliseconds. Empty ones are allowed.
        screen: (width, height) in pixels, one for all or [B, 2].
        durations: per path [n], in milliseconds, or None.
        symbols: per path one hashable per fixation: of the kind "objects", or a mapping by kind.
        boxes: [4] or [B, 4], the target's x, y, width, height.
        targets: per path the target's symbol; None for no target.
        tasks: per path what was looked for; the same for all by default.
        trials: per path what it is a sample of; each path its own by default.
        outside: what becomes of fixations outside the screen. "warn" and "keep" keep them (grids and label maps count
            them at the border, distances where they are); "clip" moves them to the border; "raise" refuses them.

    Raises:
        InputError: coordinates that are not finite, negative durations, shapes that do not fit. It names the path.

    Warns:
        UserWarning: durations look like seconds or microseconds; fixations outside the screen.
    """
    require_choice("outside", outside, ("warn", "keep", "clip", "raise"))
    count = len(paths)
    if durations is not None and len(durations) != count:
        raise InputError(f"durations: got {len(durations)} for {count} paths; give one array for each, or None")
    times: Sequence[Any] = durations if durations is not None else [None] * count
    read = [read_path(path, time, index) for index, (path, time) in enumerate(zip(paths, times, strict=True))]
    lengths = np.array([len(points) for points, _ in read], np.int64)
    longest = int(lengths.max(initial=0))
    points, spans = np.zeros((count, longest, 2)), np.zeros((count, longest))
    for row, (xy, span) in enumerate(read):
        points[row, : len(xy)], spans[row, : len(xy)] = xy, span
    screens = _rows(screen, count, 2, "screen")
    if not (np.isfinite(screens).all() and (screens > 0).all()):
        raise InputError(f"screen: got {screen!r:.60}; give a width and a height in pixels, above 0")
    found = Paths(
        handle_outside(points, lengths, screens, outside, trials),
        lengths,
        spans,
        screens,
        {},
        _rows(np.full(4, np.nan) if boxes is None else boxes, count, 4, "boxes"),
        named("targets", targets, [None] * count),
        named("tasks", tasks, [None] * count),
        named("trials", trials, list(range(count))),
    )
    check_units(found.durations[found.real])
    kinds = symbols if isinstance(symbols, Mapping) else {} if symbols is None else {"objects": symbols}
    for kind, sequences in kinds.items():
        found = found.with_symbols(kind, sequences)
    return found


def _rows(value: ArrayLike, count: int, width: int, name: str) -> Floats:
    given = np.asarray(value, np.float64)
    if given.shape not in ((width,), (count, width)):
        raise InputError(f"{name}: got shape {given.shape}; give {width} numbers, or [{count}, {width}]")
    return np.array(np.broadcast_to(given, (count, width)))


def check_pairs(predicted: Paths, human: Paths) -> None:
    """Refuse batches whose rows cannot be compared one by one."""
    if len(predicted) != len(human):
        raise InputError(
            f"predicted, human: got {len(predicted)} and {len(human)} paths; give as many of both, row by row what is "
            "compared (Paths.take repeats rows)"
        )
    odd = np.flatnonzero((predicted.screens != human.screens).any(1))
    if len(odd):
        row = odd[0]
        raise InputError(
            f"predicted, human: screens differ in row {row}, {predicted.screens[row].tolist()} and "
            f"{human.screens[row].tolist()}; scale the coordinates to one screen"
        )
