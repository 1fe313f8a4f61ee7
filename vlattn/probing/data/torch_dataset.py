"""Any torch dataset of (image, label), such as torchvision's CIFAR100, under the names that probing uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from vlattn.errors import InputError
from vlattn.probing.data.base import Transform


class TorchImages(Dataset[tuple[Any, torch.Tensor]]):
    """A torch dataset with `classes`, `multi_label`, and labels as tensors."""

    def __init__(self, dataset: Any, classes: Sequence[str], transform: Transform | None, multi_label: bool) -> None:
        self.dataset, self.classes, self.transform = dataset, list(classes), transform
        self.multi_label = multi_label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        image, label = self.dataset[index]
        label = torch.as_tensor(label, dtype=torch.float32 if self.multi_label else torch.int64)
        if tuple(label.shape) != ((len(self.classes),) if self.multi_label else ()):
            wanted = f"{len(self.classes)} zeros and ones" if self.multi_label else "one integer"
            raise InputError(f"dataset: item {index} has a label of shape {list(label.shape)}; give {wanted}")
        if not self.multi_label and not 0 <= int(label) < len(self.classes):
            raise InputError(f"dataset: item {index} has the label {int(label)}, outside {len(self.classes)} classes")
        return (image if self.transform is None else self.transform(image)), label


def from_torch(
    dataset: Any,
    transform: Transform | None = None,
    *,
    classes: Sequence[str] | None = None,
    multi_label: bool = False,
) -> TorchImages:
    """Wrap a torch dataset of (image, int), or of (image, K zeros and ones) where `multi_label`.

    Args:
        dataset: with a length and items by position.
        transform: applied to the dataset's images; leave it out where the dataset has its own.
        classes: class names in label order; default the dataset's `classes`.

    Raises:
        InputError: the dataset has no length, or no class names are known.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"dataset: {type(dataset).__name__} has no length or positions; give a map-style dataset")
    names = getattr(dataset, "classes", None) if classes is None else classes
    if not names:
        raise InputError(
            f"classes: {type(dataset).__name__} has no `classes`; give their names, as in "
            "from_torch(dataset, classes=[...])"
        )
    return TorchImages(dataset, [str(name) for name in names], transform, multi_label)


def as_labeled(dataset: Any) -> Any:
    """The dataset itself where it has `classes` and `multi_label`, else wrapped by `from_torch`."""
    return dataset if hasattr(dataset, "classes") and hasattr(dataset, "multi_label") else from_torch(dataset)
