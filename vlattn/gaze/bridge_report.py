"""A language model's attention beside OAT: a predictor of scanpaths on the same searches, and a test of grounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.bridge import object_attention
from vlattn.gaze.bridge_choice import CHOSEN_BY, Read, Reading, choose_reading
from vlattn.gaze.grounding import grounding
from vlattn.gaze.metrics.gaze_paths import one_of_each
from vlattn.gaze.trial import GazeSet

CHOICES = ("prompt", "target")


def ask_bridge(
    model: Any,
    processor: Any,
    questions: GazeSet,
    val: GazeSet | None = None,
    reading: Reading | None = None,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    heard: Callable[[str], object] = lambda what: None,
) -> tuple[GazeSet, dict[str, Any]]:
    """Paths of a language model's attention, and how well that attention finds the target.

    Each path ends on the target, as a search does that knows where it is: so does OAT, which is told.

    Args:
        questions: one trial for each scene and target that is asked about.
        val: trials to choose the reading on; nothing about `questions` is looked at for it.
        reading: None chooses it, by the Sequence Score.
        n_boot, seed: bootstrap over searches, for the intervals of grounding.
        heard: hears what is being done.

    Returns:
        The paths, of the subject "bridge", and plain data: `reading`, `chosen_by`, `tried` on val, and `grounding`.

    Raises:
        InputError: neither `val` nor `reading`, a layer that there is not, or as `object_attention` does.
    """
    tried = None
    if reading is None:
        if val is None:
            raise InputError("attention: got auto, but there is no val part to choose on; give such as target:0")
        heard("bridge: attention on val")
        asked = one_of_each(val)
        read: Read = {rows: object_attention(model, processor, asked, rows=rows) for rows in CHOICES}  # type: ignore[arg-type, misc]
        reading, tried = choose_reading(asked, val, read)
    heard("bridge: attention")
    found = object_attention(model, processor, questions, rows=reading.rows)
    paths = reading.paths(questions, {reading.rows: found})
    score = grounding(questions, found, layers=[reading.layer], n_boot=n_boot, seed=seed)
    told = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(score).items()}
    return paths, {
        "reading": reading.text,
        "chosen_by": None if tried is None else f"{CHOSEN_BY} on val",
        "tried": tried,
        "grounding": told,
    }
