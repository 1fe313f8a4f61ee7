"""The pixels that a Hugging Face model takes, from its image processor, or from its config where there is none."""

from __future__ import annotations

from typing import Any

from vlattn.probing.backbones.transforms import CLIP, HALF, IMAGENET, ImageSettings, Stats

_FAMILY_STATS = {
    "clip": CLIP,
    "deit": IMAGENET,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "idefics3": HALF,
    "internvl": IMAGENET,
    "metaclip_2": CLIP,
    "qwen2_5_vl": CLIP,
    "qwen2_vl": CLIP,
    "qwen3_vl": HALF,
    "siglip": HALF,
    "smolvlm": HALF,
    "vit": HALF,
    "vit_mae": IMAGENET,
}
"""(mean, std) of the released models of a family, for live models without a processor."""

DEFAULT_SIZE = 224


def hf_images(
    config: Any, processor: Any = None, *, image_size: int | None = None, fixed: bool = False
) -> ImageSettings:
    """Size, mean and std of a vision config and a processor, or an image processor.

    image_size: what to take instead of the size that they name.
    fixed: whether the config's size goes before the processor's; else the processor's does, as for DINOv2, whose config
        names the size that its positions were stored for.
    """
    processor = getattr(processor, "image_processor", processor)
    named = [_processor_size(processor), _config_size(config)]
    given = (image_size, image_size) if image_size is not None else None
    sizes = [given, *(reversed(named) if fixed else named), (DEFAULT_SIZE, DEFAULT_SIZE)]
    size = next(size for size in sizes if size is not None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is not None and std is not None:
        return ImageSettings(size, _stats(mean), _stats(std), "processor")
    # Vision configs are called clip_vision_model, idefics3_vision, qwen2_vl, ..., by family and version.
    kind = getattr(config, "model_type", "").removesuffix("_model").removesuffix("_vision")
    stats = _FAMILY_STATS.get(kind, IMAGENET)
    return ImageSettings(
        size, *stats, source="family" if kind in _FAMILY_STATS else "ImageNet, for want of a processor"
    )


def _stats(values: Any) -> Stats:
    red, green, blue = values if isinstance(values, list | tuple) else [values] * 3
    return float(red), float(green), float(blue)


def _processor_size(processor: Any) -> tuple[int, int] | None:
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or getattr(processor, "size", None)
    if not size:
        return None
    if size.get("height") and size.get("width"):
        return size.get("height"), size.get("width")
    side = size.get("shortest_edge")
    return (side, side) if side and not size.get("longest_edge") else None  # both together bound a number of pixels


def _config_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])
