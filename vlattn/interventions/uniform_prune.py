"""Uniform pruning: evenly spaced visual tokens in the decoder's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlattn.interventions.prompt_pruner import PromptPruner
from vlattn.interventions.visual_pruner import VisualPruner
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens


def uniform_indices(total: int, keep: int) -> torch.Tensor:
    """`keep` of `total` positions, int64, ascending: the centre of each of `keep` equal stretches."""
    return ((2 * torch.arange(keep) + 1) * total) // (2 * keep)


@dataclass(frozen=True)
class UniformPrune(VisualPruner, PromptPruner):
    """Baseline: keep `keep` evenly spaced visual tokens of each image, the same ones of every image of a size."""

    def _watch(self, session: Session, hooks: HookSet) -> None:
        self._check_keep(session.adapter)

    def _keep_of(self, tokens: int) -> int:
        return self.keep

    def _select(
        self, features: torch.Tensor, keep: int, images: list[int], visual: VisualTokens, memory: Any
    ) -> torch.Tensor:
        ids = uniform_indices(features.shape[1], keep)
        return ids.to(features.device).expand(features.shape[0], -1)
