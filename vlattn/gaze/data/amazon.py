"""The Amazon book covers: collages of 6 x 14 covers that six people each searched for one of five.

Collages by Sattar et al.; annotations by DFKI (STI-Dataset, CC BY-NC-SA 4.0, non-commercial). One JSON object:
{image name: {"fixations": {"1": [[x, y], ...], ..., "6": ...}, "ground_truth": [{xmin, xmax, ymin, ymax}],
"size": {height, width}, "target": "target_k.jpg"}}. No durations.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from vlattn.checks import require_count, require_positive
from vlattn.errors import InputError
from vlattn.gaze.assign import assign_objects
from vlattn.gaze.data.json_file import field_of, number, numbers, read_json
from vlattn.gaze.data.overlap import iou
from vlattn.gaze.data.shelf_grid import grid_boxes
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial
from vlattn.gaze.trial_check import check_gaze

WHAT = "the annotation file of the Amazon book covers"
OUTLIERS = 3.0


def read_amazon(
    path: str | Path,
    images: str | Path | None = None,
    *,
    rows: int = 6,
    columns: int = 14,
    outliers: float | None = OUTLIERS,
    last_subject_for_all: bool = False,
) -> GazeSet:
    """Read the annotation file.

    The authors cut cells out of mask files that are not public: here they are a regular grid over the image. The target
    object is the cell with the best IoU with the ground truth; a fixation is on the cell that it is in, or off the
    image on the one whose middle is nearest.

    Args:
        path: the JSON file.
        images: the folder of the collages; None leaves the scenes without pictures.
        rows, columns: cells of the grid.
        outliers: trials whose length is further than so many standard deviations from the mean are left out; None keeps
            all. With 3, 585 of the published file's 600 trials stay.
        last_subject_for_all: reproduce a defect of the reference preparation ("OAT: Object-Level Attention Transformer
            for Gaze Scanpath Prediction", arXiv 2407.13335): it makes one record per image and lists it six times, so
            that all six trials of an image are those of its last subject, and 594 stay. Published figures were probably
            made so; this is for comparing with them alone.

    Returns:
        A scene for each image, and trials "IMAGE/SUBJECT" with `objects` and `target_object`.

    Raises:
        InputError: what is wrong, with file, trial and field.
    """
    require_count("rows", rows)
    require_count("columns", columns)
    if outliers is not None:
        require_positive("outliers", outliers)
    scenes, trials = {}, []
    for name, entry in read_json(path, dict, WHAT).items():
        where = f"{path}: image {name!r}"
        target = field_of(entry, "target", where)
        if not isinstance(target, str) or not target:
            raise InputError(f"{where}: target is {target!r}; give the name of the target's picture")
        scene, wanted = _scene(name, entry, Path(target).stem, (rows, columns), where, images is not None)
        scenes[name] = scene
        paths = _paths(field_of(entry, "fixations", where), where)
        if last_subject_for_all:
            paths = dict.fromkeys(paths, copy.copy(list(paths.values())[-1]))
        for subject, points in paths.items():
            fixations = tuple(Fixation(x, y) for x, y in points)
            one = Trial(f"{name}/{subject}", name, Path(target).stem, subject, fixations, None, target_object=wanted)
            trials.append(one)
    kept = trials if outliers is None else _without_outliers(trials, outliers)
    found = GazeSet(scenes, tuple(kept), None if images is None else Path(images))
    check_gaze(found, str(path))
    return assign_objects(found, "nearest")


def _scene(name: str, entry: Any, target: str, grid: tuple[int, int], where: str, pictured: bool) -> tuple[Scene, int]:
    """The collage, and which of its cells is the target."""
    size = field_of(entry, "size", where)
    width, height = (int(number(field_of(size, side, f"{where}: size"), side, where)) for side in ("width", "height"))
    boxes = np.array(grid_boxes(*grid, (width / grid[1], height / grid[0])))
    truth = field_of(entry, "ground_truth", where)
    one = truth[0] if isinstance(truth, list) and truth else truth  # the file has lists of one, its description none
    inside = f"{where}: ground_truth"
    left, right, top, bottom = (
        number(field_of(one, side, inside), side, inside) for side in ("xmin", "xmax", "ymin", "ymax")
    )
    overlap = iou(boxes, np.array([left, top, right - left, bottom - top]))
    wanted = int(overlap.argmax())
    if not overlap[wanted] > 0:
        raise InputError(f"{inside}: is {one!r}, outside the image of {width} x {height}; give a box inside it")
    labels = [target if cell == wanted else "book cover" for cell in range(len(boxes))]
    objects = tuple(SceneObject(label, tuple(box)) for label, box in zip(labels, boxes.tolist(), strict=True))
    return Scene(name, width, height, objects, name if pictured else None), wanted


def _paths(fixations: Any, where: str) -> dict[str, list[list[float]]]:
    if not isinstance(fixations, dict) or not fixations:
        raise InputError(f"{where}: fixations is {fixations!r:.60}; give an object of subjects")
    found = {}
    for subject, points in fixations.items():
        inside = f"{where}: fixations of subject {subject!r}"
        if not isinstance(points, list):
            raise InputError(f"{inside}: got {points!r:.60}; give a list of [x, y]")
        found[subject] = [numbers(point, f"fixation {place}", inside, 2) for place, point in enumerate(points)]
    return found


def _without_outliers(trials: list[Trial], limit: float) -> list[Trial]:
    lengths = np.array([len(trial.fixations) for trial in trials])
    usual = np.abs(lengths - lengths.mean()) <= limit * lengths.std()
    return [trial for trial, keep in zip(trials, usual, strict=True) if keep]
