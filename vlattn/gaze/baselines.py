"""Models of search that need no training, to measure others against: what chance, habit and looks alone predict.

Each says the probability of every next step, as the searcher does, and samples paths. Those without a will of their own
to stop end as often as training paths of that length did; how strongly they follow their score is fitted to training
paths as well, by maximum likelihood, so that they are as good as their idea allows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vlattn.checks import require_choice, require_count
from vlattn.errors import InputError
from vlattn.gaze.search_view import SearchView, SearchViews, Similarity
from vlattn.gaze.searcher import Searcher
from vlattn.gaze.trial import Fixation, GazeSet, Scene, Trial

BASELINES = ("random", "centre", "saliency", "similarity", "searcher")
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class SearchModel(Protocol):
    """Anything that knows the next step of a search."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    def probabilities(self, view: SearchView, path: Sequence[int]) -> np.ndarray:
        """[P + 1]: each object, and the end, after `path`."""
        ...

    def sample(self, view: SearchView, rng: np.random.Generator, count: int = 1) -> list[list[int]]:
        """`count` paths of object indices."""
        ...


def central(view: SearchView) -> np.ndarray:
    """1 in the middle of the screen, falling with the squared distance in half sides of it; [P]."""
    half = np.array(view.size) / 2
    return 1 - (((view.centers - half) / half) ** 2).sum(1) / 2


SCORES: dict[str, Callable[[SearchView], np.ndarray]] = {
    "random": lambda view: np.zeros(len(view.centers)),
    "centre": central,
    "saliency": lambda view: view.saliency / view.saliency.max(),
    "similarity": lambda view: view.similarity,
}


@dataclass(frozen=True)
class ScoreModel:
    """Draws objects with softmax(strength x score), whatever was fixated before.

    name: of `SCORES`. strength: 0 is chance.
    stops: float64 [T], the chance to end after 1, 2, ... fixations. later: after more than T.
    """

    name: str
    strength: float
    stops: np.ndarray
    later: float = 1.0

    def probabilities(self, view: SearchView, path: Sequence[int]) -> np.ndarray:
        objects, end = _softmax(self.strength * SCORES[self.name](view)), self._end(len(path))
        return np.append((1 - end) * objects, end)

    def sample(self, view: SearchView, rng: np.random.Generator, count: int = 1) -> list[list[int]]:
        objects = _softmax(self.strength * SCORES[self.name](view))
        paths = []
        for _ in range(count):
            length = 1
            while rng.random() >= self._end(length):
                length += 1
            paths.append(rng.choice(len(objects), length, p=objects).tolist())
        return paths

    def _end(self, length: int) -> float:
        if length == 0:
            return 0.0
        return float(self.stops[length - 1]) if length <= len(self.stops) else self.later


def make_baseline(name: str, train: GazeSet | None = None, similarity: Similarity = "pixels") -> SearchModel:
    """A baseline, fitted to training trials.

    Args:
        name: of `BASELINES`. "searcher" is the one that made the embedded data: on these it is the best that can be.
        train: trials with `objects`, all on objects; "searcher" needs none.
        similarity: as for `SearchViews`.

    Raises:
        InputError: an unknown name, no trial to fit to, or fixations on no object.
    """
    require_choice("name", name, BASELINES)
    if name == "searcher":
        return Searcher()
    paths = [] if train is None else [(trial, object_path(trial)) for trial in train.trials]
    paths = [(trial, path) for trial, path in paths if path]
    if train is None or not paths:
        raise InputError(f"train: got no path to fit {name!r} to; give trials with fixations")
    lengths = np.array([len(path) for _, path in paths])
    usual = len(lengths) / lengths.sum()
    steps = np.arange(1, int(lengths.max()) + 1)
    # As if one more path had gone on everywhere as usual: nothing is impossible, and rare lengths say little.
    stops = ((lengths == steps[:, None]).sum(1) + usual) / ((lengths >= steps[:, None]).sum(1) + 1)
    views = SearchViews(train, similarity)
    scored = [(SCORES[name](views.of(trial)), path) for trial, path in paths]
    fit = [sum(float(np.log(_softmax(beta * score)[path]).sum()) for score, path in scored) for beta in STRENGTHS]
    return ScoreModel(name, STRENGTHS[int(np.argmax(fit))], stops, float(usual))


def object_path(trial: Trial) -> list[int]:
    """The fixated objects of a trial.

    Raises:
        InputError: fixations were not assigned, or one is on no object.
    """
    if trial.objects is None or -1 in trial.objects:
        raise InputError(
            f"trial {trial.id!r}: objects is missing or has -1, but models point at objects; assign fixations first, "
            "with assign_objects(gaze, 'nearest' or 'drop')"
        )
    return list(trial.objects)


def predict_paths(
    model: SearchModel, gaze: GazeSet, samples: int = 1, seed: int = 0, similarity: Similarity = "pixels"
) -> GazeSet:
    """Sampled paths for each trial T, as trials T/0 to T/(samples - 1) with the model's name as subject.

    Fixations are in the middle of the objects, without durations. A trial's samples depend on its id and
    the seed alone. With `Searcher()` on the embedded data this is the searcher against itself: the ceiling.
    """
    require_count("samples", samples)
    views, found = SearchViews(gaze, similarity), []
    for trial in gaze.trials:
        rng = np.random.default_rng([seed, zlib.crc32(trial.id.encode())])
        scene = gaze.scene_of(trial)
        for number, path in enumerate(model.sample(views.of(trial), rng, samples)):
            found.append(path_trial(trial, scene, path, model.name, number))
    return replace(gaze, trials=tuple(found))


def direct_paths(gaze: GazeSet, name: str = "direct") -> GazeSet:
    """A path of one fixation, on the target, for each trial that has it in its scene.

    It takes nothing but to know where the target is, and scores of similarity like it where people are quick: what they
    say of a model is to be read beside it.
    """
    known = [(trial, trial.target_object) for trial in gaze.trials if trial.target_object is not None]
    return replace(gaze, trials=tuple(path_trial(trial, gaze.scene_of(trial), [at], name) for trial, at in known))


def path_trial(trial: Trial, scene: Scene, path: Sequence[int], model: str, sample: int = 0) -> Trial:
    """A predicted path of object indices as a trial T/sample, each fixation in the middle of its object."""
    centers = scene.centers()
    fixations = tuple(Fixation(float(x), float(y)) for x, y in (centers[index] for index in path))
    return replace(
        trial, id=f"{trial.id}/{sample}", subject=model, fixations=fixations, objects=tuple(path), correct=None
    )


def step_losses(model: SearchModel, gaze: GazeSet, similarity: Similarity = "pixels") -> list[np.ndarray]:
    """-log p of each step that people took, the end last, in nats: float64 [T + 1] per trial.

    Steps are predicted from the true ones before them. On data that a `Searcher` made, its own mean is the least that a
    model can expect. Infinite where a model says impossible.
    """
    views, found = SearchViews(gaze, similarity), []
    for trial in gaze.trials:
        path, view = object_path(trial), views.of(trial)
        chances = [model.probabilities(view, path[:t]) for t in range(len(path) + 1)]
        with np.errstate(divide="ignore"):
            found.append(-np.log([p[step] for p, step in zip(chances, [*path, -1], strict=True)]))
    return found


def _softmax(score: np.ndarray) -> np.ndarray:
    chances = np.exp(score - score.max())
    return chances / chances.sum()
