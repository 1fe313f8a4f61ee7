"""Where objects lie, in cells: rows and columns of a grid where there is one, else centres in the grid's units."""

from __future__ import annotations

import numpy as np

from vlattn.gaze.trial import Scene


def scene_cells(scene: Scene, rows: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Cells (row, column) of the objects, float64 [P, 2], and of the place where paths begin [2].

    A scene whose boxes fill a grid gets whole numbers, rows counted from the top, and begins at (rows // 2,
    columns // 2), as published. Any other scene, and one with more than `rows` rows or columns, gets its boxes' centres
    scaled so that the longer side of the screen spans 0 to rows - 1, and begins at the middle of the screen.

    rows: of the table of positions.
    """
    grid = find_grid(scene)
    if grid is not None and grid.max() < rows:
        return grid, np.floor((grid.max(0) + 1) / 2)
    unit = (rows - 1) / max(scene.width, scene.height)
    middle = np.array((scene.height, scene.width)) * unit / 2
    return (scene.centers()[:, ::-1] * unit).clip(0, rows - 1), middle


def find_grid(scene: Scene) -> np.ndarray | None:
    """Rows and columns, float64 [P, 2], where each cell of a grid of 2 x 2 or more holds one object; else None.

    Centres closer than half the median box are one row, or one column.
    """
    if len(scene.objects) < 4:
        return None
    centers, boxes = scene.centers(), scene.boxes()
    columns, rows = (_lines(centers[:, axis], float(np.median(boxes[:, 2 + axis])) / 2) for axis in (0, 1))
    cells = np.stack((rows, columns), 1)
    height, width = (int(count) + 1 for count in cells.max(0))
    filled = height * width == len(cells) == len(np.unique(cells, axis=0))
    return cells.astype(np.float64) if filled and min(height, width) > 1 else None


def _lines(values: np.ndarray, apart: float) -> np.ndarray:
    """int [P]: which line each value is on, where a step of more than `apart` begins another."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order], prepend=values[order[:1]]) > apart
    lines = np.empty(len(values), int)
    lines[order] = np.cumsum(steps)
    return lines
