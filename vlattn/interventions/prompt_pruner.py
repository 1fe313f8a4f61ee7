"""What pruners at the decoder's door share: choose among each image's visual tokens, as the decoder would get them.

It works on every model family, whatever tiles, pooling or newline tokens come before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from vlattn.interventions.base import Intervention, positions_for
from vlattn.interventions.visual_pruner import known_grid
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class PromptPruner(Intervention):
    """Base of pruners that read the projected features [n, D] of each image and keep some of them in place.

    A CLS feature always stays and counts inside the budget; newline features are candidates like any other.
    """

    place = "encoder"
    selects_features = True

    @abstractmethod
    def _keep_of(self, tokens: int) -> int:
        """How many of an image's `tokens` visual tokens stay, CLS counted."""

    @abstractmethod
    def _select(
        self, features: torch.Tensor, keep: int, images: list[int], visual: VisualTokens, memory: Any
    ) -> torch.Tensor:
        """Which `keep` of n candidates stay, int64 [images, keep], for features [images, n, D] of equally many.

        images: their running indices within the batch, as in `visual.image`. memory: what `_watch` returned.
        """

    def _watch(self, session: Session, hooks: HookSet) -> Any:
        """Check the settings against the model; register what the method needs to see before the decoder's door."""

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        given: Positions = getattr(self, "positions", "auto")
        session.positions = positions_for(type(self).__name__, given, "compact", session.adapter)
        grid = known_grid(session.adapter)
        trace.visual_tokens = 0 if grid is None else grid[0] * grid[1] + int(session.adapter.cls_in_features)
        memory = self._watch(session, hooks)

        def choose(
            embeds: torch.Tensor, visual: VisualTokens, call: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            stays = visual.mask & (visual.patch < 0) & (visual.tile >= 0)  # CLS
            for images, places in _by_size(visual, ~stays):
                batch, position = places  # [images, n] each
                features = embeds[batch, position]
                lead = int((stays & (visual.image == images[0])).sum())
                keep = min(max(self._keep_of(features.shape[1] + lead) - lead, 0), features.shape[1])
                if keep == features.shape[1]:
                    stays[batch, position] = True
                    continue
                chosen = self._select(features, keep, images, visual, memory)
                stays[batch.gather(1, chosen), position.gather(1, chosen)] = True
            trace.kept = kept_patches(visual, stays)
            trace.visual_tokens = int(visual.image[visual.mask].bincount().max())
            return visual.mask & ~stays, None

        session.choosers.append(choose)
        hooks.also(lambda: session.choosers.remove(choose))


def _by_size(
    visual: VisualTokens, candidate: torch.Tensor
) -> list[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]]:
    """Images grouped by their number of candidates: (image indices, (batch row, position) int64 [images, n] each)."""
    batch, position = (visual.mask & candidate).nonzero(as_tuple=True)  # in prompt order
    image = visual.image[batch, position]
    counts = image.bincount(minlength=visual.images).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for number, count in enumerate(counts):
        if count:
            groups[count].append(number)
    found = []
    for count, images in groups.items():
        here = torch.isin(image, torch.tensor(images, device=image.device))
        found.append((images, (batch[here].view(-1, count), position[here].view(-1, count))))
    return found


def kept_patches(visual: VisualTokens, stays: torch.Tensor) -> torch.Tensor:
    """Patch ids that stay, int64 [tiles, K] on the CPU, ascending, padded with -1 at the end."""
    tiles = int(visual.tile.max()) + 1
    if tiles == 0:  # features that belong to no tile: pooled or resized ones
        return torch.zeros(0, 0, dtype=torch.int64)
    here = stays & (visual.patch >= 0) & (visual.tile >= 0)
    tile, patch = visual.tile[here].cpu(), visual.patch[here].cpu()
    order = (tile * (int(patch.max()) + 1 if patch.numel() else 1) + patch).argsort()
    tile, patch = tile[order], patch[order]
    counts = tile.bincount(minlength=tiles)
    kept = torch.full((tiles, int(counts.max())), -1, dtype=torch.int64)
    first = counts.cumsum(0) - counts
    kept[tile, torch.arange(tile.shape[0]) - first[tile]] = patch
    return kept
