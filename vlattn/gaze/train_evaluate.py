"""How well a model does on trials: loss, overlap, and how its greedy paths behave beside people's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlattn.gaze.decode import Decoding, generate
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATData, Search
from vlattn.gaze.oat_chances import overlap, path_losses, step_chances
from vlattn.gaze.train_behaviour import delta, mean_behaviour


def evaluate_oat(model: OAT, data: OATData, searches: Sequence[Search]) -> dict[str, float]:
    """Scores of a model that knows its `longest` path, as the log of a training run keeps them.

    Returns:
        loss: mean -log p in nats over fixations and ends, among what generation can choose.
        sim: mean chance of the next fixation, ends left out; the paper's. delta: of greedy paths, the paper's.
        correct, length, search, refix, revisit: of greedy paths, what delta compares.
    """
    chances = step_chances(model, data, searches)
    paths = [some[0].objects for some in generate(model, data, searches, Decoding())]
    found = mean_behaviour(searches, paths)
    human = mean_behaviour(searches, [one.path or () for one in searches])
    return {
        "loss": float(np.mean(np.concatenate(path_losses(chances, searches)))),
        "sim": overlap(chances, searches),
        "delta": delta(found, human),
        **found,
    }
