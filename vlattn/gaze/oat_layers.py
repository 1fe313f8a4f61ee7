"""Post-norm transformer layers as in "Attention Is All You Need", arXiv 1706.03762, with caches for generation.

Parameters have the names and shapes of PyTorch's own encoder and decoder layers, whose states load here and the other
way round. Those keep no keys and values from one step to the next.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, D] -> [..., h, T, D / h]."""
        dim = x.shape[-1]
        return self._split(F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim]), 1)[0]

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., T, D] -> keys and values, both [..., h, T, D / h]."""
        dim = x.shape[-1]
        keys, values = self._split(F.linear(x, self.in_proj_weight[dim:], self.in_proj_bias[dim:]), 2)
        return keys, values

    def all_three(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of one sequence."""
        queries, keys, values = self._split(F.linear(x, self.in_proj_weight, self.in_proj_bias), 3)
        return queries, keys, values

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        mask: torch.Tensor | None = None, causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """[B, h, T, d] and [B, h, S, d] -> [B, T, D]. mask: bool, False hides; broadcasts to [B, h, T, S]."""
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=causal)
        out: torch.Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        split = x.unflatten(-1, (parts, self.heads, -1))  # [..., T, parts, h, d]
        return tuple(part.transpose(-2, -3) for part in split.unbind(-3))


class EncoderLayer(nn.Module):
    """Full self-attention, then a feed-forward net; each with a residual and a norm behind it."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        mixed = self.self_attn.attend(*self.self_attn.all_three(x), mask=mask)
        x = self.norm1(x + self.dropout(mixed))
        out: torch.Tensor = self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return out


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, then a feed-forward net."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.multihead_attn = Attention(dim, heads, dropout), Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """A whole path [B, T, D]. memory: keys and values of the encoder [B, h, S, d]. mask: of them."""
        mixed = self.self_attn.attend(*self.self_attn.all_three(x), causal=True)
        return self._rest(x, mixed, memory, mask)

    def step(
        self, x: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None, past: LayerCache
    ) -> torch.Tensor:
        """The newest fixation of N paths in each of B trials: [B, N, D] -> [B, N, D]; `past` grows by it."""
        queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in self.self_attn.all_three(x))
        seen_keys, seen_values = past.append(keys, values)  # [B * N, h, t, d]
        mixed = self.self_attn.attend(queries[:, :, None], seen_keys, seen_values)  # [B * N, 1, D]
        return self._rest(x, mixed.view_as(x), memory, mask)

    def _rest(
        self, x: torch.Tensor, mixed: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.norm1(x + self.dropout(mixed))
        # Paths of one trial are queries side by side: they share the encoder's keys and values.
        x = self.norm2(x + self.dropout(self.multihead_attn.attend(self.multihead_attn.queries(x), *memory, mask=mask)))
        out: torch.Tensor = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return out


class LayerCache:
    """Keys and values of one layer for rows of paths, in room that is made once. capacity: fixations it can hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, h, d] of one more fixation -> all so far, [R, h, t, d]."""
        if self.room is None:
            rows, heads, width = keys.shape
            shape = (rows, heads, self.capacity, width)
            self.room = keys.new_empty(shape), values.new_empty(shape)
        for room, new in zip(self.room, (keys, values), strict=True):
            room[:, :, self.length] = new
        self.length += 1
        return self.room[0][:, :, : self.length], self.room[1][:, :, : self.length]

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows [R'], in this order; one may come several times."""
        if self.room is not None:
            kept = []
            for room in self.room:
                new = room.new_empty((len(rows), *room.shape[1:]))
                new[:, :, : self.length] = room[:, :, : self.length][rows]
                kept.append(new)
            self.room = kept[0], kept[1]


def time_encoding(length: int, dim: int, device: torch.device | None = None) -> torch.Tensor:
    """float32 [length, dim]: sines on even channels, cosines on odd ones, base 10,000."""
    places = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    rates = torch.exp(torch.arange(0, dim, 2, device=device).float() * (-math.log(10_000.0) / dim))
    return torch.stack((torch.sin(places * rates), torch.cos(places * rates)), -1).flatten(1)[:, :dim]
