"""What fixations are called before paths are compared as strings: grid cells, labels of a map, clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Floats, Ints


def grid_cells(points: Floats, screens: Floats, grid: tuple[int, int]) -> Ints:
    """col + row * columns of each point, int64 [B, L]; points outside belong to the border's cells."""
    require_count("grid", grid[0])
    require_count("grid", grid[1])
    shape = np.array(grid)
    cell = np.clip(np.floor(points * shape / screens[:, None]), 0, shape - 1).astype(np.int64)
    return cell[..., 0] + cell[..., 1] * grid[0]


def grid_symbols(paths: Paths, grid: tuple[int, int] = (5, 5)) -> list[list[int]]:
    """Grid cells of each path, for `Paths.with_symbols`. grid: columns and rows of the screen."""
    cells = grid_cells(paths.points, paths.screens, grid).tolist()
    return [row[:n] for row, n in zip(cells, paths.lengths.tolist(), strict=True)]


def label_symbols(paths: Paths, maps: Sequence[ArrayLike]) -> list[list[Any]]:
    """The label at (int(y), int(x)) of a segmentation map as large as the screen; points outside at the border.

    maps: per path [H, W].

    Raises:
        InputError: another number or size of maps.
    """
    if len(maps) != len(paths):
        raise InputError(f"maps: got {len(maps)} for {len(paths)} paths; give one for each")
    found = []
    for row, one in enumerate(maps):
        labels = np.asarray(one)
        width, height = paths.screens[row].astype(int).tolist()
        if labels.shape != (height, width):
            raise InputError(
                f"maps[{row}]: has shape {labels.shape}, but the screen is {width} x {height}; give [{height}, {width}]"
            )
        x, y = paths.points[row, : paths.lengths[row]].T
        column, line = np.clip(x.astype(int), 0, width - 1), np.clip(y.astype(int), 0, height - 1)
        found.append(labels[line, column].tolist())
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """Where people looked in one image. centers: float64 [K, 2]. bandwidth: pixels, to be reported with results."""

    centers: Floats
    bandwidth: float

    def of(self, points: ArrayLike) -> Ints:
        """The nearest cluster of each point [n, 2]: int64 [n]."""
        given = np.asarray(points, np.float64).reshape(-1, 2)
        return ((given[:, None] - self.centers) ** 2).sum(2).argmin(1)


def fixation_clusters(points: ArrayLike, bandwidth: float | None = None) -> Clusters:
    """Mean-shift clusters of all people's fixations on an image, as the sequence score of search papers uses them.

    Args:
        points: [n, 2], n at least 1, of one image (and task).
        bandwidth: pixels. The papers ship clusters without saying it; None estimates it from the points.

    Raises:
        InputError: no point, or scikit-learn is not installed.
    """
    given = np.asarray(points, np.float64).reshape(-1, 2)
    if not len(given):
        raise InputError("points: got none; clusters need at least one fixation")
    try:
        from sklearn.cluster import MeanShift, estimate_bandwidth
    except ImportError:
        raise InputError("clusters need scikit-learn, which is not installed; pip install scikit-learn") from None
    width = float(estimate_bandwidth(given)) if bandwidth is None else float(bandwidth)
    if not width > 0:  # so few points that none has a neighbour: each its own
        return Clusters(np.unique(given, axis=0), 0.0)
    return Clusters(np.asarray(MeanShift(bandwidth=width).fit(given).cluster_centers_, np.float64), width)
