"""Augmentation that depends on the image and the view alone, not on order, workers, or where a run began again."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from vlattn.probing.train_seed import seeded


class SeededView(Dataset[tuple[Any, Any]]):
    """A dataset whose item i is drawn under a seed of (seed, i, view): always the same view of the image."""

    def __init__(self, dataset: Any, view: int, seed: int) -> None:
        self.dataset, self.view, self.seed = dataset, view, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with seeded(self.seed, f"image {index}, view", self.view):
            return self.dataset[index]
