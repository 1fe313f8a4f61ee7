"""Draw tiny COCO: small scenes of COCO categories with boxes, masks and captions, in COCO's own format.

    python -m vlattn.assets.build_tiny_coco --artwork node_modules --out assets/tiny_coco

`val` is drawn with the artwork families the tiny LLaVA was trained on, `shift` with a family it has never seen. Image i
of `val` comes from the generator seeded [seed, 3, i], of `shift` from [seed, 4, i]; training draws from [seed, 1, step]
and [seed, 2, step], so the two never meet. The same artwork and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from vlattn.assets.reference_captions import reference_captions, visible_pixels
from vlattn.assets.scenes import INDEX, NAMES, SEEN_FAMILIES, SIZE, Scene, draw_scene, load_sprites

COUNTS = {"val": 480, "shift": 240}
FAMILIES = {"val": SEEN_FAMILIES, "shift": ("fluent",)}
STREAMS = {"val": 3, "shift": 4}
FIRST_IDS = {"val": 1, "shift": 100001}
LEAST_VISIBLE = 0.3
"""A scene with an object of which less than this can be seen is drawn again, so that labels are honest."""

MISLABELLED = (("tennis racket", "twemoji"),)
"""Artwork that does not show its category, and is not drawn here: this racket is a ball alone."""

JPEG: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": "4:4:4", "optimize": True}

LICENCES: dict[str, tuple[str, str]] = {
    "noto": ("Noto Emoji: Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "twemoji": ("Twemoji graphics: CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "fluent": ("Fluent Emoji: MIT License", "https://opensource.org/license/mit"),
}

COCO_CATEGORIES: dict[str, dict[int, str]] = {
    "person": {1: "person"},
    "vehicle": dict(enumerate(("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"), 2)),
    "outdoor": {10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    "animal": dict(
        enumerate(("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"), 16)
    ),
    "accessory": {27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    "sports": {
        **{34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
        **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    },
    "kitchen": {44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl"},
    "food": {
        **{52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot"},
        **{58: "hot dog", 59: "pizza", 60: "donut", 61: "cake"},
    },
    "furniture": {
        **{62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    },
    "electronic": {72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    "appliance": {78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator"},
    "indoor": {
        **{84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier"},
        **{90: "toothbrush"},
    },
}
"""COCO's 80 categories by supercategory, under their official ids."""

CATEGORY_IDS = {name: key for members in COCO_CATEGORIES.values() for key, name in members.items()}

Sprites = list[list[list[np.ndarray]]]


def load_honest_sprites(artwork: Path, families: tuple[str, ...]) -> Sprites:
    """`load_sprites` without the artwork in MISLABELLED."""
    sprites = load_sprites(artwork, families)
    for name, family in MISLABELLED:
        if family in families:
            del sprites[INDEX[name]][families.index(family)]
    return sprites


def is_honest(scene: Scene) -> bool:
    """Whether enough of every object can be seen to say that it is there."""
    whole = np.array([(o.alpha > 0.5).sum() for o in scene.objects])
    return bool((visible_pixels(scene) >= LEAST_VISIBLE * whole).all())


def draw(seed: int, split: str, index: int, sprites: Sprites) -> tuple[Scene, list[str]]:
    """The `index`-th scene of a split and its captions; further attempts append 1, 2, ... to the seed."""
    attempt = 0
    while True:
        rng = np.random.default_rng([seed, STREAMS[split], index, *([attempt] if attempt else [])])
        scene = draw_scene(rng, sprites)
        if is_honest(scene):
            return scene, reference_captions(rng, scene)
        attempt += 1


def instance(scene: Scene, number: int) -> dict[str, Any]:
    """The category, visible mask, box and area of one object, as COCO writes them."""
    coded = rle.encode(np.asfortranarray(scene.owner == number, dtype=np.uint8))
    return {
        "category_id": CATEGORY_IDS[NAMES[scene.objects[number].category]],
        "bbox": [int(v) for v in rle.toBbox(coded)],
        "area": int(rle.area(coded)),
        "iscrowd": 0,
        "segmentation": {"size": [SIZE, SIZE], "counts": coded["counts"].decode("ascii")},
    }


def header(split: str) -> dict[str, Any]:
    """What both files of a split begin with."""
    families = FAMILIES[split]
    names, urls = zip(*(LICENCES[family] for family in families), strict=True)
    return {
        "info": {
            "description": f"vlattn tiny COCO, {split}: scenes composed from emoji artwork ({' and '.join(families)})",
            "url": "",
            "version": "1.0",
            "year": 2026,
            "contributor": "vlattn; artwork as in `licenses`",
            "date_created": "2026",
        },
        "licenses": [{"id": 1, "name": "; ".join(names), "url": " ".join(urls)}],
    }


def categories() -> list[dict[str, Any]]:
    """The categories that have artwork, by ascending id."""
    rows = [
        {"supercategory": group, "id": key, "name": name}
        for group, members in COCO_CATEGORIES.items()
        for key, name in members.items()
        if name in NAMES
    ]
    return sorted(rows, key=lambda row: row["id"])


def build_split(out: Path, split: str, sprites: Sprites, count: int, seed: int) -> None:
    """Write `count` images and the two annotation files of one split below `out`."""
    folder = out / split
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.jpg"):
        old.unlink()
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index in range(count):
        scene, texts = draw(seed, split, index, sprites)
        image_id = FIRST_IDS[split] + index
        name = f"{image_id:012d}.jpg"
        Image.fromarray(np.rint(scene.image * 255).astype(np.uint8)).save(folder / name, **JPEG)
        size = {"width": SIZE, "height": SIZE}
        images.append({"id": image_id, "file_name": name, **size, "license": 1, "background": scene.background})
        for number in range(len(scene.objects)):
            key = 10 * image_id + number
            instances.append({"id": key, "image_id": image_id, **instance(scene, number)})
        captions += [{"id": 10 * image_id + n, "image_id": image_id, "caption": text} for n, text in enumerate(texts)]
    common = {**header(split), "images": images}
    _write(out / f"instances_{split}.json", {**common, "categories": categories(), "annotations": instances})
    _write(out / f"captions_{split}.json", {**common, "annotations": captions})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes((json.dumps(content, separators=(",", ":")) + "\n").encode("ascii"))


def build(artwork: Path, out: Path, seed: int = 7, counts: Mapping[str, int] = COUNTS) -> None:
    """Draw `counts` images per split from the artwork in the node_modules folder `artwork` and write them to `out`."""
    for split, count in counts.items():
        build_split(out, split, load_honest_sprites(artwork, FAMILIES[split]), count, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--artwork", type=Path, required=True, help="node_modules folder that holds the artwork packages"
    )
    parser.add_argument("--out", type=Path, default=Path("assets/tiny_coco"))
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    build(args.artwork, args.out, args.seed)


if __name__ == "__main__":
    main()
