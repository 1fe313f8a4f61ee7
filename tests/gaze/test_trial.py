"""The gaze file: what is written is read, and what is wrong is named by file, trial and field."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, read_gaze, write_gaze


def a_set() -> GazeSet:
    objects = (SceneObject("cup", (0, 0, 40, 30)), SceneObject("dog", (50.5, 10, 20, 20.25)))
    scene = Scene("s1", 100, 80, objects, "pictures/s1.png")
    trials = (
        Trial("t1", "s1", "dog", "anna", (Fixation(10, 10, 210), Fixation(60.5, 20, 300)), (0, 1), True, 1),
        Trial("t2", "s1", "cat", "ben", (Fixation(-3.25, 10),), None, False, None),
        Trial("t3", "s1", "cup", "model", (), ()),
    )
    return GazeSet({"s1": scene}, trials)


def as_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_gaze(a_set(), tmp_path / "deep" / "gaze.json")
    again = read_gaze(path)
    assert again == a_set()
    assert write_gaze(again, tmp_path / "again.json").read_bytes() != b""
    assert read_gaze(write_gaze(read_gaze(path), path)) == again


def test_the_same_set_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_gaze(a_set(), tmp_path / name).read_bytes() for name in ("a.json", "b.json"))
    assert first == second
    assert json.loads(first)["version"] == 1


def test_numpy_numbers_are_written_as_plain_ones(tmp_path: Path) -> None:
    scene = a_set().scenes["s1"]
    trial = Trial("t", "s1", "dog", "m", (Fixation(np.float32(1.5), np.float64(2)),), (np.int64(1),), None, np.int64(1))  # type: ignore[arg-type]
    path = write_gaze(GazeSet({"s1": scene}, (trial,)), tmp_path / "g.json")
    assert as_json(path)["trials"][0]["fixations"] == [[1.5, 2]]


def test_pictures_are_found_from_wherever_the_file_moves(tmp_path: Path) -> None:
    (tmp_path / "a" / "pictures").mkdir(parents=True)
    (tmp_path / "a" / "pictures" / "s1.png").touch()
    first = read_gaze(write_gaze(a_set(), tmp_path / "a" / "g.json"))
    moved = read_gaze(write_gaze(first, tmp_path / "b" / "c" / "g.json"))
    assert moved.scenes["s1"].image == "../../a/pictures/s1.png"
    assert moved.image_path(moved.scenes["s1"]).resolve() == (tmp_path / "a" / "pictures" / "s1.png").resolve()


def test_a_scene_without_a_picture_says_so() -> None:
    scene = replace(a_set().scenes["s1"], image=None)
    with pytest.raises(InputError, match="scene 's1' has no picture"):
        GazeSet({"s1": scene}, ()).image_path(scene)


def test_fixations_may_be_objects(tmp_path: Path) -> None:
    data = as_json(write_gaze(a_set(), tmp_path / "g.json"))
    data["trials"][0]["fixations"] = [{"x": 10, "y": 10, "duration": 210}, {"x": 60.5, "y": 20, "duration": 300}]
    (tmp_path / "g.json").write_text(json.dumps(data))
    assert read_gaze(tmp_path / "g.json") == a_set()


def test_arrays_have_a_row_for_each_object_and_fixation_even_for_none() -> None:
    gaze = a_set()
    assert gaze.scenes["s1"].boxes().tolist() == [[0, 0, 40, 30], [50.5, 10, 20, 20.25]]
    assert gaze.scenes["s1"].centers().tolist() == [[20, 15], [60.5, 20.125]]
    assert gaze.trials[0].points().tolist() == [[10, 10], [60.5, 20]]
    assert gaze.trials[0].durations().tolist() == [210, 300]
    assert math.isnan(gaze.trials[1].durations()[0])
    assert gaze.trials[2].points().shape == (0, 2)
    assert Scene("s", 1, 1, ()).boxes().shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["trials"][0].pop("target"), "trial 't1': target is missing"),
        (lambda d: d["trials"][0].update(target=""), "trial 't1': target is ''"),
        (lambda d: d["trials"][0].update(scene="s9"), "trial 't1': scene is 's9'"),
        (lambda d: d["trials"][1].update(id="t1"), "trial 't1': id is given twice"),
        (lambda d: d["trials"][0]["fixations"].__setitem__(1, [math.nan, 3]), r"fixations\[1\]: x is nan"),
        (lambda d: d["trials"][0]["fixations"].__setitem__(1, [1, math.inf]), r"fixations\[1\]: y is inf"),
        (lambda d: d["trials"][0]["fixations"].__setitem__(0, ["1", 2]), r"fixations\[0\]: x is '1'"),
        (lambda d: d["trials"][0]["fixations"].__setitem__(0, [1, 2, -5]), r"fixations\[0\]: duration is -5"),
        (lambda d: d["trials"][0]["fixations"].__setitem__(0, [1]), r"fixations\[0\]: got \[1\]"),
        (lambda d: d["trials"][0].update(objects=[0]), "objects has 1 entries for 2 fixations"),
        (lambda d: d["trials"][0].update(objects=[0, 2]), r"objects\[1\] is 2, but the scene has 2 objects"),
        (lambda d: d["trials"][0].update(objects=[0, -2]), r"objects\[1\] is -2"),
        (lambda d: d["trials"][0].update(target_object=2), "target_object is 2"),
        (lambda d: d["trials"][0].update(target_object=-1), "target_object is -1"),
        (lambda d: d["trials"][0].update(correct="yes"), "correct is 'yes'"),
        (lambda d: d["trials"].__setitem__(0, 7), "trial number 0: got 7"),
        (lambda d: d["scenes"].append(d["scenes"][0]), "scene 's1': id is given twice"),
        (lambda d: d["scenes"][0].update(width=0), "scene 's1': width is 0"),
        (lambda d: d["scenes"][0]["objects"][1].update(box=[0, 0, 0, 5]), r"scene 's1': objects\[1\]: box"),
        (lambda d: d["scenes"][0]["objects"][1].update(box=[0, 0, math.nan, 5]), r"objects\[1\]: box"),
        (lambda d: d["scenes"][0]["objects"][0].pop("label"), r"objects\[0\]: label is missing"),
        (lambda d: d.update(version=2), "version is 2, but this vlattn reads 1"),
        (lambda d: d.pop("scenes"), "has no lists scenes and trials"),
    ],
)
def test_errors_name_file_entry_and_field(tmp_path: Path, change: Any, message: str) -> None:
    path = write_gaze(a_set(), tmp_path / "broken.json")
    data = as_json(path)
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as raised:
        read_gaze(path)
    assert "broken.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        read_gaze(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(InputError, match=r"text\.json: is not JSON"):
        read_gaze(tmp_path / "text.json")


def test_nothing_is_written_of_a_set_that_is_wrong(tmp_path: Path) -> None:
    wrong = replace(a_set().trials[0], fixations=(Fixation(math.nan, 0),), objects=None)
    with pytest.raises(InputError, match="trial 't1'"):
        write_gaze(replace(a_set(), trials=(wrong,)), tmp_path / "g.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("factor", "unit"), [(0.001, "seconds"), (1000, "microseconds")])
def test_durations_in_another_unit_warn(tmp_path: Path, factor: float, unit: str) -> None:
    fixations = tuple(replace(one, duration=(one.duration or 0) * factor) for one in a_set().trials[0].fixations)
    gaze = replace(a_set(), trials=(replace(a_set().trials[0], fixations=fixations),))
    path = write_gaze(gaze, tmp_path / "g.json")
    with pytest.warns(UserWarning, match=rf"g\.json: the median duration .* looks like {unit}"):
        read_gaze(path)


def test_milliseconds_do_not_warn(tmp_path: Path) -> None:
    path = write_gaze(a_set(), tmp_path / "g.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_gaze(path)


def test_reading_and_the_loaders_leave_torch_alone() -> None:
    modules = "trial assign splits searcher baselines data.named data.amazon data.shelf data.coco_search"
    imports = "; ".join(f"import vlattn.gaze.{name}" for name in modules.split())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
