"""Searches as a model takes them: scenes of any size side by side, each look once, paths padded behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlattn.errors import InputError
from vlattn.gaze.baselines import object_path
from vlattn.gaze.crops import Looks
from vlattn.gaze.oat_layout import scene_cells
from vlattn.gaze.trial import GazeSet, Trial


@dataclass(frozen=True)
class Search:
    """A scene and the index of its target; path: indices of the objects that were fixated, where that is known."""

    scene: str
    target: int
    path: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OATBatch:
    """B searches, P objects in the largest scene.

    Ids are one row for the whole batch: 0..P-1 objects, P the end, P + 1 padding, P + 2 the beginning.

    looks: [N, ...] of all objects, each scene once. index: int64 [B, P] into them.
    present: bool [B, P], False where a scene has fewer objects; None where none has.
    cells: float64 [B, P, 2], rows and columns. start: float64 [B, 2], where paths begin. Both stay on the CPU, where
        positions are looked up.
    target: int64 [B]. paths: int64 [B, T], padded with P + 1; None for searches whose path is to be predicted.
    """

    looks: torch.Tensor
    index: torch.Tensor
    present: torch.Tensor | None
    cells: torch.Tensor
    start: torch.Tensor
    target: torch.Tensor
    paths: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.target)

    @property
    def objects(self) -> int:
        """P."""
        return self.index.shape[1]

    @property
    def end(self) -> int:
        return self.objects

    @property
    def pad(self) -> int:
        return self.objects + 1

    @property
    def begin(self) -> int:
        return self.objects + 2

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [B, T + 1]: beginning, f_1 .. f_T."""
        paths = self._paths()
        return torch.cat((paths.new_full((self.size, 1), self.begin), paths), 1)

    @property
    def wanted(self) -> torch.Tensor:
        """int64 [B, T + 1]: f_1 .. f_T, end; padding behind."""
        paths = self._paths()
        lengths = (paths != self.pad).sum(1, keepdim=True)
        longer = torch.cat((paths, paths.new_full((self.size, 1), self.pad)), 1)
        return longer.scatter(1, lengths, self.end)

    def to(self, device: torch.device | str) -> OATBatch:
        """On a device, all but what stays on the CPU."""
        present = None if self.present is None else self.present.to(device)
        paths = None if self.paths is None else self.paths.to(device)
        moved = {"looks": self.looks.to(device), "index": self.index.to(device), "target": self.target.to(device)}
        return replace(self, present=present, paths=paths, **moved)

    def _paths(self) -> torch.Tensor:
        if self.paths is None:
            raise InputError("paths: the batch has none; give searches with paths, or generate some")
        return self.paths


class OATData:
    """Scenes as batches of them. looks: how objects look. rows: of the model's table of positions."""

    def __init__(self, gaze: GazeSet, looks: Looks, rows: int = 14) -> None:
        self.gaze, self.looks, self.rows = gaze, looks, rows
        self._cells: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, searches: Sequence[Search]) -> OATBatch:
        """A batch in the order of `searches`; paths come along if all have one.

        Raises:
            InputError: no searches, an unknown scene, a target or a fixation that is none of its objects, an empty
                path.
        """
        if not searches:
            raise InputError("searches: got none; give at least one")
        self._check(searches)
        names = list(dict.fromkeys(one.scene for one in searches))
        looks = {name: self.looks.of(self.gaze.scenes[name]) for name in names}
        firsts = dict(zip(names, np.cumsum([0, *map(len, looks.values())]).tolist(), strict=False))
        counts = [len(looks[one.scene]) for one in searches]
        most = max(counts)
        index = torch.zeros(len(searches), most, dtype=torch.int64)
        cells = torch.zeros(len(searches), most, 2, dtype=torch.float64)
        start = torch.zeros(len(searches), 2, dtype=torch.float64)
        for row, (one, count) in enumerate(zip(searches, counts, strict=True)):
            index[row, :count] = torch.arange(firsts[one.scene], firsts[one.scene] + count)
            found = self._cells_of(one.scene)
            cells[row, :count], start[row] = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        present = None if min(counts) == most else torch.arange(most) < torch.tensor(counts)[:, None]
        target = torch.tensor([one.target for one in searches])
        return OATBatch(
            torch.cat(list(looks.values())), index, present, cells, start, target, _pad_paths(searches, most)
        )

    def _cells_of(self, scene: str) -> tuple[np.ndarray, np.ndarray]:
        if scene not in self._cells:
            self._cells[scene] = scene_cells(self.gaze.scenes[scene], self.rows)
        return self._cells[scene]

    def _check(self, searches: Sequence[Search]) -> None:
        for one in searches:
            if one.scene not in self.gaze.scenes:
                raise InputError(f"searches: scene {one.scene!r} is not in the gaze set; give one of its scenes")
            count = len(self.gaze.scenes[one.scene].objects)
            if not 0 <= one.target < count:
                raise InputError(
                    f"searches: target {one.target} in scene {one.scene!r} of {count} objects; give an index of one"
                )
            if one.path is not None and (not one.path or not all(0 <= place < count for place in one.path)):
                raise InputError(
                    f"searches: path {list(one.path)} in scene {one.scene!r} of {count} objects; give at least one "
                    "fixation, all on objects"
                )


def search_of(trial: Trial) -> Search | None:
    """A trial as a search; None for one that a pointer model cannot learn from: its target is not in the scene, or it
    has no fixation.

    Raises:
        InputError: fixations were not assigned to objects, or one is on no object.
    """
    path = tuple(int(index) for index in object_path(trial))
    return Search(trial.scene, int(trial.target_object), path) if path and trial.target_object is not None else None


def searches_of(trials: Iterable[Trial]) -> tuple[list[Search], list[Trial]]:
    """Searches, and the trials they come from, one by one; those that give none are left out."""
    pairs = [(search, trial) for trial in trials if (search := search_of(trial)) is not None]
    return [search for search, _ in pairs], [trial for _, trial in pairs]


def _pad_paths(searches: Sequence[Search], objects: int) -> torch.Tensor | None:
    paths = [one.path for one in searches if one.path is not None]
    if len(paths) < len(searches):
        return None
    padded = torch.full((len(paths), max(map(len, paths))), objects + 1, dtype=torch.int64)
    for row, path in enumerate(paths):
        padded[row, : len(path)] = torch.tensor(path)
    return padded
