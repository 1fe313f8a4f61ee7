"""Poolers between mean and maximum, with one learnable number each: GeM, LSE and GMP."""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_positive
from vlattn.probing.poolers.base import Pooler


class GeM(Pooler):
    """Generalised mean of each channel over tokens: (mean max(x, 1e-6)^p)^(1/p), the mean at p = 1.

    "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv 1711.02512. Negative values count as 1e-6.

    p: the exponent at first; learnable.
    """

    def __init__(self, dim: int, *, p: float = 3.0) -> None:
        super().__init__(dim)
        require_positive("p", p)
        self.p = nn.Parameter(torch.tensor([float(p)]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        return tokens.clamp(min=1e-6).pow(self.p).mean(1).pow(1 / self.p)

    def macs(self, tokens: int) -> int:
        return tokens * self.dim


class LSE(Pooler):
    """Log-sum-exp of each channel over tokens: (1/r) log mean exp(r x), the maximum as r grows, the mean as r falls.

    "From Image-level to Pixel-level Labeling with Convolutional Networks", arXiv 1411.6228.

    r: the sharpness at first; learnable.
    """

    def __init__(self, dim: int, *, r: float = 10.0) -> None:
        super().__init__(dim)
        require_positive("r", r)
        self.r = nn.Parameter(torch.tensor([float(r)]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        top = tokens.amax(1, keepdim=True)
        return top[:, 0] + (self.r * (tokens - top)).exp().mean(1).log() / self.r

    def macs(self, tokens: int) -> int:
        return tokens * self.dim


class GMP(Pooler):
    """Generalised max pooling: the y that all tokens match alike, X y near 1, at ridge weight lam.

    "Generalized Max Pooling", arXiv 1406.0312. y = X^T a with (X X^T + lam I) a = 1, solved in fp32 or finer. Where
    there are more tokens than channels the equal form (X^T X + lam I) y = X^T 1 is the smaller system, and is used.

    lam: the ridge weight at first; learnable.
    """

    def __init__(self, dim: int, *, lam: float = 1e3) -> None:
        super().__init__(dim)
        require_positive("lam", lam)
        self.lam = nn.Parameter(torch.tensor([float(lam)]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        count = tokens.shape[1]
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            ridge = self.lam.to(x.dtype) * torch.eye(min(count, self.dim), dtype=x.dtype, device=x.device)
            if count <= self.dim:
                ones = x.new_ones(len(x), count, 1)
                out = (x.mT @ torch.linalg.solve(x @ x.mT + ridge, ones))[..., 0]
            else:
                out = torch.linalg.solve(x.mT @ x + ridge, x.sum(1)[..., None])[..., 0]
        return out.to(tokens.dtype)

    def macs(self, tokens: int) -> int:
        """The Gram matrix, a third of a cube for the elimination, and the sum over tokens."""
        side = min(tokens, self.dim)
        return tokens * self.dim * side + side**3 // 3 + tokens * self.dim
