"""Handwritten digits that scikit-learn carries: 1,797 real images, offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.probing.data.base import LabeledImages, Transform

_HELD_OUT = 0.2
_SEED = 0


def digits(
    size: int = 32, part: Literal["train", "val"] = "train", transform: Transform | None = None
) -> LabeledImages:
    """The digits 0 to 9 of scikit-learn, upsampled to RGB.

    From "Optical Recognition of Handwritten Digits" (UCI), 8 x 8 pixels of 17 grey levels. A fifth of each class is
    held out, the same images always.

    Args:
        size: pixels per side of the image that `transform` gets, at least 8 (bicubic).
        part: `train` (1,442 images) or `val` (355).
        transform: from a PIL image to what the model takes.

    Raises:
        InputError: scikit-learn is not installed, or `part` or `size` are not as above.
    """
    if part not in ("train", "val"):
        raise InputError(f"part: got {part!r}; give 'train' or 'val'")
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise InputError(f"size: got {size!r}; give pixels per side, an integer of at least 8")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "digits: they come with scikit-learn, which is not installed; pip install scikit-learn"
        ) from None
    found: Any = load_digits()
    labels = torch.from_numpy(found.target.astype(np.int64))
    whole = LabeledImages(
        range(len(labels)),
        Enlarged(np.rint(found.images * (255 / 16)).astype(np.uint8), size),
        names=[f"digits/{size}/{number}" for number in range(len(labels))],
        labels=labels,
        classes=[str(digit) for digit in range(10)],
        transform=transform,
    )
    return whole.subset(_positions(found.target, part))


@dataclass(frozen=True)
class Enlarged:
    """Small grey images, uint8 [n, h, w], read as RGB squares of `size`."""

    grey: np.ndarray[Any, np.dtype[np.uint8]]
    size: int

    def __call__(self, number: int) -> Image.Image:
        image = Image.fromarray(self.grey[number])
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")


def _positions(target: Any, part: str) -> list[int]:
    """Positions of a part, ascending. RandomState's stream is the one that NumPy keeps the same in all versions."""
    draw = np.random.RandomState(_SEED)
    chosen: list[int] = []
    for digit in range(10):
        members = draw.permutation(np.flatnonzero(target == digit))
        held_out = int(len(members) * _HELD_OUT)
        chosen += (members[:held_out] if part == "val" else members[held_out:]).tolist()
    return sorted(chosen)
