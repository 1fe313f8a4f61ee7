"""Regular grids of cells, row by row from the top left."""

from __future__ import annotations

Box = tuple[float, float, float, float]


def grid_boxes(rows: int, columns: int, cell: tuple[float, float], origin: tuple[float, float] = (0, 0)) -> list[Box]:
    """Boxes of a grid, row-major.

    cell: width and height, pixels. origin: x and y of the top left corner, pixels.
    """
    width, height = cell
    left, top = origin
    return [(left + c * width, top + r * height, width, height) for r in range(rows) for c in range(columns)]
