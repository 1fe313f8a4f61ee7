"""The likeliest paths as wholes, by beam search."""

from __future__ import annotations

import torch

from vlattn.gaze.decode_steps import Steps
from vlattn.gaze.oat import exclude


def search_beams(
    steps: Steps, trials: int, objects: int, longest: int, beams: int, length_penalty: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beams in falling order of log-probability / length^length_penalty, the end counted as a step.

    Args:
        steps: nothing appended yet.
        trials, objects: B and P.
        longest: fixations at most; a path that long may be without its end.
        beams: K.

    Returns:
        int64 [B, K', longest + 1] of ids, the end's (P) from where a path ends; float32 [B, K'], natural logarithms of
        the paths' probabilities, -inf where there are fewer paths. K' is K, or less where no K paths exist.
    """
    pad, classes = objects + 1, objects + 2
    every = torch.arange(trials, device=device)
    ids = torch.full((trials, 1, longest + 1), objects, dtype=torch.int64, device=device)
    totals = torch.zeros(trials, 1, device=device)
    ended = torch.zeros(trials, 1, dtype=torch.bool, device=device)
    steps_taken = torch.zeros(trials, 1, device=device)
    newest = torch.full((trials, 1), objects + 2, dtype=torch.int64, device=device)
    for time in range(longest):
        chances = exclude(steps.logits(newest), objects, first=time == 0).log_softmax(-1)
        # What has ended goes on as it is, at no cost, by way of the padding class.
        waiting = torch.full_like(chances, -torch.inf)
        waiting[..., pad] = 0
        chances = torch.where(ended[..., None], waiting, chances)
        totals, best = (totals[..., None] + chances).flatten(1).topk(min(beams, chances[0].numel()))
        columns, newest = best // classes, best % classes
        steps.select(every, columns)
        ids = ids.gather(1, columns[..., None].expand(-1, -1, ids.shape[-1]))
        steps_taken = steps_taken.gather(1, columns) + (newest != pad)
        ids[..., time] = torch.where(newest == pad, objects, newest)
        ended = (newest == pad) | (newest == objects) | (totals == -torch.inf)
        if bool(ended.all()):
            break
    order = (totals / steps_taken.clamp(min=1) ** length_penalty).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order[..., None].expand(-1, -1, ids.shape[-1])), totals.gather(1, order)
