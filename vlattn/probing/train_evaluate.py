"""How well a bank of heads does on held-out images."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vlattn.errors import InputError
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.metrics import mean_average_precision, topk_correct
from vlattn.probing.train_loss import bank_losses
from vlattn.probing.train_world import World


@torch.no_grad()
def evaluate_bank(
    bank: HeadBank, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World, autocast: torch.autocast
) -> dict[str, list[float]]:
    """Loss and metrics of each head over all batches of all processes, in eval mode.

    Returns:
        {"loss": [R], and either "top1" and "top5" or "map", in percent}.

    Raises:
        InputError: there are no images.
    """
    bank.eval()
    sums, multi = torch.zeros(4, bank.copies, device=world.device), False
    scores, targets = [], []
    for tokens, labels in batches:
        with autocast:
            logits = bank(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        multi = labels.ndim == 2
        sums[0] += len(labels)
        sums[1] += bank_losses(logits, labels) * len(labels)
        if multi:
            scores.append(logits.transpose(0, 1).cpu())  # [B, R, K]
            targets.append(labels.cpu())
        else:
            sums[2] += topk_correct(logits, labels, 1)
            sums[3] += topk_correct(logits, labels, 5)
    images, loss, top1, top5 = world.add(sums)
    if not images[0]:
        raise InputError("val: it gave no images; give a source with at least one")
    found = {"loss": (loss / images).tolist()}
    if not multi:
        return found | {"top1": (100 * top1 / images).tolist(), "top5": (100 * top5 / images).tolist()}
    every = world.join(torch.cat(scores)).transpose(0, 1)
    return found | {"map": (100 * mean_average_precision(every, world.join(torch.cat(targets)))).tolist()}
