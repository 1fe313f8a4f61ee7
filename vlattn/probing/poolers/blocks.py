"""Parts that several poolers are built from: multi-head attention of one query, an MLP, a patch grid."""

from __future__ import annotations

import math

import torch
from torch import nn

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.base import attention_maps, split_heads


def mlp(dim: int, ratio: int = 4) -> nn.Sequential:
    """Two layers with biases and an exact GELU between: 2 ratio D^2 + (ratio + 1) D parameters."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention of one query over projected tensors, scaled by (E / H)^(-1/2), heads joined.

    Args:
        query: [B, 1, E], or [1, 1, E] for all images.
        key, value: [B, N, E].
        heads: H, divides E.

    Returns:
        [B, E] in the value's dtype, or in autocast's.
    """
    maps = head_maps(query, key, heads).to(value.dtype)
    return (maps[:, :, None] @ split_heads(value, heads)).flatten(1)


def head_maps(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """What `attend` weighs values by, [B, H, N], fp32 or finer."""
    scale = (query.shape[-1] // heads) ** -0.5
    return attention_maps(split_heads(query.to(key.dtype), heads), split_heads(key, heads), scale)[:, :, 0]


def require_grid(name: str, value: object) -> None:
    """Refuse what is no pair of positive integers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"{name}: got {value!r}; give (rows, columns)")
    for side in value:
        require_count(name, side)


def grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of so many patch tokens: `grid` where it fits them, else a square."""
    if grid is not None and grid[0] * grid[1] == tokens:
        return grid
    side = math.isqrt(tokens)
    if side * side != tokens:
        known = "" if grid is None else f" and no {grid[0]} x {grid[1]} grid"
        raise InputError(
            f"tokens: got {tokens} of them, no square{known}; give patch tokens only, and grid=(rows, columns)"
        )
    return side, side
