"""Uniform pruning: evenly spaced patches in raster order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlattn.interventions.visual_pruner import Chooser, VisualPruner
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


def uniform_indices(total: int, keep: int) -> torch.Tensor:
    """`keep` of `total` positions, int64, ascending: the centre of each of `keep` equal stretches."""
    return ((2 * torch.arange(keep) + 1) * total) // (2 * keep)


@dataclass(frozen=True)
class UniformPrune(VisualPruner):
    """Keep `keep` evenly spaced patches, the same ones of every image."""

    def _chooser(self, session: Session, hooks: HookSet, trace: Trace, target: int) -> Chooser:
        ids = uniform_indices(session.adapter.patches, target)
        return lambda features: ids.to(features.device).expand(features.shape[0], -1)
