"""VisPruner: keep the patches that CLS attends to, and of the others a set without near-duplicates.

"Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", arXiv 2412.01818.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vlattn.checks import require_count, require_number
from vlattn.interventions.tower_selector import PatchChooser, TowerSelector
from vlattn.interventions.vision_attention import LayerWatch
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session


def vispruner_choice(
    features: torch.Tensor, score: torch.Tensor, keep: int, important: float = 0.5, step: int = 8
) -> torch.Tensor:
    """The most attended patches, and diverse ones of the rest.

    From the rest, in order of attention, duplicates leave a few at a time: every second patch is compared with the ones
    between, and those with the highest cosine to any of them go, until as many are left as are wanted.

    Args:
        features: patch features [B, N, C] of the encoder, before the projector.
        score: attention of each patch [B, N]; ties go to the lower id.
        keep: T, patches kept in all, 1 <= T <= N.
        important: share of T that is taken by attention alone, rounded down.
        step: how many leave at a time.

    Returns:
        int64 [B, T], ascending.
    """
    best = int(keep * important)
    diverse = keep - best
    order = score.sort(dim=-1, descending=True, stable=True).indices  # [B, N]
    left = order[:, best:] if diverse else order[:, :0]
    unit = F.normalize(features.to(accumulation_dtype(features.dtype)), dim=-1)
    # All cosines once: rounds of products of ever new halves cost several times as much.
    cosine = unit @ unit.transpose(1, 2) if left.shape[1] > diverse else unit  # [B, N, N]
    while left.shape[1] > diverse:
        even, odd = left[:, ::2], left[:, 1::2]  # [B, n / 2]
        # The released code takes both halves for equally long; odd numbers of patches need the true ones.
        leaving = min(step, left.shape[1] - diverse, even.shape[1])
        others = torch.full_like(cosine[:, 0], -torch.inf).scatter(1, odd, 0)
        alike = (_rows(cosine, even) + others[:, None]).amax(-1)  # [B, n / 2]
        staying = alike.sort(dim=-1, descending=True, stable=True).indices[:, leaving:]
        left = torch.cat([even.gather(1, staying), odd], 1)  # this order decides the next halves
    return torch.cat([order[:, :best], left], 1).sort(-1).values


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class VisPruner(TowerSelector):
    """VisPruner for towers whose patches become one visual token each.

    "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", arXiv 2412.01818. Scores
    are the CLS row of the layer whose output is the image feature; in towers without CLS they are the attention each
    patch receives from all (ours). `important=1` is the first version of the paper, FasterVLM.

    keep: visual tokens per encoder image (tile) that reach the decoder; a CLS feature counts inside it.
    positions: see `VisualPruner`.
    important: share of the kept patches that is chosen by attention alone; the others are chosen to differ.
    step: how many near-duplicates leave at a time.
    """

    keep: int = 128
    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("important", self.important, 0.0, 1.0)
        require_count("step", self.step)

    def _watch(self, session: Session, hooks: HookSet, target: int) -> PatchChooser:
        watch = LayerWatch(session.adapter, session.adapter.feature_layer, hooks)
        return lambda features: vispruner_choice(features, watch.view().salience(), target, self.important, self.step)
