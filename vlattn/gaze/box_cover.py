"""How much of each visual token of an image lies in each object's box."""

from __future__ import annotations

from typing import Any

import numpy as np

Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def seen_window(image_processor: Any, width: int, height: int) -> Window:
    """The part of a picture that a model sees: left, top, right, bottom as shares of its width and height.

    All of it, unless the processor crops the middle out, as CLIP's does with what is not square.

    Args:
        image_processor: with do_center_crop, crop_size, do_resize and size, as transformers has them.
        width, height: of the picture, pixels.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return WHOLE
    crop, size = image_processor.crop_size, getattr(image_processor, "size", None)
    scale = (1.0, 1.0)
    if getattr(image_processor, "do_resize", False) and size is not None:
        shortest = _get(size, "shortest_edge")
        if shortest:
            scale = (shortest / min(width, height),) * 2
        elif _get(size, "width"):
            scale = (_get(size, "width") / width, _get(size, "height") / height)
    shares = [
        _get(crop, side) / (s * of) for side, s, of in zip(("width", "height"), scale, (width, height), strict=True)
    ]
    left, top = ((1 - share) / 2 for share in shares)
    return left, top, left + shares[0], top + shares[1]


def _get(sizes: Any, name: str) -> Any:
    return sizes.get(name) if isinstance(sizes, dict) else getattr(sizes, name, None)


def box_cover(boxes: np.ndarray, screen: tuple[int, int], grid: tuple[int, int], window: Window = WHOLE) -> np.ndarray:
    """The share of each cell of a grid that lies in each box.

    Args:
        boxes: [P, 4], x, y, width, height in pixels of the screen.
        screen: width and height.
        grid: rows and columns of the visual tokens.
        window: what of the screen the grid lies over, from `seen_window`.

    Returns:
        float64 [P, rows, columns], 0 to 1; its sum over a box is the box's area in cells, as far as it is seen.
    """
    along = []
    for axis, cells in ((1, grid[0]), (0, grid[1])):
        low, high = window[axis], window[axis + 2]
        start = (boxes[:, axis] / screen[axis] - low) / (high - low) * cells
        end = ((boxes[:, axis] + boxes[:, axis + 2]) / screen[axis] - low) / (high - low) * cells
        edges = np.arange(cells)
        inside = np.minimum(end[:, None], edges + 1) - np.maximum(start[:, None], edges)
        along.append(inside.clip(0, 1))  # [P, cells]
    return along[0][:, :, None] * along[1][:, None, :]
