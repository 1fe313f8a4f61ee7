"""Trials as paths: what a gaze set holds, in the shapes that metrics take."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np

from vlattn.gaze.assign import assign_objects
from vlattn.gaze.metrics.paths import Outside, Paths, make_paths
from vlattn.gaze.trial import Fixation, GazeSet, Scene, Trial

Stimulus = tuple[str, str]
NO_LABEL = ""


def stimulus_of(trial: Trial) -> Stimulus:
    """What was looked at, and for what: paths of the same stimulus are compared."""
    return trial.scene, trial.target


def one_of_each(gaze: GazeSet) -> GazeSet:
    """The first trial of each stimulus: a question that a model is asked once, whoever searched."""
    first = {stimulus_of(trial): trial for trial in reversed(gaze.trials)}
    return replace(gaze, trials=tuple(first.values())[::-1])


def gaze_paths(gaze: GazeSet, outside: Outside = "warn") -> Paths:
    """A row for each trial.

    Symbols of the kind "objects" are indices of the scene's objects, by the boxes where trials have none yet; all
    fixations on nothing are one object more, -1. "labels" are the objects' labels, "" on nothing. Target, and its box:
    `target_object`, or the only object with the target's label. Durations stay in milliseconds.

    Args:
        outside: as for `make_paths`.
    """
    objects = [trial.objects for trial in gaze.trials]
    if any(one is None for one in objects):
        assigned = [trial.objects for trial in assign_objects(gaze).trials]
        objects = [had if had is not None else made for had, made in zip(objects, assigned, strict=True)]
    paths: list[tuple[int, ...]] = [one or () for one in objects]
    scenes = [gaze.scene_of(trial) for trial in gaze.trials]
    targets = [target_index(trial, scene) for trial, scene in zip(gaze.trials, scenes, strict=True)]
    boxes = [
        (np.nan,) * 4 if target is None else scene.objects[target].box
        for target, scene in zip(targets, scenes, strict=True)
    ]
    labels: list[list[Hashable]] = [
        [NO_LABEL if index < 0 else scene.objects[index].label for index in path]
        for path, scene in zip(paths, scenes, strict=True)
    ]
    return make_paths(
        [trial.points() for trial in gaze.trials],
        np.array([(scene.width, scene.height) for scene in scenes], np.float64).reshape(-1, 2),
        durations=[trial.durations() for trial in gaze.trials],
        symbols={"objects": paths, "labels": labels},
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        targets=targets,
        tasks=[trial.target for trial in gaze.trials],
        trials=[trial.id for trial in gaze.trials],
        outside=outside,
    )


def target_index(trial: Trial, scene: Scene) -> int | None:
    """The object that is looked for; None where no object, or more than one, can be."""
    if trial.target_object is not None:
        return trial.target_object
    named = [index for index, one in enumerate(scene.objects) if one.label == trial.target]
    return named[0] if len(named) == 1 else None


def random_gaze(gaze: GazeSet, seed: int = 0) -> GazeSet:
    """What chance does: each trial with as many fixations anywhere on the screen, its durations in another order."""
    rng, trials = np.random.default_rng(seed), []
    for trial in gaze.trials:
        scene, count = gaze.scene_of(trial), len(trial.fixations)
        points = rng.random((count, 2)) * (scene.width, scene.height)
        order = rng.permutation(count)
        fixations = tuple(
            Fixation(float(x), float(y), trial.fixations[place].duration)
            for (x, y), place in zip(points, order, strict=True)
        )
        trials.append(replace(trial, fixations=fixations, objects=None))
    return replace(gaze, trials=tuple(trials))
