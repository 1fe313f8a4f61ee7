"""SigLIP's MAP head: a learned latent looks at the tokens, then an MLP.

"Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, with the head of "Scaling Vision Transformers",
arXiv 2106.04560; built as in "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, head_maps, mlp


class SigLIPPool(Pooler):
    """z = attention of a learned latent over the tokens, projected; feature = z + MLP(z).

    heads: attention heads H, 8 in the benchmark.
    norm: whether the MLP reads LayerNorm(z), as in SigLIP itself; the benchmark has no norm there.
    """

    def __init__(self, dim: int, *, heads: int = 8, norm: bool = False) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        # Cut at two standard deviations, then scaled: narrower than cutting at +-2.
        latent = nn.init.trunc_normal_(torch.empty(1, dim)) * dim**-0.5
        self.latent = nn.Parameter(latent)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.mlp = mlp(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        key, value = self.key_value(tokens).chunk(2, -1)
        pooled = self.out(attend(self.query(self.latent)[None], key, value, self.heads))
        return pooled + self.mlp(self.norm(pooled))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        self.check(tokens)
        key, _ = self.key_value(tokens).chunk(2, -1)
        return head_maps(self.query(self.latent)[None], key, self.heads)

    def macs(self, tokens: int) -> int:
        return 2 * tokens * self.dim**2 + 2 * tokens * self.dim + 10 * self.dim**2
