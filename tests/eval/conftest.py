"""Small COCO files and records, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteCoco = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write_coco(tmp_path: Path) -> WriteCoco:
    """Write an instances and a captions file: image id -> category names, image id -> captions."""

    def write(
        objects: Mapping[int, Sequence[str]],
        captions: Mapping[int, Sequence[str]] | None = None,
        categories: Sequence[str] | None = None,
    ) -> tuple[Path, Path]:
        names = list(categories or dict.fromkeys(name for found in objects.values() for name in found))
        ids = {name: i + 1 for i, name in enumerate(names)}
        images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in objects]
        annotations = [
            {"id": n, "image_id": i, "category_id": ids[name], "iscrowd": 0, "area": 1.0, "bbox": [0, 0, 1, 1]}
            for n, (i, name) in enumerate([(i, name) for i, found in objects.items() for name in found])
        ]
        spoken = [
            {"id": n, "image_id": i, "caption": text}
            for n, (i, text) in enumerate([(i, t) for i, texts in (captions or {}).items() for t in texts])
        ]
        data: dict[str, Any] = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": ids[name], "name": name} for name in names],
        }
        instances = tmp_path / "instances.json"
        instances.write_text(json.dumps(data))
        reference = tmp_path / "captions.json"
        reference.write_text(json.dumps({"images": images, "annotations": spoken}))
        return instances, reference

    return write
