"""One more fixation for many paths of many trials: from caches, or, to check these, from the paths as a whole."""

from __future__ import annotations

from typing import Protocol

import torch

from vlattn.gaze.oat import OAT, Memory


class Steps(Protocol):
    """Paths that grow together, N in each of B trials."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B, N]; float32 [B, N, P + 2] of what comes next."""
        ...

    def select(self, trials: torch.Tensor, columns: torch.Tensor) -> None:
        """Go on with paths `columns` [B', N'] of `trials` [B'], in this order; one may come several times."""
        ...


class CachedSteps:
    """Keeps keys and values; paths of a trial share those of the encoder. capacity: ids that a path can have."""

    def __init__(self, model: OAT, memory: Memory, capacity: int) -> None:
        self.model, self.memory, self.caches, self.paths = model, memory, model.caches(capacity), 0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.paths = ids.shape[1]
        return self.model.step(self.memory, self.caches, ids).float()

    def select(self, trials: torch.Tensor, columns: torch.Tensor) -> None:
        rows = (trials[:, None] * self.paths + columns).flatten()
        for cache in self.caches:
            cache.select(rows)
        if len(trials) < len(self.memory.tokens):
            self.memory = self.memory.select(trials)


class PrefixSteps:
    """Runs the decoder over all of each path, each time."""

    def __init__(self, model: OAT, memory: Memory, capacity: int) -> None:
        self.model, self.memory, self.ids = model, memory, None

    ids: torch.Tensor | None  # [B, N, t]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids[..., None] if self.ids is None else torch.cat((self.ids, ids[..., None]), -1)
        trials, paths, _ = self.ids.shape
        each = torch.arange(trials, device=ids.device).repeat_interleave(paths)
        memory = self.memory if paths == 1 else self.memory.select(each)
        return self.model.logits(memory, self.ids.flatten(0, 1))[:, -1].view(trials, paths, -1).float()

    def select(self, trials: torch.Tensor, columns: torch.Tensor) -> None:
        assert self.ids is not None
        self.ids = self.ids[trials[:, None], columns]
        if len(trials) < len(self.memory.tokens):
            self.memory = self.memory.select(trials)
