"""Training examples: read from a file, or the embedded ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.eval.coco import read_coco
from vlattn.training.examples import Example, load_examples, open_image, read_examples
from vlattn.training.tiny_examples import is_training_image, tiny_examples


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lines_become_examples_with_images_beside_the_file(tmp_path: Path) -> None:
    line = {"image": "pictures/a.jpg", "question": "What is it?", "answer": "a dog", "source": "mine"}
    file = write(tmp_path / "set.jsonl", line, "", {**line, "image": "b.jpg"})
    assert read_examples(file) == [
        Example(tmp_path / "pictures" / "a.jpg", "What is it?", "a dog"),
        Example(tmp_path / "b.jpg", "What is it?", "a dog"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "set.jsonl, line 2 is not JSON"),
        ("[]", "line 2 has no text under 'image'"),
        ({"image": "a.jpg", "question": "?"}, "line 2 has no text under 'answer'"),
        ({"image": "a.jpg", "question": " ", "answer": "x"}, "line 2 has no text under 'question'"),
        ({"image": 3, "question": "?", "answer": "x"}, "line 2 has no text under 'image'"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: object, message: str) -> None:
    good = {"image": "a.jpg", "question": "?", "answer": "x"}
    with pytest.raises(InputError, match=message):
        read_examples(write(tmp_path / "set.jsonl", good, line))


def test_missing_and_empty_files_and_broken_images_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no example"):
        load_examples(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="does not exist"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="no readable image"):
        open_image(write(tmp_path / "text.jpg", "text"))


# The embedded set -----------------------------------------------------------------------------------------------------


def test_a_third_of_val_trains_and_the_rest_never_does() -> None:
    ids = read_coco(tiny_coco("val").instances).image_ids
    training = {i for i in ids if is_training_image(i)}
    assert 0.25 * len(ids) < len(training) < 0.42 * len(ids)
    assert {int(e.image.stem) for e in tiny_examples()} == training
    assert all(e.image.is_file() for e in tiny_examples())


def test_which_images_train_is_fixed() -> None:
    assert [i for i in range(1, 30) if is_training_image(i)] == [2, 6, 8, 12, 15, 19, 22, 24, 28, 29]


def test_yes_is_said_of_what_is_there_and_no_of_what_is_not_equally_often() -> None:
    coco = read_coco(tiny_coco("val").instances)
    answers: Counter[str] = Counter()
    for e in load_examples("tiny:val"):
        if e.question.startswith("Is there"):
            name = e.question.removeprefix("Is there a").removeprefix("n").removesuffix(" in the image?").strip()
            assert (name in coco.objects[int(e.image.stem)]) == (e.answer == "yes")
            answers[e.answer] += 1
    assert answers["yes"] == answers["no"] > 400


def test_captions_name_every_object_of_the_image() -> None:
    coco = read_coco(tiny_coco("val").instances)
    captions = [e for e in tiny_examples() if "," in e.answer or " and " in e.answer]
    assert len(captions) > 250
    singular = {name for name in coco.categories if name not in ("person", "mouse", "knife", "sheep", "bus")}
    for e in captions:
        for name in set(coco.objects[int(e.image.stem)]) & singular:
            assert name in e.answer


def test_the_seed_changes_what_is_asked_and_nothing_else_does() -> None:
    assert tiny_examples(1) == tiny_examples(1)
    assert tiny_examples(1) != tiny_examples(2)
    assert [e.image for e in tiny_examples(1)] == [e.image for e in tiny_examples(2)]
