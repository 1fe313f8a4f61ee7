"""How fast the target is found: the share of paths that are on it by each fixation, and what is read off that curve.

Paths have the target's box, and begin with the fixation they start from (the centre, in COCO-Search18): entry 1.
"Predicting Goal-directed Human Attention Using Inverse Reinforcement Learning", arXiv 2005.14310.
"""

from __future__ import annotations

import numpy as np

from vlattn.checks import require_count
from vlattn.gaze.metrics.average import codes, over_tasks
from vlattn.gaze.metrics.paths import Paths
from vlattn.gaze.metrics.policy import Degenerate, Floats
from vlattn.gaze.metrics.set_rule import SetRule, evaluate, trial_means

MAX_STEP = 6
"""Fixations after the first: published for target-present search; 9 for target-absent."""


def search_steps(paths: Paths) -> Floats:
    """Number, from 1, of the first fixation strictly inside the target's box: float64 [B].

    Infinite where there is none; NaN for empty paths and paths without a box.
    """
    low, size = paths.boxes[:, None, :2], paths.boxes[:, None, 2:]
    inside = ((paths.points > low) & (paths.points < low + size)).all(2) & paths.real
    step = np.full(len(paths), np.inf)
    row, place = np.nonzero(inside)
    np.minimum.at(step, row, place + 1)
    step[paths.empty | np.isnan(paths.boxes).any(1)] = np.nan
    return step


def search_hits(paths: Paths, max_step: int = MAX_STEP) -> Floats:
    """1 where a path is on the target by fixation k = 1 to max_step + 1: float64 [B, max_step + 1]."""
    require_count("max_step", max_step, 0)
    step = search_steps(paths)[:, None]
    return np.where(np.isnan(step), np.nan, step <= np.arange(1, max_step + 2))


def search_curve(paths: Paths, max_step: int = MAX_STEP) -> Floats:
    """Search accuracy: the share of paths on the target by each fixation, in each task, then over tasks; [K]."""
    trials, first, _ = trial_means(search_hits(paths, max_step), paths)
    known = ~np.isnan(trials)
    tasks = codes([paths.tasks[row] for row in first])[0]
    return over_tasks(np.where(known, trials, 0), known.astype(np.float64), tasks)[0]


def path_ratios(paths: Paths, max_step: int = MAX_STEP) -> Floats:
    """The straight way from the first fixation to the middle of the target, over the way that was gone: float64 [B].

    At most 1. NaN for paths that do not find it by then, have one fixation, or no length.
    """
    step = search_steps(paths)
    legs = np.linalg.norm(np.diff(paths.points, axis=1), axis=2)  # [B, L - 1]
    taken = np.arange(1, legs.shape[1] + 1) < np.where(np.isnan(step), 0, step)[:, None]
    gone = np.where(taken, legs, 0).sum(1)
    start = paths.points[:, 0] if paths.points.shape[1] else np.zeros((len(paths), 2))
    straight = np.linalg.norm(start - (paths.boxes[:, :2] + paths.boxes[:, 2:] / 2), axis=1)
    usable = (step <= max_step + 1) & (paths.lengths > 1) & (gone > 0)
    return np.where(usable, np.minimum(1, straight / np.where(gone > 0, gone, 1)), np.nan)


def tfp_auc_rule(max_step: int = MAX_STEP) -> SetRule:
    return SetRule(lambda paths: search_hits(paths, max_step), lambda model, human: model.sum(-1))


def mismatch_rule(max_step: int = MAX_STEP) -> SetRule:
    return SetRule(lambda paths: search_hits(paths, max_step), lambda model, human: np.abs(model - human).sum(-1))


def found_rule(max_step: int = MAX_STEP) -> SetRule:
    return SetRule(lambda paths: search_hits(paths, max_step), lambda model, human: model[..., -1])


def ratio_rule(max_step: int = MAX_STEP) -> SetRule:
    return SetRule(lambda paths: path_ratios(paths, max_step)[:, None], lambda model, human: model[..., 0])


def step_rule(max_step: int = MAX_STEP) -> SetRule:
    def describe(paths: Paths) -> Floats:
        step = search_steps(paths)[:, None]
        return np.where(step <= max_step + 1, step, np.nan)

    return SetRule(describe, lambda model, human: model[..., 0])


def tfp_auc(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", max_step: int = MAX_STEP) -> float:
    """The sum of the predicted search curve's max_step + 1 entries (no trapezoids, despite the name); higher is better.

    Args:
        predicted, human: sets of paths of any sizes; human is not looked at, as in all but `probability_mismatch`.
        on_degenerate: see `policy`.
        max_step: fixations after the first that count.
    """
    return evaluate(tfp_auc_rule(max_step), "tfp_auc", predicted, human, on_degenerate)


def probability_mismatch(
    predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", max_step: int = MAX_STEP
) -> float:
    """The sum of differences of the two search curves; lower is better. Arguments as for `tfp_auc`."""
    return evaluate(mismatch_rule(max_step), "probability_mismatch", predicted, human, on_degenerate)


def target_found(
    predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", max_step: int = MAX_STEP
) -> float:
    """The last entry of the predicted search curve; higher is better. Arguments as for `tfp_auc`."""
    return evaluate(found_rule(max_step), "target_found", predicted, human, on_degenerate)


def scanpath_ratio(
    predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", max_step: int = MAX_STEP
) -> float:
    """The mean of `path_ratios` of predicted paths; higher is better. Arguments as for `tfp_auc`."""
    return evaluate(ratio_rule(max_step), "scanpath_ratio", predicted, human, on_degenerate)


def mean_step(predicted: Paths, human: Paths, *, on_degenerate: Degenerate = "nan", max_step: int = MAX_STEP) -> float:
    """The mean number of the fixation that finds the target, among paths that do; lower is better. As for `tfp_auc`."""
    return evaluate(step_rule(max_step), "mean_step", predicted, human, on_degenerate)
