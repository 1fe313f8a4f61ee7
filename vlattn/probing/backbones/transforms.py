"""From a PIL image to pixels: the crop and augmentations that probes are trained with, and the view they are judged by.

As in "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vlattn.errors import InputError

Stats = tuple[float, float, float]
Augment = Literal["auto", "standard", "aimv2"]
Transform = Callable[[Any], torch.Tensor]

IMAGENET: tuple[Stats, Stats] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Stats, Stats] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Stats, Stats] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""(mean, std) of pixels in [0, 1] that models were trained with."""

STANDARD_RATIO = (3 / 4, 4 / 3)
AIMV2_RATIO = (0.75, 1.33)


@dataclass(frozen=True)
class ImageSettings:
    """What pixels a model takes.

    size: (height, width).
    mean, std: of each channel, for pixels in [0, 1].
    source: where mean and std come from, for the record.
    """

    size: tuple[int, int]
    mean: Stats = IMAGENET[0]
    std: Stats = IMAGENET[1]
    source: str = "model"


def draw_crop(
    height: int, width: int, *, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = STANDARD_RATIO
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, drawn once from torch's generator.

    The area is a uniform share of the image's, the aspect (width by height) log-uniform; both sides are rounded, and
    cut where they exceed the image. torchvision's crop draws anew in that case, which gives other crops.
    """
    share, position = torch.rand(2, dtype=torch.float64).tolist()
    area = height * width * (scale[0] + share * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + position * (high - low))
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    top = int(torch.randint(height - h + 1, ()))
    left = int(torch.randint(width - w + 1, ()))
    return top, left, h, w


class SingleDrawCrop(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop with the crop drawn by `draw_crop`."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = functional.get_size(flat_inputs[0])
        top, left, h, w = draw_crop(height, width, scale=self.scale, ratio=self.ratio)
        return {"top": top, "left": left, "height": h, "width": w}


def train_transform(settings: ImageSettings, augment: Augment = "standard") -> Transform:
    """PIL image -> float32 [3, H, W], another view at each call.

    augment: `standard` is a single-draw crop (area 0.08 to 1, aspect 3/4 to 4/3, bicubic) and a flip; `aimv2` has
        aspects of 0.75 to 1.33, and after the flip brightness of 0.7 to 1.3 and AutoAugment's ImageNet policy.
    """
    if augment not in ("standard", "aimv2"):
        raise InputError(f"augment: got {augment!r}; give 'standard' or 'aimv2'")
    ratio = STANDARD_RATIO if augment == "standard" else AIMV2_RATIO
    crop = SingleDrawCrop(settings.size, scale=(0.08, 1.0), ratio=ratio, interpolation=v2.InterpolationMode.BICUBIC)
    steps = [v2.Lambda(to_rgb), crop, v2.RandomHorizontalFlip(0.5)]
    if augment == "aimv2":
        steps += [v2.ColorJitter(brightness=0.3), v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)]
    return v2.Compose([*steps, *_to_pixels(settings)])


def eval_transform(settings: ImageSettings) -> Transform:
    """PIL image -> float32 [3, H, W]: shorter side to int(256 / 224 * size), bicubic, and the centre of that."""
    shorter = int(256 / 224 * max(settings.size))
    resize = v2.Resize(shorter, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([v2.Lambda(to_rgb), resize, v2.CenterCrop(settings.size), *_to_pixels(settings)])


def to_rgb(image: Any) -> Any:
    """A PIL image of any mode as RGB; anything else as it is."""
    return image.convert("RGB") if isinstance(image, Image.Image) else image


def _to_pixels(settings: ImageSettings) -> list[Any]:
    normalize = v2.Normalize(list(settings.mean), list(settings.std))
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize, v2.ToPureTensor()]
