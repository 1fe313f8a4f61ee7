"""Data sets give the images and labels that their files say, and refuse files that contradict themselves."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.probing.data import (
    LabeledImages,
    coco_presence,
    csv_manifest,
    digits,
    from_hf_datasets,
    from_torch,
    image_folder,
    tiny_coco_presence,
)
from vlattn.probing.data.coco_presence import part_of
from vlattn.probing.data.fingerprint import fingerprint
from vlattn.probing.data.seeding import SeededView
from vlattn.probing.data.torch_dataset import as_labeled

GREYS = {"a": 10, "b": 60, "c": 110, "d": 160, "e": 210}


def put(path: Path, grey: int) -> Path:
    """A plain image whose colour tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), grey).save(path)
    return path


def grey(image: Any) -> int:
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    (value,) = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}
    assert value[0] == value[1] == value[2]
    return value[0]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_csv(folder: Path, *lines: str) -> Path:
    for name, value in GREYS.items():
        put(folder / "img" / f"{name}.png", value)
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Image folders


def test_a_folder_per_class_gives_sorted_classes_and_paths(tmp_path: Path) -> None:
    for name, value in [("dog/2.png", 20), ("dog/sub/1.PNG", 30), ("cat/x.png", 40), ("ant/1.bmp", 50)]:
        put(tmp_path / name, value)
    put(tmp_path / "dog" / ".hidden.png", 1)
    put(tmp_path / ".cache" / "x.png", 2)
    (tmp_path / "dog" / "readme.txt").write_text("no image")
    found = image_folder(tmp_path)
    assert found.classes == ["ant", "cat", "dog"]
    assert [(grey(image), int(label)) for image, label in found] == [(50, 0), (40, 1), (20, 2), (30, 2)]
    assert found.names == ["ant/1.bmp", "cat/x.png", "dog/2.png", "dog/sub/1.PNG"]
    assert not found.multi_label
    assert found[0][1].dtype == torch.int64
    assert found[0][1].shape == ()


def test_image_folders_agree_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for number in range(12):
        put(tmp_path / f"class{number % 3}" / f"{number % 5}" / f"{number}.png", number * 20)
    theirs, ours = ImageFolder(str(tmp_path)), image_folder(tmp_path)
    assert ours.classes == theirs.classes
    assert [(grey(image), int(label)) for image, label in ours] == [(grey(image), label) for image, label in theirs]


def test_given_classes_decide_the_labels_and_may_lack_images(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png", 10)
    found = image_folder(tmp_path, classes=["dog", "cat"])
    assert int(found[0][1]) == 1
    assert found.classes == ["dog", "cat"]
    with pytest.raises(InputError, match="'cat', which is not among the 1 classes"):
        image_folder(tmp_path, classes=["dog"])
    with pytest.raises(InputError, match="'cat' is given more than once"):
        image_folder(tmp_path, classes=["cat", "cat"])


def test_a_folder_that_is_no_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        image_folder(tmp_path / "none")
    put(tmp_path / "flat.png", 1)
    with pytest.raises(InputError, match="one folder per class"):
        image_folder(tmp_path)
    put(tmp_path / "cat" / "1.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty' holds no image"):
        image_folder(tmp_path)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"broken\.png is no readable image"):
        image_folder(tmp_path)[0]


# What all data sets share


def test_another_transform_or_a_subset_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    for name, value in GREYS.items():
        put(tmp_path / name / "1.png", value)
    whole = image_folder(tmp_path, lambda image: ("train", grey(image)))
    other = whole.with_transform(grey)
    part = whole.subset([3, 1])
    assert whole[2][0] == ("train", 110)
    assert other[2][0] == 110
    assert [(image[1], int(label)) for image, label in part] == [(160, 3), (60, 1)]
    assert part.classes == whole.classes
    assert len(part) == 2


def test_identity_tells_names_labels_and_classes_but_not_where_they_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        for name, value in GREYS.items():
            put(tmp_path / place / name / "1.png", value)
    here, there = image_folder(tmp_path / "here"), image_folder(tmp_path / "there")
    assert here.identity() == there.identity()
    assert here.identity() != here.subset([0, 1]).identity()
    assert here.identity() != image_folder(tmp_path / "here", classes=[*"edcba"]).identity()
    (tmp_path / "there" / "a" / "1.png").rename(tmp_path / "there" / "a" / "2.png")
    assert image_folder(tmp_path / "there").identity() != there.identity()


