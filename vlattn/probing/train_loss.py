"""The loss that a bank of heads is trained with; the labels decide which, and which metric goes with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.head_bank import BankOut
from vlattn.probing.poolers.acmil_loss import branch_similarity
from vlattn.probing.poolers.branches import BranchLosses

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


def training_losses(out: BankOut, labels: torch.Tensor, losses: BranchLosses | None = None) -> dict[str, torch.Tensor]:
    """What each head is trained with, and what that is the sum of.

    Args:
        out: what the bank gave.
        labels: as for `bank_losses`.
        losses: the bank's `branch_losses`.

    Returns:
        {"total": [R]}; with losses of branches also "bag", "branch" and "div", before weights, as
        `vlattn.probing.poolers.acmil_loss.acmil_loss` has them.
    """
    bag = bank_losses(out.logits, labels)
    if losses is None or out.attention is None:
        return {"total": bag}
    branch = torch.zeros_like(bag)
    if out.branch_logits is not None:
        heads = out.branch_logits.transpose(1, 2).flatten(0, 1)  # [R M, B, K]
        branch = bank_losses(heads, labels).view(len(bag), -1).mean(1)
    div = torch.stack([branch_similarity(maps) for maps in out.attention])
    total = bag + losses.w_branch * branch + losses.w_div * div
    return {"total": total, "bag": bag, "branch": branch, "div": div}


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
