"""How long one training step of a probe takes, poolers side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from vlattn.probing.head import make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_loss import training_losses
from vlattn.runtime.timing import interleave


def step_times(
    tokens: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    classes: int,
    settings: ProbeSettings,
    *,
    grid: tuple[int, int] | None = None,
    rounds: int = 7,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of forward, backward and optimiser step of one head, for one batch of tokens that are there already.

    Poolers take turns, so that what slows the machine for a while slows all of them.

    Args:
        tokens: {pooler: the batch that it gets [B, N, D]}; the device is the tokens' own.
        labels: int64 [B], or [B, K] for multi-label data.
        classes: number of classes K.
        settings: optimiser and precision are taken from here.
        grid: (rows, columns) of the patches.
        rounds: steps that count, after two that do not.

    Returns:
        {pooler: {"median", "lower", "upper" (quartiles), "rounds", "batch"}}.
    """
    arms = {name: _step(name, batch, labels, classes, settings, grid) for name, batch in tokens.items()}
    found = interleave(arms, repeats=rounds, warmup=2)
    times = {}
    for name, timing in found.items():
        spread = timing.seconds
        milliseconds = {key: 1e3 * getattr(spread, key) for key in ("median", "lower", "upper")}
        times[name] = {**milliseconds, "rounds": spread.n, "batch": len(labels)}
    return times


def _step(
    name: str,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    settings: ProbeSettings,
    grid: tuple[int, int] | None,
) -> Callable[[], object]:
    """One training step of a head of its own."""
    bank = HeadBank(make_head(name, tokens.shape[-1], classes, grid=grid, seed=0), 1).to(tokens.device)
    optimizer = replace(settings, blr=None, lr=1e-3).make_optimizer(list(bank.parameters()))
    half = settings.autocast_dtype(tokens.device)

    def step() -> None:
        # What is timed runs without gradients, which training needs.
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(tokens.device.type, dtype=half, enabled=half is not None):
                seen = bank.read(tokens)
            training_losses(seen, labels, bank.branch_losses)["total"].sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
