"""What is asked of a model: one item per answer, for any task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.coco import CocoSet, read_coco
from vlattn.eval.pope_build import build_pope
from vlattn.eval.pope_files import read_pope

CHAIR_PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class Item:
    """A prompt about one image; `image` is the file name below the image folder."""

    id: str
    image_id: int
    image: str
    prompt: str
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def choose_images(image_ids: Sequence[int], n_images: int | None, seed: int) -> list[int]:
    """`n_images` ids drawn from the ascending ids by `random.Random(seed).sample`, ascending; all of them for None."""
    ordered = sorted(image_ids)
    if n_images is None:
        return ordered
    if not 1 <= n_images <= len(ordered):
        raise InputError(f"n_images: got {n_images}, but there are {len(ordered)} images; give 1 to {len(ordered)}")
    return sorted(random.Random(seed).sample(ordered, n_images))


def chair_items(coco: CocoSet, n_images: int | None = None, seed: int = 0, prompt: str = CHAIR_PROMPT) -> list[Item]:
    """One caption per image. The sample does not depend on the order of files on a disk."""
    return [Item(str(i), i, coco.file_names[i], prompt) for i in choose_images(coco.image_ids, n_images, seed)]


def pope_items(annotations: str | Path, n_images: int = 500, seed: int = 0, suffix: str = "") -> list[Item]:
    """POPE questions of a question file or folder, or built from a COCO instances file.

    suffix is put after each question, on a line of its own (for example "Answer the question using a single word or
    phrase."); it shifts the yes ratio, so it is part of what a run records.
    """
    path = Path(annotations)
    if path.is_dir() or _is_json_lines(path):
        questions = [q for file in read_pope(path) for q in file.questions]
    else:
        built = build_pope(read_coco(path).image_objects(), n_images=n_images, seed=seed)
        questions = [q for split in built.values() for q in split]
    tail = f"\n{suffix}" if suffix else ""
    return [
        Item(q.item_id, q.image_id, q.image, q.text + tail, q.label, {"split": q.item_id.partition(":")[0]})
        for q in questions
    ]


def _is_json_lines(path: Path) -> bool:
    """A question file starts with a whole object on its first line; an instances file is one object."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline(4096)
    except OSError as error:
        raise InputError(
            f"annotations={str(path)!r} cannot be read ({error.strerror}); give an existing file"
        ) from None
    return '"question_id"' in first
