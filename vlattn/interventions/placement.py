"""Putting merged or reordered features where the decoder reads them: at the front of their image's span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlattn.errors import InputError
from vlattn.runtime.tokens import VisualTokens


@dataclass(frozen=True)
class Reduced:
    """What is left of each tile.

    features: [tiles, K, C], in the order in which the decoder gets them.
    ids: int64 [tiles, K], patch id of each; -1 for CLS and for filler of shorter rows, -2 for a merged token.
    alive: bool [tiles, K], False for filler; None for none.
    selected: True where every feature is one of the tile's own, at its own place in raster order (CLS first, where the
        model hands CLS to the decoder); False for merged or reordered features, which move to the front of the image.
    """

    features: torch.Tensor
    ids: torch.Tensor
    alive: torch.Tensor | None = None
    selected: bool = True

    def tile(self, number: int) -> Reduced:
        """One tile's row, filler left out: features [1, k, C], ids [1, k]."""
        if self.alive is None:
            return Reduced(self.features[number : number + 1], self.ids[number : number + 1], None, self.selected)
        alive = self.alive[number]
        return Reduced(self.features[number, alive][None], self.ids[number, alive][None], None, self.selected)


# The tiles of one image, in order, the visual tokens of the batch, the image's running index -> features [K_image, D].
Arrange = Callable[[list[Reduced], VisualTokens, int], torch.Tensor]


def in_tile_order(tiles: list[Reduced], visual: VisualTokens, image: int) -> torch.Tensor:
    """Tile after tile."""
    return torch.cat([tile.features[0] for tile in tiles])


def place(
    name: str, embeds: torch.Tensor, visual: VisualTokens, merged: Reduced, arrange: Arrange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the features of every image at the front of its span; the rest of the span leaves.

    Args:
        name: of the method, for errors.
        embeds: what the decoder is about to get [B, T, D].
        visual: the visual tokens of the prompts.
        merged: features of every tile, in the decoder's width.
        arrange: the order within an image.

    Returns:
        (drop bool [B, T], new embeds [B, T, D]).
    """
    drop, embeds = visual.mask.clone(), embeds.clone()
    tiles = tiles_by_image(visual)
    source = rows_of_tiles(visual, sum(map(len, tiles)), merged.features.shape[0])
    newline = visual.mask & (visual.tile < 0)
    for image, numbers in enumerate(tiles):
        features = arrange([merged.tile(source[number]) for number in numbers], visual, image)
        batch, position = (visual.image == image).nonzero(as_tuple=True)
        count = features.shape[0]
        if count > position.shape[0]:
            raise InputError(
                f"{name}: {count} tokens are to replace the {position.shape[0]} visual tokens of an image; "
                "give a smaller budget"
            )
        embeds[batch[:count], position[:count]] = features.to(embeds.dtype)
        drop[batch[:count], position[:count]] = False
        if len(numbers) == 1:  # a single tile keeps the newline at its end
            drop[newline & (visual.image == image)] = False
    return drop, embeds


def newlines_to_drop(visual: VisualTokens) -> torch.Tensor:
    """Newlines of images in several tiles, bool [B, T]: the released code of these methods inserts none there."""
    newline = visual.mask & (visual.tile < 0)
    if not bool(newline.any()):
        return newline
    many = torch.tensor([len(tiles) > 1 for tiles in tiles_by_image(visual)], device=newline.device)
    return newline & many[visual.image.clamp(min=0)]


def tiles_by_image(visual: VisualTokens) -> list[list[int]]:
    """Running tile indices of each image, in order."""
    found: list[list[int]] = [[] for _ in range(visual.images)]
    inside, tiles = visual.tile >= 0, int(visual.tile.max()) + 1
    # As one number each: `unique` of rows compares them in a loop.
    for pair in (visual.image[inside] * tiles + visual.tile[inside]).unique().tolist():
        found[pair // tiles].append(pair % tiles)
    return found


def rows_of_tiles(visual: VisualTokens, tiles: int, computed: int) -> list[int]:
    """For each tile of the prompts, the row of the computed features that it is.

    Features may be computed before generation repeats every prompt for its beams: then there are fewer of them.
    """
    if tiles == computed:
        return list(range(tiles))
    if tiles % computed or visual.mask.shape[0] % (tiles // computed):
        raise InputError(
            f"pixel_values: the prompts have {tiles} image tiles, but features of {computed} were computed inside this "
            "context; give each prompt its own images"
        )
    times = tiles // computed
    source: list[int] = []
    for sample in range(0, visual.mask.shape[0], times):
        count = int(visual.tile[sample][visual.tile[sample] >= 0].unique().numel())
        first = source[-1] + 1 if source else 0
        source += list(range(first, first + count)) * times
    return source
