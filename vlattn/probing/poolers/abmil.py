"""ABMIL: attention over the instances of a bag, plain or gated.

"Attention-based Deep Multiple Instance Learning", arXiv 1802.04712.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.bag import BagPooler, hide_padding


class InstanceScores(nn.Module):
    """Scores W (tanh(V h + b_V) * sigmoid(U h + b_U)) + b_W of instances h, or without the sigmoid factor.

    width: L, of the instances.
    hidden: rows of V and U.
    branches: M, rows of W; they share V and U.
    gated: whether there is the sigmoid factor.
    """

    def __init__(self, width: int, hidden: int, branches: int, gated: bool) -> None:
        super().__init__()
        self.v = nn.Linear(width, hidden)
        self.u = nn.Linear(width, hidden) if gated else None
        self.w = nn.Linear(hidden, branches)

    def forward(self, instances: torch.Tensor) -> torch.Tensor:
        """[B, N, L] to [B, M, N], fp32 or finer, under autocast, too."""
        hidden = self.v(instances).tanh()
        if self.u is not None:
            hidden = hidden * self.u(instances).sigmoid()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(hidden.to(dtype), self.w.weight.to(dtype), self.w.bias.to(dtype))
        return scores.transpose(1, 2)


class AttentionBag(BagPooler):
    """A bag pooler with M maps over its instances, which the feature takes together: zb = mean_m P_m H.

    d_inner: L, see `BagPooler`.
    hidden: width of the layer that scores are read from, 128 in the papers.
    branches: M.
    gated: see `InstanceScores`.
    """

    def __init__(self, dim: int, d_inner: int | None, hidden: int, branches: int, gated: bool) -> None:
        super().__init__(dim, d_inner)
        require_count("hidden", hidden)
        if not isinstance(gated, bool):
            raise InputError(f"gated: got {gated!r}; give True or False")
        self.hidden, self.n_token = hidden, branches
        self.score = InstanceScores(self.width, hidden, branches, gated)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        instances, scores = self.read(tokens, mask)
        return weighted_sums(scores.softmax(-1).mean(1, keepdim=True), instances)[:, 0]

    def attention(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps [B, M, N] of the branches, nothing dropped; 0 on padding. The feature uses their mean."""
        return self._scores(self.instances(tokens, mask), mask).softmax(-1)

    def read(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Instances H [B, N, L] and the scores [B, M, N] that are used, -inf where nothing is to be seen."""
        instances = self.instances(tokens, mask)
        return instances, self._scores(instances, mask)

    def macs(self, tokens: int) -> int:
        """Of the scores of all M branches, and of one weighted sum by their mean map."""
        layers = 1 if self.score.u is None else 2
        each = self.dim * self.width + layers * self.width * self.hidden
        return tokens * (each + self.hidden * self.n_token + self.width)

    def _scores(self, instances: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return hide_padding(self.score(instances), mask)


class ABMILPool(AttentionBag):
    """z = sum_n a_n h_n with a = softmax of w (tanh(V h_n + b_V) * sigmoid(U h_n + b_U)) + b, h_n = ReLU(W x_n).

    Give padded bags as `pooler(tokens, mask)`.

    d_inner: L, see `BagPooler`.
    hidden: rows of V and U, 128 in the paper.
    gated: False leaves out the sigmoid factor.
    """

    def __init__(self, dim: int, *, d_inner: int | None = None, hidden: int = 128, gated: bool = True) -> None:
        super().__init__(dim, d_inner, hidden, 1, gated)


def weighted_sums(maps: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
    """[B, M, N] times [B, N, L], in the dtype of the instances or in autocast's."""
    return maps.to(instances.dtype) @ instances
