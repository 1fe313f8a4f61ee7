"""Training sets of few images per class, and settings that give them as many updates as the whole set gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.settings import ProbeSettings

SHARES = (0.01, 0.1)
SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


def stratified_subset(labels: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """A share of each class, rounded to whole images and at least one.

    The same seed draws nested sets: the smaller share is part of the larger.

    Args:
        labels: int64 [N].
        share: above 0, at most 1.

    Returns:
        int64 [n], indices of the images, ascending.

    Raises:
        InputError: labels are multi-label, or the share is out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"share: got {share!r}; give a number above 0 and up to 1, such as 0.01")
    return _first_of_each(labels, seed, lambda label, size: max(1, int(share * size + 0.5)))


def shots_subset(labels: torch.Tensor, shots: int, seed: int = 0) -> torch.Tensor:
    """`shots` images of each class that occurs; nested over `shots` for the same seed, ascending int64 indices.

    Raises:
        InputError: labels are multi-label, or a class has fewer images.
    """
    require_count("shots", shots)

    def count(label: int, size: int) -> int:
        if size < shots:
            raise InputError(f"shots: got {shots}, but class {label} has {size} images; give at most {size}")
        return shots

    return _first_of_each(labels, seed, count)


def comparable_settings(settings: ProbeSettings, full: int, subset: int, batch: int) -> tuple[ProbeSettings, int]:
    """Settings and batch under which `subset` images get about as many updates as `full` images do under `settings`.

    Epochs, warm-up, first possible stop and the distance of evaluations grow alike. A batch that is larger than the
    subset becomes the subset, and `accumulate` then 1.

    Args:
        settings: of the run on all images.
        full, subset: numbers of images.
        batch: images of one update in that run.

    Returns:
        The settings, and the images of one update to give the source (divide by `accumulate` for its batches).
    """
    for name, value in (("full", full), ("subset", subset), ("batch", batch)):
        require_count(name, value)
    if subset > full or batch > full:
        raise InputError(f"subset, batch: got {subset} and {batch} of {full} images; give at most {full}")
    small = min(batch, subset)
    growth = (full // batch) / (subset // small)
    epochs = max(1, round(settings.epochs * growth))
    changes: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": settings.warmup_epochs * epochs / settings.epochs,
        "stop_from": round(settings.stop_from * epochs / settings.epochs),
        "eval_every": max(1, round(settings.eval_every * epochs / settings.epochs)),
    }
    if small < batch:
        changes["accumulate"] = 1
    return dataclasses.replace(settings, **changes), small


def _first_of_each(labels: torch.Tensor, seed: int, count: Callable[[int, int], int]) -> torch.Tensor:
    """The first count(class, images) of each class in one seeded order of all images."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0:
        raise InputError(
            f"labels: got {labels.dtype} {list(labels.shape)}; subsets by class need int64 labels [N], "
            "one for each image"
        )
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    found, sizes = labels.unique(return_counts=True)
    parts = zip(found.tolist(), by_class.split(sizes.tolist()), strict=True)
    return torch.cat([part[: count(label, len(part))] for label, part in parts]).sort().values
