"""Random pruning: the baseline that any selection must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.interventions.visual_pruner import Chooser, VisualPruner
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class RandomPrune(VisualPruner):
    """Keep `keep` patches drawn uniformly without replacement.

    seed: the draw depends on the seed and on the image's own pixels, so that an image keeps the same patches in any
        batch and at any place in it, and different images keep different ones.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InputError(f"seed: got {self.seed!r}; give an integer from 0 to 2147483647")

    def _chooser(self, session: Session, hooks: HookSet, trace: Trace, target: int) -> Chooser:
        sums: list[int] = []

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pixels = as_keywords(module, args, kwargs)["pixel_values"]
            # The seed enters the checksum: torch's CPU generator reads only the low 32 bits of what it is seeded with.
            sums[:] = [zlib.crc32(image.float().cpu().contiguous().numpy().tobytes(), self.seed) for image in pixels]

        def choose(features: torch.Tensor) -> torch.Tensor:
            total = session.adapter.patches
            rows = []
            for checksum in sums:
                generator = torch.Generator().manual_seed(checksum)
                rows.append(torch.randperm(total, generator=generator)[:target].sort().values)
            return torch.stack(rows).to(features.device)

        hooks.before(session.adapter.tower, read)
        return choose
