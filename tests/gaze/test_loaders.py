"""Published gaze data, from small files of their form; and data sets by name."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.data.amazon import read_amazon
from vlattn.gaze.data.coco_search import read_coco_search
from vlattn.gaze.data.named import gaze_name, named_gaze
from vlattn.gaze.data.shelf import read_shelf
from vlattn.gaze.trial import GazeSet, Trial, read_gaze, write_gaze


def trial(gaze: GazeSet, name: str) -> Trial:
    return next(one for one in gaze.trials if one.id == name)


# Amazon ---------------------------------------------------------------------------------------------------------------
def collage(number: int, truth_as_list: bool = True) -> dict[str, Any]:
    """A 1400 x 600 image, cells of 100 x 100; the path of subject k begins in cell k and has k + 1 fixations."""
    box = {"xmin": 305, "xmax": 395, "ymin": 110, "ymax": 190}
    paths = {str(k): [[100 * k + 50, 50]] + [[310 + 2 * i, 150] for i in range(k)] for k in range(1, 7)}
    return {
        "fixations": paths,
        "ground_truth": [box] if truth_as_list else box,
        "size": {"height": 600, "width": 1400},
        "target": f"target_{number % 5}.jpg",
    }


@pytest.fixture
def amazon(tmp_path: Path) -> Path:
    path = tmp_path / "amazon.json"
    path.write_text(json.dumps({f"{n}.jpg": collage(n, truth_as_list=n > 0) for n in range(10)}))
    return path


def test_each_subject_of_a_collage_has_a_path_of_its_own(amazon: Path) -> None:
    gaze = read_amazon(amazon)
    assert len(gaze.scenes) == 10
    assert len(gaze.trials) == 60
    for name in gaze.scenes:
        assert len({one.objects for one in gaze.trials if one.scene == name}) == 6
    one = trial(gaze, "3.jpg/2")
    assert (one.subject, one.target, one.objects) == ("2", "target_3", (2, 17, 17))


def test_cells_count_row_by_row_and_the_target_is_the_best_overlap(amazon: Path) -> None:
    gaze = read_amazon(amazon)
    scene = gaze.scenes["0.jpg"]
    assert [one.box for one in scene.objects[:15]][13:] == [(1300, 0, 100, 100), (0, 100, 100, 100)]
    assert {one.target_object for one in gaze.trials} == {14 + 3}
    assert scene.objects[17].label == "target_0"


def test_fixations_are_assigned_as_floor_division_says(amazon: Path) -> None:
    data = json.loads(amazon.read_text())
    points = np.random.default_rng(0).integers(0, [1400, 600], (50, 2)).tolist()
    data["0.jpg"]["fixations"] = {"1": points, "2": [[-40, 250], [1500, 590]]}
    amazon.write_text(json.dumps(data))
    gaze = read_amazon(amazon, outliers=None)
    assert trial(gaze, "0.jpg/1").objects == tuple(y // 100 * 14 + x // 100 for x, y in points)
    assert trial(gaze, "0.jpg/2").objects == (28, 83)  # off the image: the nearest cell


def test_the_defect_of_the_reference_gives_every_subject_the_last_path_only_when_asked(amazon: Path) -> None:
    gaze = read_amazon(amazon, last_subject_for_all=True)
    assert len(gaze.trials) == 60
    last = {name: trial(gaze, f"{name}/6").fixations for name in gaze.scenes}
    assert all(one.fixations == last[one.scene] for one in gaze.trials)


def test_lengths_beyond_three_deviations_are_left_out(amazon: Path) -> None:
    data = json.loads(amazon.read_text())
    data["4.jpg"]["fixations"]["6"] = [[5, 5]] * 90
    amazon.write_text(json.dumps(data))
    lengths = [len(path) for one in data.values() for path in one["fixations"].values()]
    kept = [n for n in lengths if abs(n - np.mean(lengths)) <= 3 * np.std(lengths)]
    assert len(kept) == 59
    assert sorted(len(one.fixations) for one in read_amazon(amazon).trials) == sorted(kept)
    assert len(read_amazon(amazon, outliers=None).trials) == 60
    # With the defect the outlier stands for all six subjects of its image, which leave together.
    assert len(read_amazon(amazon, last_subject_for_all=True, outliers=1).trials) == 54


def test_pictures_are_named_where_a_folder_is_given(amazon: Path, tmp_path: Path) -> None:
    gaze = read_amazon(amazon, tmp_path / "images")
    assert gaze.image_path(gaze.scenes["1.jpg"]) == tmp_path / "images" / "1.jpg"
    assert read_amazon(amazon).scenes["1.jpg"].image is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("target"), r"image '2\.jpg': target is missing"),
        (lambda one: one.pop("fixations"), r"image '2\.jpg': fixations is missing"),
        (lambda one: one["fixations"]["3"].__setitem__(0, [1, float("nan")]), r"subject '3': fixation 0\[1\] is nan"),
        (lambda one: one["fixations"]["3"].__setitem__(0, [1]), "subject '3': fixation 0 is"),
        (lambda one: one["ground_truth"][0].pop("xmax"), "ground_truth: xmax is missing"),
        (lambda one: one["ground_truth"][0].update(xmin=2000, xmax=2100), "outside the image of 1400 x 600"),
        (lambda one: one["size"].update(width="wide"), "width is 'wide'"),
    ],
)
def test_amazon_errors_name_file_image_and_field(amazon: Path, change: Any, message: str) -> None:
    data = json.loads(amazon.read_text())
    change(data["2.jpg"])
    amazon.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as raised:
        read_amazon(amazon)
    assert "amazon.json" in str(raised.value)


# Shelves --------------------------------------------------------------------------------------------------------------
HEAD = ("ID", "Question", "Target", "T_Package", "Choice", "X", "Y", "Sub_ID")
ROWS: list[tuple[Any, ...]] = [
    (1, "Q1_2", "Merlot", 13, 1, 76, 300, 5),
    (1, "Q1_2", "Merlot", 13, 13, 228.5, 700, 5),
    (1, "Q1_2", "Merlot", 13, 13, 230, 710, 5),
    (2, "Q3_1", "Berry", 27, 10, 90, 500, 6),
    (3, "Q2_1", "Shampoo", 4, 2, 90, 500, 6),
]


def sheet_xml(rows: list[tuple[Any, ...]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, str):
            return f'<c t="inlineStr"><is><t>{value}</t></is></c>'
        return f"<c><v>{value}</v></c>"

    body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    return f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{body}</sheetData></worksheet>'


def write_xlsx(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    """The least that is a spreadsheet: a workbook with the sheet "data"."""
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet1.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="data" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/worksheet" Target="sheet1.xml"/></Relationships>',
        "xl/sheet1.xml": sheet_xml(rows),
    }
    with zipfile.ZipFile(path, "w") as book:
        for name, text in parts.items():
            book.writestr(name, text)
    return path


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=["csv", "xlsx"])
def shelf_file(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes rows below the head in one of the two forms."""
    if request.param == "xlsx":
        pytest.importorskip("python_calamine")
    write = write_xlsx if request.param == "xlsx" else write_csv
    return lambda rows, head=HEAD: write(tmp_path / f"gaze.{request.param}", [head, *rows])


