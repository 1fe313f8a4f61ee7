"""Which of a language model's attention to read as scanpaths: chosen on searches that nothing is reported about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from vlattn.errors import InputError
from vlattn.gaze.bridge import ObjectAttention, Rows, Search
from vlattn.gaze.grounding import attention_paths
from vlattn.gaze.metrics.score import score_gaze
from vlattn.gaze.metrics.score_settings import ScoreSettings
from vlattn.gaze.trial import GazeSet

CHOSEN_BY = "ss"
"""The metric that the choice is made by, higher being better."""
Read = Mapping[Rows, Mapping[Search, ObjectAttention]]
"""What `object_attention` read, by the rows it was asked for."""


@dataclass(frozen=True)
class Reading:
    """rows: as `object_attention` takes them. layer: the mean of this layer's heads. per_area: order objects by
    attention per token of their box."""

    rows: Rows
    layer: int
    per_area: bool = False

    @classmethod
    def parse(cls, text: str) -> Reading:
        """From ROWS:LAYER, such as "target:0", with ":area" for per_area.

        Raises:
            InputError: another form.
        """
        found = re.fullmatch(rf"({'|'.join(get_args(Rows))}):(\d+)(:area)?", text)
        if found is None:
            raise InputError(f"attention: got {text!r}; give ROWS:LAYER or ROWS:LAYER:area, such as target:0, or auto")
        return cls(found[1], int(found[2]), found[3] is not None)  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        """What `parse` takes."""
        return f"{self.rows}:{self.layer}" + ":area" * self.per_area

    def paths(self, gaze: GazeSet, read: Read, name: str = "bridge") -> GazeSet:
        """A path for each trial; see `attention_paths`."""
        return attention_paths(gaze, read[self.rows], name=name, layers=[self.layer], per_area=self.per_area)


def choose_reading(questions: GazeSet, people: GazeSet, read: Read) -> tuple[Reading, list[dict[str, Any]]]:
    """The rows, layer and order whose paths have the best Sequence Score, the first of equal ones.

    Args:
        questions: one trial for each scene and target. people: all trials of these, from a part of the data that is
            kept for such choices.
        read: of these scenes and targets.

    Returns:
        The best, and all with their scores as plain data.
    """
    tried = []
    for rows, found in read.items():
        depth = len(next(iter(found.values())).objects)
        for reading in (Reading(rows, layer, dense) for layer in range(depth) for dense in (False, True)):
            scored = score_gaze(
                reading.paths(questions, read), people, metrics=[CHOSEN_BY], settings=ScoreSettings(n_boot=0)
            )
            (model,) = scored["models"].values()
            tried.append((model["metrics"][CHOSEN_BY]["value"], reading))
    best = max(tried, key=lambda pair: pair[0])
    return best[1], [{**asdict(reading), CHOSEN_BY: value} for value, reading in tried]
