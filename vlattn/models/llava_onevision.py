"""LLaVA-OneVision: LLaVA-NeXT's tiles, shrunk where they are many; one view each of several images; pooled videos.

`patchwise` speaks of images: the patches of video frames are pooled, and those of shrunk tiles mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.models.layouts import MixedLayout, place_layouts
from vlattn.models.llava_next import LlavaNextAdapter
from vlattn.runtime.tokens import ImageLayout, VisualTokens


class LlavaOnevisionAdapter(LlavaNextAdapter):
    model_types = ("llava_onevision",)
    size_arguments = ("image_sizes", "batch_num_images", "vision_aspect_ratio", "pixel_values_videos")

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    def patches_stay_whole(self, visual: VisualTokens, call: Mapping[str, Any]) -> bool:
        """As `Adapter.patches_stay_whole`: not in videos, which are pooled, nor where many tiles are shrunk."""
        shrunk = (visual.tile < 0) & (visual.row >= 0)
        return not bool(shrunk.any()) and not bool((self.visual_kinds(call) == 1).any())

    def visual_tokens(self, call: Mapping[str, Any]) -> VisualTokens:
        """As `Adapter.visual_tokens`. Needs image_sizes [images, 2] and pixel_values_videos [videos, frames, ...].

        Tile 0 is the small view, as in LLaVA-NeXT. Where the stitched tiles are shrunk, each token mixes several
        patches: `tile` and `patch` are -1 then, and rows and columns are those of the shrunk grid. In videos a tile is
        a frame and `patch` counts pooled cells. Newlines have none of the four.
        """
        kinds = self.visual_kinds(call)
        images: list[ImageLayout] = []
        videos: list[ImageLayout] = []
        if bool((kinds == 0).any()):
            images = self._image_layouts(call)
        if bool((kinds == 1).any()):
            number, frames = self._required_sizes(call, "pixel_values_videos", "video")[:2]
            videos = [self._video_layout(frames)] * number
        return place_layouts(kinds, [images, videos])

    def _image_layouts(self, call: Mapping[str, Any]) -> list[ImageLayout]:
        sizes = torch.as_tensor(self._required_sizes(call, "image_sizes")).cpu()
        counts = self._sizes(call, "batch_num_images", "image")
        tiled = [True] * len(sizes)
        if counts is not None:  # an image is cut into tiles only where it is alone in its prompt
            tiled = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        if len(tiled) != len(sizes):
            raise InputError(
                f"batch_num_images: it counts {len(tiled)} images, but image_sizes has {len(sizes)}; "
                "prepare both with this model's own processor"
            )
        # The forward's own vision_aspect_ratio does not reach the features; that of their computation does.
        told = self._sizes({**call, "vision_aspect_ratio": None}, "vision_aspect_ratio", "image")
        ratio = told or self.config.vision_aspect_ratio
        view = ImageLayout.of_grid(*self.grid)
        return [
            self._tiled_layout(size, ratio) if in_tiles else _with_newline(view)
            for size, in_tiles in zip(sizes, tiled, strict=True)
        ]

    def _tiled_layout(self, size: torch.Tensor, ratio: str) -> ImageLayout:
        rows, columns = self._tile_grid(size)
        numbers = torch.arange((1 + rows * columns) * self.patches, dtype=torch.float64).view(-1, self.patches, 1)
        order = self._pack(numbers, size, vision_aspect_ratio=ratio)[:, 0]
        whole = self._pack(numbers, size, vision_aspect_ratio=f"anyres_max_{rows * columns}")[:, 0]
        if len(order) == len(whole):  # with room for every tile nothing is shrunk
            return self._stitched(whole.long(), columns)
        view, shrunk = ImageLayout.of_grid(*self.grid), order[self.patches :]
        newline = shrunk < 0
        width = int(newline.nonzero()[0])
        place = torch.arange(len(shrunk))
        none = torch.full_like(place, -1)
        row = torch.where(newline, none, place.div(width + 1, rounding_mode="floor"))
        column = torch.where(newline, none, place % (width + 1))
        return MixedLayout(
            torch.cat([view.tile, none]),
            torch.cat([view.patch, none]),
            torch.cat([view.row, row]),
            torch.cat([view.column, column]),
            unnamed=rows * columns,
        )

    def _video_layout(self, frames: int) -> ImageLayout:
        height, width = ((side + 1) // 2 for side in self.grid)
        return _with_newline(ImageLayout.of_grid(height, width, tiles=frames))


def _with_newline(layout: ImageLayout) -> ImageLayout:
    end = torch.full((1,), -1)
    parts = (layout.tile, layout.patch, layout.row, layout.column)
    return ImageLayout(*(torch.cat([part, end]) for part in parts))