@pytest.mark.parametrize("make", [lambda: digits(16), lambda: tiny_coco_presence("val")])
def test_data_sets_survive_pickling(make: Callable[[], LabeledImages]) -> None:
    whole = make()
    again = pickle.loads(pickle.dumps(whole))
    assert np.array_equal(np.asarray(again[5][0]), np.asarray(whole[5][0]))
    assert torch.equal(again[5][1], whole[5][1])


# CSV manifests


def test_a_csv_gives_its_rows_in_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "label,note,path", "dog,x,img/b.png", '"cat, small",,img/a.png', "", "dog,y,img/e.png")
    found = csv_manifest(path)
    assert found.classes == ["cat, small", "dog"]
    assert [(grey(image), int(label)) for image, label in found] == [(60, 1), (10, 0), (210, 1)]
    assert not found.multi_label


def test_integer_labels_sort_by_value(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label", "img/a.png,10", "img/b.png,9", "img/c.png,100")
    found = csv_manifest(path)
    assert found.classes == ["9", "10", "100"]
    assert found.labels.tolist() == [1, 0, 2]


def test_several_labels_become_presence(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label", "img/a.png,dog|cat", "img/b.png,", "img/c.png,cat|cat", "img/d.png,eel")
    found = csv_manifest(path)
    assert found.multi_label
    assert found.classes == ["cat", "dog", "eel"]
    assert found.labels.dtype == torch.float32
    assert found.labels.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_multi_label_can_be_forced_either_way(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label", "img/a.png,dog", "img/b.png,cat")
    assert csv_manifest(path, multi_label=True).labels.tolist() == [[0, 1], [1, 0]]
    path = write_csv(tmp_path, "path,label", "img/a.png,dog|cat", "img/b.png,cat")
    assert csv_manifest(path, multi_label=False).classes == ["cat", "dog|cat"]


def test_splits_share_the_classes_of_the_whole_file(tmp_path: Path) -> None:
    lines = ["path,label,split", "img/a.png,ant,train", "img/b.png,bee,val", "img/c.png,cow,train", "img/d.png,cow,val"]
    path = write_csv(tmp_path, *lines)
    train, val = csv_manifest(path, split="train"), csv_manifest(path, split="val")
    assert train.classes == val.classes == ["ant", "bee", "cow"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 2], [1, 2])
    assert [grey(image) for image, _ in val] == [60, 160]
    assert len(csv_manifest(path)) == 4
    with pytest.raises(InputError, match=r"no rows of 'test'; choose one of 'train', 'val'"):
        csv_manifest(path, split="test")


def test_a_root_and_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    write_csv(tmp_path, "unused")
    path = tmp_path / "lists" / "from_a_spreadsheet.csv"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\na.png,x\r\n")
    assert grey(csv_manifest(path, root=tmp_path / "img")[0][0]) == 10


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "img/a.png,x"], "line 1: the columns are file, label"),
        (["path,label,path", "img/a.png,x,"], "line 1: the columns are path, label, path"),
        (["path,label", "img/a.png,x", "img/b.png"], "line 3: 1 fields under 2 columns"),
        (["path,label", "img/a.png,x,y"], "line 2: 3 fields under 2 columns"),
        (["path,label", "img/a.png,x", ",y"], "line 3: the path is empty"),
        (["path,label", "img/a.png,x", "img/b.png,"], "line 3: the label is empty"),
        (["path,label", "img/a.png,x|", "img/b.png,y"], r"line 2: the label 'x\|' has an empty part"),
        (["path,label", "img/a.png,x", "", "img/z.png,y"], "line 4: there is no image"),
        (["path,label", "img/a.png,x", "img/b.png,x", "img/a.png,x"], "line 4: 'img/a.png' is in line 2 already"),
        (["path,label", 'img/a.png,"x'], "line 2: unexpected end of data"),
        (["path,label"], "lists no image"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write_csv(tmp_path, *lines)
    with pytest.raises(InputError, match=message) as caught:
        csv_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        csv_manifest(tmp_path / "none.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes(b"path,label\nx.png,caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.csv is not UTF-8"):
        csv_manifest(path)
    with pytest.raises(InputError, match="line 1 names no column `split`"):
        csv_manifest(write_csv(tmp_path, "path,label", "img/a.png,x"), split="train")


# Hugging Face datasets, by what they offer


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Value:
    pass


class List:
    def __init__(self, feature: Any) -> None:
        self.feature = feature


FakeImage = type("Image", (), {})


class Rows:
    """As much of datasets.Dataset as is needed; counts which rows were decoded."""

    _fingerprint = "0123"

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features, self.columns = features, columns
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        self.decoded.append(key)
        return {name: values[key] for name, values in self.columns.items()}


def plain(value: int) -> Image.Image:
    return Image.new("L", (3, 3), value)


def test_columns_are_found_by_their_types_and_images_decoded_when_asked_for() -> None:
    rows = Rows(
        {"id": Value(), "picture": FakeImage(), "kind": ClassLabel("x", "y", "z")},
        {"id": [7, 8, 9], "picture": [plain(1), plain(2), plain(3)], "kind": [2, 0, 1]},
    )
    found = from_hf_datasets(rows)
    assert rows.decoded == []
    assert found.classes == ["x", "y", "z"]
    assert [(grey(image), int(label)) for image, label in found] == [(1, 2), (2, 0), (3, 1)]
    assert rows.decoded == [0, 1, 2]


def test_lists_of_class_labels_are_presence() -> None:
    rows = Rows(
        {"image": FakeImage(), "objects": List(ClassLabel("x", "y", "z"))},
        {"image": [plain(1), plain(2)], "objects": [[2, 0, 2], []]},
    )
    found = from_hf_datasets(rows)
    assert found.multi_label
    assert found.labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_plain_labels_take_the_classes_that_occur_or_are_given() -> None:
    rows = Rows({"image": FakeImage(), "label": Value()}, {"image": [plain(1)] * 3, "label": [30, 4, 30]})
    assert from_hf_datasets(rows).classes == ["4", "30"]
    assert from_hf_datasets(rows, classes=["30", "4", "1"]).labels.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="'4', which is not among the 1 classes"):
        from_hf_datasets(rows, classes=["30"])


def test_undecoded_images_are_read_from_bytes_or_path(tmp_path: Path) -> None:
    content = io.BytesIO()
    plain(9).save(content, "PNG")
    path = str(put(tmp_path / "x.png", 77))
    images = [{"bytes": content.getvalue(), "path": None}, {"bytes": None, "path": path}, path, 5]
    rows = Rows({"image": FakeImage(), "label": Value()}, {"image": images, "label": [0, 0, 0, 0]})
    found = from_hf_datasets(rows)
    assert [grey(found[i][0]) for i in range(3)] == [9, 77, 77]
    with pytest.raises(InputError, match="row 3 of the column 'image' holds int"):
        found[3]


def test_columns_that_cannot_be_told_apart_are_listed() -> None:
    features = {"img": FakeImage(), "fine": ClassLabel("a", "b"), "coarse": ClassLabel("c")}
    rows = Rows(features, {"img": [plain(1)], "fine": [1], "coarse": [0]})
    with pytest.raises(
        InputError, match=r"label: the dataset has several columns of type ClassLabel \('fine', 'coarse'\)"
    ):
        from_hf_datasets(rows)
    assert from_hf_datasets(rows, label="coarse").classes == ["c"]
    with pytest.raises(InputError, match="no column 'none'; choose one of 'img', 'fine', 'coarse'"):
        from_hf_datasets(rows, label="none")
    with pytest.raises(InputError, match="image: the dataset has no column of type Image"):
        from_hf_datasets(Rows({"label": Value()}, {"label": [0]}))


@pytest.mark.parametrize(("labels", "message"), [([0, None], "row 1 .* has none"), ([0, -1], r"row 1 .* has \[-1\]")])
def test_rows_without_a_label_are_refused(labels: list[Any], message: str) -> None:
    rows = Rows({"image": FakeImage(), "label": ClassLabel("a")}, {"image": [plain(1)] * 2, "label": labels})
    with pytest.raises(InputError, match=message):
        from_hf_datasets(rows)


def test_all_splits_at_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"dataset\[SPLIT\] with one of 'train', 'test'"):
        from_hf_datasets({"train": None, "test": None})


