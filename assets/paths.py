"""Where the embedded data and model lie, in a checkout as in an installed package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vlattn.errors import InputError

SPLITS = ("val", "shift")


@dataclass(frozen=True)
class TinyCoco:
    """One split: the folder of images and the two COCO annotation files."""

    images: Path
    instances: Path
    captions: Path


def tiny_coco(split: str = "val") -> TinyCoco:
    """The files of a split of tiny COCO: `val`, or `shift`, drawn in an artwork family that training never saw."""
    if split not in SPLITS:
        raise InputError(f"split={split!r} is no split of tiny COCO; choose one of {', '.join(SPLITS)}")
    root = _assets() / "tiny_coco"
    return TinyCoco(root / split, root / f"instances_{split}.json", root / f"captions_{split}.json")


def tiny_llava() -> Path:
    """The folder of the tiny LLaVA, for `from_pretrained`."""
    return _assets() / "tiny_llava"


def tiny_gaze() -> Path:
    """The gaze file of the simulated searches over scenes of tiny COCO and shelves of their objects."""
    return _assets() / "tiny_gaze" / "gaze.json"


def _assets() -> Path:
    # A namespace package has no single folder of its own, but each of its files has one.
    return Path(str(files("vlattn.assets").joinpath("coco_emoji.json"))).parent