def test_shelf_rows_become_trials_counted_from_zero(shelf_file: Any) -> None:
    gaze = read_shelf(shelf_file(ROWS))
    assert [(t.id, t.scene, t.target, t.subject) for t in gaze.trials] == [
        ("1", "Q1_2", "Merlot", "5"),
        ("2", "Q3_1", "Berry", "6"),
    ]
    first, second = gaze.trials
    assert (first.objects, first.target_object) == ((0, 12, 12), 12)
    assert first.points().tolist() == [[76, 300], [228.5, 700], [230, 710]]
    assert (second.objects, second.target_object) == ((9,), 26)


def test_shelves_stand_on_the_lower_edge_of_the_screen(shelf_file: Any) -> None:
    gaze = read_shelf(shelf_file(ROWS))
    wine, yogurt = gaze.scenes["Q1_2"], gaze.scenes["Q3_1"]
    assert (len(wine.objects), len(yogurt.objects)) == (22, 27)
    assert (wine.objects[0].box, wine.objects[11].box) == ((0, 152, 152, 449), (0, 601, 152, 449))
    assert (yogurt.objects[0].box, yogurt.objects[26].box) == ((0, 135, 186, 305), (8 * 186, 745, 186, 305))
    assert {(s.width, s.height) for s in gaze.scenes.values()} == {(1680, 1050)}


