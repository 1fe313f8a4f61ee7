"""Backbones by name, folder or live module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone, FinalNorm

_FORMS = '"timm/NAME", "open_clip/NAME:TAG", "hf/REPO_OR_FOLDER", "lvlm/NAME" ("lvlm/tiny" is embedded)'


def load_backbone(
    what: str | nn.Module,
    *,
    layer: int | None = None,
    final_norm: FinalNorm = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    processor: Any = None,
) -> Backbone:
    """A frozen backbone that gives tokens.

    Args:
        what: "timm/NAME", "open_clip/NAME:TAG" (also "open_clip/hf-hub:REPO"), "hf/REPO_OR_FOLDER", "lvlm/NAME" for the
            tower inside a vision-language model, "lvlm/tiny" being the embedded one; or a live timm, open_clip or
            Hugging Face model, or any model that vlattn wraps.
        layer: the block whose tokens are read, counted from 0, before the final norm; the blocks behind it are not run.
            None is what the model's own forward ends with (what its projector gets, in a vision-language model).
        final_norm: whether tokens pass the model's final norm; "auto" is as the library does where layer is None, and
            no norm at a layer.
        device, dtype: where and in what to run; None is the CPU and the library's choice (as stored for "lvlm", else
            float32). A live model stays where and what it is unless they are given.
        pretrained: load weights; False draws random ones.
        image_size: side of the square images, in place of the model's own.
        processor: of a live Hugging Face model, to take image mean, std and size from.

    Returns:
        A `Backbone`: pixels [B, 3, H, W] -> Tokens, in eval mode, without gradients.

    Raises:
        InputError: an unknown form or name, weights out of reach, or a layer or norm that the model does not have.
    """
    chosen = _dtype(dtype)
    if isinstance(what, str):
        library, _, path = what.partition("/")
        if library not in _BY_NAME or not path:
            raise InputError(f"what: got {what!r}; give {_FORMS}, or a live model")
        with _in_reach(what):
            make = _BY_NAME[library](path, pretrained, image_size, chosen)
    else:
        make = _from_live(what, image_size, processor)
    name = what if isinstance(what, str) else f"live {type(what).__name__}"
    backbone = make(name=name, layer=layer, final_norm=final_norm)
    if isinstance(what, str):
        backbone.module.eval().requires_grad_(False)
    if device is not None or chosen is not None:
        backbone.module.to(device=device, dtype=chosen)
    return backbone


Make = Callable[..., Backbone]


def _timm(name: str, pretrained: bool, image_size: int | None, dtype: torch.dtype | None) -> Make:
    from vlattn.probing.backbones.timm_backbone import TimmBackbone, load_timm

    model, images = load_timm(name, pretrained=pretrained, image_size=image_size)
    return lambda **settings: TimmBackbone(model, images=images, **settings)


def _open_clip(name: str, pretrained: bool, image_size: int | None, dtype: torch.dtype | None) -> Make:
    from vlattn.probing.backbones.open_clip_backbone import load_open_clip, open_clip_backbone

    visual = load_open_clip(name, pretrained=pretrained, image_size=image_size)
    return lambda **settings: open_clip_backbone(visual, **settings)


def _hf(name: str, pretrained: bool, image_size: int | None, dtype: torch.dtype | None) -> Make:
    from vlattn.probing.backbones.hf_backbone import load_hf

    model, processor = load_hf(name, pretrained=pretrained, dtype=dtype)
    return _from_transformers(model, image_size, processor)


def _lvlm(name: str, pretrained: bool, image_size: int | None, dtype: torch.dtype | None) -> Make:
    from vlattn.models.load import load

    if not pretrained:
        raise InputError("pretrained: towers of vision-language models come with their weights; leave it True")
    model, processor = load(name, dtype="auto" if dtype is None else dtype)
    return _from_transformers(model, image_size, processor)


_BY_NAME = {"timm": _timm, "open_clip": _open_clip, "hf": _hf, "lvlm": _lvlm}


def _from_live(model: nn.Module, image_size: int | None, processor: Any) -> Make:
    """By the library that the model's class, or one that it derives from, is defined in."""
    if not isinstance(model, nn.Module):
        raise InputError(f"what: got {type(model).__name__}; give {_FORMS}, or a live model")
    libraries = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    if "open_clip" in libraries:
        from vlattn.probing.backbones.open_clip_backbone import open_clip_backbone

        if image_size is not None:
            raise InputError("image_size: a live open_clip model has its size; leave it out, or load the model by name")
        return lambda **settings: open_clip_backbone(model, **settings)
    if "timm" in libraries:
        from vlattn.probing.backbones.timm_backbone import TimmBackbone, timm_images

        images = timm_images(model, image_size)
        return lambda **settings: TimmBackbone(model, images=images, **settings)
    if "transformers" in libraries:
        return _from_transformers(model, image_size, processor)
    raise InputError(
        f"what: {type(model).__name__} is no model of timm, open_clip or transformers; give one of these, or {_FORMS}"
    )


def _from_transformers(model: Any, image_size: int | None, processor: Any) -> Make:
    from vlattn.models.registry import families
    from vlattn.probing.backbones.hf_backbone import HFBackbone, vision_part
    from vlattn.probing.backbones.hf_images import hf_images
    from vlattn.probing.backbones.lvlm_backbone import tower_backbone

    if model.config.model_type in families() and hasattr(model.config, "vision_config"):
        return lambda **settings: tower_backbone(model, processor=processor, image_size=image_size, **settings)
    images = hf_images(vision_part(model).config, processor, image_size=image_size)
    return lambda **settings: HFBackbone(model, images=images, **settings)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"dtype: {dtype!r} is no floating-point dtype of torch; give float32, bfloat16 or float16")
    return found


@contextmanager
def _in_reach(what: str) -> Iterator[None]:
    """What libraries raise for unknown names and weights that cannot be fetched, as one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"what: {what!r} could not be loaded ({reason}); check the name, and give a model that is on this machine "
            "or a machine that is online, or pretrained=False for random weights"
        ) from error
