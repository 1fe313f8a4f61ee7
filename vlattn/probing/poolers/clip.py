"""CLIP's attention pool: the mean token looks at the tokens, all with learned positions.

"Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020; built as in "Attention,
Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_divisor
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.blocks import attend, grid_of, head_maps, require_grid


class CLIPPool(Pooler):
    """Self-attention over [mean token; tokens] with positions, of which only the first row is the feature.

    The original computes all N + 1 rows and throws N away; here the one row is computed, the same numbers for less.

    grid: (rows, columns) that the position table is made for. Tokens of another grid, which has to be square, get the
        table interpolated (bicubic, antialiased).
    heads: attention heads H, 4 in the benchmark.
    external_cls: the first token is a CLS token, which takes the place of the mean, instead of a patch.
    """

    needs_grid = True

    def __init__(self, dim: int, *, grid: tuple[int, int], heads: int = 4, external_cls: bool = False) -> None:
        super().__init__(dim)
        require_grid("grid", grid)
        require_divisor("heads", heads, "dim", dim)
        self.grid = (grid[0], grid[1])
        self.heads, self.external_cls = heads, external_cls
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.position = nn.Parameter(torch.empty(grid[0] * grid[1] + 1, dim))
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        for table in (self.position, self.query.weight, self.key_value.weight):
            nn.init.trunc_normal_(table, std=dim**-0.5)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key_value.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self._project(tokens)
        return self.out(attend(query, key, value, self.heads))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """One map per head, [B, H, N]: how the attention that goes to patch tokens is shared among them.

        With external_cls the N tokens are those behind CLS.
        """
        query, key, _ = self._project(tokens)
        return head_maps(query, key[:, 1:], self.heads)

    def built_macs(self, tokens: int) -> int:
        """Multiply-accumulates of the original, which computes all rows."""
        keys = tokens + (not self.external_cls)
        return 4 * keys * self.dim**2 + 2 * keys**2 * self.dim

    def macs(self, tokens: int) -> int:
        """Of the one row that is computed."""
        keys = tokens + (not self.external_cls)
        return 2 * keys * self.dim**2 + 2 * self.dim**2 + 2 * keys * self.dim

    def _project(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [B, 1, D], key and value [B, N + 1, D]; with external_cls [B, N, D]."""
        self.check(tokens)
        sequence = self.norm(tokens)
        if not self.external_cls:
            sequence = torch.cat([sequence.mean(1, keepdim=True), sequence], 1)
        sequence = sequence + self._positions(sequence.shape[1] - 1)
        key, value = self.key_value(sequence).chunk(2, -1)
        return self.query(sequence[:, :1]), key, value

    def _positions(self, patches: int) -> torch.Tensor:
        """Table [1 + patches, D], interpolated where the tokens form another grid."""
        grid = grid_of(patches, self.grid)
        if grid == self.grid:
            return self.position
        table = self.position[1:].to(torch.promote_types(self.position.dtype, torch.float32))
        image = table.T.unflatten(1, self.grid)[None]  # [1, D, rows, columns]
        image = F.interpolate(image, grid, mode="bicubic", antialias=True)
        return torch.cat([self.position[:1], image[0].flatten(1).T.to(self.position.dtype)])
