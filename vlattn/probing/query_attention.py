"""Attention maps of a trained head over val images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.probing.cache_manifest import backbone_settings
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.sources import TokenSources
from vlattn.probing.train_result import ProbeResult


@dataclass(frozen=True)
class HeadAttention:
    """pictures: images as the backbone saw them. patches: fp32 [images, M, N], maps over patches alone, rows sum to 1.
    grid: rows and columns of the patches. cls_mass: mean share of attention that CLS got; None where it took no part.
    """

    pictures: Sequence[Image.Image]
    patches: torch.Tensor
    grid: tuple[int, int]
    cls_mass: float | None


@torch.no_grad()
def head_attention(result: ProbeResult, sources: TokenSources, images: int) -> HeadAttention:
    """Maps of the best head over the first val images, in the data set's order.

    Raises:
        InputError: the head was trained on another backbone, has no maps, or the patches lie on no grid.
    """
    trained, loaded = result.about["backbone"]["weights"], backbone_settings(sources.backbone)["weights"]
    if trained != loaded:
        raise InputError(
            f"run: the head was trained on a backbone with other weights ({trained}, now {loaded}); give the folder "
            "with those weights as work, or the same model"
        )
    kind = parse_pooler(result.pooler)[2]
    dataset = sources.data.val.subset(range(min(images, len(sources.data.val))))
    shown = dataset.with_transform(sources.backbone.transform(train=False))
    pixels = torch.stack([shown[index][0] for index in range(len(shown))])
    tokens = sources.backbone(pixels)
    maps = result.head().pooler.attention(tokens.choose(kind).cpu().float())
    if maps is None or kind == "cls":
        raise InputError(f"run: {result.pooler} has no attention maps; give a run of an attentive pooler such as ep")
    if tokens.grid is None:
        raise InputError("run: the patches of this backbone lie on no grid, so that there is nothing to draw")
    mass = None
    if kind == "all":
        mass = float(maps[..., 0].mean())
        maps = maps[..., 1:] / maps[..., 1:].sum(-1, keepdim=True).clamp(min=1e-12)
    return HeadAttention([_picture(one, sources.backbone.images) for one in pixels], maps, tokens.grid, mass)


def _picture(pixels: torch.Tensor, settings: Any) -> Image.Image:
    """Pixels back to what they were before mean and std."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    levels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
