"""A model beside people, chance, simple ideas of search, and the best there can be where that is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.gaze.baselines import make_baseline, predict_paths, step_losses
from vlattn.gaze.decode import Decoding
from vlattn.gaze.decode_trials import predict_trials
from vlattn.gaze.metrics.gaze_paths import one_of_each
from vlattn.gaze.metrics.score import score_gaze
from vlattn.gaze.metrics.score_settings import ScoreSettings
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATData, searches_of
from vlattn.gaze.oat_chances import overlap, path_losses, step_chances
from vlattn.gaze.search_view import Similarity
from vlattn.gaze.trial import GazeSet

METRICS = ("ss", "ed_norm", "scanmatch", "multimatch", "target_found", "tfp_auc", "scanpath_ratio", "behaviour_delta")


def report_oat(
    model: OAT,
    data: OATData,
    people: GazeSet,
    train: GazeSet | None = None,
    baselines: Sequence[str] = (),
    *,
    others: Mapping[str, GazeSet] | None = None,
    samples: int = 20,
    metrics: Sequence[str] | None = METRICS,
    settings: ScoreSettings | None = None,
    seed: int = 0,
    similarity: Similarity = "pixels",
    parity: bool = False,
    heard: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Score sampled and greedy paths of a model, and those of baselines, against people.

    Each stimulus (scene and target) is asked for once, and each prediction is compared with all who searched there.

    Args:
        people: trials with `objects`, of scenes in `data`.
        train: what baselines are fitted to; see `vlattn.gaze.baselines.make_baseline`.
        baselines: names of `BASELINES`.
        others: paths that somebody else predicts for the same searches, by name.
        samples: paths a stimulus.
        metrics: names of `vlattn.gaze.metrics.METRICS`; None for all that paths without durations allow.
        parity: SIM with the reference's softmax along the path.
        heard: hears what is being done.

    Returns:
        Plain data. `models`: by name ("OAT", "OAT greedy", baselines, others), `metrics` as `score_gaze` has them, and,
        where steps have chances, `loss` (mean -log p in nats, the end included) and `sim` (mean chance of the next
        fixation). `human`, `random`, `about`, `settings`: as `score_gaze` has them.
    """
    require_count("samples", samples)
    searches, trials = searches_of(people.trials)
    if not trials:
        raise InputError("people: no trial has fixations on objects and its target in the scene; give some that do")
    usable = replace(people, trials=tuple(trials))
    questions = one_of_each(usable)
    asked = list(questions.trials)
    heard("OAT")
    decoding = Decoding("sample", samples, seed=seed)
    predicted = {
        "OAT": predict_trials(model, data, asked, decoding),
        "OAT greedy": predict_trials(model, data, asked, name="OAT greedy"),
    }
    chances = step_chances(model, data, searches)
    steps: dict[str, dict[str, float]] = {"OAT": {"loss": _mean(path_losses(chances, searches))}}
    seen = step_chances(model, data, searches, over="time") if parity else chances
    steps["OAT"]["sim"] = overlap(seen, searches)
    for name in baselines:
        heard(name)
        baseline = make_baseline(name, train, similarity)
        predicted[name] = predict_paths(baseline, questions, samples, seed, similarity)
        losses = step_losses(baseline, usable, similarity)
        sims = np.exp(-np.concatenate([one[:-1] for one in losses]))
        steps[name] = {"loss": _mean(losses), "sim": float(sims.mean())}
    predicted |= others or {}
    found: dict[str, Any] = {"models": {}}
    for name, gaze in predicted.items():
        heard(f"scores of {name}")
        scored = score_gaze(gaze, usable, metrics=metrics, settings=settings)
        (one,) = scored["models"].values()
        found["models"][name] = {"metrics": one["metrics"], **steps.get(name, {})}
        for key in ("human", "about", "settings", "counts"):
            found[key] = scored[key]
        if name == "OAT":
            found["random"] = one["random"]
    return found


def _mean(losses: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate(losses)))
