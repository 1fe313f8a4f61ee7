"""DivPrune: keep the subset of visual tokens whose closest pair is farthest apart, found greedily.

"DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vlattn.checks import require_choice, require_count, require_number, require_one
from vlattn.interventions.prompt_pruner import PromptPruner
from vlattn.kernels.reference import ROW_BLOCK, accumulation_dtype
from vlattn.runtime.sequence import Positions
from vlattn.runtime.tokens import VisualTokens

TABLE = 4096
"""Tokens up to which all distances are held at once: 64 MB in fp32 for each image."""


def all_distances(unit: torch.Tensor) -> torch.Tensor:
    """Cosine distances between all tokens, unit vectors [B, N, D] -> [B, N, N]; each pair is computed once."""
    total = unit.shape[1]
    table = unit.new_empty(len(unit), total, total)
    for start in range(0, total, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, total)
        block = 1 - unit[:, start:stop] @ unit[:, start:].transpose(1, 2)  # [B, r, N - start]
        table[:, start:stop, start:] = block
        table[:, start:, start:stop] = block.transpose(1, 2)
    return table


def nearest_distance(unit: torch.Tensor) -> torch.Tensor:
    """Cosine distance of each token to its nearest other one; unit vectors [B, N, D] -> [B, N], a block at a time."""
    total = unit.shape[1]
    rows = []
    for start in range(0, total, ROW_BLOCK):
        block = unit[:, start : start + ROW_BLOCK]  # [B, r, D]
        rows.append(_nearest(1 - block @ unit.transpose(1, 2), start))
    return torch.cat(rows, 1)


def _nearest(distance: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The smallest of each row [B, r, N] that is not the token itself; row 0 is token `start`."""
    own = torch.arange(start, start + distance.shape[1], device=distance.device)
    return distance.scatter(2, own[None, :, None].expand(len(distance), -1, -1), torch.inf).amin(-1)


def max_min_picks(x: torch.Tensor, keep: int, table: int = TABLE) -> torch.Tensor:
    """Greedy max-min diversity: start from the token farthest from its nearest other one, then always add the token
    farthest from all picked ones.

    Args:
        x: tokens [B, N, D]; only directions matter, and a zero vector is at distance 1 from everything.
        keep: 1 <= keep <= N.
        table: tokens up to which all distances are held, O(N^2) memory; above, one row of them is computed for each
            pick, O(N) memory and O(N keep D) multiply-adds more.

    Returns:
        int64 [B, keep] in the order of picking, so that a smaller `keep` gives a prefix; ties go to the lower id.
        O(N^2 D) multiply-adds, for the first pick needs every pair.
    """
    unit = F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1)  # [B, N, D]
    batch = torch.arange(len(x), device=x.device)
    held = all_distances(unit) if unit.shape[1] <= table else None
    distance = nearest_distance(unit) if held is None else _nearest(held)  # decides the first pick only
    closest = torch.full_like(distance, torch.inf)  # [B, N], to the nearest pick
    picked = torch.zeros_like(distance, dtype=torch.bool)
    picks = []
    for _ in range(keep):
        # By a mask, not by their distance of about 0: a copy of a picked token has that too.
        pick = distance.masked_fill(picked, -torch.inf).argmax(-1)  # [B]
        picked[batch, pick] = True
        picks.append(pick)
        row = 1 - (unit @ unit[batch, pick][..., None]).squeeze(-1) if held is None else held[batch, pick]
        closest = closest.minimum(row)
        distance = closest
    return torch.stack(picks, 1)


@dataclass(frozen=True)
class DivPrune(PromptPruner):
    """DivPrune: the most diverse visual tokens of each image, by the features that the decoder would get.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175. Neither attention
    nor text is looked at. All tiles of an image and its newline features compete together, as in the released code;
    distances are taken in fp32, which the released code leaves to the model's dtype.

    keep: visual tokens per image that reach the decoder. Give this or `ratio`.
    ratio: share of each image's visual tokens to keep, rounded half to even, one token at least (the paper: 0.098,
        which is 56 of 576).
    positions: `compact` renumbers the prompt after the drop, as code that concatenates features does; `preserve` keeps
        the original position ids; `auto` is compact, and preserve where positions have three dimensions (Qwen-VL).
    """

    keep: int | None = None
    ratio: float | None = None
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        require_one(keep=self.keep, ratio=self.ratio)
        if self.keep is not None:
            require_count("keep", self.keep)
        if self.ratio is not None:
            require_number("ratio", self.ratio, 0.0, 1.0)
        require_choice("positions", self.positions, ("auto", "compact", "preserve"))

    def _keep_of(self, tokens: int) -> int:
        return self.keep if self.ratio is None else max(1, round(self.ratio * tokens))  # type: ignore[return-value]

    def _select(
        self, features: torch.Tensor, keep: int, images: list[int], visual: VisualTokens, memory: Any
    ) -> torch.Tensor:
        if not keep:
            return torch.empty(features.shape[0], 0, dtype=torch.int64, device=features.device)
        return max_min_picks(features, keep)
