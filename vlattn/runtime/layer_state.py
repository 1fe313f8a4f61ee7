"""What a method may look at right after one decoder layer: hidden states, tokens, and the layer's own q, k, v."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vlattn import ops
from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter


@dataclass
class LayerState:
    """One decoder layer that has just run on n positions.

    layer: its 0-based index.
    hidden: its output [B, n, D], the residual stream.
    alive: bool [B, n], False on left padding.
    seen: bool [B, n], where the layer's attention may look: alive, and not hidden by a method.
    visual: bool [B, n], visual tokens that are left and visible.
    slot: int64 [B, n], running index of a visual token within its prompt; -1 for text, -2 for a merged token.
    image: int64 [B, n], running index of the image within the batch; -1 for text.
    arguments: the layer's keyword arguments (attention_mask, position_embeddings, position_ids, cache, ...).
    generated: positions cached behind the prompt; above 0 only for methods that act at every step, whose hidden states
        are then those of the new positions alone; alive, seen, visual, slot and keys are those of the whole sequence.
    """

    adapter: Adapter
    layer: int
    hidden: torch.Tensor
    alive: torch.Tensor
    seen: torch.Tensor
    visual: torch.Tensor
    slot: torch.Tensor
    image: torch.Tensor
    arguments: dict[str, Any]
    generated: int = 0
    projected: dict[str, torch.Tensor] = field(default_factory=dict)
    cached_key: torch.Tensor | None = None

    @property
    def last(self) -> int:
        """Index of the last position among the layer's queries: prompts are padded on the left, so it is real."""
        return self.hidden.shape[1] - 1

    @property
    def scaling(self) -> float:
        attention = self.adapter.decoder_attention(self.layer)
        return float(getattr(attention, "scaling", attention.head_dim**-0.5))

    def query(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries of positions `rows` (int64 [B, R]) with their rotary positions [B, H, R, d]."""
        index = rows[..., None].expand(-1, -1, self._projected("q").shape[-1])
        return self._rotated("q", self._projected("q").gather(1, index), rows)

    @property
    def key(self) -> torch.Tensor:
        """Keys with their rotary positions [B, H_kv, n, d]."""
        if self.cached_key is not None:
            return self.cached_key
        return self._rotated("k", self._projected("k"), None)

    @property
    def value(self) -> torch.Tensor:
        """Values [B, H_kv, n, d]."""
        return self._heads(self._projected("v"))

    def key_mask(self, rows: torch.Tensor) -> torch.Tensor:
        """Where positions `rows` (int64 [B, R]) may look, bool [B, R, n]: causal, seen, inside the layer's window."""
        places = torch.arange(self.alive.shape[1], device=rows.device)
        # The layer's queries are the last positions of its keys.
        query = (rows + self.alive.shape[1] - self.hidden.shape[1])[..., None]  # [B, R, 1]
        mask = (places <= query) & self.seen[:, None]
        window = getattr(self.adapter.decoder_attention(self.layer), "sliding_window", None)
        return mask if window is None else mask & (places > query - window)

    def attention_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention weights of positions `rows` (int64 [B, R]) over all keys [B, H, R, n]; no other row is made.

        fp32 for half-precision models. The layer itself stays on whatever attention it runs.
        """
        return ops.query_row_attention(self.query(rows), self.key, scale=self.scaling, key_mask=self.key_mask(rows))

    def _projected(self, name: str) -> torch.Tensor:
        if name not in self.projected:
            raise InputError(f"decoder layer {self.layer}: its {name} projection was not captured")
        return self.projected[name]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.adapter.decoder_attention(self.layer).head_dim)).transpose(1, 2)

    def _rotated(self, name: str, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        cos, sin = self.arguments["position_embeddings"]
        return self.adapter.decoder_states(self.layer, name, x, _at(cos, rows), _at(sin, rows))


def _at(table: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows of a rotary table [..., B or 1, n, d] at positions `rows` [B, R]."""
    if rows is None:
        return table
    shape = list(table.shape)
    shape[-3] = rows.shape[0]
    index = rows[..., None].expand(*rows.shape, table.shape[-1])
    return table.expand(shape).gather(-2, index.expand(*shape[:-3], *index.shape))
