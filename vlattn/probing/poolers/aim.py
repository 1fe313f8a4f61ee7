"""AIM: cross-attention over batch-normalised tokens.

"Scalable Pre-training of Large Autoregressive Image Models", arXiv 2401.08541.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_count, require_divisor
from vlattn.probing.poolers.base import Pooler, attention_maps, pool, split_heads


class AIM(Pooler):
    """Learnable queries look at keys of batch-normalised tokens in several heads; their outputs are averaged.

    The normalisation has no parameters and takes its statistics over images and tokens, so in training mode the
    feature of an image depends on the others of its batch.

    heads: attention heads H; 16 as in the benchmark of arXiv 2506.10178, where the authors' own code has 12.
    queries: learnable queries, 1 in both.
    """

    def __init__(self, dim: int, *, heads: int = 16, queries: int = 1) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        require_count("queries", queries)
        self.heads, self.queries = heads, queries
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.query = nn.Parameter(torch.empty(queries, dim).normal_(std=0.02))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        normed = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        key = split_heads(self.key(normed), self.heads)  # [B, H, N, D / H]
        value = split_heads(self.value(normed), self.heads)
        query = split_heads(self.query[None], self.heads).to(key.dtype).expand(len(tokens), -1, -1, -1)
        return pool(query, key, value).mean(2).flatten(1)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N], the mean over queries; running statistics stay as they are."""
        self.check(tokens)
        running = (None, None) if self.training else (self.norm.running_mean, self.norm.running_var)
        normed = F.batch_norm(tokens.flatten(0, 1), *running, training=self.training, eps=self.norm.eps)
        key = split_heads(self.key(normed.view_as(tokens)), self.heads)
        query = split_heads(self.query[None], self.heads)
        return attention_maps(query, key, (self.dim // self.heads) ** -0.5).mean(2)

    def macs(self, tokens: int) -> int:
        return 2 * tokens * self.dim**2 + 2 * self.queries * tokens * self.dim
