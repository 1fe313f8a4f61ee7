"""ACMIL with multi-head attention: each branch has a learned query and projections of its own.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_count, require_divisor
from vlattn.probing.poolers.acmil import Branches
from vlattn.probing.poolers.bag import BagPooler, hide_padding
from vlattn.probing.poolers.base import split_heads
from vlattn.probing.poolers.stkim import STKIM


class QueryScores(nn.Module):
    """Scores of a learned query against instances, in heads: (W_q q + b_q)(W_k h + b_k)^T (L / H)^(-1/2).

    The query starts at N(0, 1e-12), so the bias of its projection is what looks at first. It underflows in fp16.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, width).normal_(std=1e-6))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, instances: torch.Tensor) -> torch.Tensor:
        """[B, N, L] to [B, H, N], fp32 or finer, under autocast, too."""
        query, key = (
            split_heads(self.query(self.latent)[None], self.heads),
            split_heads(self.key(instances), self.heads),
        )
        dtype = torch.promote_types(key.dtype, torch.float32)
        with torch.autocast(key.device.type, enabled=False):
            scores = query.to(dtype) @ key.to(dtype).transpose(2, 3)
        return scores[:, :, 0] * query.shape[-1] ** -0.5


class HeadGather(nn.Module):
    """Values of instances weighted by one map per head, projected, dropout, LayerNorm: [B, H, N] to [B, L]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, maps: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
        value = split_heads(self.value(instances), self.heads)  # [B, H, N, L / H]
        joined = (maps[:, :, None].to(value.dtype) @ value).flatten(1)
        return self.norm(self.dropout(self.out(joined)))


class MHABagPool(BagPooler):
    """Multi-head attention of one learned query over the instances of a bag: the baseline of `ACMILMHAPool`.

    heads: H, 8 as released; has to divide L.
    dropout: behind the output projection, 0.1 as released.
    d_inner: L, see `BagPooler`.
    """

    def __init__(self, dim: int, *, heads: int = 8, dropout: float = 0.1, d_inner: int | None = None) -> None:
        super().__init__(dim, d_inner)
        require_divisor("heads", heads, "d_inner", self.width)
        self.score = QueryScores(self.width, heads)
        self.gather = HeadGather(self.width, heads, dropout)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        instances = self.instances(tokens, mask)
        return self.gather(hide_padding(self.score(instances), mask).softmax(-1), instances)

    def attention(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One map per head, [B, H, N]; 0 on padding."""
        return hide_padding(self.score(self.instances(tokens, mask)), mask).softmax(-1)

    def macs(self, tokens: int) -> int:
        inner = self.width**2
        return tokens * self.dim * self.width + 2 * tokens * inner + 2 * inner + 2 * tokens * self.width


class ACMILMHAPool(BagPooler):
    """M branches of multi-head attention, and a feature of their mean map through values of its own (ACMIL-MHA).

    The feature is not the mean of the branches' features. `STKIM` hides the best instances of each head in training.
    The released code takes one bag at a time; here bags are batched. Dropout draws at random, so training it in a
    `HeadBank` needs dropout=0.

    heads, dropout, d_inner: as in `MHABagPool`.
    n_token, n_masked_patch, mask_drop, seed: as in `ACMILPool`.
    """

    def __init__(
        self,
        dim: int,
        *,
        n_token: int = 5,
        n_masked_patch: int = 10,
        mask_drop: float = 0.6,
        heads: int = 8,
        dropout: float = 0.1,
        d_inner: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, d_inner)
        require_count("n_token", n_token)
        require_divisor("heads", heads, "d_inner", self.width)
        self.n_token = n_token
        self.scores = nn.ModuleList([QueryScores(self.width, heads) for _ in range(n_token)])
        self.gathers = nn.ModuleList([HeadGather(self.width, heads, dropout) for _ in range(n_token)])
        self.bag = HeadGather(self.width, heads, dropout)
        self.stkim = STKIM(n_masked_patch, mask_drop, seed)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        instances = self.instances(tokens, mask)
        scores = self.stkim(self._scores(instances, mask), mask)
        return self.bag(scores.softmax(-1).mean(2), instances)

    def attention(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps [B, M, N] of the branches, means over heads, nothing hidden; 0 on padding."""
        return self._scores(self.instances(tokens, mask), mask).softmax(-1).mean(1)

    def branches(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Branches:
        """Features of all branches, and of their mean map; maps and scores in heads, [B, H, M, N]."""
        instances = self.instances(tokens, mask)
        scores = self.stkim(self._scores(instances, mask), mask)
        maps = scores.softmax(-1)
        pairs = zip(self.gathers, maps.unbind(2), strict=True)
        features = torch.stack([gather(one, instances) for gather, one in pairs], 1)
        return Branches(self.bag(maps.mean(2), instances), features, maps, scores)

    def macs(self, tokens: int) -> int:
        """Of all branches and of the bag, with no classifier."""
        inner, sums = self.width**2, tokens * self.width
        branch = 2 * tokens * inner + 2 * inner + 2 * sums
        return tokens * self.dim * self.width + self.n_token * branch + tokens * inner + inner + sums

    def _scores(self, instances: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, H, M, N]."""
        return hide_padding(torch.stack([score(instances) for score in self.scores], 2), mask)
