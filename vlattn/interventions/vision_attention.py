"""What one layer of a vision tower attends to, from its projections alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlattn import ops
from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import HookSet


@dataclass(frozen=True)
class LayerView:
    """Queries and keys [tiles, H, lead + P, D] of one pass through a layer; lead is 1 where slot 0 is CLS."""

    q: torch.Tensor
    k: torch.Tensor
    lead: int

    def received(self) -> torch.Tensor:
        """Attention each patch receives, mean over heads and over all queries, CLS among them [tiles, P]."""
        sums = ops.received_attention(self.q, self.k, scale=self.q.shape[-1] ** -0.5)  # [tiles, H, lead + P]
        return sums.mean(1)[:, self.lead :] / self.q.shape[2]

    def salience(self) -> torch.Tensor:
        """Attention each patch gets from CLS, or where there is none from every patch; mean over heads [tiles, P]."""
        if not self.lead:
            return self.received()
        row = ops.query_row_attention(self.q[:, :, :1], self.k, scale=self.q.shape[-1] ** -0.5)  # [tiles, H, 1, 1 + P]
        return row.mean(1)[:, 0, 1:]

    def keys(self) -> torch.Tensor:
        """Keys of the patches, mean over heads, as the projection gave them [tiles, P, D]."""
        return self.k.mean(1)[:, self.lead :]


def no_pass() -> InputError:
    """The error for features whose pass through the tower was not seen."""
    return InputError(
        "pixel_values: features reached the projector that did not pass through the vision tower inside this context; "
        "give pixel_values instead of precomputed features"
    )


class LayerWatch:
    """Looks at one layer of each tower of the CLIP or SigLIP kind whenever the tower runs."""

    def __init__(self, adapter: Adapter, layer: int, hooks: HookSet) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._lead = int(adapter.has_cls)
        for layers in adapter.encoders:
            attention = layers[layer].self_attn
            self._heads = attention.num_heads
            hooks.after(attention.q_proj, self._keep("q"))
            hooks.after(attention.k_proj, self._keep("k"))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._held[name] = output

        return hook

    def view(self, *, one_head: bool = False) -> LayerView:
        """The last pass, once; `one_head` leaves the heads together, as one of full width."""
        if not self._held:
            raise no_pass()
        heads = 1 if one_head else self._heads
        q, k = (self._held.pop(name).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qk")
        return LayerView(q, k, self._lead)
