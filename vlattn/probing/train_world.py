"""Training one head in several processes, each on its share of the images.

Works under `accelerate launch` and `torchrun`: both say rank and number of processes in the environment. Gradients are
averaged, so a step is that of all images together. Batch norm takes the statistics of a process's own images, as the
published runs do, and the running statistics kept are those of rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place: alone, it is rank 0 of 1 and nothing is sent."""

    rank: int
    size: int
    device: torch.device

    def mean_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average gradients over the processes, in one message."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        flat /= self.size
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def share_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Have what rank 0 has."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [B, ...] of all processes one after the other; each may have another number."""
        if self.size == 1:
            return rows
        parts: list[torch.Tensor | None] = [None] * self.size
        distributed.all_gather_object(parts, rows.cpu())
        return torch.cat([part for part in parts if part is not None])


def join_world(device: torch.device | str | None = None) -> World:
    """The world that a launcher set up, joined on the first call, or this process alone.

    device: None is the CUDA device of this process where there is one, else the CPU.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size(), device)
    return World(0, 1, device)
