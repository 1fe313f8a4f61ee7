"""Scores of single predicted steps against where people looked next, the true path being known up to there.

All take `predicted` [S, C], a row per step over cells, pixels ([S, H, W] is flattened) or objects, and `human` [S], the
index in the row that was looked at, -1 for steps to leave out (the end of a path, say): float64 [S], NaN for those.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vlattn.checks import require_choice
from vlattn.errors import InputError
from vlattn.gaze.metrics.policy import Degenerate, Floats, Ints, settle

EPS = float(np.finfo(np.float64).eps)


def step_overlap(predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan") -> Floats:
    """The predicted probability of what was looked at: histogram intersection with the one-hot truth, higher is better.

    "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335, calls it SIM.

    Args:
        predicted: probabilities; rows sum to 1. human: see above.
        on_degenerate: `raise` refuses steps that are left out.

    Raises:
        InputError: no probabilities, indices outside, shapes that do not fit.
    """
    maps, at = _read(predicted, human, chances=True)
    return _settle("step_overlap", _chosen(maps, at), at, on_degenerate)


def step_nll(predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan") -> Floats:
    """-log of that probability, in nats, lower is better; exp of its mean is perplexity. As for `step_overlap`."""
    maps, at = _read(predicted, human, chances=True)
    with np.errstate(divide="ignore"):
        return _settle("step_nll", -np.log(_chosen(maps, at)), at, on_degenerate)


def step_gain(
    predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan", base: ArrayLike | None = None
) -> Floats:
    """Information gain over a base distribution in bits, higher is better.

    "Information-theoretic model comparison unifies saliency metrics", PNAS 2015.

    Args:
        predicted, human, on_degenerate: as for `step_overlap`.
        base: probabilities [C] or [S, C], such as where people look on average in the training set; uniform by default.
    """
    maps, at = _read(predicted, human, chances=True)
    if base is None:
        prior = np.full(maps.shape, 1 / maps.shape[1])
    else:
        given = np.asarray(base, np.float64)
        given = given.reshape(-1) if given.size == maps.shape[1] else given.reshape(len(given), -1)
        if given.shape not in (maps.shape, maps.shape[1:]):
            raise InputError(f"base: got shape {given.shape} for maps {maps.shape}; give [C] or [S, C]")
        prior = np.broadcast_to(given, maps.shape)
        _check_chances("base", prior)
    return _settle("step_gain", np.log2(_chosen(maps, at) + EPS) - np.log2(_chosen(prior, at) + EPS), at, on_degenerate)


def step_nss(predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan") -> Floats:
    """Normalised scanpath saliency: the value there in standard deviations above the mean; 0 for a constant map.

    "Components of bottom-up gaze allocation in natural images", Vision Research 2005. Higher is better. Maps need not
    be probabilities; otherwise as for `step_overlap`.
    """
    maps, at = _read(predicted, human)
    spread, flat = maps.std(1), np.ptp(maps, axis=1) == 0
    return _settle(
        "step_nss", np.where(flat, 0, (_chosen(maps, at) - maps.mean(1)) / np.where(flat, 1, spread)), at, on_degenerate
    )


def step_auc(predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan", form: str = "roc") -> Floats:
    """How many other locations have a lower value, higher is better. Ties count against the model.

    Args:
        predicted, human, on_degenerate: as for `step_nss`.
        form: `roc`, the area under (0, 0), (fp, 1), (1, 1) with fp the share of others that are no lower, so 0.5 at
            worst; `share`, 1 - fp.
    """
    require_choice("form", form, ("roc", "share"))
    maps, at = _read(predicted, human)
    others = maps.shape[1] - 1
    rank = (maps >= _chosen(maps, at)[:, None]).sum(1) - 1
    wrong = rank / others if others else np.full(len(maps), np.nan)
    return _settle("step_auc", 1 - wrong / (2 if form == "roc" else 1), at, on_degenerate)


def step_cc(predicted: ArrayLike, human: ArrayLike, *, on_degenerate: Degenerate = "nan") -> Floats:
    """Pearson's correlation of two maps, higher is better; 0 where either is constant.

    Args:
        predicted, on_degenerate: as for `step_nss`.
        human: indices, which stand for a map with a 1 there, or maps [S, C], such as blurred fixations.
    """
    given = np.asarray(human)
    if given.ndim == 1:
        maps, at = _read(predicted, human)
        truth = np.zeros_like(maps)
        truth[np.arange(len(maps)), at] = at >= 0
    else:
        truth = given.reshape(len(given), -1).astype(np.float64)
        maps, at = _read(predicted, np.zeros(len(given), np.int64))
        if truth.shape != maps.shape or not np.isfinite(truth).all():
            raise InputError(f"human: got maps of shape {given.shape}; give finite ones as large as predicted's")
    a, b = (one - one.mean(1, keepdims=True) for one in (maps, truth))
    flat = (np.ptp(maps, axis=1) == 0) | (np.ptp(truth, axis=1) == 0)
    scale = np.where(flat, 1, np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    return _settle("step_cc", np.where(flat, 0, (a * b).sum(1) / scale), at, on_degenerate)


def _read(predicted: ArrayLike, human: ArrayLike, chances: bool = False) -> tuple[Floats, Ints]:
    maps, given = np.asarray(predicted, np.float64), np.asarray(human)
    if maps.ndim < 2 or maps.size == 0:
        raise InputError(f"predicted: got shape {maps.shape}; give [S, C] or [S, H, W], not empty")
    maps = maps.reshape(len(maps), -1)
    if given.shape != (len(maps),) or not np.issubdtype(given.dtype, np.integer):
        raise InputError(
            f"human: got {given.dtype} of shape {given.shape}; give {len(maps)} integers, one for each step"
        )
    if (given < -1).any() or (given >= maps.shape[1]).any():
        raise InputError(f"human: goes from {given.min()} to {given.max()}; give indices below {maps.shape[1]}, or -1")
    if not np.isfinite(maps).all():
        row = int(np.flatnonzero(~np.isfinite(maps).all(1))[0])
        raise InputError(f"predicted: row {row} is not finite; give finite values")
    if chances:
        _check_chances("predicted", maps)
    return maps, given.astype(np.int64)


def _check_chances(name: str, maps: Floats) -> None:
    odd = (maps < 0).any(1) | ~(np.abs(maps.sum(1) - 1) < 1e-3)
    if odd.any():
        row = int(np.flatnonzero(odd)[0])
        raise InputError(
            f"{name}: row {row} is no distribution (sum {maps[row].sum():g}, least {maps[row].min():g}); give "
            "probabilities that sum to 1"
        )


def _chosen(maps: Floats, at: Ints) -> Floats:
    return maps[np.arange(len(maps)), at]


def _settle(metric: str, values: Floats, at: Ints, on_degenerate: Degenerate) -> Floats:
    return settle(metric, np.where(at < 0, np.nan, values), at < 0, on_degenerate)
