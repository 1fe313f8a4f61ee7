"""ViT: self-attention with a fresh class token, without projection behind it.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178, has it in its code,
not in its tables.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, head_maps


class ViTPool(Pooler):
    """Multi-head self-attention over [c; X] for a learned class token c; the row of c is the feature.

    The other rows are not computed; `built_macs` counts them, `macs` does not.

    heads: attention heads H, 8 in the benchmark's code.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        self.heads = heads
        self.cls = nn.Parameter(torch.zeros(1, dim))
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        cls = self.cls.to(tokens.dtype).expand(len(tokens), 1, -1)
        sequence = torch.cat([cls, tokens], 1)
        return attend(self.query(self.cls)[None], self.key(sequence), self.value(sequence), self.heads)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]: how the attention that goes to tokens is shared among them."""
        self.check(tokens)
        return head_maps(self.query(self.cls)[None], self.key(tokens), self.heads)

    def built_macs(self, tokens: int) -> int:
        """Multiply-accumulates of all rows, as released."""
        keys = tokens + 1
        return 3 * keys * self.dim**2 + 2 * keys**2 * self.dim

    def macs(self, tokens: int) -> int:
        """Of the one row that is computed."""
        keys = tokens + 1
        return 2 * keys * self.dim**2 + self.dim**2 + 2 * keys * self.dim
