"""One side of a comparison: paths, and what each was made for; and which rows of two sides belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.metrics.gaze_paths import Stimulus, gaze_paths, stimulus_of
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Ints
from vlattn.gaze.metrics.symbols import Clusters, fixation_clusters
from vlattn.gaze.trial import GazeSet


@dataclass(frozen=True, eq=False)
class Side:
    """B paths with, for each, its stimulus, the subject whose it is, and the trial that it is, or is for."""

    paths: Paths
    stimuli: tuple[Stimulus, ...]
    subjects: tuple[str, ...]
    trials: tuple[str, ...]

    @classmethod
    def of(cls, gaze: GazeSet, known: frozenset[str] = frozenset()) -> Side:
        """known: ids of human trials, of which predictions T/0, T/1, ... are samples."""
        trials = tuple(_sampled(trial.id, known) for trial in gaze.trials)
        stimuli = tuple(stimulus_of(trial) for trial in gaze.trials)
        # Samples for no known trial are samples for their stimulus.
        names = tuple(t if t in known else s for t, s in zip(trials, stimuli, strict=True)) if known else trials
        subjects = tuple(trial.subject for trial in gaze.trials)
        return cls(replace(gaze_paths(gaze), trials=names), stimuli, subjects, trials)

    def take(self, rows: Ints) -> Side:
        places = rows.tolist()
        return Side(
            self.paths.take(rows),
            tuple(self.stimuli[i] for i in places),
            tuple(self.subjects[i] for i in places),
            tuple(self.trials[i] for i in places),
        )

    def truncated(self, longest: int | None) -> Side:
        return self if longest is None else replace(self, paths=self.paths.truncated(longest))

    def clustered(self, clusters: Mapping[Stimulus, Clusters]) -> Side:
        """With symbols of the kind "clusters"; none of an unknown stimulus."""
        found = []
        for row, stimulus in enumerate(self.stimuli):
            points = self.paths.points[row, : self.paths.lengths[row]]
            known = clusters.get(stimulus)
            found.append([-1] * len(points) if known is None else known.of(points).tolist())
        return replace(self, paths=self.paths.with_symbols("clusters", found))


def _sampled(name: str, known: frozenset[str]) -> str:
    trial, slash, _ = name.rpartition("/")
    return trial if slash and name not in known and trial in known else name


def human_clusters(human: Side) -> dict[Stimulus, Clusters]:
    """Of all people's fixations on each stimulus."""
    points = defaultdict(list)
    for row, stimulus in enumerate(human.stimuli):
        points[stimulus].append(human.paths.points[row, : human.paths.lengths[row]])
    stacked = {stimulus: np.concatenate(found) for stimulus, found in points.items()}
    return {stimulus: fixation_clusters(found) for stimulus, found in stacked.items() if len(found)}


def match(predicted: Side, human: Side, compare: str) -> tuple[Ints, Ints]:
    """Rows of both sides that are compared: int64 [P] each."""
    by: defaultdict[object, list[int]] = defaultdict(list)
    keys, wanted = (human.trials, predicted.trials) if compare == "trial" else (human.stimuli, predicted.stimuli)
    for row, key in enumerate(keys):
        by[key].append(row)
    pairs = [(row, other) for row, key in enumerate(wanted) if key in by for other in by[key]]
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def match_people(human: Side) -> tuple[Ints, Ints]:
    """Each human path with those of other people on the same stimulus."""
    first, second = match(human, human, "stimulus")
    subjects = np.array(human.subjects, object)
    other = subjects[first] != subjects[second] if len(first) else np.zeros(0, bool)
    return first[other], second[other]


def check_scenes(predicted: GazeSet, human: GazeSet) -> None:
    """Refuse scenes that both sets have, but not alike."""
    for name, scene in predicted.scenes.items():
        other = human.scenes.get(name)
        if other is None:
            continue
        if (scene.width, scene.height) != (other.width, other.height):
            raise InputError(
                f"scene {name!r}: is {scene.width} x {scene.height} in the predictions and {other.width} x "
                f"{other.height} in the human file; scale the predictions"
            )
        if scene.objects != other.objects:
            raise InputError(f"scene {name!r}: has other objects in the human file; use the same scenes in both files")
