"""Random pruning: the baseline that any selection must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.placement import tiles_by_image
from vlattn.interventions.prompt_pruner import PromptPruner
from vlattn.interventions.visual_pruner import VisualPruner
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens


@dataclass(frozen=True)
class RandomPrune(VisualPruner, PromptPruner):
    """Baseline: keep `keep` visual tokens of each image, drawn uniformly without replacement.

    seed: the draw depends on the seed and on the image's features, so that an image keeps the same tokens in any batch
        and at any place in it, and different images keep different ones.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InputError(f"seed: got {self.seed!r}; give an integer from 0 to 2147483647")

    def _watch(self, session: Session, hooks: HookSet) -> Any:
        self._check_keep(session.adapter)
        seen: dict[str, Any] = {}

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = as_keywords(module, args, kwargs)
            grid = call.get("grid_thw")
            seen["pixels"] = next(value for value in call.values() if isinstance(value, torch.Tensor))
            seen["rows"] = None if grid is None else grid.prod(-1).tolist()

        hooks.before(session.adapter.tower, read)
        return seen

    def _keep_of(self, tokens: int) -> int:
        return self.keep

    def _select(
        self, features: torch.Tensor, keep: int, images: list[int], visual: VisualTokens, memory: Any
    ) -> torch.Tensor:
        pixels = memory.get("pixels")
        stretches = None if pixels is None else pixel_rows(visual, pixels.shape[0], memory["rows"])
        chosen = []
        for image in images:
            if stretches is None:
                checksum = zlib.crc32(image.to_bytes(8, "little"), self.seed)
            else:
                own = pixels[slice(*stretches[image])].detach().float().cpu().contiguous()
                # The seed enters the checksum: torch's CPU generator reads only the low 32 bits of what it is given.
                checksum = zlib.crc32(own.numpy().tobytes(), self.seed)
            generator = torch.Generator().manual_seed(checksum)
            chosen.append(torch.randperm(features.shape[1], generator=generator)[:keep].sort().values)
        return torch.stack(chosen).to(features.device)


def pixel_rows(visual: VisualTokens, rows: int, by_image: list[int] | None = None) -> list[tuple[int, int]] | None:
    """Which of the tower's `rows` input rows each image of the prompts came from, as (start, stop); None if unclear.

    by_image: rows of each image that the tower ran on; None where a row is a tile. There may be fewer images than in
        the prompts, where generation repeated every prompt for its beams after the features were computed.
    """
    tiles = [len(numbers) for numbers in tiles_by_image(visual)]
    whole, given = (sum(tiles), rows) if by_image is None else (visual.images, len(by_image))
    if not given or whole % given or visual.mask.shape[0] % (whole // given):
        return None
    times, found, start, number = whole // given, [], 0, 0
    for sample in range(0, visual.mask.shape[0], times):
        own = visual.image[sample][visual.mask[sample]].unique().tolist()
        places = []
        for image in own:
            stop = start + (tiles[image] if by_image is None else by_image[number])
            places.append((start, stop))
            start, number = stop, number + 1
        found += places * times
    return found
