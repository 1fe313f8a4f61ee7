"""Paths drawn or followed one fixation at a time, all at once; those that have ended make room."""

from __future__ import annotations

import torch

from vlattn.gaze.decode_steps import Steps
from vlattn.gaze.oat import exclude

SPARE = 0.8
"""Rows move together when at most this share of them is still growing: moving costs a copy of their caches."""


def draw_paths(
    steps: Steps,
    trials: int,
    objects: int,
    longest: int,
    temperature: float,
    draws: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample paths, or take the likeliest step each time.

    Args:
        steps: nothing appended yet.
        trials, objects: B and P.
        longest: fixations at most.
        draws: float64 [B, N, longest] in [0, 1), one for each step: which quantile is drawn; None is greedy, N = 1.

    Returns:
        int64 [B, N, longest + 1] of ids, the end's (P) from where a path ends; float32 [B, N], natural logarithms of
        the paths' probabilities, the end's included where it came.
    """
    count = 1 if draws is None else draws.shape[1]
    ids = torch.full((trials, count, longest + 1), objects, dtype=torch.int64, device=device)
    totals = torch.zeros(trials, count, device=device)
    rows = torch.arange(trials, device=device)  # which trial each row is
    paths = torch.arange(count, device=device).expand(trials, -1)  # and which path each column of it
    growing = torch.ones(trials, count, dtype=torch.bool, device=device)
    # All paths begin alike, so the first step is made once a trial.
    logits = steps.logits(torch.full((trials, 1), objects + 2, dtype=torch.int64, device=device))
    if count > 1:
        steps.select(rows, torch.zeros(trials, count, dtype=torch.int64, device=device))
        logits = logits.expand(-1, count, -1)
    for time in range(longest):
        chances = (exclude(logits, objects, first=time == 0) / temperature).log_softmax(-1)
        if draws is None:
            chosen = chances.argmax(-1)
        else:
            chosen = quantile(chances, draws[rows[:, None], paths, time])
        chosen = torch.where(growing, chosen, objects)
        gained = chances.gather(-1, chosen[..., None])[..., 0]
        ids[rows[:, None], paths, time] = chosen
        totals[rows[:, None], paths] += torch.where(growing, gained, 0.0)
        growing = growing & (chosen != objects)
        left = growing.sum(1)
        most = int(left.max())
        if most == 0 or time + 1 == longest:
            break
        if most * int((left > 0).sum()) <= SPARE * growing.numel():
            kept = left.nonzero()[:, 0]
            columns = growing[kept].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            steps.select(kept, columns)
            rows, paths = rows[kept], paths[kept].gather(1, columns)
            growing, chosen = growing[kept].gather(1, columns), chosen[kept].gather(1, columns)
        # What has ended is fed its end until it is moved out; nobody looks at what it gives.
        logits = steps.logits(chosen)
    return ids, totals


def quantile(log_chances: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The class [...] at which the cumulated chances [..., V] pass `draws` [...]: one that is possible, always."""
    cumulated = log_chances.to(draws.dtype).exp().cumsum(-1)
    total = cumulated[..., -1:]
    # Below the total, where rounding must not reach: the class that passes it there has a chance of its own.
    wanted = torch.minimum(draws[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, wanted, right=True)[..., 0]
