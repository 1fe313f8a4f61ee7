"""What `vlattn.ops.grouped_attention` takes and gives, without a line of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

REST, VISUAL, VISUAL_SINK, TEXT_SINK = GROUPS = 0, 1, 2, 3
MAX_WIDTH = 256
"""Channels of a head that the Triton kernel takes."""


@dataclass(frozen=True)
class Redistribution:
    """VAR's numbers: which rows look at the image, and what share of their sinks' mass the rest of the image gets.

    "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321.

    rho_nonsink: least share of a row's image attention on visual tokens that are no sinks.
    min_visual_mass: least attention of a row on the image.
    move: share of the sinks' attention that is moved, from 0 to 1.
    require_visual_sink: whether a prompt without visual sinks stays as it is.
    eps: added to each visual token's attention before the share of sinks is taken.
    """

    rho_nonsink: float = 0.5
    min_visual_mass: float = 0.2
    move: float = 0.4
    require_visual_sink: bool = True
    eps: float = 0.0


class GroupedAttention(NamedTuple):
    """None is what was not asked for. fp32 but for `output`; fp64 for fp64 inputs.

    output: [B, H, R, D] in the dtype of q, redistributed and scaled by head where that was asked for.
    lse: [B, H, R], the natural log-sum-exp of the logits; -inf in a row that sees no key.
    mass: [B, H, R, 4], attention on each group; sums to 1, or to 0 in a row that sees no key.
    partial: [B, H, R, 4, D], sum of p_j v_j over the keys of each group; sums to the output that nothing was done to.
    without: [B, H, R, D], the output had the row seen no image; 0 where it sees nothing else.
    shift: [B, H, R], the distance between `without` and the output that nothing was done to.
    chosen: bool [B, H, R], rows that `redistribution` changed.
    """

    output: torch.Tensor
    lse: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    partial: torch.Tensor | None = None
    without: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


def image_keys(groups: torch.Tensor) -> torch.Tensor:
    """bool, where `groups` says visual token or visual sink."""
    return (groups == VISUAL) | (groups == VISUAL_SINK)


def sink_slack(groups: torch.Tensor, rule: Redistribution, dtype: torch.dtype) -> torch.Tensor:
    """[B], what joins a row's image attention before the share of sinks is taken.

    NaN for a prompt that stays as it is: no comparison with it is true.
    """
    slack = rule.eps * image_keys(groups).sum(1).to(dtype)
    if rule.require_visual_sink:
        slack = slack.masked_fill(~(groups == VISUAL_SINK).any(1), torch.nan)
    return slack
