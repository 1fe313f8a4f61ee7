"""What an object looks like: its crop, or the features that a frozen backbone sees in it. Made once a scene."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.gaze.trial import GazeSet, Scene
from vlattn.image_file import read_rgb

HEIGHT, WIDTH = 150, 93
"""Pixels of a crop, as the paper has them."""


class Looks(Protocol):
    """How objects look. shape: of one object's tensor. describe: plain data that decides what it holds."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def of(self, scene: Scene) -> torch.Tensor:
        """[P, *shape], one row for each object of the scene."""
        ...

    def describe(self) -> dict[str, Any]: ...


class CropLooks:
    """Crops, uint8 [P, 3, H, W], resized as OpenCV's default does (bilinear, no smoothing).

    order: `rgb`, or `bgr` for parity with the reference's book covers.
    """

    def __init__(self, gaze: GazeSet, height: int = HEIGHT, width: int = WIDTH, order: str = "rgb") -> None:
        require_count("height", height)
        require_count("width", width)
        require_choice("order", order, ("rgb", "bgr"))
        self.gaze, self.size, self.order = gaze, (height, width), order
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, *self.size)

    def of(self, scene: Scene) -> torch.Tensor:
        """Raises InputError where the picture cannot be read, or a box lies outside it."""
        if scene.id not in self._kept:
            made = [resize_crop(crop, self.size) for crop in cut_objects(self.gaze, scene)]
            crops = torch.stack(made) if made else torch.empty(0, *self.shape, dtype=torch.uint8)
            self._kept[scene.id] = crops.flip(1) if self.order == "bgr" else crops
        return self._kept[scene.id]

    def describe(self) -> dict[str, Any]:
        return {"looks": "crops", "height": self.size[0], "width": self.size[1], "order": self.order}


class FeatureLooks:
    """The mean patch token of each crop in a frozen backbone, float32 [P, D].

    backbone: as `vlattn.probing.named_backbone` gives it: `transform(False)`, a call on pixels that gives `.patches`
        [B, N, D], `name` and `dim`.
    batch: crops that pass at once.
    """

    def __init__(self, gaze: GazeSet, backbone: Any, batch: int = 64) -> None:
        require_count("batch", batch)
        self.gaze, self.backbone, self.batch = gaze, backbone, batch
        self.transform: Callable[[Image.Image], torch.Tensor] = backbone.transform(False)
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.backbone.dim),)

    def of(self, scene: Scene) -> torch.Tensor:
        """Raises InputError as `CropLooks.of` does."""
        if scene.id not in self._kept:
            self._kept[scene.id] = self._features([Image.fromarray(crop) for crop in cut_objects(self.gaze, scene)])
        return self._kept[scene.id]

    def start(self) -> torch.Tensor:
        """[D]: features of an all-white image, which stands in for the object before the first."""
        return self._features([Image.new("RGB", (WIDTH, HEIGHT), "white")])[0]

    def describe(self) -> dict[str, Any]:
        return {"looks": "features", "backbone": self.backbone.name, "dim": int(self.backbone.dim)}

    def _features(self, crops: list[Image.Image]) -> torch.Tensor:
        if not crops:
            return torch.empty(0, *self.shape)
        pixels = torch.stack([self.transform(crop) for crop in crops])
        return torch.cat([self.backbone(part).patches.float().mean(1).cpu() for part in pixels.split(self.batch)])


def cut_objects(gaze: GazeSet, scene: Scene) -> list[np.ndarray]:
    """uint8 [h, w, 3] of each object: its box, cut at the picture's edges, at least one pixel.

    Boxes are in pixels of the screen; a picture of another size is read as filling the screen.

    Raises:
        InputError: no picture, or a box outside it.
    """
    pixels = np.asarray(read_rgb(gaze.image_path(scene), f"image: scene {scene.id!r}:"))
    height, width = pixels.shape[:2]
    across, down = width / scene.width, height / scene.height
    crops = []
    for index, (x, y, w, h) in enumerate(scene.boxes()):
        left, top = int(np.floor(x * across + 0.5)), int(np.floor(y * down + 0.5))
        right = max(left + 1, int(np.floor((x + w) * across + 0.5)))
        bottom = max(top + 1, int(np.floor((y + h) * down + 0.5)))
        crop = pixels[max(top, 0) : bottom, max(left, 0) : right] if right > 0 and bottom > 0 else pixels[:0]
        if crop.size == 0:
            raise InputError(
                f"box: scene {scene.id!r}, object {index}: {[float(v) for v in (x, y, w, h)]} lies outside its "
                f"picture of {width} x {height}; give x, y, width, height within the screen"
            )
        crops.append(np.ascontiguousarray(crop))
    return crops


def resize_crop(crop: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [h, w, 3] -> uint8 [3, H, W]."""
    channels = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
    return F.interpolate(channels, size=size, mode="bilinear", align_corners=False)[0].round().to(torch.uint8)