def test_the_real_package_is_understood(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["x", "y"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["p", "q", "r"])),
        }
    )
    columns = {"image": [plain(5), plain(6)], "label": [1, 0], "tags": [[2, 0], []]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    single = from_hf_datasets(rows, label="label")
    assert [(grey(image), int(label)) for image, label in single] == [(5, 1), (6, 0)]
    assert from_hf_datasets(rows, label="tags").labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    assert grey(from_hf_datasets(undecoded, label="label")[1][0]) == 6


# COCO


def coco_file(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 9, "file_name": "e.png"}, {"id": 2, "file_name": "a.png"}, {"id": 5, "file_name": "c.png"}],
        "categories": [{"id": 44, "name": "cup"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 44, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 44, "iscrowd": 0},
            {"id": 3, "image_id": 9, "category_id": 3, "iscrowd": 1},
            {"id": 4, "image_id": 5, "category_id": 17},
        ],
    } | changes
    for name, value in GREYS.items():
        put(folder / f"{name}.png", value)
    path = folder / "instances.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_categories_present_in_each_image(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    found = coco_presence(path, tmp_path)
    assert found.classes == ["car", "cat", "cup"]
    assert found.labels.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert [grey(image) for image, _ in found] == [10, 110, 210]
    assert found.multi_label
    assert coco_presence(path, tmp_path, crowds=False).labels.tolist()[2] == [0, 0, 1]
    assert coco_presence(path, tmp_path, image_ids=[9, 2]).names == ["a.png", "e.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "lacks images"),
        ({"images": [{"id": 9}, {"id": 5}]}, "lacks images with file_name"),
        ({"images": [{"file_name": "a.png"}]}, "an entry lacks 'id'"),
        ({"categories": [{"id": 44, "name": "cup"}]}, "annotates category 17, which `categories` does not list"),
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        coco_presence(coco_file(tmp_path, **changes), tmp_path)
    assert "instances.json" in str(caught.value)


def test_a_coco_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    with pytest.raises(InputError, match="cannot be read"):
        coco_presence(path, tmp_path)
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(InputError, match="is not a JSON object"):
            coco_presence(path, tmp_path)
    with pytest.raises(InputError, match="has no image 1"):
        coco_presence(coco_file(tmp_path), tmp_path, image_ids=[1])
    with pytest.raises(InputError, match="no image of"):
        coco_presence(coco_file(tmp_path), tmp_path, image_ids=[])


@pytest.mark.parametrize("split", ["val", "shift"])
def test_tiny_coco_parts_are_disjoint_whole_and_true(split: str) -> None:
    files = tiny_coco(split)
    content = json.loads(files.instances.read_text())
    train, val = tiny_coco_presence("train", split=split), tiny_coco_presence("val", split=split)
    assert set(train.names).isdisjoint(val.names)
    assert set(train.names) | set(val.names) == {image["file_name"] for image in content["images"]}
    assert 0.2 < len(val) / len(content["images"]) < 0.3
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert train.classes == val.classes == [names[key] for key in sorted(names)]
    shown: dict[str, set[str]] = {image["file_name"]: set() for image in content["images"]}
    files_by_id = {image["id"]: image["file_name"] for image in content["images"]}
    for a in content["annotations"]:
        shown[files_by_id[a["image_id"]]].add(names[a["category_id"]])
    for number in range(0, len(val), 7):
        image, label = val[number]
        assert image.size == (96, 96)
        present = {name for name, there in zip(val.classes, label.tolist(), strict=True) if there}
        assert present == shown[val.names[number]]


def test_the_part_of_an_image_follows_from_its_id_alone() -> None:
    assert [i for i in range(1, 30) if part_of(i) == "val"] == [i for i in range(1, 30) if crc(i) % 4 == 0]
    with pytest.raises(InputError, match="part: got 'test'"):
        tiny_coco_presence("test")  # type: ignore[arg-type]


def crc(image_id: int) -> int:
    """CRC-32 bit by bit."""
    register = 0xFFFFFFFF
    for byte in f"vlattn/probing/{image_id}".encode():
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


# Digits


def test_digits_are_scikit_learns_enlarged() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    stored = datasets.load_digits()
    train, val = digits(8, "train"), digits(8, "val")
    assert (len(train), len(val)) == (1442, 355)
    assert train.classes == [*"0123456789"]
    seen = Counter()
    for part in (train, val):
        for number in range(len(part)):
            image, label = part[number]
            pixels = np.asarray(image)
            assert np.array_equal(pixels[..., 0], pixels[..., 2])
            seen[(np.rint(pixels[..., 0] * (16 / 255)).astype(int).tobytes(), int(label))] += 1
    assert seen == Counter(
        (image.astype(int).tobytes(), int(t)) for image, t in zip(stored.images, stored.target, strict=True)
    )


def test_digits_hold_out_a_fifth_of_each_class_always_the_same() -> None:
    pytest.importorskip("sklearn")
    train, val = digits(8, "train"), digits(32, "val")
    kept, out = Counter(train.labels.tolist()), Counter(val.labels.tolist())
    assert all(out[digit] == (kept[digit] + out[digit]) // 5 for digit in range(10))
    numbers = [[int(name.split("/")[-1]) for name in part.names] for part in (train, val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(1797))
    assert numbers[1][:5] == [int(name.split("/")[-1]) for name in digits(8, "val").names[:5]]
    assert digits(48)[0][0].size == (48, 48)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        digits()


@pytest.mark.parametrize(
    ("settings", "message"), [({"size": 4}, "size: got 4"), ({"part": "test"}, "part: got 'test'")]
)
def test_digits_refuse_other_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        digits(**settings)


# Any torch dataset


class Cifar:
    """As torchvision's CIFAR100: PIL images and int labels."""

    classes = ("apple", "bear")

    def __init__(self, label: Any = 1) -> None:
        self.label = label

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("RGB", (4, 4), (index,) * 3), self.label


def test_any_torch_dataset_of_image_and_int_is_taken() -> None:
    found = as_labeled(Cifar())
    assert (found.classes, found.multi_label, len(found)) == (["apple", "bear"], False, 3)
    image, label = found[2]
    assert grey(image) == 2
    assert (label.dtype, label.shape, int(label)) == (torch.int64, (), 1)
    assert from_torch(Cifar(), grey)[1][0] == 1
    ours = digits(8)
    assert as_labeled(ours) is ours


def test_a_torch_dataset_may_have_several_labels_per_image() -> None:
    found = from_torch(Cifar([0, 1, 1]), classes=["a", "b", "c"], multi_label=True)
    assert found[0][1].tolist() == [0.0, 1.0, 1.0]
    assert found[0][1].dtype == torch.float32


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(InputError, match="item 0 has the label 2, outside 2 classes"):
        from_torch(Cifar(2))[0]
    with pytest.raises(InputError, match=r"item 0 has a label of shape \[2\]; give one integer"):
        from_torch(Cifar([0, 1]))[0]
    with pytest.raises(InputError, match=r"give 3 zeros and ones"):
        from_torch(Cifar([0, 1]), classes=["a", "b", "c"], multi_label=True)[0]


def test_a_torch_dataset_without_class_names_says_how_to_give_them() -> None:
    class Nameless(Cifar):
        classes = ()

    with pytest.raises(InputError, match=r"Nameless has no `classes`; give their names"):
        from_torch(Nameless())
    assert from_torch(Nameless(), classes=["x", "y"]).classes == ["x", "y"]
    with pytest.raises(InputError, match="no length or positions"):
        from_torch(iter([]), classes=["x"])


# Seeds and fingerprints


def noisy(image: Image.Image) -> torch.Tensor:
    """Draws from all three generators that transforms use."""
    import random

    return to_tensor(image) + torch.rand(()) + random.random() + float(np.random.rand())


def test_a_view_depends_on_seed_image_and_view_and_on_nothing_else() -> None:
    dataset = from_torch(Cifar(), noisy)

    def pixel(view: int, seed: int, index: int) -> float:
        return float(SeededView(dataset, view, seed)[index][0][0, 0, 0]) - index / 255

    first = pixel(0, 0, 0)
    torch.rand(3), np.random.rand(3)
    assert pixel(0, 0, 0) == first
    others = {pixel(view, seed, index) for view in (0, 1) for seed in (0, 1) for index in (0, 1, 2)}
    assert len(others) == 12


def test_seeded_views_leave_the_generators_as_they_were() -> None:
    import random

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def reset() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    reset()
    expected = [draws(), draws()]
    reset()
    found = [draws()]
    SeededView(from_torch(Cifar(), noisy), 1, 0)[2]
    assert [*found, draws()] == expected


def test_fingerprints_differ_by_transform_labels_names_and_number() -> None:
    base = digits(8, "val", to_tensor)
    print_of = fingerprint(base)
    assert fingerprint(digits(8, "val", to_tensor)) == print_of
    assert print_of["items"] == 355
    changed = {
        "transform": base.with_transform(lambda image: to_tensor(image) * 2),
        "part": digits(8, "train", to_tensor),
        "subset": base.subset(range(354)),
        "size": digits(9, "val", to_tensor),
    }
    for what, other in changed.items():
        assert fingerprint(other) != print_of, what
    relabeled = base.subset(range(355))
    relabeled.labels = relabeled.labels.clone()
    relabeled.labels[7] = (relabeled.labels[7] + 1) % 10
    assert fingerprint(relabeled)["names"] != print_of["names"]
    assert fingerprint(relabeled)["sample"] == print_of["sample"]


def test_a_fingerprint_sees_any_image_file_that_is_written_anew_and_no_copy(tmp_path: Path) -> None:
    for number in range(9):
        put(tmp_path / "a" / "x" / f"{number}.png", 20 * number)
    print_of = fingerprint(image_folder(tmp_path / "a", to_tensor))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "b").rglob("*.png"):
        os.utime(file, (1, 1))
    assert fingerprint(image_folder(tmp_path / "b", to_tensor)) == print_of
    Image.new("RGB", (12, 8), (1, 2, 3)).save(tmp_path / "b" / "x" / "2.png")  # none of the three that are decoded
    changed = fingerprint(image_folder(tmp_path / "b", to_tensor))
    assert {key for key in changed if changed[key] != print_of[key]} == {"files"}


def test_file_sizes_are_none_where_images_are_no_files_and_a_lost_file_differs(tmp_path: Path) -> None:
    assert fingerprint(digits(8, "val", to_tensor))["files"] is None
    for number in range(3):
        put(tmp_path / "x" / f"{number}.png", 20 * number)
    images = image_folder(tmp_path)
    before = images.file_sizes()
    assert images.with_transform(to_tensor).file_sizes() == before
    assert images.subset([0, 1]).file_sizes() != before
    (tmp_path / "x" / "1.png").unlink()
    assert images.with_transform(None).file_sizes() == before  # looked up once for all transforms
    assert images.subset([0, 1, 2]).file_sizes() != before


def test_fingerprints_of_random_transforms_repeat_with_the_seed() -> None:
    dataset = from_torch(Cifar(), noisy)
    assert fingerprint(dataset, 1) == fingerprint(dataset, 1)
    assert fingerprint(dataset, 1) != fingerprint(dataset, 2)
    assert fingerprint(dataset)["names"] is None


def test_images_without_a_transform_are_refused_where_pixels_are_due() -> None:
    with pytest.raises(InputError, match=r"item 0 is Image where pixels \[3, H, W\] are due"):
        fingerprint(digits(8))
    with pytest.raises(InputError, match=r"item 0 is shape \[8, 8\]"):
        fingerprint(digits(8, transform=lambda image: to_tensor(image)[0]))
    with pytest.raises(InputError, match="it is empty"):
        fingerprint(digits(8, transform=to_tensor).subset([]))
