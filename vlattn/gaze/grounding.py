"""What a language model's attention on objects says: in which order it looks at them, and whether at the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.baselines import path_trial
from vlattn.gaze.bridge import ObjectAttention, Search, chosen
from vlattn.gaze.metrics.average import percentiles, resamples
from vlattn.gaze.trial import GazeSet, Trial

Heads = Sequence[tuple[int, int]]
LEVEL = 0.95


def attention_paths(
    gaze: GazeSet,
    found: Mapping[Search, ObjectAttention],
    *,
    name: str = "attention",
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    per_area: bool = False,
    to_target: bool = True,
) -> GazeSet:
    """A predicted path for each trial T, as trial T/0: objects in descending attention, none of them twice.

    Args:
        gaze: trials.
        found: what `object_attention` read for them.
        name: the subject of the predictions.
        layers, heads: average over these layers, or these (layer, head); None takes all.
        per_area: order by attention per token of the box rather than in the box.
        to_target: end on the target, where it is in the scene, as a search does; else all objects are in the path.

    Raises:
        InputError: nothing was read for a trial, or no such layer or head.
    """
    made = []
    for trial in gaze.trials:
        order = np.argsort(-_attention(found, trial, layers, heads, per_area), kind="stable").tolist()
        if to_target and trial.target_object is not None:
            order = order[: order.index(trial.target_object) + 1]
        made.append(path_trial(trial, gaze.scene_of(trial), order, name))
    return replace(gaze, trials=tuple(made))


@dataclass(frozen=True)
class Grounding:
    """How often attention singles out the target, over searches whose target is in the scene beside other objects.

    per_area: share in which the target's box has the most attention per token. by_head: the same, float64 [L, H].
    pointing: share in which the token with the most attention lies in the target's box, by at least half as much as any
        token does.
    chance_per_area, chance_pointing: of an object, and of a token, drawn at random.
    n_valid, n_total: searches that count, and all of them.
    per_area_interval, pointing_interval: 95% percentile bootstrap over searches; None without one.
    """

    per_area: float
    by_head: np.ndarray
    pointing: float
    chance_per_area: float
    chance_pointing: float
    n_valid: int
    n_total: int
    per_area_interval: tuple[float, float] | None = None
    pointing_interval: tuple[float, float] | None = None


def grounding(
    gaze: GazeSet,
    found: Mapping[Search, ObjectAttention],
    *,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    n_boot: int = 0,
    seed: int = 0,
) -> Grounding:
    """Score attention as grounding; each search counts once, however many subjects made it.

    Left out (see n_valid): scenes of one object, where any attention is right; targets that are not in the scene, and
    those that the model does not see. The pointing game is that of "Top-down Neural Attention by Excitation Backprop",
    arXiv 1608.00507, here with the target's box.

    Args:
        gaze, found, layers, heads: as for `attention_paths`; `by_head` is of every head, whatever these say.
        n_boot, seed: of the intervals; 0 for none.

    Raises:
        InputError: as `attention_paths`.
    """
    searches: dict[Search, Trial] = {}
    for trial in gaze.trials:
        searches.setdefault((trial.scene, trial.target), trial)
    rows, by_head = [], []
    for search, trial in searches.items():
        density = _attention(found, trial, layers, heads, True)
        one, target = found[search], trial.target_object
        if target is None or len(density) < 2 or not one.area[target] > 0:
            continue
        tokens = chosen(one.tokens, layers, heads)
        inside = one.cover[target] >= one.cover[target].max() / 2
        rows.append((density.argmax() == target, inside.flat[tokens.argmax()], 1 / len(density), inside.mean()))
        by_head.append(_density(one.objects, one.area).argmax(-1) == target)
    if not rows:
        raise InputError("gaze: no search has its target in a scene of several objects; give trials with target_object")
    each = np.array(rows, np.float64)
    per_area, pointing, of_objects, of_tokens = each.mean(0).tolist()
    samples = resamples(len(each), n_boot, seed) @ each[:, :2] / len(each)
    low, high = percentiles(samples, LEVEL)
    area, point = ((float(low[k]), float(high[k])) if n_boot else None for k in (0, 1))
    heads_alone = np.mean(by_head, 0)
    return Grounding(per_area, heads_alone, pointing, of_objects, of_tokens, len(rows), len(searches), area, point)


def _attention(
    found: Mapping[Search, ObjectAttention],
    trial: Trial,
    layers: Sequence[int] | None,
    heads: Heads | None,
    per_area: bool,
) -> np.ndarray:
    """Of each object, [P]."""
    one = found.get((trial.scene, trial.target))
    if one is None:
        raise InputError(f"found: has nothing of trial {trial.id!r}; read its scene and target with object_attention")
    attention = chosen(one.objects, layers, heads)
    return _density(attention, one.area) if per_area else attention


def _density(attention: np.ndarray, area: np.ndarray) -> np.ndarray:
    """[..., P]: attention per token; 0 for what is not seen."""
    return np.divide(attention, area, out=np.zeros_like(attention), where=area > 0)
