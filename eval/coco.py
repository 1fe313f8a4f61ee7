"""Reading COCO-format annotation files, through pycocotools."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from vlattn.errors import InputError


@dataclass(frozen=True)
class ImageObjects:
    """One image and the distinct categories in it, in order of first appearance in the annotation list."""

    image_id: int
    file_name: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class CocoSet:
    """What scoring needs of a COCO file.

    image_ids ascend; objects: image id -> distinct category names in order of first appearance (crowds and small areas
    included); captions: image id -> reference captions, None when no caption file was read; sha256: role -> digest of
    the file's bytes.
    """

    image_ids: tuple[int, ...]
    file_names: Mapping[int, str]
    categories: tuple[str, ...]
    objects: Mapping[int, tuple[str, ...]]
    captions: Mapping[int, tuple[str, ...]] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def image_objects(self) -> list[ImageObjects]:
        """Every image with its objects, by ascending image id."""
        return [ImageObjects(i, self.file_names[i], self.objects[i]) for i in self.image_ids]


def raw_coco(instances: str | Path) -> COCO:
    """The pycocotools object of an instances file: boxes, areas and sizes, which a CocoSet leaves out."""
    return _load(instances, "instances", ("images", "annotations", "categories"))[0]


def read_coco(instances: str | Path, captions: str | Path | None = None) -> CocoSet:
    """Read an instances file and, where given, the captions file of the same images.

    Raises InputError for a file that is missing, is not JSON, lacks a part, or has ids that are not integers.
    """
    coco, digest = _load(instances, "instances", ("images", "annotations", "categories"))
    image_ids = tuple(sorted(coco.imgs))
    names = {key: category.get("name") for key, category in coco.cats.items()}
    if not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"instances={str(instances)!r} has a category without a name; give every category one")
    try:
        objects = {
            image_id: tuple(dict.fromkeys(names[a["category_id"]] for a in coco.imgToAnns.get(image_id, ())))
            for image_id in image_ids
        }
    except KeyError as missing:
        raise InputError(
            f"instances={str(instances)!r} annotates category {missing}, which `categories` does not list; add it there"
        ) from None
    file_names = {i: str(coco.imgs[i].get("file_name", "")) for i in image_ids}
    sha256 = {"instances": digest}
    texts = None
    if captions is not None:
        spoken, sha256["captions"] = _load(captions, "captions", ("images", "annotations"))
        try:
            texts = {i: tuple(str(a["caption"]) for a in anns) for i, anns in spoken.imgToAnns.items()}
        except KeyError:
            raise InputError(
                f"captions={str(captions)!r} has annotations without `caption`; give a COCO captions file"
            ) from None
    return CocoSet(image_ids, file_names, tuple(names.values()), objects, texts, sha256)


def _load(path: str | Path, argument: str, parts: tuple[str, ...]) -> tuple[COCO, str]:
    shown = f"{argument}={str(path)!r}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}); give a COCO annotation file") from None
    try:
        dataset: Any = json.loads(content)
    except ValueError:
        raise InputError(f"{shown} is not JSON; give a COCO annotation file") from None
    for part in parts:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(part), list):
            raise InputError(f"{shown} has no list `{part}`; give a COCO {argument} file")
    coco = COCO()
    coco.dataset = dataset
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by printing
            if "categories" in parts:
                coco.createIndex()
            else:  # a captions file may carry `categories` that its annotations do not use
                coco.dataset = {key: dataset[key] for key in parts}
                coco.createIndex()
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{shown} is not in COCO format (an entry lacks {error}); give a COCO {argument} file"
        ) from None
    odd = [i for i in [*coco.imgs, *coco.imgToAnns] if type(i) is not int]
    if odd:
        raise InputError(f"{shown} has the image id {odd[0]!r}, which is not an integer; write ids as integers")
    stray = coco.imgToAnns.keys() - coco.imgs.keys()
    if stray:
        raise InputError(f"{shown} annotates image {min(stray)}, which `images` does not list; add it there")
    return coco, hashlib.sha256(content).hexdigest()
