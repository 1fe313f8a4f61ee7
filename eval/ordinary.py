"""Ordinary questions: does a method that fights hallucination cost what the model otherwise knows?

Counts and places, asked of any COCO set: "How many dogs are in the image?" and "Where is the dog?", answered right
where the answer is the expected words and nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlattn.assets.language import NUMBERS, POSITIONS, plural
from vlattn.errors import InputError
from vlattn.eval.coco import raw_coco
from vlattn.eval.items import Item
from vlattn.eval.records import Record, read_records
from vlattn.eval.stats import interval, paired_difference, resample_totals

LEFT, RIGHT = 0.38, 0.62
"""Where the left third ends and the right one begins, as shares of the width: what the embedded model was taught."""


def ordinary_items(instances: str | Path, image_ids: Sequence[int]) -> list[Item]:
    """For each image: the count of every category in it and of one that is not, and the place of every single object.

    The absent category is the one at the place in the alphabet that the image id points to, so it is the same in every
    run. Categories counted above six are left out.

    Args:
        instances: a COCO instances file.
        image_ids: the images to ask about.
    """
    coco = raw_coco(instances)
    by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in image_ids}
    for a in coco.anns.values():
        if a["image_id"] in by_image:
            by_image[a["image_id"]].append(a)
    names = {c["id"]: c["name"] for c in coco.cats.values()}
    items = []
    for image, boxes in sorted(by_image.items()):
        counts = Counter(names[a["category_id"]] for a in boxes)
        absent = sorted(set(names.values()) - set(counts))
        asked = {**counts, absent[image % len(absent)]: 0} if absent else dict(counts)
        file, width = coco.imgs[image]["file_name"], coco.imgs[image]["width"]
        for name, count in sorted(asked.items()):
            if count < len(NUMBERS):
                question = f"How many {plural(name)} are in the image?"
                items.append(Item(f"count:{image}:{name}", image, file, question, NUMBERS[count], {"kind": "count"}))
        for box in sorted(boxes, key=lambda a: a["id"]):
            name = names[box["category_id"]]
            if counts[name] == 1:
                x, _, w, _ = box["bbox"]
                label, question = place((x + w / 2) / width), f"Where is the {name}?"
                items.append(Item(f"place:{image}:{name}", image, file, question, label, {"kind": "place"}))
    return items


def place(x: float) -> str:
    """A horizontal position (a share of the width) in words."""
    return POSITIONS[0] if x < LEFT else POSITIONS[2] if x > RIGHT else POSITIONS[1]


def is_right(answer: str, label: str) -> bool:
    """Whether an answer is the label, whatever its case, spacing and full stop."""
    return re.sub(r"[^\w ]", "", " ".join(answer.lower().split())).strip() == label


def score_ordinary(path: str | Path, n_boot: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Share of right answers with a 95% interval by image, in all and by kind."""
    records = read_records(path)
    found: dict[str, Any] = {}
    for kind in ("all", *sorted({r.meta["kind"] for r in records})):
        table, images = _table([r for r in records if kind in ("all", r.meta["kind"])])
        totals = resample_totals(table, images, n_boot, seed)
        value = float(table[:, 0].sum() / len(table))
        bounds = interval(value, totals[:, 0] / totals[:, 1], len(set(images)), 0.95)
        found[kind] = {"value": value, "low": bounds.low, "high": bounds.high, "n": len(table)}
    return found


def compare_ordinary(a: str | Path, b: str | Path, n_boot: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Accuracy of B minus that of A on the same questions, paired by image."""
    first, second = ({r.id: r for r in read_records(path)} for path in (a, b))
    if first.keys() != second.keys():
        raise InputError(f"records: {str(a)!r} and {str(b)!r} hold answers to different questions; compare one set")
    tables, images = zip(*(_table([run[key] for key in sorted(run)]) for run in (first, second)), strict=True)
    totals = resample_totals(np.concatenate(tables, 1), images[0], n_boot, seed)
    values = [float(t[:, 0].sum() / len(t)) for t in tables]
    samples = totals[:, 2] / totals[:, 3] - totals[:, 0] / totals[:, 1]
    found = paired_difference(values[0], values[1], samples, len(set(images[0])), 0.95)
    return {"difference": found.difference, "low": found.low, "high": found.high, "p_value": found.p_value}


def _table(records: Sequence[Record]) -> tuple[np.ndarray, list[int]]:
    """[items, (right, 1)] and the image of each."""
    rows = [[is_right(r.raw, r.label or ""), 1] for r in records]
    return np.array(rows, dtype=np.float64), [r.image_id for r in records]
