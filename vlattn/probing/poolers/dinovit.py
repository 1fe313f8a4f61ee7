"""DINOViT: one more transformer block over the tokens, then their mean.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler, split_heads
from vlattn.probing.poolers.blocks import mlp


class DINOViTPool(Pooler):
    """X <- X + Attention(LN X), X <- X + MLP(LN X), feature = mean over tokens.

    heads: attention heads H, 8 in the benchmark.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        projected = self.query_key_value(self.norm1(tokens)).chunk(3, -1)
        query, key, value = (split_heads(part, self.heads) for part in projected)
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = tokens + self.out(read)
        return (hidden + self.mlp(self.norm2(hidden))).mean(1)

    def macs(self, tokens: int) -> int:
        return 12 * tokens * self.dim**2 + 2 * tokens**2 * self.dim
