"""Splits of Hugging Face `datasets`, taken by what they offer: the package itself is not imported."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.image_file import read_rgb
from vlattn.probing.data.base import LabeledImages, Transform, choose_classes, presence


def from_hf_datasets(
    dataset: Any,
    transform: Transform | None = None,
    *,
    image: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabeledImages:
    """One split of a Hugging Face dataset.

    Args:
        dataset: a map-style `datasets.Dataset`, or anything with `features`, a length, rows as dicts by position and
            columns by name.
        transform: from a PIL image to what the model takes.
        image: the column of images; default the only one of type Image.
        label: the column of labels; default the only one of type ClassLabel, or of lists of ClassLabel (any number of
            labels), or else the one called `label`.
        classes: class names in label order, for columns of plain numbers or words; default the values there are,
            sorted. Columns of ClassLabel bring their own.

    Returns:
        Items in the dataset's order; labels int64, or float32 [n, K] of presence. Images are decoded when asked for.

    Raises:
        InputError: the columns cannot be told apart, or a row has no label.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, dict) or not hasattr(dataset, "__len__"):
        splits = ", ".join(map(repr, dataset)) if isinstance(dataset, dict) else ""
        hint = f"dataset[SPLIT] with one of {splits}" if splits else "a split that is loaded without streaming"
        raise InputError(f"dataset: {type(dataset).__name__} has no rows with `features`; give {hint}")
    images = [name for name, feature in features.items() if _kind(feature) == "Image"]
    image = _column("image", image, images, list(features), "of type Image")
    labeled = [name for name, feature in features.items() if _class_label(feature) is not None]
    if not labeled and "label" in features:
        labeled = ["label"]
    label = _column("label", label, labeled, list(features), "of type ClassLabel")
    values = list(dataset[label])
    several = _element(features[label]) is not None
    _require_labels(label, values)
    rows: list[list[Any]] = [list(value) if several else [value] for value in values]
    class_label = _class_label(features[label])
    if class_label is None:
        known = choose_classes((str(one) for row in rows for one in row), classes, f"the column {label!r}")
        index = {name: number for number, name in enumerate(known)}
        indices = [[index[str(one)] for one in row] for row in rows]
    else:
        known = list(class_label.names)
        if classes is not None and list(classes) != known:
            raise InputError(f"classes: the column {label!r} brings its own {len(known)} classes; leave classes out")
        indices = [[int(one) for one in row] for row in rows]
        _require_range(label, indices, len(known))
    origin = getattr(dataset, "_fingerprint", "")
    return LabeledImages(
        range(len(values)),
        ImageColumn(dataset, image),
        names=[f"{origin}/{image}/{row}" for row in range(len(values))],
        labels=presence(indices, len(known)) if several else torch.tensor([one for (one,) in indices]),
        classes=known,
        transform=transform,
    )


@dataclass(frozen=True)
class ImageColumn:
    """Reads the image of a row: decoded, as the bytes or path that undecoded columns hold, or a path alone."""

    dataset: Any
    column: str

    def __call__(self, row: int) -> Image.Image:
        value = self.dataset[row][self.column]
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if isinstance(value, dict) and value.get("bytes") is not None:
            return Image.open(io.BytesIO(value["bytes"])).convert("RGB")
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str | Path):
            raise InputError(
                f"image: row {row} of the column {self.column!r} holds {type(value).__name__}, not an image; name the "
                "column of images"
            )
        return read_rgb(path)


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _element(feature: Any) -> Any:
    """What a list feature lists; None for other features."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if _kind(feature) in ("Sequence", "List", "LargeList") else None


def _class_label(feature: Any) -> Any:
    """The ClassLabel that a feature is, or lists; None for others."""
    inner = _element(feature)
    found = feature if inner is None else inner
    return found if _kind(found) == "ClassLabel" else None


def _column(argument: str, given: str | None, found: list[str], columns: list[str], what: str) -> str:
    shown = ", ".join(map(repr, columns))
    if given is not None:
        if given not in columns:
            raise InputError(f"{argument}: the dataset has no column {given!r}; choose one of {shown}")
        return given
    if len(found) != 1:
        those = f"several columns {what} ({', '.join(map(repr, found))})" if found else f"no column {what}"
        raise InputError(f"{argument}: the dataset has {those}; name one of {shown}")
    return found[0]


def _require_labels(label: str, values: list[Any]) -> None:
    for row, value in enumerate(values):
        if value is None:
            raise InputError(f"label: row {row} of the column {label!r} has none; take such rows out first")


def _require_range(label: str, indices: list[list[int]], classes: int) -> None:
    for row, found in enumerate(indices):
        if not all(0 <= one < classes for one in found):
            raise InputError(
                f"label: row {row} of the column {label!r} has {found}, outside the {classes} classes (test splits "
                "often hide labels as -1); choose a split with labels"
            )
