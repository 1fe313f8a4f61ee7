"""Parting trials into train, val and test, by what must not be seen in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlattn.checks import require_choice, require_number
from vlattn.errors import InputError
from vlattn.gaze.trial import GazeSet, Trial

By = Literal["trial", "scene", "target", "subject", "pair"]
BY = ("trial", "scene", "target", "subject", "pair")


@dataclass(frozen=True)
class GazeSplit:
    """Three sets with the scenes of all, and trials in the order they came."""

    train: GazeSet
    val: GazeSet
    test: GazeSet


def split_gaze(
    gaze: GazeSet,
    by: By = "trial",
    *,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> GazeSplit:
    """Part a set at random.

    "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335, parts by trial, 80 : 10 :
    10, so that test asks for targets and shows scenes that training had, also the very pair by another subject; and for
    unseen combinations holds out all trials of a pair of target and scene (layout).

    Args:
        gaze: what to part.
        by: "trial"; "scene", "target" or "subject": all trials of one are in the same part; "pair": test has pairs
            (target, scene) of which training has target and scene, but never together, and val is drawn from the rest
            by trial.
        val, test: shares of the trials, scenes, targets, subjects or pairs; at least one of them is in each part.
        seed: the same seed parts the same set alike.
        pairs: with "pair", the (target, scene) to hold out, in place of a random share.

    Raises:
        InputError: too few of them for three parts, no pair that can be held out, or an unknown pair.
    """
    require_choice("by", by, BY)
    for name, share in (("val", val), ("test", test)):
        require_number(name, share, 0, 1)
    if not 0 < val + test < 1:
        raise InputError(f"val, test: got {val} and {test}; give shares that leave some for training")
    if pairs is not None and by != "pair":
        raise InputError(f"pairs: got some with by={by!r}; give by='pair', or leave pairs out")
    rng = np.random.default_rng(seed)
    if by != "pair":
        keys = [_key(trial, by) for trial in gaze.trials]
        part = _parted(list(dict.fromkeys(keys)), val, test, rng, by)
        return _split(gaze, [part[key] for key in keys])
    both = [(trial.target, trial.scene) for trial in gaze.trials]
    held = _unseen(list(dict.fromkeys(both)), test, rng) if pairs is None else _known(pairs, both)
    chosen = _apart([n for n, pair in enumerate(both) if pair not in held], both, val, rng)
    parts = ["test" if both[n] in held else "val" if n in chosen else "train" for n in range(len(both))]
    return _split(gaze, parts)


def _key(trial: Trial, by: str) -> Hashable:
    return trial.id if by == "trial" else getattr(trial, by)


def _parted(keys: list[Hashable], val: float, test: float, rng: np.random.Generator, by: str) -> dict[Hashable, str]:
    """First train, then val, then test of one permutation, as in the paper."""
    counts = [max(1, round(share * len(keys))) if share else 0 for share in (val, test)]
    train = len(keys) - sum(counts)
    if train < 1:
        raise InputError(
            f"by: {len(keys)} {by}s cannot be parted into train, val and test; give by='trial' or more data"
        )
    order = [keys[i] for i in rng.permutation(len(keys))]
    names = ["train"] * train + ["val"] * counts[0] + ["test"] * counts[1]
    return dict(zip(order, names, strict=True))


def _unseen(pairs: list[tuple[str, str]], share: float, rng: np.random.Generator) -> set[tuple[str, str]]:
    """Pairs to hold out so that both of each one's halves still occur in others."""
    wanted = max(1, round(share * len(pairs))) if share else 0
    targets, scenes = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    held: set[tuple[str, str]] = set()
    for number in rng.permutation(len(pairs)):
        target, scene = pairs[number]
        if len(held) < wanted and targets[target] > 1 and scenes[scene] > 1:
            held.add((target, scene))
            targets[target] -= 1
            scenes[scene] -= 1
    if wanted and not held:
        raise InputError(
            "by: no pair of target and scene can be held out, because each has a target or a scene that occurs in no "
            "other; give by='scene' or by='target'"
        )
    return held


def _apart(rest: list[int], both: list[tuple[str, str]], share: float, rng: np.random.Generator) -> set[int]:
    """Trials for val, of those that are left; each target and each scene keeps one for training."""
    targets, scenes = (Counter(both[n][side] for n in rest) for side in (0, 1))
    wanted = max(1, round(share * len(both))) if share else 0
    chosen: set[int] = set()
    for place in rng.permutation(len(rest)):
        target, scene = both[rest[place]]
        if len(chosen) < wanted and targets[target] > 1 and scenes[scene] > 1:
            chosen.add(rest[place])
            targets[target] -= 1
            scenes[scene] -= 1
    if len(chosen) == len(rest):
        raise InputError("pairs: nothing is left to train on; hold fewer out")
    return chosen


def _known(pairs: Sequence[tuple[str, str]], both: list[tuple[str, str]]) -> set[tuple[str, str]]:
    for pair in pairs:
        if tuple(pair) not in set(both):
            raise InputError(f"pairs: no trial looks for {pair[0]!r} in scene {pair[1]!r}; give (target, scene) of one")
    return {(target, scene) for target, scene in pairs}


def _split(gaze: GazeSet, parts: list[str]) -> GazeSplit:
    def one(name: str) -> GazeSet:
        return replace(gaze, trials=tuple(t for t, part in zip(gaze.trials, parts, strict=True) if part == name))

    return GazeSplit(one("train"), one("val"), one("test"))
