"""Which box is the one that somebody else drew."""

from __future__ import annotations

import numpy as np


def iou(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of each of `boxes` [P, 4] with one box [4], all x, y, width, height; float64 [P]."""
    low = np.maximum(boxes[:, :2], other[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], other[:2] + other[2:])
    shared = (high - low).clip(min=0).prod(1)
    return shared / (boxes[:, 2:].prod(1) + other[2:].prod() - shared)
