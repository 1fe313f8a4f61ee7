"""What a search model without weights may know of a trial: where objects are, and how alike and how salient each is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.appearance import likeness, thumbnails
from vlattn.gaze.saliency import object_saliency
from vlattn.gaze.trial import GazeSet, Scene, Trial
from vlattn.image_file import read_rgb

Similarity = Literal["pixels", "labels"]


@dataclass(frozen=True)
class SearchView:
    """One search of P objects.

    centers: float64 [P, 2], pixels. size: width and height of the screen.
    target: index of the target; None where it is not in the scene.
    similarity: float64 [P], to the target, 0 to 1. saliency: float64 [P], at least 0.
    """

    centers: np.ndarray
    size: tuple[int, int]
    target: int | None
    similarity: np.ndarray
    saliency: np.ndarray


class SearchViews:
    """Views of the trials of a set; each scene is looked at once.

    similarity: "pixels" compares what pictures show of the objects; "labels" is 1 for objects of the target's label and
        0 for others, and needs no pictures (saliency is then the same for all objects).

    Raises:
        InputError: when asked for a trial of a scene without objects or, with "pixels", without a picture or target.
    """

    def __init__(self, gaze: GazeSet, similarity: Similarity = "pixels") -> None:
        require_choice("similarity", similarity, ("pixels", "labels"))
        self._gaze, self._similarity = gaze, similarity
        self._seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, trial: Trial) -> SearchView:
        scene = self._gaze.scene_of(trial)
        if not scene.objects:
            raise InputError(f"trial {trial.id!r}: scene {scene.id!r} has no objects, so there is nothing to look at")
        size, count = (scene.width, scene.height), len(scene.objects)
        if self._similarity == "labels":
            alike = np.array([float(one.label == trial.target) for one in scene.objects])
            return SearchView(scene.centers(), size, trial.target_object, alike, np.ones(count))
        if trial.target_object is None:
            raise InputError(
                f"trial {trial.id!r}: target_object is missing, so nothing can be compared with the target; name its "
                "index in the scene, or give similarity='labels'"
            )
        looks, saliency = self._look(scene)
        return SearchView(scene.centers(), size, trial.target_object, likeness(looks, trial.target_object), saliency)

    def all(self, trials: Iterable[Trial]) -> list[SearchView]:
        return [self.of(trial) for trial in trials]

    def _look(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        if scene.id not in self._seen:
            picture, screen = read_rgb(self._gaze.image_path(scene)), (scene.width, scene.height)
            boxes = scene.boxes()
            self._seen[scene.id] = thumbnails(picture, boxes, screen), object_saliency(picture, boxes, screen)
        return self._seen[scene.id]
