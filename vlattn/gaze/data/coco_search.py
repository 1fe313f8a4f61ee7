"""COCO-Search18: ten people searching COCO images for one of 18 categories.

"COCO-Search18 Fixation Dataset for Predicting Goal-directed Attention Control", Scientific Reports 11, 2021. The
fixations are JSON, a list of {"name": image file, "subject", "task": category, "condition": "present" or "absent",
"bbox": target [x, y, w, h], "X", "Y": pixels, "T": milliseconds, "length", "correct": 1 or 0, "RT", "split"}; the first
fixation is the one on the middle of the screen that each trial begins with. The boxes are COCO's own. Images were shown
on 1680 x 1050 pixels, as large as fits, with zeros around them.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.assign import Outside, assign_objects
from vlattn.gaze.data.json_file import field_of, numbers, read_json
from vlattn.gaze.data.overlap import iou
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial
from vlattn.gaze.trial_check import check_gaze, warn_of_units

WHAT = "a fixation file of COCO-Search18"
Placement = Literal["middle", "corner"]
SCREEN = (1680, 1050)
SAME = 0.5
"""A box with at least this IoU with the target's is the target."""


def read_coco_search(
    fixations: str | Path,
    instances: str | Path,
    images: str | Path | None = None,
    *,
    condition: str = "present",
    splits: Sequence[str] | None = None,
    outside: Outside = "none",
    screen: tuple[int, int] = SCREEN,
    placement: Placement = "middle",
) -> GazeSet:
    """Read fixations, and the boxes of the same images.

    Args:
        fixations: the JSON file.
        instances: COCO instances with the images of the fixation file, found by their numbers, so that
            COCO_val2014_000000000042.jpg and 000000000042.jpg are the same; crowds are left out.
        images: the folder of the pictures as they were shown, of the screen's size; None leaves scenes without.
        condition: "present", "absent" or "both".
        splits: keep trials of these (such as ["train"]); None keeps all.
        outside: what becomes of a fixation in no box, as in `assign_objects`.
        screen: width and height of the pictures as they were shown.
        placement: where the zeros are: around the image ("middle"), or to its right and below it ("corner").

    Returns:
        A scene for each image, boxes in pixels of the screen, and trials "IMAGE/TASK/SUBJECT". `target_object` of a
        present target is the box of its category with the best IoU with `bbox`; where none reaches 0.5, `bbox` itself
        becomes one more object. An absent target has None.

    Raises:
        InputError: what is wrong, with file, trial and field.

    Warns:
        UserWarning: durations look like seconds or microseconds; or most targets have no box like theirs, which says
            that `placement` or `screen` is wrong.
    """
    require_choice("placement", placement, ("middle", "corner"))
    require_choice("condition", condition, ("present", "absent", "both"))
    shown = str(fixations)
    entries = read_json(fixations, list, WHAT)
    boxed = _Boxed(instances, screen, 0.5 if placement == "middle" else 0.0, images is not None)
    trials = []
    for place, entry in enumerate(entries):
        where = f"{shown}: trial {place}"
        kind = field_of(entry, "condition", where)
        if kind not in ("present", "absent"):
            raise InputError(f"{where}: condition is {kind!r}; give 'present' or 'absent'")
        if (condition != "both" and kind != condition) or (splits is not None and entry.get("split") not in splits):
            continue
        trials.append(_trial(entry, kind == "present", boxed, where))
    if not trials:
        raise InputError(f"{shown}: has no trial with condition={condition!r} and splits={splits!r}; ask for others")
    boxed.warn_if_misplaced(shown)
    scenes = {name: boxed.scene(name) for name in dict.fromkeys(trial.scene for trial in trials)}
    found = GazeSet(scenes, tuple(trials), None if images is None else Path(images))
    check_gaze(found, shown)
    warn_of_units(found, shown)
    return assign_objects(found, outside)


