"""Top-k accuracy and mean average precision, as sums that batches and processes add up, or from all scores."""

from __future__ import annotations

import torch

from vlattn.errors import InputError


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """How many images have their label among the k highest logits.

    Args:
        logits: [..., B, K]; leading dimensions are heads that saw the same images. An image for which a logit is not
            finite counts as wrong, so that a head that diverged does not score by chance.
        labels: int64 [B].
        k: at least 1; more than K classes is all of them.

    Returns:
        int64 [...].
    """
    best = logits.topk(min(k, logits.shape[-1]), -1).indices  # [..., B, k]
    hit = (best == labels[:, None]).any(-1) & logits.isfinite().all(-1)
    return hit.sum(-1)


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Average precision of each class: the sum over thresholds of precision times the gain in recall.

    Images with the same score pass a threshold together; nothing is interpolated. This is scikit-learn's
    `average_precision_score`.

    Args:
        scores: [..., B, K], higher means present.
        targets: [B, K], 1 where the class is present, else 0.

    Returns:
        fp64 [..., K], from 0 to 1; NaN for classes that no image has and for classes with a score that is NaN.

    Raises:
        InputError: shapes differ, or targets are neither 0 nor 1.
    """
    if targets.ndim != 2 or scores.shape[-2:] != targets.shape or len(targets) == 0:
        raise InputError(
            f"targets: got {list(targets.shape)} for scores {list(scores.shape)}; give [B, K] for scores [..., B, K], "
            "with B of at least 1"
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise InputError("targets: got values other than 0 and 1; give 1 where a class is present and 0 elsewhere")
    down, order = scores.double().transpose(-1, -2).contiguous().sort(-1, descending=True)  # [..., K, B]
    present = targets.double().T.expand(down.shape).gather(-1, order)
    hits = present.cumsum(-1)
    # The last place that has the same score: all up to it are taken together.
    end = torch.searchsorted(-down, -down, right=True) - 1
    precision = hits.gather(-1, end) / (end + 1)
    found = (precision * present).sum(-1) / present.sum(-1)
    return torch.where(down.isnan().any(-1), torch.full_like(found, float("nan")), found)


def mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean of `average_precision` over the classes that some image has, fp64 [...]; NaN if a score is NaN.

    Raises:
        InputError: no image has any class.
    """
    classes = targets.bool().any(0)
    if not bool(classes.any()):
        raise InputError("targets: no image has any class; give labels with at least one")
    return average_precision(scores, targets)[..., classes].mean(-1)
