"""The scaled loss of fp16 training, with a scale of its own for each head of a bank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vlattn.probing.optim import SliceOptimizer, along_slices


class LossScaler:
    """What `torch.amp.GradScaler` does, slice by slice: a head whose gradients overflow skips its own step only.

    heads: R.
    enabled: False leaves losses and gradients as they are.
    start, growth_interval: first scale, and steps without overflow before it doubles; an overflow halves it.
    """

    def __init__(
        self,
        heads: int,
        enabled: bool,
        device: torch.device | str = "cpu",
        start: float = 65536.0,
        growth_interval: int = 2000,
    ) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = torch.full((heads,), start, device=device)
        self.good = torch.zeros(heads, device=device)

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        """What to call backward on, for losses [R]: no head's gradients reach another's weights, so it is a sum."""
        return (losses * self.scale).sum() if self.enabled else losses.sum()

    @torch.no_grad()
    def step(self, optimizer: SliceOptimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scales, step the heads whose gradients are finite, and adapt the scales."""
        if not self.enabled:
            optimizer.step()
            return
        finite = torch.ones_like(self.scale, dtype=torch.bool)
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(along_slices(self.scale, p))
                finite &= p.grad.isfinite().flatten(1).all(1)
        optimizer.step(live=finite)
        self.good = torch.where(finite, self.good + 1, torch.zeros_like(self.good))
        grown = self.good >= self.growth_interval
        self.scale = torch.where(finite, torch.where(grown, self.scale * 2, self.scale), self.scale / 2)
        self.good = torch.where(grown, torch.zeros_like(self.good), self.good)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good = state["scale"].to(self.scale), state["good"].to(self.good)
