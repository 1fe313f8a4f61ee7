"""What stands out in a picture, whoever looks for whatever: the spectral residual.

"Saliency Detection: A Spectral Residual Approach", Hou and Zhang, CVPR 2007.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlattn.gaze.appearance import crop_box

SIDE = 64
SMOOTH = 2.5
FLOOR = 0.01
"""Of the mean amplitude, added to all: drawn pictures lack whole frequencies, whose logarithms would outweigh all."""


def saliency_map(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    """Saliency of a picture scaled to `side` pixels, the scale the paper's fixed settings are for.

    Returns:
        float64 [side, side], at least 0, with a mean of 1; ones for a picture of one colour.
    """
    grey = np.asarray(picture.convert("L").resize((side, side), Image.Resampling.BOX), np.float64)
    if np.ptp(grey) == 0:
        return np.ones((side, side))
    spectrum = np.fft.fft2(grey)
    size = np.abs(spectrum)
    amplitude = np.log(size + FLOOR * size.mean())
    padded = np.pad(amplitude, 1, mode="wrap")
    local = sum(padded[r : r + side, c : c + side] for r in range(3) for c in range(3)) / 9
    residual = np.abs(np.fft.ifft2(np.exp(amplitude - local + 1j * np.angle(spectrum)))) ** 2
    places = np.arange(side)
    blur = np.exp(-((places[:, None] - places) ** 2) / (2 * SMOOTH**2))
    blur /= blur.sum(1, keepdims=True)
    smooth = blur @ residual @ blur.T
    return smooth / smooth.mean()


def object_saliency(picture: Image.Image, boxes: np.ndarray, screen: tuple[int, int]) -> np.ndarray:
    """Mean saliency in each box [P, 4] of pixels of the screen; float64 [P]."""
    found = saliency_map(picture)
    scale = (found.shape[1] / screen[0], found.shape[0] / screen[1])
    parts = (crop_box(box, scale, (found.shape[1], found.shape[0])) for box in boxes)
    return np.array([found[top:bottom, left:right].mean() for left, top, right, bottom in parts])
