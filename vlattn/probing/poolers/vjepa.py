"""The attentive pooler of V-JEPA and I-JEPA: one cross-attention block with a learned query.

"Revisiting Feature Prediction for Learning Visual Representations from Video", arXiv 2404.08471; built as in
"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, head_maps, mlp


class VJEPAPool(Pooler):
    """z = q + Attention(q, LN X), feature = z + MLP(LN z), for a learned query q that is not normalised itself.

    heads: attention heads H, 16 in the benchmark.
    """

    def __init__(self, dim: int, *, heads: int = 16) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.latent = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02))
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)
        self._initialise()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        key, value = self.key_value(self.norm1(tokens)).chunk(2, -1)
        read = attend(self.query(self.latent)[None], key, value, self.heads)
        hidden = self.latent + self.out(read)
        return hidden + self.mlp(self.norm2(hidden))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        self.check(tokens)
        key, _ = self.key_value(self.norm1(tokens)).chunk(2, -1)
        return head_maps(self.query(self.latent)[None], key, self.heads)

    def macs(self, tokens: int) -> int:
        return 2 * tokens * self.dim**2 + 2 * tokens * self.dim + 10 * self.dim**2

    def _initialise(self) -> None:
        into_residual = (self.out, self.mlp[-1])  # of block 1, which scales them by (2 * 1)^(-1/2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
                if module in into_residual:
                    module.weight.data.mul_(2**-0.5)
