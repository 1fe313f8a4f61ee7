"""Which prompt positions are visual, and which patch of which image each one is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlattn.errors import InputError


@dataclass(frozen=True)
class VisualTokens:
    """Visual positions of a batch of prompts [B, T]; spans may differ from sample to sample and image to image.

    mask: bool, True where a position holds a visual feature.
    image: int64, running index of the image within the batch; -1 for text.
    patch: int64, row-major patch id within its image; -1 for text and for a CLS feature.
    grid: (rows, columns) of patches of one image.
    """

    mask: torch.Tensor
    image: torch.Tensor
    patch: torch.Tensor
    grid: tuple[int, int]

    @classmethod
    def from_placeholders(cls, mask: torch.Tensor, grid: tuple[int, int], leading: int = 0) -> VisualTokens:
        """Count placeholders off into images of `leading` + rows * columns features, in prompt order."""
        per_image = leading + grid[0] * grid[1]
        total = int(mask.sum())
        if total % per_image:
            raise InputError(
                f"input_ids: {total} visual placeholders do not divide into images of {per_image} features; "
                "prepare the prompt with this model's own processor"
            )
        order = mask.flatten().cumsum(0).view_as(mask) - 1
        image = torch.where(mask, order.div(per_image, rounding_mode="floor"), -1)
        patch = torch.where(mask, order % per_image - leading, -1).clamp(min=-1)
        return cls(mask, image, patch, grid)

    @property
    def row(self) -> torch.Tensor:
        """Patch row [B, T]; -1 where there is no patch."""
        return torch.where(self.patch >= 0, self.patch.div(self.grid[1], rounding_mode="floor"), -1)

    @property
    def column(self) -> torch.Tensor:
        """Patch column [B, T]; -1 where there is no patch."""
        return torch.where(self.patch >= 0, self.patch % self.grid[1], -1)

    @property
    def images(self) -> int:
        return int(self.image.max()) + 1 if self.mask.any() else 0
