"""CoCa's attentional pooler: learned queries look through several heads at one shared key and value head.

"CoCa: Contrastive Captioners are Image-Text Foundation Models", arXiv 2205.01917; built as in "Attention, Please!
Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_count
from vlattn.probing.poolers.base import Pooler, attention_maps, split_heads


class CoCaPool(Pooler):
    """Multi-query attention: H queries heads of one learned token over a single key head and a single value head.

    The original holds 196 queries, computes them all and gives the first as the feature: the others never get a
    gradient. Here that one is computed, and counted in `macs`; `built_parameters` and `built_macs` count the original.

    heads, head_dim: H and the width of a head.
    queries: learned queries that are held. 196 makes the parameters of the original, 1 those that matter.
    """

    BUILT_QUERIES = 196

    def __init__(self, dim: int, *, heads: int = 8, head_dim: int = 64, queries: int = 1) -> None:
        super().__init__(dim)
        require_count("heads", heads)
        require_count("head_dim", head_dim)
        require_count("queries", queries)
        self.heads, self.head_dim = heads, head_dim
        self.latent = nn.Parameter(torch.randn(queries, dim))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        key, value = self._keys(tokens)
        maps = attention_maps(self._query().to(key.dtype), key, self.head_dim**-0.5)  # [B, H, N]
        return self.out((maps.to(value.dtype) @ value).flatten(1))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        key, _ = self._keys(tokens)
        return attention_maps(self._query().to(key.dtype), key, self.head_dim**-0.5)

    def built_macs(self, tokens: int) -> int:
        """Multiply-accumulates of the original with its 196 queries."""
        return self._macs(tokens, self.BUILT_QUERIES)

    def macs(self, tokens: int) -> int:
        """Of the one query that is computed."""
        return self._macs(tokens, 1)

    def built_parameters(self) -> int:
        """Parameters of the original with its 196 queries."""
        held = sum(p.numel() for p in self.parameters())
        return held + (self.BUILT_QUERIES - len(self.latent)) * self.dim

    def _macs(self, tokens: int, queries: int) -> int:
        inner = self.heads * self.head_dim
        return 2 * queries * self.dim * inner + 2 * self.head_dim * tokens * self.dim + 2 * queries * tokens * inner

    def _query(self) -> torch.Tensor:
        """The first query in heads, [H, E]."""
        return split_heads(self.query(self.norm(self.latent[None, :1])), self.heads)[0, :, 0]

    def _keys(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared key and value head, [B, N, E] each."""
        self.check(tokens)
        key, value = self.key_value(tokens).chunk(2, -1)
        return key, value
