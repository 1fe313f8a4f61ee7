"""What both training stages of the tiny LLaVA share: schedule, optimisers, checkpoints, log."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """The data generator of one step: resuming at any step draws what an uninterrupted run would have drawn."""
    return np.random.default_rng([seed, stage, step])


def learning_rate_factor(step: int, steps: int, warmup: int = 60) -> float:
    """Linear warm-up, then cosine down to 1%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimiser:
    """AdamW over every trainable parameter of `modules`, with clipping and one schedule."""

    def __init__(self, modules: nn.Module, lr: float) -> None:
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.lr = lr
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.03, betas=(0.9, 0.98))

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


class Log:
    """Appends one JSON object a line and prints it."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()

    def __call__(self, **values: Any) -> None:
        values["seconds"] = round(time.time() - self.start)
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def save_checkpoint(path: Path, step: int, modules: nn.Module, optimiser: Optimiser) -> None:
    """Write beside and rename, so that a kill leaves the old or the new checkpoint, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "modules": modules.state_dict(), "optimiser": optimiser.adamw.state_dict()}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, modules: nn.Module, optimiser: Optimiser) -> int:
    """Restore in place and return the step to go on from; 0 where there is no checkpoint."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    modules.load_state_dict(state["modules"])
    optimiser.adamw.load_state_dict(state["optimiser"])
    return int(state["step"])
