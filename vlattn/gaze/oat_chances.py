"""How likely a model holds what people did next, step by step, given what they had done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlattn.checks import require_choice, require_count
from vlattn.gaze.oat import OAT, exclude
from vlattn.gaze.oat_batch import OATBatch, OATData, Search


@torch.inference_mode()
def step_chances(
    model: OAT, data: OATData, searches: Sequence[Search], *, batch: int = 64, over: str = "classes"
) -> list[np.ndarray]:
    """Chances of each next step along the searches' own paths: float64 [T + 1, P + 1] each, objects and then the end.

    Steps after the last fixation are the end's; what generation cannot choose has chance 0.

    over: `classes`: of each step, which sum to 1. `time`: softmax along the path, the defect of the reference's
        validation score, for parity with its numbers.
    """
    require_count("batch", batch)
    require_choice("over", over, ("classes", "time"))
    found: list[np.ndarray] = []
    training = model.training
    model.eval()
    try:
        for first in range(0, len(searches), batch):
            part = list(searches[first : first + batch])
            given = data.batch(part).to(next(model.parameters()).device)
            chances = _chances(model, given, over).double().cpu().numpy()
            for row, one in zip(chances, part, strict=True):
                count = len(data.gaze.scenes[one.scene].objects)
                steps = row[: len(one.path or ()) + 1]
                found.append(np.concatenate((steps[:, :count], steps[:, given.end : given.end + 1]), 1))
    finally:
        model.train(training)
    return found


def path_losses(chances: Sequence[np.ndarray], searches: Sequence[Search]) -> list[np.ndarray]:
    """-log p of each step that people took, the end last, in nats: float64 [T + 1] each, from `step_chances`."""
    found = []
    for one, steps in zip(chances, searches, strict=True):
        with np.errstate(divide="ignore"):
            found.append(-np.log([p[step] for p, step in zip(one, [*(steps.path or ()), -1], strict=True)]))
    return found


def overlap(chances: Sequence[np.ndarray], searches: Sequence[Search]) -> float:
    """Mean chance of the next fixation, ends left out: the paper's SIM."""
    return float(
        np.mean(
            [
                p[step]
                for one, s in zip(chances, searches, strict=True)
                for p, step in zip(one, s.path or (), strict=False)
            ]
        )
    )


def _chances(model: OAT, batch: OATBatch, over: str) -> torch.Tensor:
    logits = model(batch).float()
    if over == "time":
        # The reference's batch is one path, so its softmax runs over that path's steps alone.
        beyond = (batch.wanted == batch.pad)[..., None]
        return logits.masked_fill(beyond, -torch.inf).softmax(1).nan_to_num(0.0)
    first = exclude(logits[:, :1], batch.objects, first=True)
    return torch.cat((first, exclude(logits[:, 1:], batch.objects, first=False)), 1).softmax(-1)
