"""Pooling of bags: the tokens of an image, of its tiles or of a video as a set of instances, padded ones masked.

"Attention-based Deep Multiple Instance Learning", arXiv 1802.04712.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler

# Widths that the authors of ACMIL reduce tokens to; for others, half.
_REDUCED = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}


class BagPooler(Pooler):
    """What bag poolers share: instances H = ReLU(X W) [B, N, L], a map without bias, and masks of padded bags.

    d_inner: L, the width of instances and of the feature. None is the authors' choice for the usual widths of tokens,
        and D / 2 for others.
    """

    def __init__(self, dim: int, d_inner: int | None = None) -> None:
        require_count("dim", dim)
        width = _REDUCED.get(dim, max(1, dim // 2)) if d_inner is None else d_inner
        require_count("d_inner", width)
        super().__init__(dim, width)
        self.reduce = nn.Sequential(nn.Linear(dim, width, bias=False), nn.ReLU())

    @abstractmethod
    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Feature [B, L].

        Args:
            tokens: [B, N, D].
            mask: bool [B, N], True on real tokens; what stands in the others does not matter. None: all are real.

        Raises:
            InputError: a mask of another shape or dtype, or a bag without a real token.
        """

    def attention(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """Maps [B, M, N], 0 on padding; None where there are none."""
        return None

    def instances(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """H [B, N, L] of checked tokens; zero where the mask is False, whatever the tokens hold there."""
        self.check(tokens)
        check_mask(tokens, mask)
        return self.reduce_tokens(tokens, mask)

    def reduce_tokens(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`instances` without checks."""
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)  # 0 * NaN is NaN: a weight of 0 would not hide padding
        return self.reduce(tokens)


class MeanBagPool(BagPooler):
    """Mean over the instances of a bag: a baseline with the head of the attention poolers.

    d_inner: L, see `BagPooler`.
    """

    def __init__(self, dim: int, *, d_inner: int | None = None) -> None:
        super().__init__(dim, d_inner)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        instances = self.instances(tokens, mask)
        return instances.mean(1) if mask is None else instances.sum(1) / mask.sum(1, keepdim=True).to(instances.dtype)

    def macs(self, tokens: int) -> int:
        return tokens * self.dim * self.width + tokens * self.width


class MaxBagPool(BagPooler):
    """Maximum over the instances of a bag, channel by channel: a baseline with the head of the attention poolers.

    d_inner: L, see `BagPooler`.
    """

    def __init__(self, dim: int, *, d_inner: int | None = None) -> None:
        super().__init__(dim, d_inner)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.instances(tokens, mask).amax(1)  # instances are at least 0, as padding is, so padding cannot win

    def macs(self, tokens: int) -> int:
        return tokens * self.dim * self.width


def check_mask(tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse a mask that is not bool [B, N], or that leaves a bag empty."""
    if mask is None:
        return
    wanted = tokens.shape[:2]
    if mask.dtype != torch.bool or mask.shape != wanted:
        raise InputError(
            f"mask: got {mask.dtype} {list(mask.shape)}; give bool {list(wanted)}, True on real tokens of tokens "
            f"{list(tokens.shape)}"
        )
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"mask: bags {empty} have no real token; leave them out")


def hide_padding(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, ..., N] with -inf where the mask [B, N] is False."""
    return scores if mask is None else scores.masked_fill(~over_scores(mask, scores), -torch.inf)


def over_scores(mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A mask [B, N] as [B, 1, ..., N], to go with scores [B, ..., N]."""
    return mask.view(mask.shape[0], *[1] * (scores.ndim - 2), mask.shape[1])
