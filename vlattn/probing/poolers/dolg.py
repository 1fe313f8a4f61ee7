"""The spatial attention of DELF and DOLG: an unbounded positive score for each place.

"DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features", arXiv 2108.02927, with
the attention of "Large-Scale Image Retrieval with Attentive Deep Local Features", arXiv 1612.06321; built as in
"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.probing.poolers.base import Pooler


class DOLGPool(Pooler):
    """Mean over tokens of s * f / |f|, where f = BN(W x + b) and s = softplus(w ReLU(f) + c).

    The 1 x 1 convolutions of the original are linear maps of each token, so tokens need no grid. There is no softmax:
    the scale of the feature depends on the scores. Statistics of the batch norm are over images and tokens. The
    multi-dilation front end of DOLG is left out, as in the benchmark.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.local = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.score = nn.Linear(dim, 1)
        for layer in (self.local, self.score):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # variance 2 / outputs

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        local = self.norm(self.local(tokens).flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return (self._scores(local) * F.normalize(local, dim=-1)).mean(1)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map, [B, 1, N]: scores as shares of their sum. Running statistics stay as they are."""
        self.check(tokens)
        norm = self.norm
        running = (None, None) if self.training else (norm.running_mean, norm.running_var)
        flat = self.local(tokens).flatten(0, 1)
        local = F.batch_norm(flat, *running, norm.weight, norm.bias, training=self.training, eps=norm.eps)
        scores = self._scores(local).view(tokens.shape[:2]).to(torch.promote_types(tokens.dtype, torch.float32))
        return F.normalize(scores, p=1, dim=1)[:, None]

    def macs(self, tokens: int) -> int:
        return tokens * self.dim**2 + 2 * tokens * self.dim

    def _scores(self, local: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., 1]."""
        return F.softplus(self.score(local.relu()))
