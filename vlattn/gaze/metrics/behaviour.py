"""Search behaviour over objects: new ones, returns and stays, and how far a model's shares are from people's."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Degenerate, Floats
from vlattn.gaze.metrics.set_rule import SetRule, evaluate

BEHAVIOUR = ("correct", "length", "search", "refix", "revisit")


def behaviour(paths: Paths, symbols: str = "objects") -> Floats:
    """float64 [B, 5]: last object is the target, length, and the shares of search, refixation and revisit.

    A path falls into runs of one object. search: runs of an object seen for the first time; revisit: runs of one seen
    in an earlier run; refix: fixations that stay. The three sum to 1. NaN for empty paths; `correct` is NaN where paths
    have no target.
    """
    found = np.full((len(paths), 5), np.nan)
    for row, (path, target) in enumerate(zip(paths.symbols_of(symbols), paths.targets, strict=True)):
        if not path:
            continue
        seen: set[Hashable] = set()
        search = revisit = 0
        for place, one in enumerate(path):
            if place and one == path[place - 1]:
                continue
            if one in seen:
                revisit += 1
            else:
                search += 1
                seen.add(one)
        n = len(path)
        correct = np.nan if target is None else float(path[-1] == target)
        found[row] = correct, n, search / n, (n - search - revisit) / n, revisit / n
    return found


def delta(model: Floats, human: Floats) -> Floats:
    """Mean relative difference [...] of averages [..., 5], over those that are known and, for people, not 0."""
    kept = kept_behaviour(model, human)
    off = np.abs(model - human) / np.where(kept, human, 1)
    count = kept.sum(-1)
    return np.divide(np.where(kept, off, 0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def kept_behaviour(model: Floats, human: Floats) -> np.ndarray:
    """bool [..., 5]: which averages `delta` compares."""
    return ~np.isnan(model) & ~np.isnan(human) & (human != 0)


def behaviour_rule(symbols: str = "objects") -> SetRule:
    return SetRule(lambda paths: behaviour(paths, symbols), delta, by_task=False)


def behaviour_delta(
    predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", symbols: str = "objects"
) -> float:
    """How far the five averages of `behaviour` are from people's, relative to these; 0 is best.

    "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335. Averages are of shares per
    path, over the samples of a trial, then over trials. It compares sets: but for `correct`, swapping predictions
    between trials changes nothing, so it says little alone. Averages that are 0 for people are left out
    (`kept_behaviour`).

    Args:
        predicted, human: sets of paths of any sizes. on_degenerate: see `policy`.
        symbols: their kind, of which `Paths.targets` are.
    """
    return evaluate(behaviour_rule(symbols), "behaviour_delta", predicted, human, on_degenerate)
