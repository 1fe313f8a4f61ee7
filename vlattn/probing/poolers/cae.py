"""CAE's attentive probe: a learned query looks at the tokens, each input with a norm of its own.

"Context Autoencoder for Self-Supervised Representation Learning", arXiv 2202.03026; built as in "Attention, Please!
Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, head_maps


class CAEPool(Pooler):
    """feature = projected attention of LN(q) over keys of LN(X) and values of another LN(X), for a learned query q.

    The query starts at zero, so attention starts uniform. The original also makes a fourth norm that it never uses.

    heads: attention heads H, 8 in the benchmark.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, dim))
        self.query_norm = nn.LayerNorm(dim)
        self.key_norm = nn.LayerNorm(dim)
        self.value_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        key, value = self.key(self.key_norm(tokens)), self.value(self.value_norm(tokens))
        return self.out(attend(self._query(), key, value, self.heads))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        self.check(tokens)
        return head_maps(self._query(), self.key(self.key_norm(tokens)), self.heads)

    def macs(self, tokens: int) -> int:
        return 2 * tokens * self.dim**2 + 2 * self.dim**2 + 2 * tokens * self.dim

    def built_parameters(self) -> int:
        """Parameters of the original, its unused norm included."""
        return sum(p.numel() for p in self.parameters()) + 2 * self.dim

    def _query(self) -> torch.Tensor:
        return self.query(self.query_norm(self.latent))[None]
