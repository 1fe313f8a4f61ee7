"""Ordinary questions: asked of what is annotated, answered right by the expected words alone, compared by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlattn.errors import InputError
from vlattn.eval.ordinary import compare_ordinary, is_right, ordinary_items, place, score_ordinary
from vlattn.eval.records import Record


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    """Two images 100 wide: two dogs and a cat on the right; a lone bus in the middle. No sheep anywhere."""
    data: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("bus", "cat", "dog", "sheep"), 1)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": [x, 0, 10, 10], "area": 100, "iscrowd": 0}
            for n, (image, category, x) in enumerate([(1, 3, 0), (1, 3, 20), (1, 2, 80), (2, 1, 45)], 1)
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return path


def test_every_count_one_absent_category_and_the_place_of_single_objects_are_asked(instances: Path) -> None:
    asked = {(i.image_id, i.prompt): i.label for i in ordinary_items(instances, [1, 2])}
    assert asked == {
        (1, "How many dogs are in the image?"): "two",
        (1, "How many cats are in the image?"): "one",
        (1, "How many sheep are in the image?"): "zero",  # of bus and sheep, the one at place 1 % 2
        (1, "Where is the cat?"): "on the right",
        (2, "How many buses are in the image?"): "one",
        (2, "How many sheep are in the image?"): "zero",  # of cat, dog and sheep, the one at place 2 % 3
        (2, "Where is the bus?"): "in the middle",
    }
    assert {i.image_id for i in ordinary_items(instances, [2])} == {2}


def test_places_are_thirds_of_the_width() -> None:
    assert [place(x) for x in (0.0, 0.37, 0.39, 0.61, 0.63, 1.0)] == (
        ["on the left"] * 2 + ["in the middle"] * 2 + ["on the right"] * 2
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [("two", True), (" Two. ", True), ("two dogs", False), ("", False), ("twotwo", False), ("2", False)],
)
def test_an_answer_is_right_where_it_is_the_label_and_nothing_else(answer: str, right: bool) -> None:
    assert is_right(answer, "two") is right


def write(path: Path, answers: dict[str, str]) -> Path:
    labels = {"a": "one", "b": "on the left", "c": "two"}
    kinds = {"a": "count", "b": "place", "c": "count"}
    records = [
        Record(key, 1 if key == "a" else 2, raw=raw, label=labels[key], meta={"kind": kinds[key]})
        for key, raw in answers.items()
    ]
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    return path


def test_scores_are_shares_of_right_answers_in_all_and_by_kind(tmp_path: Path) -> None:
    found = score_ordinary(write(tmp_path / "a.jsonl", {"a": "one", "b": "left", "c": "Two."}), n_boot=200)
    assert [(kind, round(found[kind]["value"], 3), found[kind]["n"]) for kind in found] == [
        ("all", 0.667, 3), ("count", 1.0, 2), ("place", 0.0, 1),
    ]  # fmt: skip
    assert found["all"]["low"] <= found["all"]["value"] <= found["all"]["high"]


def test_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"a": "one", "b": "left", "c": "three"})
    b = write(tmp_path / "b.jsonl", {"c": "two", "b": "on the left", "a": "one"})
    assert compare_ordinary(a, b, n_boot=200)["difference"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="different questions"):
        compare_ordinary(a, write(tmp_path / "c.jsonl", {"a": "one"}))
