"""What tells a dataset under a transform from another, without reading all of it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.data.seeding import SeededView


def fingerprint(dataset: Any, seed: int = 0) -> dict[str, Any]:
    """Plain data that differ where two datasets, or their transforms, differ.

    Args:
        dataset: items (pixels [3, H, W], label), with `classes` and `multi_label`.
        seed: of the draw of random transforms.

    Returns:
        items: how many; classes: their number; names: SHA-256 of item names, labels and classes, None where the dataset
        has no `identity()`; files: SHA-256 of the sizes of all image files, None where there are none or the dataset
        has no `file_sizes()`; sample: SHA-256 of the transformed pixels and labels of the first, middle and last item.
        Images written anew are seen by their sizes, which pictures that are compressed differently share by chance
        only; one of the others that keeps its name and its size to the byte goes unseen.

    Raises:
        InputError: the dataset is empty, or its items are no tensors.
    """
    count = len(dataset)
    if count == 0:
        raise InputError("dataset: it is empty; give at least one image")
    view, sample = SeededView(dataset, 0, seed), hashlib.sha256()
    for index in sorted({0, count // 2, count - 1}):
        pixels, label = view[index]
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 3:
            shown = f"shape {list(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise InputError(
                f"dataset: item {index} is {shown} where pixels [3, H, W] are due; give the dataset a transform, such "
                "as backbone.transform(train=False)"
            )
        for tensor in (pixels, torch.as_tensor(label)):
            sample.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            sample.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    identity, file_sizes = getattr(dataset, "identity", None), getattr(dataset, "file_sizes", None)
    return {
        "items": count,
        "classes": len(dataset.classes),
        "names": None if identity is None else identity(),
        "files": None if file_sizes is None else file_sizes(),
        "sample": sample.hexdigest(),
    }
