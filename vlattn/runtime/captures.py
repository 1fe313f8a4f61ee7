"""Read a layer's queries, keys and values from its projections, without asking it for attention weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.runtime.hooks import HookSet


class ProjectionCapture:
    """Holds q, k, v of one attention module's last call, each [B, N, H * D] as its projection gave it."""

    def __init__(self, attention: nn.Module, hooks: HookSet) -> None:
        self._held: dict[str, torch.Tensor] = {}
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(attention, name, None)
            if not isinstance(projection, nn.Module):
                raise InputError(f"model: {type(attention).__name__} has no {name}, so its {name[0]} cannot be read")
            hooks.after(projection, self._keep(name[0]))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._held[name] = output

        return hook

    def take(self, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, k, v) as [B, H, N, D] views, and forget them."""
        split = [self._held.pop(name).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"]
        return split[0], split[1], split[2]
