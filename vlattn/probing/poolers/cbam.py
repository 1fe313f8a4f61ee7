"""CBAM: gates on channels, then on places, then the mean.

"CBAM: Convolutional Block Attention Module", arXiv 1807.06521; built as in "Attention, Please! Revisiting Attentive
Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn

from vlattn.checks import require_count
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import grid_of, require_grid


class CBAMPool(Pooler):
    """Mean over places of ReLU(X + gated X), with one sigmoid gate per channel, then one per place.

    The channel gate comes from mean and maximum over places through a shared MLP; the gate of a place from mean and
    maximum over channels through a 7 x 7 convolution and a batch norm, whose statistics are over images and places.

    grid: (rows, columns) of the tokens; None, or tokens of another number, stands for a square.
    reduction: the MLP is max(1, D / reduction, rounded half up) wide.
    """

    needs_grid = True

    def __init__(self, dim: int, *, grid: tuple[int, int] | None = None, reduction: int = 16) -> None:
        super().__init__(dim)
        if grid is not None:
            require_grid("grid", grid)
        require_count("reduction", reduction)
        self.grid = None if grid is None else (grid[0], grid[1])
        self.hidden = max(1, int(dim / reduction + 0.5))
        self.squeeze = nn.Linear(dim, self.hidden, bias=False)
        self.excite = nn.Linear(self.hidden, dim, bias=False)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        grid = grid_of(tokens.shape[1], self.grid)
        extremes = torch.stack([tokens.mean(1), tokens.amax(1)])  # [2, B, D]
        channels = self.excite(self.squeeze(extremes).relu()).sum(0).sigmoid()
        gated = tokens * channels[:, None]
        maps = torch.stack([gated.mean(2), gated.amax(2)], 1).unflatten(2, grid)  # [B, 2, rows, columns]
        places = self.norm(self.conv(maps)).sigmoid().flatten(1)  # [B, N]
        return (gated * places[..., None] + tokens).relu().mean(1)

    def macs(self, tokens: int) -> int:
        """Of the MLP, which runs twice, and of the convolution; gates and means count as nothing."""
        return 4 * self.dim * self.hidden + 98 * tokens
