"""The definition of `vlattn.ops.flowcut_statistics`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

MAX_TOKENS = 4096
"""Tokens, CLS included, that the Triton kernel takes."""


class FlowCutStatistics(NamedTuple):
    """What FlowCut makes of one encoder layer with P patches.

    score: [B, P], (share of attention + share of similarity) times size of the value.
    attention: [B, P], the head-mean attention of CLS to patches, not renormalised.
    average: [B, P], the running average with this layer in it; the score itself in the first layer.
    entropy: [B], of the attention scaled to sum to 1 over patches, in nats; 0 log 0 = 0.
    """

    score: torch.Tensor
    attention: torch.Tensor
    average: torch.Tensor
    entropy: torch.Tensor


def shares(weights: torch.Tensor) -> torch.Tensor:
    """Rows scaled to sum to 1; a row that vanished (CLS relates to itself alone) stays 0 instead of turning NaN."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def entropy(attention: torch.Tensor) -> torch.Tensor:
    """Entropy of rows scaled to sum to 1, in nats; 0 log 0 = 0."""
    return torch.special.entr(shares(attention)).sum(-1)


def from_row(
    v: torch.Tensor,
    cls_attention: torch.Tensor,
    alive: torch.Tensor | None = None,
    average: torch.Tensor | None = None,
    momentum: float = 0.5,
) -> FlowCutStatistics:
    """The statistics from values and the row of CLS [B, H, 1 + P], both fp32 or fp64."""
    v = v.contiguous()
    attention = cls_attention.mean(1)[:, 1:]  # [B, P]
    size = v.mean(1)[:, 1:].abs().sum(-1)  # heads are averaged first, then the norm is taken
    logits = (v @ v[:, :, 0, :, None]).squeeze(-1)  # [B, H, 1 + P], no 1 / sqrt(D)
    if alive is not None:
        logits = logits.masked_fill(F.pad(~alive, (1, 0))[:, None], -torch.inf)
    similarity = logits.softmax(-1).mean(1)[:, 1:]
    score = (shares(attention) + shares(similarity)) * size
    moved = score if average is None else momentum * average.to(score.dtype) + (1 - momentum) * score
    return FlowCutStatistics(score, attention, moved, entropy(attention))
