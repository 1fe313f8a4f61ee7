"""Data sets by their texts, and the messages for those that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.probing.data.named import named_data


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            for number in range(count):
                picture(tmp_path / "pets" / part / name / f"{number}.png")
    return tmp_path / "pets"


def test_digits_have_the_size_that_is_asked_for() -> None:
    data = named_data("digits:40")
    assert data.val[0][0].size == (40, 40)
    assert (len(data.train), len(data.val), data.name) == (1442, 355, "digits:40")
    assert named_data("digits").train[0][0].size == (32, 32)


def test_splits_of_tiny_coco_differ_and_their_parts_share_no_image() -> None:
    val, shift = named_data("tiny-coco"), named_data("tiny-coco:shift")
    for data in (val, shift):
        assert data.train.multi_label
        assert not set(data.train.names) & set(data.val.names)
    assert len(val.train) + len(val.val) == len(json.loads(tiny_coco("val").instances.read_text())["images"])
    assert val.name != shift.name
    assert val.train.names != shift.train.names


def test_a_folder_gives_its_parts_and_a_name_without_a_path(folder: Path) -> None:
    data = named_data(str(folder))
    assert (len(data.train), len(data.val), data.classes, data.name) == (4, 2, ["cat", "dog"], "pets")


def test_a_csv_file_is_parted_by_its_column_split(folder: Path) -> None:
    file = folder / "list.csv"
    rows = ["train/cat/0.png,a,train", "train/dog/0.png,b,train", "val/dog/0.png,b,val"]
    file.write_text("\n".join(["path,label,split", *rows]))
    data = named_data(str(file))
    assert data.train.labels.tolist() == [0, 1]
    assert data.val.labels.tolist() == [1]


def test_coco_takes_a_text_for_each_part() -> None:
    val, shift = ("::".join(map(str, (tiny_coco(s).instances, tiny_coco(s).images))) for s in ("val", "shift"))
    data = named_data(val, shift)
    assert (len(data.train), len(data.val)) == (480, 240)
    assert data.name == tiny_coco("val").instances.name


def test_parts_with_other_classes_are_refused(folder: Path) -> None:
    picture(folder / "val" / "emu" / "0.png")
    with pytest.raises(InputError, match="2 classes in train and 3 in val"):
        named_data(str(folder))
    shutil.rmtree(folder / "val" / "dog")
    with pytest.raises(InputError, match="'dog' in train where val has 'emu'"):
        named_data(str(folder))


def test_classes_without_images_to_train_on_are_refused(folder: Path) -> None:
    file = folder / "list.csv"
    file.write_text("path,label,split\ntrain/cat/0.png,a,train\nval/dog/0.png,b,val\n")
    with pytest.raises(InputError, match=r"no image of list\.csv train shows the class 'b'"):
        named_data(str(file))
    for image in (folder / "train" / "cat").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="holds no image"):
        named_data(str(folder))


@pytest.mark.parametrize(
    ("text", "val", "message"),
    [
        ("digits:big", None, "digits:SIZE"),
        ("tiny-coco:train", None, "tiny-coco:shift"),
        ("nowhere", None, "none that is known"),
        ("a.json::images", None, "val: got None"),
        ("digits", "a.json::b", "leave it out"),
        ("a.json::", "b.json::c", "INSTANCES.json::IMAGES"),
    ],
)
def test_texts_that_name_no_data_are_told(text: str, val: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_data(text, val)


def test_a_folder_without_parts_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder train"):
        named_data(str(tmp_path))
