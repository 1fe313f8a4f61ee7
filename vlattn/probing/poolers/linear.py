"""The poolers of a linear probe, without parameters: the CLS token alone, and the mean of the patch tokens."""

from __future__ import annotations

import torch

from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler


class CLS(Pooler):
    """The CLS token as it is: tokens [B, 1, D] to [B, D]."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feature [B, D] of the CLS token alone, [B, 1, D]; more tokens are refused, since any of them could be CLS."""
        self.check(tokens)
        if tokens.shape[1] != 1:
            raise InputError(
                f"tokens: got {tokens.shape[1]} tokens an image; give the CLS token alone, [B, 1, {self.dim}]"
            )
        return tokens[:, 0]

    def macs(self, tokens: int) -> int:
        return 0


class GAP(Pooler):
    """Global average pooling: the arithmetic mean of tokens [B, N, D], [B, D]."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        return tokens.mean(1)

    def macs(self, tokens: int) -> int:
        return tokens * self.dim
