"""AbMILP: attention-based multiple-instance learning over tokens, with self-attention in front.

"Beyond [cls]: Exploring the True Potential of Masked Image Modeling Representations", arXiv 2412.03215.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler

ApplyTo = Literal["both", "map", "none"]


class AbMILP(Pooler):
    """A small network scores each token by itself; the feature is the softmax-weighted sum of tokens.

    self_attention: where a single-head self-attention layer acts first: `both` scores and pools its output, `map`
        scores its output and pools the tokens, `none` has no such layer.
    activation: between the layers of the scoring network, `tanh` or `relu`.
    depth: linear layers of the scoring network, the last one to a single number.
    cond: `pe` adds a fixed 2-D sine-cosine embedding to what is scored; `none` adds nothing.
    content: `patch` leaves out the first token, so it belongs to tokens with CLS in front; `all` takes every token.
    grid: (rows, columns) of the patch tokens, for cond="pe"; one token more than the grid has is a CLS token in front,
        at no place.
    """

    position: torch.Tensor

    def __init__(
        self,
        dim: int,
        *,
        self_attention: ApplyTo = "both",
        activation: Literal["tanh", "relu"] = "tanh",
        depth: int = 2,
        cond: Literal["none", "pe"] = "none",
        content: Literal["all", "patch"] = "all",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(dim)
        require_choice("self_attention", self_attention, ("both", "map", "none"))
        require_choice("activation", activation, ("tanh", "relu"))
        require_count("depth", depth)
        require_choice("cond", cond, ("none", "pe"))
        require_choice("content", content, ("all", "patch"))
        self.self_attention, self.cond, self.content, self.depth = self_attention, cond, content, depth
        if cond == "pe":
            if grid is None:
                raise InputError("grid: got None; give (rows, columns) of the patch tokens, which cond='pe' needs")
            self.register_buffer("position", sincos_2d(dim, grid), persistent=False)
        if self_attention != "none":
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.proj = nn.Linear(dim, dim)
        between = nn.Tanh if activation == "tanh" else nn.ReLU
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(dim, dim), between())]
        self.predictor = nn.Sequential(*hidden, nn.Linear(dim, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights, content = self._weigh(tokens)
        return (weights.to(content.dtype) @ content)[:, 0]

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """The weights of the sum, [B, 1, N]; a token that content="patch" leaves out has 0."""
        weights, _ = self._weigh(tokens)
        return F.pad(weights, (tokens.shape[1] - weights.shape[2], 0))

    def macs(self, tokens: int) -> int:
        n, square = tokens - (self.content == "patch"), self.dim**2
        scored = (self.depth - 1) * n * square + 2 * n * self.dim
        return scored if self.self_attention == "none" else scored + 4 * n * square + 2 * n**2 * self.dim

    def _weigh(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [B, 1, N], softmax in fp32, and what they weigh, [B, N, D]."""
        self.check(tokens)
        if self.content == "patch":
            if tokens.shape[1] == 1:
                raise InputError("tokens: got 1 token, which content='patch' leaves out; give patch tokens behind it")
            tokens = tokens[:, 1:]
        attended = tokens if self.self_attention == "none" else self._attend(tokens)
        scored = attended if self.cond == "none" else attended + self._positions(tokens.shape[1]).to(attended.dtype)
        scores = self.predictor(scored).mT  # [B, 1, N]
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return weights, attended if self.self_attention == "both" else tokens

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(tokens)[:, None].chunk(3, dim=-1)  # [B, 1, N, D] each
        return self.proj(F.scaled_dot_product_attention(query, key, value)[:, 0])

    def _positions(self, count: int) -> torch.Tensor:
        extra = count - len(self.position)
        if extra not in (0, 1):
            raise InputError(
                f"tokens: got {count} to score, where grid has {len(self.position)} places; "
                f"give one a place, or one more for a CLS token in front"
            )
        return F.pad(self.position, (0, 0, extra, 0))


def sincos_2d(dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed position embedding [rows * columns, D], fp32.

    The first half of the channels tells the column, the second the row; each half is sines and then cosines of the
    index times 10000^(-4 i / D), i from 0 to D / 4 - 1, as in masked autoencoders (arXiv 2111.06377).
    """
    if dim % 4:
        raise InputError(f"dim: got {dim}, of which cond='pe' makes four parts; give a multiple of 4")
    for side in grid:
        require_count("grid", side)
    rows, columns = grid
    rate = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [index.flatten()[:, None] * rate for index in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()
