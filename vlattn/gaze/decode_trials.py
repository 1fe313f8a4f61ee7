"""Predicted paths as trials, so that everything that reads what people did reads what a model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vlattn.gaze.baselines import path_trial
from vlattn.gaze.decode import Decoding, generate
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATData, Search
from vlattn.gaze.trial import GazeSet, Trial


def predict_trials(
    model: OAT,
    data: OATData,
    trials: list[Trial],
    decoding: Decoding | None = None,
    *,
    name: str = "OAT",
    progress: Callable[[int], object] = lambda done: None,
) -> GazeSet:
    """Predictions for trials, whose own fixations are not looked at: T/0, T/1, ... for trial T, with `name` as subject.

    Fixations are in the middle of the objects. A trial whose target is not in its scene gets none: the model has no
    token for it. Samples of a trial depend on the seed and its id alone.
    """
    asked = [trial for trial in trials if trial.target_object is not None]
    searches = [Search(trial.scene, int(trial.target_object)) for trial in asked]  # type: ignore[arg-type]
    paths = generate(model, data, searches, decoding, keys=[trial.id for trial in asked], progress=progress)
    made = (
        path_trial(trial, data.gaze.scene_of(trial), path.objects, name, sample)
        for trial, some in zip(asked, paths, strict=True)
        for sample, path in enumerate(some)
    )
    return replace(data.gaze, trials=tuple(made))
