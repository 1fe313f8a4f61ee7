"""The loss that a bank of heads is trained with; the labels decide which, and which metric goes with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from vlattn.errors import InputError

Metric = Literal["top1", "map"]


def bank_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each head, fp32 or finer.

    Args:
        logits: [R, B, K].
        labels: int64 [B] for cross-entropy without smoothing, or [B, K] of 0 and 1 for binary cross-entropy, the mean
            over images and classes.

    Returns:
        [R].
    """
    heads, _, classes = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(heads), reduction="none")
    else:
        wanted = labels.to(logits.dtype).expand(heads, -1, classes)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return each.view(heads, -1).mean(1)


def check_labels(labels: torch.Tensor, classes: int) -> Metric:
    """The metric that goes with labels: top1 for int64 [B], map for multi-label [B, K].

    Raises:
        InputError: neither, or labels beyond the number of classes.
    """
    if labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise InputError(f"classes: got {classes}, but labels go from {low} to {high}; give at least {high + 1}")
        return "top1"
    if labels.ndim == 2 and labels.shape[1] == classes:
        return "map"
    raise InputError(
        f"labels: got {labels.dtype} {list(labels.shape)} for {classes} classes; give int64 [B], or [B, {classes}] of "
        "0 and 1 for images with several labels"
    )
