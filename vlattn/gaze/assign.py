"""Which object of a scene each fixation is on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.trial import GazeSet, Trial

Outside = Literal["none", "nearest", "drop", "raise"]
OUTSIDE = ("none", "nearest", "drop", "raise")


def assign_points(points: np.ndarray, boxes: np.ndarray, *, nearest: bool = False) -> np.ndarray:
    """The box that each point is in, -1 for none.

    A box has its left and top border and not its right and bottom one, so that of two cells side by side one has the
    border between them. In several boxes, a point is on the smallest: what lies on a table is in front of it. Boxes of
    the same size: the one whose middle is nearer, then the first.

    Args:
        points: [n, 2], x and y in pixels.
        boxes: [P, 4], x, y, width, height.
        nearest: give a point in no box to the one whose middle is nearest (the first of several), as "OAT: Object-Level
            Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335, does.

    Returns:
        int64 [n]; -1 for all where there are no boxes.
    """
    if not len(boxes) or not len(points):
        return np.full(len(points), -1, np.int64)
    offset = points[:, None] - boxes[None, :, :2]  # [n, P, 2]
    inside = ((offset >= 0) & (offset < boxes[None, :, 2:])).all(-1)
    apart = ((offset - boxes[None, :, 2:] / 2) ** 2).sum(-1)  # squared distance from the middle
    area = np.where(inside, boxes[:, 2] * boxes[:, 3], np.inf)
    smallest = inside & (area == area.min(1, keepdims=True))
    found = np.where(smallest, apart, np.inf).argmin(1)
    outside = apart.argmin(1) if nearest else -1
    return np.where(inside.any(1), found, outside).astype(np.int64)


def assign_objects(gaze: GazeSet, outside: Outside = "none") -> GazeSet:
    """The same set with `objects` of every trial, by the boxes of its scene.

    Args:
        gaze: objects that trials have already are replaced.
        outside: what becomes of a fixation in no box: "none" says -1 and keeps it; "nearest" takes the box whose middle
            is nearest, which suits shelves without gaps; "drop" leaves the fixation out, as models need that can only
            point at objects; "raise" refuses it. An empty path stays one, and dropping can make one.

    Raises:
        InputError: with "raise", a fixation in no box; with "nearest", fixations in a scene without objects.
    """
    require_choice("outside", outside, OUTSIDE)
    boxes = {scene.id: scene.boxes() for scene in gaze.scenes.values()}
    return replace(gaze, trials=tuple(_assigned(trial, boxes[trial.scene], outside) for trial in gaze.trials))


def _assigned(trial: Trial, boxes: np.ndarray, outside: Outside) -> Trial:
    found = assign_points(trial.points(), boxes, nearest=outside == "nearest").tolist()
    missed = [place for place, index in enumerate(found) if index < 0]
    if missed and outside == "nearest":
        raise InputError(f"trial {trial.id!r}: scene {trial.scene!r} has no objects to fixate; give outside='none'")
    if missed and outside == "raise":
        one = trial.fixations[missed[0]]
        raise InputError(
            f"trial {trial.id!r}: fixations[{missed[0]}] at ({one.x:g}, {one.y:g}) is in no box of scene "
            f"{trial.scene!r}; give outside='none', 'nearest' or 'drop'"
        )
    if outside == "drop":
        kept = [(one, index) for one, index in zip(trial.fixations, found, strict=True) if index >= 0]
        return replace(trial, fixations=tuple(one for one, _ in kept), objects=tuple(index for _, index in kept))
    return replace(trial, objects=tuple(found))
