"""Which COCO categories an image shows, as targets with any number of labels."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pycocotools.coco import COCO

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.image_file import read_rgb
from vlattn.probing.data.base import LabeledImages, Transform, presence

Part = Literal["train", "val"]


def coco_presence(
    instances: str | Path,
    images: str | Path,
    transform: Transform | None = None,
    *,
    image_ids: Iterable[int] | None = None,
    crowds: bool = True,
) -> LabeledImages:
    """Presence of every category in every image of a COCO instances file.

    Args:
        instances: the annotation file (JSON), read through pycocotools.
        images: the folder of its images.
        transform: from a PIL image to what the model takes.
        image_ids: take these images alone; default all.
        crowds: whether an annotation of a crowd counts as presence.

    Returns:
        Items by ascending image id, images without annotations included; labels float32 [n, K] of zeros and ones, K
        categories by ascending category id.

    Raises:
        InputError: the file cannot be read, is not in COCO format, or lacks an image that is asked for.
    """
    coco = _read(instances)
    shown = f"instances={str(instances)!r}"
    column = {category: number for number, category in enumerate(sorted(coco.cats))}
    ids = sorted(coco.imgs) if image_ids is None else sorted(set(image_ids))
    missing = [one for one in ids if one not in coco.imgs]
    if missing:
        raise InputError(f"image_ids: {shown} has no image {missing[0]}; give ids of its `images`")
    if not ids:
        raise InputError(f"image_ids: no image of {shown} is left; give at least one")
    found = []
    for one in ids:
        annotations = [a for a in coco.imgToAnns.get(one, ()) if crowds or not a.get("iscrowd", 0)]
        stray = [a["category_id"] for a in annotations if a["category_id"] not in column]
        if stray:
            raise InputError(f"{shown} annotates category {stray[0]}, which `categories` does not list; add it there")
        found.append({column[a["category_id"]] for a in annotations})
    files = [coco.imgs[one]["file_name"] for one in ids]
    return LabeledImages(
        [str(Path(images, file)) for file in files],
        read_rgb,
        names=files,
        labels=presence(found, len(column)),
        classes=[coco.cats[category]["name"] for category in column],
        transform=transform,
    )


def tiny_coco_presence(part: Part, transform: Transform | None = None, *, split: str = "val") -> LabeledImages:
    """Presence of the categories of tiny COCO, which is embedded; a hash of the image id parts `train` from `val`.

    Args:
        part: `train`, three images of four, or `val`, the others.
        transform: from a PIL image of 96 x 96 to what the model takes.
        split: of tiny COCO: `val`, or `shift`, drawn in another artwork family. Either is parted the same way.
    """
    if part not in ("train", "val"):
        raise InputError(f"part: got {part!r}; give 'train' or 'val'")
    files = tiny_coco(split)
    ids = [one for one in _read(files.instances).imgs if part_of(one) == part]
    return coco_presence(files.instances, files.images, transform, image_ids=ids)


def part_of(image_id: int) -> Part:
    """The part that an image of tiny COCO belongs to: those whose hash is divisible by 4 are held out."""
    return "train" if zlib.crc32(f"vlattn/probing/{image_id}".encode()) % 4 else "val"


def _read(instances: str | Path) -> COCO:
    shown = f"instances={str(instances)!r}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by printing
            coco = COCO(str(instances))
        complete = {"images", "annotations", "categories"} <= coco.dataset.keys()
        named = all("file_name" in image for image in coco.imgs.values()) and all(
            "name" in c for c in coco.cats.values()
        )
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}); give a COCO annotation file") from None
    except (ValueError, AssertionError, AttributeError):
        raise InputError(f"{shown} is not a JSON object; give a COCO annotation file") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{shown} is not in COCO format (an entry lacks {error}); give an instances file") from None
    if not complete or not named:
        raise InputError(f"{shown} lacks images with file_name, annotations or categories; give an instances file")
    return coco
