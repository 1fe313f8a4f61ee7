"""Which prompt positions are visual, and which patch of which image each one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlattn.errors import InputError


@dataclass(frozen=True)
class ImageLayout:
    """What the n visual tokens of one image (or video) are, in prompt order; int64 [n] each.

    tile: running index of the encoder image (crop or frame) within the image; -1 for a token of none, such as newline.
    patch: row-major id within its tile, after any merging of patches; -1 for CLS and newline.
    row, column: place in the grid of the whole image, tiles stitched; -1 for CLS and newline. Where an image shows
        twice, small and in tiles, and in videos, each view or frame has rows and columns of its own.
    """

    tile: torch.Tensor
    patch: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    @classmethod
    def of_grid(cls, rows: int, columns: int, leading: int = 0, tiles: int = 1) -> ImageLayout:
        """`tiles` plain grids one after the other, each behind `leading` CLS features."""
        ids = torch.arange(-leading, rows * columns).clamp(min=-1).repeat(tiles)
        tile = torch.arange(tiles).repeat_interleave(leading + rows * columns)
        place = ids >= 0
        row = torch.where(place, ids.div(columns, rounding_mode="floor"), -1)
        return cls(tile, ids, row, torch.where(place, ids % columns, -1))

    def __len__(self) -> int:
        return self.patch.shape[0]


@dataclass(frozen=True)
class VisualTokens:
    """Visual positions of a batch of prompts [B, T]; spans may differ from sample to sample and image to image.

    mask: bool, True where a position holds a visual feature.
    image: int64, running index of the image within the batch; -1 for text.
    tile: int64, running index of the encoder image within the batch; -1 for text and for a newline.
    patch: int64, row-major patch id within its tile; -1 for text, CLS and newline.
    row, column: int64, place in the image's grid; -1 for text, CLS and newline.
    """

    mask: torch.Tensor
    image: torch.Tensor
    tile: torch.Tensor
    patch: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    @classmethod
    def from_layouts(cls, mask: torch.Tensor, layouts: Sequence[ImageLayout]) -> VisualTokens:
        """Give the placeholders of `mask` [B, T] to the images in prompt order."""
        expected, total = sum(map(len, layouts)), int(mask.sum())
        if expected != total:
            raise InputError(
                f"input_ids: {total} visual placeholders, but the images have {expected} features; "
                "prepare the prompt and its images together with this model's own processor"
            )
        if not layouts:
            none = torch.full_like(mask, -1, dtype=torch.int64)
            return cls(mask, none, none, none, none, none)
        before, image, tile = 0, [], []
        for number, layout in enumerate(layouts):
            image.append(torch.full_like(layout.patch, number))
            tile.append(torch.where(layout.tile >= 0, layout.tile + before, -1))
            before += int(layout.tile.max()) + 1
        order = mask.flatten().cumsum(0).view_as(mask) - 1

        def placed(values: Sequence[torch.Tensor]) -> torch.Tensor:
            flat = torch.cat(list(values)).to(mask.device)
            return torch.where(mask, flat[order.clamp(min=0)], -1)

        return cls(
            mask,
            placed(image),
            placed(tile),
            placed([layout.patch for layout in layouts]),
            placed([layout.row for layout in layouts]),
            placed([layout.column for layout in layouts]),
        )

    @classmethod
    def from_placeholders(cls, mask: torch.Tensor, grid: tuple[int, int], leading: int = 0) -> VisualTokens:
        """Count placeholders off into images of `leading` + rows * columns features, in prompt order."""
        layout = ImageLayout.of_grid(*grid, leading)
        total = int(mask.sum())
        if total % len(layout):
            raise InputError(
                f"input_ids: {total} visual placeholders do not divide into images of {len(layout)} features; "
                "prepare the prompt with this model's own processor"
            )
        return cls.from_layouts(mask, [layout] * (total // len(layout)))

    @property
    def slot(self) -> torch.Tensor:
        """Running index of each visual token within its prompt [B, T]; -1 for text."""
        return torch.where(self.mask, self.mask.cumsum(1) - 1, -1)

    @property
    def images(self) -> int:
        return int(self.image.max()) + 1 if self.mask.any() else 0