def _trial(entry: Mapping[str, Any], present: bool, boxed: _Boxed, where: str) -> Trial:
    name, task = (field_of(entry, field, where) for field in ("name", "task"))
    for field, value in (("name", name), ("task", task)):
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {field} is {value!r}; give a text that is not empty")
    subject = str(field_of(entry, "subject", where))
    where = f"{where} ({name}, {task}, subject {subject})"
    xs, ys = (numbers(field_of(entry, field, where), field, where) for field in ("X", "Y"))
    times: list[float] | list[None] = [None] * len(xs)
    if "T" in entry:
        times = numbers(entry["T"], "T", where)
    if not len(xs) == len(ys) == len(times):
        raise InputError(f"{where}: X, Y and T have {len(xs)}, {len(ys)} and {len(times)} entries; give equally many")
    boxed.read(name, where)
    wanted = boxed.target(name, task, entry, where) if present else None
    path = tuple(Fixation(x, y, t) for x, y, t in zip(xs, ys, times, strict=True))
    correct = entry.get("correct")
    answered = None if correct is None else bool(correct)
    return Trial(f"{name}/{task}/{subject}", name, task, subject, path, None, answered, wanted)


class _Boxed:
    """COCO's boxes in pixels of the screen, image by image as they are asked for."""

    def __init__(self, instances: str | Path, screen: tuple[int, int], before: float, pictured: bool) -> None:
        self._shown, self._screen, self._before, self._pictured = str(instances), screen, before, pictured
        self._targets: dict[tuple[str, str], bool] = {}  # whether COCO has a box like it
        data = read_json(instances, dict, "COCO instances")
        for field in ("images", "annotations", "categories"):
            field_of(data, field, self._shown)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by printing
            self._coco = COCO()
            self._coco.dataset = data
            self._coco.createIndex()
        self._ids = {_number(image["file_name"]): key for key, image in self._coco.imgs.items()}
        self._objects: dict[str, list[SceneObject]] = {}

    def read(self, name: str, where: str) -> None:
        """Read the boxes of an image."""
        if name in self._objects:
            return
        key = self._ids.get(_number(name))
        if key is None:
            raise InputError(f"{where}: name is {name!r}, which {self._shown} does not list; give its instances, too")
        image = self._coco.imgs[key]
        scale = min(self._screen[0] / image["width"], self._screen[1] / image["height"])
        left, top = (
            self._before * (s - scale * image[side]) for s, side in zip(self._screen, ("width", "height"), strict=True)
        )
        self._objects[name] = [
            SceneObject(
                self._coco.cats[one["category_id"]]["name"],
                (left + scale * x, top + scale * y, scale * width, scale * height),
            )
            for one in self._coco.imgToAnns.get(key, ())
            if not one.get("iscrowd", 0)
            for x, y, width, height in [one["bbox"]]
            if width > 0 and height > 0
        ]

    def target(self, name: str, task: str, entry: Mapping[str, Any], where: str) -> int:
        """The index of a target that is there; its box joins the scene where COCO has none like it."""
        box = np.array(numbers(field_of(entry, "bbox", where), "bbox", where, 4))
        if not (box[2:] > 0).all():
            raise InputError(f"{where}: bbox is {box.tolist()}; give [x, y, width, height] of the target")
        objects = self._objects[name]
        alike = [index for index, one in enumerate(objects) if one.label == task]
        if alike:
            overlap = iou(np.array([objects[index].box for index in alike]), box)
            self._targets.setdefault((name, task), bool(overlap.max() >= SAME))
            if overlap.max() >= SAME:
                return alike[int(overlap.argmax())]
        self._targets.setdefault((name, task), False)
        objects.append(SceneObject(task, tuple(box.tolist())))
        return len(objects) - 1

    def warn_if_misplaced(self, shown: str) -> None:
        """Warn where targets lie elsewhere than COCO's boxes of them: the boxes are then not where people looked."""
        missed = sum(not found for found in self._targets.values())
        if missed > len(self._targets) / 2:
            warnings.warn(
                f"{shown}: bbox of {missed} of {len(self._targets)} targets is like no box of {self._shown}; give the "
                "placement and the screen that the images were shown with",
                stacklevel=3,
            )

    def scene(self, name: str) -> Scene:
        return Scene(name, *self._screen, tuple(self._objects[name]), name if self._pictured else None)


def _number(name: str) -> str:
    """The number in an image's name: 000000000042 of COCO_val2014_000000000042.jpg."""
    return Path(name).stem.rpartition("_")[2]
