"""How crops become vectors: the convolutions of the paper, or one linear map on a frozen backbone's features.

"OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335. Encoder and decoder share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError

LEVELS = (2, 3, 4)
"""How deep a pyramid can be: bins of 1, 2 x 2, 4 x 4, 8 x 8."""


class Appearance(nn.Module, ABC):
    """Looks of objects [N, *shape] to [N, dim], and what stands for the object before the first fixation."""

    shape: tuple[int, ...]

    @abstractmethod
    def start(self) -> torch.Tensor:
        """One look [1, *shape], as `forward` takes it, for the beginning of a path and for padding."""


class CropCNN(Appearance):
    """Conv 3 -> 16 (5 x 5), ReLU, max-pool 5, conv 16 -> 32 (3 x 3), ReLU, max-pool 3, linear. Trained from scratch.

    dim: width of what it gives. size: height and width of crops.
    levels: in place of the second pool, a spatial pyramid of so many levels (2, 3 or 4), which takes crops of any size;
        None is the paper's pool.
    scaling: `minmax` brings each crop to [0, 1]; `none` takes 0..255 as they are, which is what the reference does with
        book covers.
    """

    def __init__(
        self, dim: int = 256, size: Sequence[int] = (150, 93), levels: int | None = None, scaling: str = "minmax"
    ) -> None:
        super().__init__()
        require_count("dim", dim)
        require_choice("scaling", scaling, ("minmax", "none"))
        if levels is not None and levels not in LEVELS:
            raise InputError(f"levels: got {levels!r}; give 2, 3 or 4, or None for the paper's pool")
        self.shape, self.levels, self.scaling = (3, int(size[0]), int(size[1])), levels, scaling
        self.first, self.second = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 3)
        rows, columns = (((side - 4) // 5) - 2 for side in self.shape[1:])
        cells = (rows // 3) * (columns // 3) if levels is None else sum(4**level for level in range(levels))
        if min(rows, columns) < (3 if levels is None else 1):
            least = 29 if levels is None else 19
            raise InputError(
                f"crop: got {list(size)}, too small for the two convolutions; give at least {least} x {least}"
            )
        self.out = nn.Linear(32 * cells, dim)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W], uint8 or floating -> [N, dim]."""
        seen = scale_crops(crops, self.out.weight.dtype) if self.scaling == "minmax" else crops.to(self.out.weight)
        # A maximum commutes with a ReLU, and behind the pool there is 25 times less to rectify.
        seen = F.relu(F.max_pool2d(self.first(seen), 5))
        seen = self.second(seen)
        pooled = F.max_pool2d(seen, 3).flatten(1) if self.levels is None else pyramid(seen, self.levels)
        out: torch.Tensor = self.out(F.relu(pooled))
        return out

    def start(self) -> torch.Tensor:
        """Ones, which `forward` leaves as they are."""
        return torch.ones(1, *self.shape, device=self.out.weight.device)


class FeatureLinear(Appearance):
    """Linear on features of a frozen backbone, each brought to mean 0 and variance 1.

    Backbones give features of any size, and large ones would drown positions for many epochs.

    features: their width.
    """

    first: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: int, dim: int = 256) -> None:
        super().__init__()
        require_count("features", features)
        self.shape = (features,)
        self.out = nn.Linear(features, dim)
        for name, value in (("first", 0.0), ("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.full((features,), value))

    @torch.no_grad()
    def fit(self, start: torch.Tensor, sample: torch.Tensor) -> None:
        """Take what stands for the object before the first [features], and mean and variance of a sample [N, features].

        A model keeps both. A feature that is the same everywhere is left at 0.
        """
        for name, given, shape in (("start", start, start.shape), ("sample", sample, sample.shape[1:])):
            if tuple(shape) != self.shape or not given.isfinite().all() or not len(given):
                raise InputError(
                    f"{name}: got shape {list(given.shape)}; give finite features, {self.shape[0]} of each object"
                )
        self.first.copy_(start)
        self.mean.copy_(sample.mean(0))
        spread = sample.std(0, correction=0)
        self.std.copy_(torch.where(spread > 1e-6 * (1 + self.mean.abs().to(spread)), spread, torch.inf))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, features] -> [N, dim]."""
        out: torch.Tensor = self.out((features.to(self.out.weight) - self.mean) / self.std)
        return out

    def start(self) -> torch.Tensor:
        return self.first[None]


def scale_crops(crops: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Each crop [N, C, H, W] brought to [0, 1] by its own lowest and highest value; a crop of one value keeps it, cut
    to [0, 1]."""
    given = crops.to(dtype)
    low, high = given.amin((1, 2, 3), keepdim=True), given.amax((1, 2, 3), keepdim=True)
    plain = high <= low
    low = torch.where(plain, 0.0, low)
    return (given - low).div_(torch.where(plain, 1.0, high - low)).clamp_(0, 1)


def pyramid(maps: torch.Tensor, levels: int) -> torch.Tensor:
    """Maxima over 1, 2 x 2, ..., 2^(levels-1) squared bins of maps [N, C, h, w]: [N, C * (1 + 4 + ...)].

    Zeros fill up a side that bins do not divide, half before and half behind, the odd one behind.
    """
    pooled = []
    height, width = maps.shape[-2:]
    for level in range(levels):
        bins = 2**level
        tall, wide = -(-height // bins), -(-width // bins)
        down, across = tall * bins - height, wide * bins - width
        padded = F.pad(maps, (across // 2, across - across // 2, down // 2, down - down // 2))
        pooled.append(F.max_pool2d(padded, (tall, wide)).flatten(1))
    return torch.cat(pooled, 1)
