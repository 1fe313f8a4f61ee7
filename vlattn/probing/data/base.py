"""Images with labels: what every maker in this folder returns, and what the token cache takes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from vlattn.errors import InputError

Transform = Callable[[Image.Image], Any]
Source = TypeVar("Source")


class LabeledImages(Dataset[tuple[Any, torch.Tensor]]):
    """Images with one label each, or with any number of labels each.

    An item is (image, label): an RGB image after `transform`, or the PIL image where there is none; the label as int64
    [] or, where images have any number of labels, float32 [K] of zeros and ones.

    Args:
        sources: what `read` makes an image of, one per item.
        read: from a source to an RGB image. It must survive pickling for loaders with worker processes.
        names: what tells the items apart wherever the data lie, such as paths relative to their folder.
        labels: class indices, int64 [n], or presence, float32 [n, K].
        classes: K names; a label is a position in this list.
        transform: from a PIL image to what the model takes, such as `backbone.transform(train=False)`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        read: Callable[[Source], Image.Image],
        *,
        names: Sequence[str],
        labels: torch.Tensor,
        classes: Sequence[str],
        transform: Transform | None = None,
    ) -> None:
        self.sources, self.read, self.transform = sources, read, transform
        self.names, self.labels, self.classes = list(names), labels, list(classes)
        self._sizes: list[str] = []  # of one digest, once it is known; shared with the same images elsewhere

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        image = self.read(self.sources[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def with_transform(self, transform: Transform | None) -> LabeledImages:
        """The same images under another transform, as for training and for evaluation."""
        same = LabeledImages(
            self.sources,
            self.read,
            names=self.names,
            labels=self.labels,
            classes=self.classes,
            transform=transform,
        )
        same._sizes = self._sizes
        return same

    def subset(self, indices: Iterable[int]) -> LabeledImages:
        """The items at these positions, in this order, with the classes of the whole set."""
        chosen = [int(i) for i in indices]
        return LabeledImages(
            [self.sources[i] for i in chosen],
            self.read,
            names=[self.names[i] for i in chosen],
            labels=self.labels[chosen],
            classes=self.classes,
            transform=self.transform,
        )

    def identity(self) -> str:
        """SHA-256 of names, labels and classes; neither pixels nor the transform are in it. See also `file_sizes`."""
        digest = hashlib.sha256()
        for texts in (self.names, self.classes):
            digest.update("\0".join([str(len(texts)), *texts]).encode(errors="surrogateescape"))
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def file_sizes(self) -> str | None:
        """SHA-256 of the sizes in bytes of all image files, in order; None where images come from elsewhere.

        Sizes rather than times of change, which differ wherever the same files were copied to. Looked up once, as a
        million files take seconds on a local disk and minutes over a network.
        """
        if not all(isinstance(source, str) for source in self.sources):
            return None
        if not self._sizes:
            digest = hashlib.sha256()
            for source in self.sources:
                digest.update(f"{_size(str(source))},".encode())
            self._sizes.append(digest.hexdigest())
        return self._sizes[0]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # reading it says what is wrong


def choose_classes(found: Iterable[str], given: Sequence[str] | None, where: str) -> list[str]:
    """The classes of a data set in label order: as given, or the found ones sorted, integers by value.

    Args:
        found: class names in the data, repeats allowed.
        given: what the caller wants, such as the classes of the training part. It may name classes without images.
        where: what holds the data, for messages.

    Raises:
        InputError: a class is given twice, or the data hold one that is not given.
    """
    there = set(found)
    if given is None:
        numbers = all(name.isascii() and name.isdigit() for name in there)
        return sorted(there, key=lambda name: (int(name), name) if numbers else (0, name))
    twice = [name for name, times in Counter(given).items() if times > 1]
    if twice:
        raise InputError(f"classes: {twice[0]!r} is given more than once; name every class once")
    unknown = sorted(there - set(given))
    if unknown:
        raise InputError(
            f"classes: {where} holds the class {unknown[0]!r}, which is not among the {len(given)} classes given; "
            "add it, or leave classes out"
        )
    return list(given)


def presence(rows: Sequence[Iterable[int]], classes: int) -> torch.Tensor:
    """Lists of class indices, one per image, as float32 [n, K] of zeros and ones."""
    found = torch.zeros(len(rows), classes)
    for row, present in zip(found, rows, strict=True):
        row[list(present)] = 1.0
    return found
