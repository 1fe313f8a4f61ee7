"""MHCA: multi-head cross-attention with one learnable query, the baseline that efficient probing starts from.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler, attention_maps, pool, split_heads


class MHCA(Pooler):
    """One learnable query looks at projected keys in several heads and gathers projected values.

    heads: attention heads H; each sees D / H channels and scales its scores by (D / H)^(-1/2).
    q_proj: whether the query is projected, too; a factor that a free query can absorb.
    out_proj: whether the joined heads are projected; a factor that the classifier behind can absorb.
    bias: whether the projections have biases.
    """

    def __init__(
        self, dim: int, *, heads: int = 16, q_proj: bool = False, out_proj: bool = False, bias: bool = False
    ) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.q_proj = nn.Linear(dim, dim, bias=bias) if q_proj else None
        self.out_proj = nn.Linear(dim, dim, bias=bias) if out_proj else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        key = split_heads(self.key(tokens), self.heads)  # [B, H, N, D / H]
        value = split_heads(self.value(tokens), self.heads)
        query = self._query().to(key.dtype).expand(len(tokens), -1, -1, -1)
        out = pool(query, key, value).flatten(1)
        return out if self.out_proj is None else self.out_proj(out)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        self.check(tokens)
        key = split_heads(self.key(tokens), self.heads)
        return attention_maps(self._query(), key, (self.dim // self.heads) ** -0.5).squeeze(2)

    def macs(self, tokens: int) -> int:
        square = self.dim**2
        extra = (self.q_proj is not None) + (self.out_proj is not None)
        return 2 * tokens * square + 2 * tokens * self.dim + extra * square

    def _query(self) -> torch.Tensor:
        query = self.query if self.q_proj is None else self.q_proj(self.query)
        return split_heads(query[None], self.heads)  # [1, H, 1, D / H]