def test_one_kind_of_shelf_can_be_read_alone(shelf_file: Any) -> None:
    assert [one.scene for one in read_shelf(shelf_file(ROWS), kinds=["yogurt"]).trials] == ["Q3_1"]
    with pytest.raises(InputError, match="kinds: got 'shampoo'"):
        read_shelf(shelf_file(ROWS), kinds=["shampoo"])
    with pytest.raises(InputError, match="has no rows of wine"):
        read_shelf(shelf_file(ROWS[3:]), kinds=["wine"])


def changed(row: int, column: str, value: Any) -> list[tuple[Any, ...]]:
    rows = [list(one) for one in ROWS]
    rows[row][HEAD.index(column)] = value
    return [tuple(one) for one in rows]


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (1, "Choice", 23, "trial '1': Choice is '23'; give a place from 1 to 22"),
        (0, "T_Package", 0, "trial '1': T_Package is both 0 and 13"),
        (3, "T_Package", 28, "trial '2': T_Package is '28'; give a place from 1 to 27"),
        (1, "Target", "Shiraz", "trial '1': Target is both Merlot and Shiraz"),
        (1, "X", "left", "trial '1': X is 'left'"),
        (1, "Y", "nan", "trial '1': Y is 'nan'"),
        (3, "Sub_ID", "", "trial '2': Sub_ID is empty"),
        (3, "Target", "", "trial '2': Target is empty"),
        (3, "Question", "P9", "trial '2': Question is 'P9'"),
    ],
)
def test_shelf_errors_name_file_trial_and_column(
    shelf_file: Any, row: int, column: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_shelf(shelf_file(changed(row, column, value)))
    assert "gaze." in str(raised.value)


def test_a_missing_column_is_named(shelf_file: Any) -> None:
    with pytest.raises(InputError, match="lacks the column Sub_ID"):
        read_shelf(shelf_file([row[:-1] for row in ROWS], HEAD[:-1]))


def test_a_spreadsheet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_xlsx(tmp_path / "gaze.xlsx", [HEAD, *ROWS])
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(InputError, match=r"needs python-calamine.*pip install 'vlattn\[scanpath\]'"):
        read_shelf(path)
    assert len(read_shelf(write_csv(tmp_path / "gaze.csv", [HEAD, *ROWS])).trials) == 2


def test_what_is_no_spreadsheet_and_a_sheet_that_is_not_there_are_named(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    (tmp_path / "bad.xlsx").write_text("no zip")
    with pytest.raises(InputError, match=r"bad\.xlsx: is no readable spreadsheet"):
        read_shelf(tmp_path / "bad.xlsx")
    with pytest.raises(InputError, match="has no sheet 'wine'; it has data"):
        read_shelf(write_xlsx(tmp_path / "gaze.xlsx", [HEAD, *ROWS]), sheet="wine")
    with pytest.raises(InputError, match=r"none\.xlsx: does not exist"):
        read_shelf(tmp_path / "none.xlsx")


# COCO-Search18 --------------------------------------------------------------------------------------------------------
def coco(tmp_path: Path) -> Path:
    """A 640 x 400 image, which fills the screen 2.625 times as large, and one of 320 x 400, with zeros beside it."""
    boxes = [(1, 1, 7, [100, 100, 40, 40]), (2, 1, 8, [80, 80, 200, 200]), (3, 1, 7, [400, 100, 40, 40])]
    boxes += [(4, 2, 7, [100, 100, 40, 40])]
    data = {
        "images": [
            {"id": 1, "file_name": "COCO_val2014_000000000042.jpg", "width": 640, "height": 400},
            {"id": 2, "file_name": "000000000043.jpg", "width": 320, "height": 400},
        ],
        "categories": [{"id": 7, "name": "cup"}, {"id": 8, "name": "dining table"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "iscrowd": 0, "area": 1} for n, i, c, b in boxes
        ]
        + [{"id": 9, "image_id": 1, "category_id": 7, "bbox": [0, 0, 640, 400], "iscrowd": 1, "area": 1}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    one = {
        "name": "000000000042.jpg",
        "subject": 3,
        "task": "cup",
        "condition": "present",
        "bbox": [1050.0, 262.5, 105.0, 105.0],
        "X": [840, 320, 1100],
        "Y": [525, 320, 300],
        "T": [150, 220, 400],
        "length": 3,
        "correct": 1,
        "RT": 900,
        "split": "train",
    }
    return {**one, **changes}


def fixation_file(tmp_path: Path, *entries: dict[str, Any]) -> Path:
    path = tmp_path / "fixations.json"
    path.write_text(json.dumps(list(entries)))
    return path


def test_coco_boxes_are_placed_on_the_screen_and_fixated_by_box(tmp_path: Path) -> None:
    gaze = read_coco_search(fixation_file(tmp_path, entry()), coco(tmp_path))
    (one,) = gaze.trials
    scene = gaze.scenes["000000000042.jpg"]
    assert [o.label for o in scene.objects] == ["cup", "dining table", "cup"]
    assert scene.objects[0].box == (262.5, 262.5, 105, 105)
    assert (one.id, one.subject, one.correct) == ("000000000042.jpg/cup/3", "3", True)
    assert one.objects == (-1, 0, 2)
    assert one.target_object == 2
    assert one.durations().tolist() == [150, 220, 400]


def test_narrow_images_stand_in_the_middle_or_in_the_corner(tmp_path: Path) -> None:
    here = {"name": "000000000043.jpg", "X": [700], "Y": [300], "T": [200]}
    instances = coco(tmp_path)
    middle = fixation_file(tmp_path, entry(**here, bbox=[682.5, 262.5, 105, 105]))
    assert read_coco_search(middle, instances).trials[0].objects == (0,)
    with pytest.warns(UserWarning, match="bbox of 1 of 1 targets is like no box"):
        read_coco_search(middle, instances, placement="corner")
    corner = fixation_file(tmp_path, entry(**here, bbox=[262.5, 262.5, 105, 105]))
    found = read_coco_search(corner, instances, placement="corner")
    assert found.scenes["000000000043.jpg"].objects[0].box == (262.5, 262.5, 105, 105)


def test_a_target_that_coco_does_not_box_joins_the_scene_once(tmp_path: Path) -> None:
    there, alone = entry(), entry(subject=4, task="clock", bbox=[10, 10, 50, 50])
    file = fixation_file(tmp_path, there, alone, entry(subject=5, task="clock", bbox=[10, 10, 50, 50]))
    gaze = read_coco_search(file, coco(tmp_path))
    assert [o.label for o in gaze.scenes["000000000042.jpg"].objects] == ["cup", "dining table", "cup", "clock"]
    assert [one.target_object for one in gaze.trials] == [2, 3, 3]


def test_absent_targets_have_no_object(tmp_path: Path) -> None:
    file = fixation_file(tmp_path, entry(), entry(task="clock", condition="absent", bbox=None))
    assert [t.target for t in read_coco_search(file, coco(tmp_path)).trials] == ["cup"]
    (absent,) = read_coco_search(file, coco(tmp_path), condition="absent").trials
    assert (absent.target, absent.target_object) == ("clock", None)
    assert len(read_coco_search(file, coco(tmp_path), condition="both").trials) == 2


def test_splits_and_misses_can_be_chosen(tmp_path: Path) -> None:
    file = fixation_file(tmp_path, entry(), entry(subject=4, split="valid"))
    instances = coco(tmp_path)
    assert [t.subject for t in read_coco_search(file, instances, splits=["valid"]).trials] == ["4"]
    assert read_coco_search(file, instances, outside="drop").trials[0].objects == (0, 2)
    with pytest.raises(InputError, match="has no trial with condition='absent'"):
        read_coco_search(file, instances, condition="absent")


def test_an_empty_path_is_kept(tmp_path: Path) -> None:
    file = fixation_file(tmp_path, entry(X=[], Y=[], T=[]))
    assert read_coco_search(file, coco(tmp_path)).trials[0].objects == ()


def test_seconds_warn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="looks like seconds"):
        read_coco_search(fixation_file(tmp_path, entry(T=[0.15, 0.22, 0.4])), coco(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": [840, float("nan"), 3]}, r"trial 0 \(000000000042\.jpg, cup, subject 3\): X\[1\] is nan"),
        ({"Y": [1, 2]}, "X, Y and T have 3, 2 and 3 entries"),
        ({"bbox": None}, "bbox is None"),
        ({"bbox": [1, 2, 0, 4]}, "bbox is"),
        ({"task": ""}, "trial 0: task is ''"),
        ({"name": "000000000099.jpg"}, r"name is '000000000099\.jpg', which .*instances\.json does not list"),
        ({"condition": "maybe"}, "condition is 'maybe'"),
    ],
)
def test_coco_search_errors_name_file_trial_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_coco_search(fixation_file(tmp_path, entry(**changes)), coco(tmp_path))
    assert "fixations.json" in str(raised.value)


# By name --------------------------------------------------------------------------------------------------------------
def test_the_embedded_set_is_named_whole_and_in_parts() -> None:
    whole, shelves, scenes = (named_gaze(f"tiny-gaze{part}") for part in ("", ":shelf", ":coco"))
    assert len(shelves.trials) + len(scenes.trials) == len(whole.trials) == 2200
    assert {trial.scene[:5] for trial in shelves.trials} == {"shelf"}
    assert set(scenes.scenes) == {trial.scene for trial in scenes.trials}


def test_published_data_and_gaze_files_have_names(tmp_path: Path, amazon: Path) -> None:
    table = write_csv(tmp_path / "gaze.csv", [HEAD, *ROWS])
    file, instances = fixation_file(tmp_path, entry()), coco(tmp_path)
    assert named_gaze(f"amazon:{amazon}") == read_amazon(amazon)
    assert named_gaze(f"amazon:{amazon}::{tmp_path}") == read_amazon(amazon, tmp_path)
    assert named_gaze(f"shelf:{table}") == read_shelf(table)
    assert named_gaze(f"coco-search:{file}::{instances}") == read_coco_search(file, instances, outside="drop")
    raw = read_coco_search(file, instances)
    unassigned = GazeSet(raw.scenes, tuple(Trial(**{**vars(one), "objects": None}) for one in raw.trials))
    path = write_gaze(unassigned, tmp_path / "own.json")
    assert read_gaze(path).trials[0].objects is None
    assert named_gaze(str(path)).trials[0].objects == (0, 2)
    assert gaze_name(f"coco-search:{file}::{instances}") == "coco-search:fixations.json::instances.json"
    assert gaze_name(str(path)) == "own.json"


@pytest.mark.parametrize(
    "text", ["tiny-gaze:wine", "nowhere.json", "coco-search:only.json", "amazon:", "shelf:a::b::c"]
)
def test_unknown_data_are_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(InputError, match=r"data: .*give .*tiny-gaze"):
        named_gaze(text)
