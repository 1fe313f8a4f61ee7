"""Data sets by a short text: the train and the val part of what a command or a configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlattn.errors import InputError
from vlattn.probing.data.base import LabeledImages
from vlattn.probing.data.coco_presence import coco_presence, tiny_coco_presence
from vlattn.probing.data.csv_manifest import csv_manifest
from vlattn.probing.data.digits import digits
from vlattn.probing.data.image_folder import image_folder

FORMS = (
    '"digits", "digits:SIZE", "tiny-coco", "tiny-coco:shift", a folder with train/ and val/, a CSV file with a column '
    'split, or "INSTANCES.json::IMAGES" with a second such text for val'
)


@dataclass(frozen=True)
class NamedData:
    """The parts of a data set, without a transform, and the name that results give it (no folders of the machine)."""

    train: LabeledImages
    val: LabeledImages
    name: str

    @property
    def classes(self) -> list[str]:
        """K names, the same for both parts."""
        return self.train.classes


def named_data(text: str, val: str | None = None) -> NamedData:
    """The data set that a short text names.

    Args:
        text: "digits[:SIZE]" (scikit-learn's, 32 pixels by default); "tiny-coco[:shift]" (embedded, presence of
            categories); a folder with train/ and val/, each with one folder per class; a CSV file with the columns
            path, label and split, where split is train or val; or "INSTANCES.json::IMAGES", presence in COCO format.
        val: for COCO alone, the same form for the val part.

    Raises:
        InputError: an unknown form, parts whose classes differ, or a class without any image to train on.
    """
    coco = "::" in text
    if coco != (val is not None):
        wanted = "give INSTANCES.json::IMAGES of the val part, too" if coco else "leave it out: the data name their val"
        raise InputError(f"val: got {val!r} for the data {text!r}; {wanted}")
    if val is not None:
        found = NamedData(_coco(text), _coco(val), Path(text.partition("::")[0]).name)
    else:
        found = _embedded(text) or _on_disk(text)
    _check(found)
    return found


def _embedded(text: str) -> NamedData | None:
    name, _, setting = text.partition(":")
    if name == "digits":
        if setting and not setting.isdecimal():
            raise InputError(f"data: got {text!r}; give digits, or digits:SIZE with pixels per side, such as digits:64")
        size = int(setting or 32)
        return NamedData(digits(size, "train"), digits(size, "val"), f"digits:{size}")
    if name == "tiny-coco":
        split = setting or "val"
        if split not in ("val", "shift"):
            raise InputError(f"data: got {text!r}; give tiny-coco, or tiny-coco:shift")
        parts = tiny_coco_presence("train", split=split), tiny_coco_presence("val", split=split)
        return NamedData(*parts, text.removesuffix(":val"))
    return None


def _on_disk(text: str) -> NamedData:
    place = Path(text)
    if place.is_dir():
        for part in ("train", "val"):
            if not (place / part).is_dir():
                raise InputError(f"data: {text!r} has no folder {part}; put one folder per class into train/ and val/")
        return NamedData(image_folder(place / "train"), image_folder(place / "val"), place.resolve().name)
    if place.is_file() and place.suffix.lower() == ".csv":
        return NamedData(csv_manifest(place, split="train"), csv_manifest(place, split="val"), place.name)
    raise InputError(f"data: {text!r} is none that is known or on this machine; give {FORMS}")


def _coco(text: str) -> LabeledImages:
    instances, separator, images = text.partition("::")
    if not separator or not instances or not images:
        raise InputError(f"data: got {text!r}; give INSTANCES.json::IMAGES, the annotations and the folder of images")
    return coco_presence(instances, images)


def _check(data: NamedData) -> None:
    """Refuse parts that one head cannot serve, and classes that no head can learn."""
    train, val = data.train, data.val
    if len(train.classes) != len(val.classes):
        raise InputError(
            f"data: {data.name} has {len(train.classes)} classes in train and {len(val.classes)} in val; give both "
            "parts the same classes"
        )
    differ = next((pair for pair in zip(train.classes, val.classes, strict=True) if pair[0] != pair[1]), None)
    if differ is not None:
        raise InputError(
            f"data: {data.name} has the class {differ[0]!r} in train where val has {differ[1]!r}; name them alike"
        )
    shown = train.labels.bool().any(0) if train.multi_label else train.labels.bincount(minlength=len(train.classes)) > 0
    empty = [name for name, there in zip(train.classes, shown.tolist(), strict=True) if not there]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise InputError(
            f"data: no image of {data.name} train shows the class {empty[0]!r}{more}; add one, or take the class out"
        )
