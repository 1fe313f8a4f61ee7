"""LLaVA-NeXT: LLaVA with a small view and tiles of each image, stitched, cropped to its shape, a newline after rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from vlattn.models.layouts import place_layouts
from vlattn.models.llava import LlavaAdapter
from vlattn.runtime.tokens import ImageLayout, VisualTokens


class LlavaNextAdapter(LlavaAdapter):
    model_types = ("llava_next",)
    many_tiles = True
    size_arguments: tuple[str, ...] = ("image_sizes",)

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """As `Adapter.visual_tokens`. Needs image_sizes [images, 2] (height, width) in the call.

        Tile 0 is the small view of the whole image, with a grid of its own; rows and columns of the other tiles are
        those of all tiles stitched, before cropping.
        """
        kinds = self.visual_kinds(call)
        if not bool((kinds >= 0).any()):
            return place_layouts(kinds, [[]])
        sizes = torch.as_tensor(self._required_sizes(call, "image_sizes")).cpu()
        return place_layouts(kinds, [[self._layout(size) for size in sizes]])

    @property
    def _home(self) -> Any:
        return sys.modules[type(self.multimodal).__module__]

    def _tile_grid(self, size: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tiles that an image of `size` (height, width) is cut into."""
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        rows, columns = self._home.get_anyres_image_grid_shape(size, pinpoints, side)
        return int(rows), int(columns)

    def _pack(self, features: torch.Tensor, size: torch.Tensor, **how: Any) -> torch.Tensor:
        """The model's own order of the features [tiles, P, C] of one image, with -1 for newlines; [n, C]."""
        packed, _ = self.multimodal.pack_image_features(
            [features], size[None], image_newline=features.new_full(features.shape[-1:], -1), **how
        )
        return packed[0]

    def _layout(self, size: torch.Tensor) -> ImageLayout:
        rows, columns = self._tile_grid(size)
        # Each patch of each tile goes through as its own number, so that its place in the prompt can be read off.
        numbers = torch.arange((1 + rows * columns) * self.patches, dtype=torch.float64)
        strategy = self.config.vision_feature_select_strategy
        order = self._pack(numbers.view(-1, self.patches, 1), size, vision_feature_select_strategy=strategy)
        return self._stitched(order[:, 0].long(), columns)

    def _stitched(self, order: torch.Tensor, columns: int) -> ImageLayout:
        """The layout of tokens [n] numbered tile by tile, patch by patch, -1 for newlines; `columns` of tiles."""
        tile = order.div(self.patches, rounding_mode="floor")  # -1 for newlines
        patch = torch.where(order >= 0, order % self.patches, -1)
        height, width = self.grid
        row = patch.div(width, rounding_mode="floor")
        column = torch.where(patch >= 0, patch % width, -1)
        crop = tile - 1
        row = torch.where(crop >= 0, row + crop.div(columns, rounding_mode="floor") * height, row)
        column = torch.where(crop >= 0, column + crop % columns * width, column)
        return ImageLayout(tile, patch, row, column)
