"""Whether a gaze set holds together; every error names the file, the trial or scene, and the field."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from vlattn.errors import InputError

if TYPE_CHECKING:
    from vlattn.gaze.trial import GazeSet, Scene, Trial

SECONDS, MICROSECONDS = 10.0, 10_000.0
"""A median fixation below or above so many milliseconds is none: people's take about 200 to 300."""


def check_gaze(gaze: GazeSet, shown: str) -> None:
    """Refuse what no reader could use. shown: what errors call the set, such as its file."""
    for key, scene in gaze.scenes.items():
        where = f"{shown}: scene {scene.id!r}"
        if key != scene.id:
            raise InputError(f"{where}: id differs from its key {key!r} in scenes; use the id as the key")
        _check_scene(scene, where)
    known: set[str] = set()
    for trial in gaze.trials:
        where = f"{shown}: trial {trial.id!r}"
        _check_trial(trial, gaze.scenes, where)
        if trial.id in known:
            raise InputError(f"{where}: id is given twice; give each trial its own, such as TRIAL/SAMPLE")
        known.add(trial.id)


def warn_of_units(gaze: GazeSet, shown: str) -> None:
    """Warn where the median duration says that they are not in milliseconds. A guess: nothing is converted."""
    durations = [one.duration for trial in gaze.trials for one in trial.fixations if one.duration is not None]
    if not durations:
        return
    middle = statistics.median(durations)
    if 0 < middle < SECONDS or middle > MICROSECONDS:
        unit, factor = ("seconds", "by 1000") if middle < SECONDS else ("microseconds", "by 0.001")
        warnings.warn(
            f"{shown}: the median duration of a fixation is {middle:g}, which looks like {unit}; durations are in "
            f"milliseconds, so multiply them {factor}",
            stacklevel=3,
        )


def _check_scene(scene: Scene, where: str) -> None:
    _check_name(scene.id, "id", where)
    for name, size in (("width", scene.width), ("height", scene.height)):
        if not _is_index(size) or size < 1:
            raise InputError(f"{where}: {name} is {size!r}; give whole pixels, at least 1")
    if scene.image is not None and not isinstance(scene.image, str):
        raise InputError(f"{where}: image is {scene.image!r}; give a path relative to the file, or leave it out")
    for place, one in enumerate(scene.objects):
        inside = f"{where}: objects[{place}]"
        _check_name(one.label, "label", inside)
        if len(one.box) != 4 or not all(_is_finite(value) for value in one.box) or min(one.box[2:]) <= 0:
            raise InputError(
                f"{inside}: box is {list(one.box)}; give [x, y, width, height] in pixels, finite, with a width and a "
                "height above 0"
            )


def _check_trial(trial: Trial, scenes: Mapping[str, Scene], where: str) -> None:
    for name in ("id", "scene", "target", "subject"):
        _check_name(getattr(trial, name), name, where)
    if trial.scene not in scenes:
        raise InputError(f"{where}: scene is {trial.scene!r}, which scenes do not list; add it there")
    count = len(scenes[trial.scene].objects)
    for place, one in enumerate(trial.fixations):
        inside = f"{where}: fixations[{place}]"
        for name, value in (("x", one.x), ("y", one.y)):
            if not _is_finite(value):
                raise InputError(f"{inside}: {name} is {value!r}; give finite pixels, or leave the fixation out")
        if one.duration is not None and (not _is_finite(one.duration) or one.duration < 0):
            raise InputError(f"{inside}: duration is {one.duration!r}; give milliseconds of at least 0, or none")
    if trial.objects is not None:
        if len(trial.objects) != len(trial.fixations):
            raise InputError(
                f"{where}: objects has {len(trial.objects)} entries for {len(trial.fixations)} fixations; give one for "
                "each, or leave objects out"
            )
        for place, index in enumerate(trial.objects):
            if not _is_index(index) or not -1 <= index < count:
                raise InputError(
                    f"{where}: objects[{place}] is {index!r}, but the scene has {count} objects; give an index from 0, "
                    "or -1 for none"
                )
    if trial.correct is not None and not isinstance(trial.correct, bool):
        raise InputError(f"{where}: correct is {trial.correct!r}; give true or false, or leave it out")
    wanted = trial.target_object
    if wanted is not None and (not _is_index(wanted) or not 0 <= wanted < count):
        raise InputError(
            f"{where}: target_object is {wanted!r}, but the scene has {count} objects; give an index from 0, or leave "
            "it out where the target is not in the scene"
        )


def _check_name(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {name} is {value!r}; give a text that is not empty")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
