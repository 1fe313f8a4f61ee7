"""timm models: transformers with and without CLS, with registers, and feature maps in either layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone, FinalNorm
from vlattn.probing.backbones.blocks import flatten_map
from vlattn.probing.backbones.transforms import IMAGENET, ImageSettings
from vlattn.probing.tokens import Tokens


class TimmBackbone(Backbone):
    """Tokens as `forward_features` gives them, or as `forward_intermediates` gives those of a block.

    The final norm is `norm`, which `forward_features` applies. In average-pooled ViTs it sits in `fc_norm` behind the
    pooling, and `forward_features` ends without one; `final_norm=True` puts that one on each token. Blocks are counted
    as `forward_intermediates` counts them: transformer blocks in ViTs, stages in hierarchical models and CNNs.
    """

    library = "timm"

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        images: ImageSettings | None = None,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        images = images or timm_images(model)
        super().__init__(model, name=name, images=images, layer=layer, final_norm=final_norm)

    @property
    def _trunk(self) -> Any:
        """The timm model itself."""
        return self.module

    @property
    def _projection(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Takes tokens of `forward_features` to the width that images are compared in; None where CLS is not."""
        return None

    @property
    def depth(self) -> int:
        return len(self._trunk.feature_info)

    @property
    def _norm(self) -> nn.Module | None:
        norms = (getattr(self._trunk, name, None) for name in ("norm", "fc_norm"))
        return next((norm for norm in norms if _is_token_norm(norm)), None)

    @property
    def _normed_by_library(self) -> bool:
        return not isinstance(getattr(self._trunk, "norm", nn.Identity()), nn.Identity)

    def _read(self, pixels: torch.Tensor) -> Tokens:
        if self.whole:
            tokens = self._split(self._trunk.forward_features(pixels), pixels)
            project = self._projection
            if project is not None and tokens.cls is not None:
                return Tokens(tokens.patches, project(tokens.cls), tokens.grid, tokens.registers, project)
            return tokens
        patches, grid, prefix = self._intermediate(pixels)
        if self.final_norm:
            norm = self._norm
            assert norm is not None
            patches, prefix = norm(patches), None if prefix is None else norm(prefix)
        return self._tokens(patches, grid, prefix)

    def _intermediate(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int] | None, torch.Tensor | None]:
        """Un-normed patches [B, N, D] of the block, their grid, and the tokens in front of them [B, P, D]."""
        read = getattr(self._trunk, "forward_intermediates", None)
        if read is None:
            raise InputError(
                f"layer: the timm model {type(self._trunk).__name__} gives no tokens of blocks (it has no "
                "forward_intermediates); leave out layer, and final_norm as 'auto'"
            )
        known = inspect.signature(read).parameters
        # Only where there are such tokens: relative-position ViTs without them fail on the question.
        ask = "return_prefix_tokens" in known and getattr(self._trunk, "num_prefix_tokens", None) != 0
        more = {"return_prefix_tokens": True} if ask else {}
        (found,) = read(
            pixels,
            indices=[self.layer],
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
            **more,
        )
        features, prefix = found if isinstance(found, tuple | list) else (found, None)
        return *flatten_map(features), prefix

    def _split(self, features: Any, pixels: torch.Tensor) -> Tokens:
        """What forward_features gave: [B, P + N, D], [B, D, rows, columns] or [B, rows, columns, D]."""
        if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
            raise self._untold(features)
        if features.ndim == 4:
            if self._channels_last(features):
                features = features.permute(0, 3, 1, 2)
            return self._tokens(*flatten_map(features), None)
        first = getattr(self._trunk, "num_prefix_tokens", None)
        if first is None:
            first = int(self._class_token is not None)
        patches = features[:, first:]
        grid = self._grid(patches.shape[1], pixels)
        if grid is None:  # some models end with CLS alone, or with CLS tokens that they do not declare
            raise self._untold(features)
        return self._tokens(patches, grid, features[:, :first] if first else None)

    def _untold(self, features: Any) -> InputError:
        got = list(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        return InputError(
            f"model: {type(self._trunk).__name__} ends with {got}, from which the tokens of patches on a grid cannot "
            f"be told; give layer={self.depth - 1}, the last that it has, or another model"
        )

    def _tokens(self, patches: torch.Tensor, grid: tuple[int, int] | None, prefix: torch.Tensor | None) -> Tokens:
        if prefix is None or not prefix.shape[1]:
            return Tokens(patches, grid=grid)
        cls = int(self._class_token is not None)
        return Tokens(
            patches=patches,
            cls=prefix[:, 0] if cls else None,
            grid=grid,
            registers=prefix[:, cls:] if prefix.shape[1] > cls else None,
        )

    @property
    def _class_token(self) -> Any:
        own = getattr(self._trunk, "cls_token", None)
        return own if own is not None else getattr(getattr(self._trunk, "embeds", None), "cls_token", None)

    def _channels_last(self, features: torch.Tensor) -> bool:
        told = getattr(self._trunk, "output_fmt", None)
        if told is not None:
            return str(getattr(told, "value", told)).upper() == "NHWC"
        width = self._trunk.num_features
        return features.shape[3] == width and features.shape[1] != width

    def _grid(self, patches: int, pixels: torch.Tensor) -> tuple[int, int] | None:
        height, width = pixels.shape[2:]
        measure = getattr(getattr(self._trunk, "patch_embed", None), "dynamic_feat_size", None)
        if measure is not None:
            rows, columns = measure((height, width))
            if rows * columns == patches:
                return rows, columns
        rows = round((patches * height / width) ** 0.5)  # of a hierarchical model: cells as square as the pixels
        columns = patches // max(rows, 1)
        fits = patches and rows * columns == patches and rows * width == columns * height
        return (rows, columns) if fits else None


def timm_images(model: Any, image_size: int | None = None) -> ImageSettings:
    """Size, mean and std of a timm model's own data config."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = image_size or getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size")
    if size is None:
        size = 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    mean, std = tuple(config.get("mean", IMAGENET[0])), tuple(config.get("std", IMAGENET[1]))
    return ImageSettings((height, width), mean, std)


def load_timm(name: str, *, pretrained: bool, image_size: int | None) -> tuple[nn.Module, ImageSettings]:
    """A timm model by its name, without a classifier, and the pixels it takes."""
    import timm

    settings: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        sized = settings if image_size is None else {**settings, "img_size": image_size}
        model = timm.create_model(name, **sized)
    except TypeError as error:  # convolutional models take any size and have no such argument
        if image_size is None or "img_size" not in str(error):
            raise
        model = timm.create_model(name, **settings)
    return model, timm_images(model, image_size)


def _is_token_norm(norm: nn.Module | None) -> bool:
    """Whether a norm works on the last axis of any tensor, and is one at all."""
    name = type(norm).__name__
    return "2d" not in name and ("LayerNorm" in name or "RmsNorm" in name or "RMSNorm" in name)
