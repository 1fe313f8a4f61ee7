"""A small training set for everybody: questions about a third of tiny COCO `val`, which evaluations then leave out.

Fresh scenes would need the artwork they are composed of; images of `val` are already here. Which of them train is
decided by a hash of the image id, so that the two parts never meet and never change.
"""

from __future__ import annotations

import json
import random
import zlib

import numpy as np

from vlattn.assets.language import (
    DETAIL_PROMPTS,
    NUMBERS,
    SHORT_PROMPTS,
    detailed_caption,
    grouped,
    plural,
    short_caption,
    yes_no_question,
)
from vlattn.assets.paths import tiny_coco
from vlattn.assets.scenes import INDEX, NAMES, Placed, Scene
from vlattn.training.examples import Example


def is_training_image(image_id: int) -> bool:
    """Whether an image of tiny COCO `val` is set aside for training: those whose hash is divisible by 3."""
    return zlib.crc32(f"vlattn/{image_id}".encode()) % 3 == 0


def tiny_examples(seed: int = 0) -> list[Example]:
    """Yes/no questions (as many no as yes), a count, a short and a detailed caption of each training image.

    The same seed gives the same examples in the same order, by ascending image id.
    """
    files = tiny_coco("val")
    content = json.loads(files.instances.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    boxes: dict[int, list[Placed]] = {}
    for a in content["annotations"]:
        if is_training_image(a["image_id"]):
            boxes.setdefault(a["image_id"], []).append(_placed(names[a["category_id"]], a["bbox"]))
    found: list[Example] = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        if image["id"] in boxes:
            draw = random.Random(f"{seed}/{image['id']}")
            turns = _turns(draw, boxes[image["id"]], boxes)
            found += [Example(files.images / image["file_name"], question, answer) for question, answer in turns]
    return found


def _placed(name: str, box: list[float]) -> Placed:
    x, y, width, _ = map(int, box)
    return Placed(INDEX[name], x, y, width, np.empty((0, 0)))


def _turns(draw: random.Random, objects: list[Placed], scenes: dict[int, list[Placed]]) -> list[tuple[str, str]]:
    # Captions are written from the objects alone; there is nothing to draw.
    scene = Scene(np.empty(0), tuple(objects), np.empty(0), "")
    groups = grouped(scene)
    present = [name for name, _ in groups]
    # Half of what is asked in vain keeps company with what is there, elsewhere: the objects a model makes up.
    company = {NAMES[o.category] for other in scenes.values() if _meet(other, present) for o in other}
    absent: list[str] = []
    for number in range(len(present)):
        pool = sorted((company if number % 2 else set(NAMES)) - set(present) - set(absent))
        absent.append(draw.choice(pool))
    counted, members = draw.choice(groups)
    return [
        *((yes_no_question(name), "yes") for name in present),
        *((yes_no_question(name), "no") for name in absent),
        (f"How many {plural(counted)} are in the image?", NUMBERS[len(members)]),
        (draw.choice(SHORT_PROMPTS), short_caption(scene)),
        (draw.choice(DETAIL_PROMPTS), detailed_caption(scene)),
    ]


def _meet(objects: list[Placed], names: list[str]) -> bool:
    return any(NAMES[o.category] in names for o in objects)
