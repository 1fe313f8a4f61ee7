"""STKIM: hide some of the most attended instances in training, so that attention spreads.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", arXiv 2311.07125.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.bag import over_scores


class STKIM(nn.Module):
    """In training, hides floor(p K') of the K' = min(K, real tokens) best scores of each row, drawn at random.

    Rows, which are branches or heads, are drawn independently; at least one real token stays. In eval mode nothing is
    hidden. Draws come from the module's own generator, on the CPU, so other draws and the device do not matter; it is
    copied with the module, but is not in the state dict.

    n_masked_patch: K.
    mask_drop: p, the share of the best K that is hidden, not a probability.
    seed: of the generator.
    """

    def __init__(self, n_masked_patch: int, mask_drop: float, seed: int) -> None:
        super().__init__()
        require_count("n_masked_patch", n_masked_patch, least=0)
        number = isinstance(mask_drop, int | float) and not isinstance(mask_drop, bool)
        if not number or not 0 <= mask_drop <= 1:
            raise InputError(f"mask_drop: got {mask_drop!r}; give a share from 0 to 1")
        require_count("seed", seed, least=0)
        self.n_masked_patch, self.mask_drop = n_masked_patch, mask_drop
        # NumPy's: can be copied in every version, and drawn from inside torch.func.vmap.
        self.generator = np.random.default_rng(seed)

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [B, ..., N], already -inf on padding, with more -inf; mask is bool [B, N], True on real tokens."""
        if not self.training or self._hidden(self.n_masked_patch) == 0:
            return scores
        return scores.masked_fill(self.draw(scores.detach(), mask), -torch.inf)

    def draw(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What is hidden at one step: bool like the scores."""
        top = min(self.n_masked_patch, scores.shape[-1])
        index = scores.topk(top, dim=-1).indices
        drawn = self.generator.random((*scores.shape[:-1], top), dtype=np.float32)
        noise = torch.from_numpy(drawn).to(scores.device)
        if mask is None:
            limit: torch.Tensor | int = min(self._hidden(top), scores.shape[-1] - 1)
        else:
            real = mask.sum(1)
            counts = torch.tensor([self._hidden(k) for k in range(top + 1)], device=scores.device)
            usable = over_scores(real.clamp(max=top)[:, None], scores)
            limit = torch.minimum(counts[usable], over_scores(real[:, None] - 1, scores))
            noise = noise.masked_fill(torch.arange(top, device=scores.device) >= usable, 2.0)  # padding comes last
        chosen = noise.argsort(-1).argsort(-1) < limit
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, chosen)

    def _hidden(self, top: int) -> int:
        return math.floor(top * self.mask_drop + 1e-9)  # 100 * 0.29 is a little less than 29
