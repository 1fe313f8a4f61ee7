"""Images in one folder per class, the layout of ImageNet and of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from vlattn.errors import InputError
from vlattn.image_file import read_rgb
from vlattn.probing.data.base import LabeledImages, Transform, choose_classes

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(
    path: str | Path, transform: Transform | None = None, *, classes: Sequence[str] | None = None
) -> LabeledImages:
    """The images below `path`, where the first folder on the way names the class.

    Args:
        path: folder with one folder per class; hidden files and folders are passed over.
        transform: from a PIL image to what the model takes.
        classes: class names in label order, such as those of the training part; default the folders' names, sorted.
            A class given here may lack a folder.

    Returns:
        Items ordered by class folder, then by path; labels int64.

    Raises:
        InputError: there are no class folders, one of them holds no image, or one is not among `classes`.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"path: {str(path)!r} is no folder; give a folder with one folder of images per class")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise InputError(f"path: {str(path)!r} holds no folders; put images in one folder per class")
    known = choose_classes(folders, classes, repr(str(path)))
    index = {name: label for label, name in enumerate(known)}
    names: list[str] = []
    labels: list[int] = []
    for folder in folders:
        inside = _images(root, folder)
        if not inside:
            raise InputError(
                f"path: the class folder {str(root / folder)!r} holds no image ({', '.join(SUFFIXES)}); "
                "put some there, or remove the folder"
            )
        names += inside
        labels += [index[folder]] * len(inside)
    return LabeledImages(
        [str(root / name) for name in names],
        read_rgb,
        names=names,
        labels=torch.tensor(labels),
        classes=known,
        transform=transform,
    )


def _images(root: Path, folder: str) -> list[str]:
    """Paths relative to `root`, with forward slashes everywhere."""
    found = []
    for place, inner, files in os.walk(root / folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [Path(place, name).relative_to(root).as_posix() for name in images]
    return sorted(found)
