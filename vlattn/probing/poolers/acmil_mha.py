"""ACMIL with multi-head attention: each branch has a learned query and projections of its own.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vlattn.checks import require_count, require_divisor, require_number
from vlattn.probing.poolers.bag import BagPooler, hide_padding
from vlattn.probing.poolers.base import split_heads
from vlattn.probing.poolers.branches import Branches, BranchLosses
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


class OwnDropout(nn.Module):
    """Dropout with a generator of its own, as `STKIM` has one: heads trained at once draw what each would alone.

    p: share of numbers that are zeroed in training, from 0 to 0.999; the others are scaled by 1 / (1 - p).
    seed: of the generator; several numbers make one seed.
    """

    def __init__(self, p: float, *seed: int) -> None:
        super().__init__()
        require_number("dropout", p, 0, 0.999)
        for one in seed:
            require_count("seed", one, least=0)
        self.p = p
        self.generator = np.random.default_rng(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.from_numpy(self.generator.random(tuple(x.shape), dtype=np.float32) >= self.p).to(x.device)
        return x * kept / (1 - self.p)


class HeadGather(nn.Module):
    """Values of instances weighted by one map per head, projected, dropout, LayerNorm: [B, H, N] to [B, L]."""

    def __init__(self, width: int, heads: int, dropout: float, *seed: int) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = OwnDropout(dropout, *seed)
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
    seed: of the dropout's own generator.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, dropout: float = 0.1, d_inner: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(dim, d_inner)
        require_divisor("heads", heads, "d_inner", self.width)
        self.score = QueryScores(self.width, heads)
        self.gather = HeadGather(self.width, heads, dropout, seed)

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
    The released code takes one bag at a time; here bags are batched.

    heads, dropout, d_inner: as in `MHABagPool`.
    n_token, n_masked_patch, mask_drop, w_branch, w_div, share_branch_classifier: as in `ACMILPool`.
    seed: of the generators of STKIM and dropout.
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
        w_branch: float = 1.0,
        w_div: float = 1.0,
        share_branch_classifier: bool = False,
    ) -> None:
        super().__init__(dim, d_inner)
        require_count("n_token", n_token)
        require_divisor("heads", heads, "d_inner", self.width)
        self.n_token = n_token
        self.scores = nn.ModuleList([QueryScores(self.width, heads) for _ in range(n_token)])
        self.gathers = nn.ModuleList([HeadGather(self.width, heads, dropout, seed, 1 + m) for m in range(n_token)])
        self.bag = HeadGather(self.width, heads, dropout, seed)
        self.stkim = STKIM(n_masked_patch, mask_drop, seed)
        self.branch_losses = BranchLosses(w_branch, w_div, share_branch_classifier).of(n_token)

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
        """Of the scores of all branches and of the bag; the branches' own features are made in training alone."""
        inner, sums = self.width**2, tokens * self.width
        scores = (tokens + 1) * inner + sums
        return tokens * self.dim * self.width + self.n_token * scores + (tokens + 1) * inner + sums

    def branch_macs(self, tokens: int) -> int:
        """Multiply-accumulates of `branches`, which makes the branches' features besides."""
        return self.macs(tokens) + self.n_token * ((tokens + 1) * self.width**2 + tokens * self.width)

    def _scores(self, instances: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, H, M, N]."""
        return hide_padding(torch.stack([score(instances) for score in self.scores], 2), mask)
