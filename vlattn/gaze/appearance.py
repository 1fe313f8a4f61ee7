"""What the objects of a scene look like, in a few numbers: crops, small copies of them, and how alike these are."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 4
ALIKE = 0.15
"""Colours whose root mean square difference is this much (of 1) are alike to exp(-1/2)."""


def crop_box(box: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole pixels of a picture, at least one pixel, inside it.

    Args:
        box: x, y, width, height, in pixels of the screen.
        scale: pixels of the picture per pixel of the screen, in x and y.
        size: width and height of the picture.
    """
    sides = []
    for axis in (0, 1):
        low = min(max(int(np.floor(box[axis] * scale[axis])), 0), size[axis] - 1)
        high = min(max(int(np.ceil((box[axis] + box[axis + 2]) * scale[axis])), low + 1), size[axis])
        sides.append((low, high))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def crops(picture: Image.Image, boxes: np.ndarray, screen: tuple[int, int]) -> list[Image.Image]:
    """What a picture shows in each box [P, 4], of pixels of the screen; the picture may have another size than it."""
    scale = (picture.width / screen[0], picture.height / screen[1])
    return [picture.crop(crop_box(box, scale, picture.size)) for box in boxes]


def thumbnails(picture: Image.Image, boxes: np.ndarray, screen: tuple[int, int]) -> np.ndarray:
    """Mean colours of 4 x 4 parts of each box, float64 [P, 48] in 0 to 1."""
    small = [crop.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for crop in crops(picture, boxes, screen)]
    return np.array([np.asarray(one, np.float64).ravel() / 255 for one in small]).reshape(len(boxes), -1)


def likeness(looks: np.ndarray, target: int) -> np.ndarray:
    """How alike each object is to the target: exp(-d^2 / (2 0.15^2)), d the root mean square difference of thumbnails.

    Args:
        looks: [P, C].
        target: index of the target.

    Returns:
        float64 [P], 1 for the target itself.
    """
    return np.exp(-((looks - looks[target]) ** 2).mean(1) / (2 * ALIKE**2))
