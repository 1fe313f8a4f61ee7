"""POPE files read and write in the released form."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from vlattn.errors import InputError
from vlattn.eval.coco import ImageObjects
from vlattn.eval.pope import build_pope, read_official_answers, read_pope, write_official_answers, write_pope
from vlattn.eval.records import Record

OFFICIAL = {
    "question_id": 1,
    "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there a snowboard in the image?",
    "label": "yes",
}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    scenes = [("a", "b", "c"), ("d", "e", "f"), ("g", "h", "i")]
    questions = build_pope([ImageObjects(i, f"{i}.jpg", s) for i, s in enumerate(scenes)], 3)
    paths = write_pope(questions, tmp_path, {"seed": 0})
    files = read_pope(tmp_path)
    assert [f.split for f in files] == ["random", "popular", "adversarial"]
    assert {f.split: list(f.questions) for f in files} == questions
    sidecar = json.loads((tmp_path / "pope_build.json").read_text())
    assert sidecar["settings"] == {"seed": 0}
    assert sidecar["image_ids"] == [0, 1, 2]
    assert sidecar["image_ids_sha256"] == hashlib.sha256(b"0\n1\n2").hexdigest()
    for f in files:
        digest = hashlib.sha256(paths[f.split].read_bytes()).hexdigest()
        assert f.sha256 == digest == sidecar["files"][f"pope_{f.split}.json"]["sha256"]
        assert f.warnings == []


def test_a_released_file_takes_the_image_id_from_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_popular.json"
    path.write_text(json.dumps(OFFICIAL) + "\n\n")
    (found,) = read_pope(path)
    (question,) = found.questions
    assert (question.image_id, question.item_id, question.label) == (310196, "popular:1", "yes")
    assert found.warnings == ["coco_pope_popular.json has 1 questions and not 3000: compare with the same release only"]


def test_the_released_layout_is_one_json_object_a_line_with_its_four_keys(tmp_path: Path) -> None:
    questions = build_pope([ImageObjects(i, f"{i}.jpg", s) for i, s in enumerate([("a", "b"), ("c", "d")])], 2, 2)
    lines = write_pope(questions, tmp_path, {})["random"].read_text().splitlines()
    assert [set(json.loads(line)) >= set(OFFICIAL) for line in lines] == [True] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "label 'maybe'"),
        ({"image": "dog.jpg"}, "does not end in its COCO id"),
        ({"question_id": "1"}, "not an integer"),
        ({"image_id": "5"}, "not an integer"),
    ],
)
def test_a_broken_entry_is_explained(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "pope_random.json"
    path.write_text(json.dumps({**OFFICIAL, **change}))
    with pytest.raises(InputError, match=message):
        read_pope(path)


def test_files_that_cannot_be_placed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no POPE files"):
        read_pope(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_pope(tmp_path / "none.json")
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(OFFICIAL))
    with pytest.raises(InputError, match="does not say its split"):
        read_pope(path)
    assert read_pope(path, "random")[0].split == "random"
    for name in ("random", "pope_random"):
        (tmp_path / f"{name}.json").write_text(json.dumps(OFFICIAL))
    with pytest.raises(InputError, match="several files of one split"):
        read_pope(tmp_path)
    path.write_text((json.dumps(OFFICIAL) + "\n") * 2)
    with pytest.raises(InputError, match="repeats a question_id"):
        read_pope(path, "random")
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON Lines"):
        read_pope(path, "random")
    path.write_text("[1]")
    with pytest.raises(InputError, match="without question_id"):
        read_pope(path, "random")


def test_official_answers_are_joined_by_order_and_exported_again(tmp_path: Path) -> None:
    path = tmp_path / "pope_random.json"
    other = {**OFFICIAL, "question_id": 2, "text": "Is there a cat in the image?", "label": "no"}
    path.write_text(json.dumps(OFFICIAL) + "\n" + json.dumps(other))
    questions = read_pope(path)[0].questions
    records = [Record(q.item_id, q.image_id, raw=raw) for q, raw in zip(questions, ["Yes", "No\n"], strict=True)]
    answers = tmp_path / "answers.jsonl"
    write_official_answers(reversed(records), questions, answers)
    assert [json.loads(line) for line in answers.read_text().splitlines()] == [
        {"question": "Is there a snowboard in the image?", "answer": "Yes"},
        {"question": "Is there a cat in the image?", "answer": "No\n"},
    ]
    back = read_official_answers(answers, questions)
    assert [(r.id, r.label, r.raw) for r in back] == [("random:1", "yes", "Yes"), ("random:2", "no", "No\n")]
    with pytest.raises(InputError, match="does not follow the 1 questions"):
        read_official_answers(answers, questions[:1])
    with pytest.raises(InputError, match="lack answers to 1"):
        write_official_answers(records[:1], questions, answers)
    with pytest.raises(InputError, match="official answer file"):
        read_official_answers(path, questions)
