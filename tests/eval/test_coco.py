"""COCO files are read through pycocotools, quietly, and what is wrong with them is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from vlattn.errors import InputError
from vlattn.eval.coco import read_coco


def test_objects_stand_in_order_of_first_appearance_and_ids_ascend(write_coco: Any) -> None:
    instances, captions = write_coco({9: ["dog", "cat", "dog"], 2: ["cat"], 5: []}, {9: ["A dog.", "A cat."]})
    coco = read_coco(instances, captions)
    assert coco.image_ids == (2, 5, 9)
    assert coco.objects == {2: ("cat",), 5: (), 9: ("dog", "cat")}
    assert coco.captions == {9: ("A dog.", "A cat.")}
    assert coco.categories == ("dog", "cat")
    assert coco.file_names[9] == "COCO_val2014_000000000009.jpg"
    assert [image.image_id for image in coco.image_objects()] == [2, 5, 9]
    assert coco.sha256["instances"] == hashlib.sha256(instances.read_bytes()).hexdigest()


def test_the_objects_are_those_pycocotools_finds(write_coco: Any) -> None:
    instances, _ = write_coco({i: ["dog", "cat", "bus"][: i % 4] for i in range(1, 12)})
    ours, theirs = read_coco(instances), COCO(str(instances))
    for i in theirs.getImgIds():
        found = theirs.loadAnns(theirs.getAnnIds(imgIds=[i]))
        assert set(ours.objects[i]) == {theirs.cats[a["category_id"]]["name"] for a in found}


def test_crowds_and_tiny_areas_count(tmp_path: Path) -> None:
    path = tmp_path / "i.json"
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 1, "area": 0}
    path.write_text(
        json.dumps({"images": [{"id": 1}], "annotations": [annotation], "categories": [{"id": 1, "name": "person"}]})
    )
    assert read_coco(path).objects == {1: ("person",)}


def test_reading_prints_nothing(write_coco: Any, capfd: pytest.CaptureFixture[str]) -> None:
    read_coco(*write_coco({1: ["dog"]}, {1: ["A dog."]}))
    assert capfd.readouterr() == ("", "")


GOOD: dict[str, Any] = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "no list `categories`"),
        ({"images": None}, "no list `images`"),
        ({"annotations": {}}, "no list `annotations`"),
        ({"images": [{"id": "1"}]}, "image id '1', which is not an integer"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 8}]}, "category 8"),
        ({"annotations": [{"id": 1, "image_id": 3, "category_id": 1}]}, "image 3"),
        ({"annotations": [{"id": 1, "category_id": 1}]}, "lacks 'image_id'"),
        ({"categories": [{"id": 1}]}, "category without a name"),
    ],
)
def test_a_broken_instances_file_is_explained(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "i.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError, match=message) as caught:
        read_coco(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "no list")])
def test_a_file_that_is_no_coco_file_is_explained(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "i.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_coco(path)


def test_instances_are_not_taken_for_captions(write_coco: Any) -> None:
    instances, _ = write_coco({1: ["dog"]})
    with pytest.raises(InputError, match="without `caption`"):
        read_coco(instances, instances)
