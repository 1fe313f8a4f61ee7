"""CaiT's class attention: a fresh class token reads the frozen tokens in one block.

"Going deeper with Image Transformers", arXiv 2103.17239; built as in "Attention, Please! Revisiting Attentive Probing
Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, head_maps, mlp


class CaiTPool(Pooler):
    """c <- c + g1 * Attention(LN [c; X]), c <- c + g2 * MLP(LN c), feature = LN c, for a learned class token c.

    heads: attention heads H, 4 in the benchmark.
    init_values: first value of the channel scales g1 and g2. With the default the feature starts all but constant.
    """

    def __init__(self, dim: int, *, heads: int = 4, init_values: float = 1e-5) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.cls = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(init_values)))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)
        self.gamma2 = nn.Parameter(torch.full((dim,), float(init_values)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self._sequence(tokens)
        read = attend(self.query(normed[:, :1]), self.key(normed), self.value(normed), self.heads)
        cls = self.cls + self.gamma1 * self.out(read)
        return self.norm(cls + self.gamma2 * self.mlp(self.norm2(cls)))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]: how the attention that goes to tokens is shared among them."""
        normed = self._sequence(tokens)
        return head_maps(self.query(normed[:, :1]), self.key(normed[:, 1:]), self.heads)

    def macs(self, tokens: int) -> int:
        keys = tokens + 1
        return 2 * keys * self.dim**2 + 2 * keys * self.dim + 10 * self.dim**2

    def _sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """LN [c; X], [B, N + 1, D]."""
        self.check(tokens)
        cls = self.cls.to(tokens.dtype).expand(len(tokens), 1, -1)
        return self.norm1(torch.cat([cls, tokens], 1))
