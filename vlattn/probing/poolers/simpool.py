"""SimPool and its form without projections, eSimPool: the mean token looks at the tokens.

"Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?", arXiv 2309.06891. Both are built as
in "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from vlattn.checks import require_divisor, require_positive
from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler, attention_maps, pool, split_heads

_EPS = 1e-6


class _MeanQuery(Pooler):
    """What both have: a LayerNorm, heads, and a plain or generalised mean of the values."""

    def __init__(self, dim: int, heads: int, gamma: float | None, beta: bool) -> None:
        super().__init__(dim)
        require_divisor("heads", heads, "dim", dim)
        if gamma is not None:
            require_positive("gamma", gamma)
        if beta and gamma is None:
            raise InputError("beta: got True without gamma; give gamma, too, or leave beta out")
        self.heads, self.gamma = heads, gamma
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    @abstractmethod
    def _read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [B, 1, D], key and value [B, N, D] of tokens [B, N, D]."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        query, key, value = self._read(tokens)
        if self.gamma is not None:
            value = (value - value.amin((1, 2), keepdim=True) + _EPS) ** self.gamma
        query, key, value = (split_heads(part, self.heads).to(query.dtype) for part in (query, key, value))
        out = pool(query, key, value).flatten(1)  # [B, D]
        if self.gamma is not None:
            out = out ** (1 / self.gamma)
        return out if self.beta is None else out + self.beta.to(out.dtype)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]."""
        self.check(tokens)
        query, key, _ = self._read(tokens)
        scale = (self.dim // self.heads) ** -0.5
        return attention_maps(split_heads(query, self.heads), split_heads(key, self.heads), scale).squeeze(2)


class SimPool(_MeanQuery):
    """The projected mean token looks at projected, normalised tokens, and gathers the normalised tokens themselves.

    gamma: exponent of a generalised mean over values shifted to be positive; the paper has 2 for convolutional networks
        and 1.25 for vision transformers. None is the plain mean, as in the benchmark. The shift is the minimum of each
        image, where the released code takes that of the whole batch, so that images do not depend on each other.
    beta: whether one learnable number, 0 at first, is added behind the generalised mean.
    """

    def __init__(self, dim: int, *, gamma: float | None = None, beta: bool = False) -> None:
        super().__init__(dim, 1, gamma, beta)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)

    def macs(self, tokens: int) -> int:
        return (tokens + 1) * self.dim**2 + 2 * tokens * self.dim

    def _read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = self.norm(tokens)
        return self.query(tokens.mean(1, keepdim=True)), self.key(normed), normed


class ESimPool(_MeanQuery):
    """The normalised mean token looks at the normalised tokens in several heads, and gathers the raw tokens.

    heads: attention heads H, 12 in the benchmark.
    gamma, beta: as in `SimPool`.
    """

    def __init__(self, dim: int, *, heads: int = 12, gamma: float | None = None, beta: bool = False) -> None:
        super().__init__(dim, heads, gamma, beta)

    def macs(self, tokens: int) -> int:
        return 2 * tokens * self.dim

    def _read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.norm(tokens.mean(1, keepdim=True)), self.norm(tokens), tokens
