"""Predicted against human gaze files: every metric with its interval, people against each other, and chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vlattn.errors import InputError
from vlattn.gaze.metrics.average import codes, group_sums, over_people, over_tasks, percentiles, resamples
from vlattn.gaze.metrics.gaze_paths import Stimulus, random_gaze
from vlattn.gaze.metrics.policy import Floats, Ints
from vlattn.gaze.metrics.registry import METRICS, Metric, get_metric
from vlattn.gaze.metrics.score_settings import ScoreSettings
from vlattn.gaze.metrics.score_side import Side, check_scenes, human_clusters, match, match_people
from vlattn.gaze.metrics.set_rule import trial_means
from vlattn.gaze.trial import GazeSet

Cell = dict[str, Any]
ON_REQUEST = ("euclidean",)
"""Not scored unless asked for: refuses paths of different lengths."""


def score_gaze(
    predicted: GazeSet,
    human: GazeSet,
    metrics: Sequence[str] | None = None,
    settings: ScoreSettings | None = None,
) -> dict[str, Any]:
    """Score predictions, each subject of theirs being a model.

    Args:
        predicted, human: as `read_gaze` gives them, with the same scenes.
        metrics: names of `METRICS`; None for all that the files allow. Those of clusters are made only if asked for.
        settings: see `ScoreSettings`.

    Returns:
        Plain data. `models`: by name, `metrics` with value, low, high (percentile bootstrap over stimuli), n_valid and
        n_total (of pairs, or of paths for metrics that compare sets); `random`, paths as long anywhere on the screen.
        `human`: each person against the others. `about`: which way is better. `skipped`: why a metric is missing.
        None stands for what is undefined.

    Raises:
        InputError: unknown metrics, such as need what the files lack, scenes that differ, or nothing in common.
    """
    how = settings or ScoreSettings()
    for name, gaze in (("predicted", predicted), ("human", human)):
        if not gaze.trials:
            raise InputError(f"{name}: has no trials; give a gaze file with paths in it")
    check_scenes(predicted, human)
    people = Side.of(human)
    known = frozenset(people.trials)
    models = Side.of(predicted, known)
    chance = Side.of(random_gaze(predicted, how.seed), known)
    wanted, skipped = _choose(metrics, models, people)
    clusters = human_clusters(people) if any("clusters" in one.needs for one in wanted) else None
    if clusters is not None:
        people, models, chance = (side.clustered(clusters) for side in (people, models, chance))
    people = people.truncated(how.truncate if how.truncate_human else None)
    models, chance = models.truncated(how.truncate), chance.truncated(how.truncate)

    found: dict[str, Any] = {}
    for name in dict.fromkeys(models.subjects):
        rows = np.flatnonzero(np.array(models.subjects, object) == name)
        found[name] = _score_model(name, models.take(rows), chance.take(rows), people, wanted, how)
    report: dict[str, Any] = {
        "settings": asdict(how),
        "counts": {"human_paths": len(people.stimuli), "stimuli": len(set(people.stimuli))},
        "models": found,
        "human": _score_people(people, wanted, how),
        "about": {column: {"better": one.better, "what": one.about} for one in wanted for column in _columns(one)},
        "skipped": skipped,
    }
    if clusters is not None:
        report["bandwidths"] = [[*stimulus, one.bandwidth] for stimulus, one in clusters.items()]
    return report


def _choose(metrics: Sequence[str] | None, models: Side, people: Side) -> tuple[list[Metric], dict[str, str]]:
    """The metrics to score, and why others are not."""
    has = {
        "objects": _any_object(people) or _any_object(models),
        "durations": all(side.paths.timed[~side.paths.empty].any() for side in (models, people)),
        "boxes": not np.isnan(people.paths.boxes).all(),
    }
    has["labels"] = has["objects"]
    why = {
        "objects": "no fixation is on an object of its scene",
        "durations": "fixations have no durations on both sides",
        "boxes": "no trial has a target in its scene",
    }
    why["labels"] = why["objects"]
    chosen, skipped = [], {}
    for name in METRICS if metrics is None else metrics:
        one = get_metric(name)
        if metrics is None and (name in ON_REQUEST or "clusters" in one.needs):
            continue
        lacking = [need for need in one.needs if not has.get(need, True)]
        if one.kind == "step":
            reason = "it takes predicted probabilities, which gaze files do not hold; call the function"
        elif lacking:
            reason = why[lacking[0]]
        else:
            chosen.append(one)
            continue
        if metrics is not None:
            raise InputError(f"metrics: {name} cannot be scored: {reason}; leave it out")
        if one.kind != "step":
            skipped[name] = reason
    return chosen, skipped


def _any_object(side: Side) -> bool:
    return any(index != -1 for path in side.paths.symbols_of("objects") for index in path)


def _columns(metric: Metric) -> list[str]:
    if not metric.columns:
        return [metric.name]
    more = ["mean4"] if metric.name == "multimatch" else []
    return [f"{metric.name}.{column}" for column in (*metric.columns, *more)]


def _score_model(
    name: str, model: Side, chance: Side, people: Side, metrics: list[Metric], how: ScoreSettings
) -> dict[str, Any]:
    mine, theirs = match(model, people, how.compare)
    if not len(mine):
        raise InputError(
            f"predictions of {name!r}: no scene and target, or trial, is in the human file too; give files of the same "
            "trials"
        )
    used = np.unique(mine)
    stimuli = list(dict.fromkeys(model.stimuli[row] for row in used))
    draws = resamples(len(stimuli), how.n_boot, how.seed)
    on_these = set(stimuli)
    humans = people.take(np.array([row for row, one in enumerate(people.stimuli) if one in on_these], np.int64))

    def score(side: Side, weights: Floats | None) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        for metric in metrics:
            if metric.kind == "pair":
                values = _pair_values(metric, side.take(mine), people.take(theirs))
                of = [side.stimuli[row] for row in mine]
                whom = [people.trials[row] for row in theirs]
                images, names = over_people(values, of, whom, how.over, metric.better)
                cells.update(_pair_cells(metric, values, images, names, how, weights))
            else:
                cells.update(_set_cells(metric, side.take(used), humans, stimuli, how, weights))
        return cells

    return {
        "paths": len(model.stimuli),
        "unmatched": len(model.stimuli) - len(used),
        "pairs": len(mine),
        "stimuli": len(stimuli),
        "metrics": score(model, draws if len(draws) else None),
        "random": score(chance, None),
    }


def _score_people(people: Side, metrics: list[Metric], how: ScoreSettings) -> dict[str, Cell]:
    """Each person against the others; nothing where each stimulus has one path."""
    first, second = match_people(people)
    cells: dict[str, Cell] = {}
    stimuli = list(dict.fromkeys(people.stimuli))
    for metric in metrics:
        if metric.kind == "set":
            draws = resamples(len(stimuli), how.n_boot, how.seed)
            cells.update(_set_cells(metric, people, people, stimuli, how, draws if len(draws) else None))
        elif len(first):
            values = _pair_values(metric, people.take(first), people.take(second))
            # First over the others, as over people for a model, then over whose path it is.
            own = [(people.stimuli[row], int(row)) for row in first]
            each, owners = over_people(values, own, second.tolist(), how.over, metric.better)
            images, names = over_people(each, [one[0] for one in owners], [one[1] for one in owners])
            draws = resamples(len(names), how.n_boot, how.seed)
            cells.update(_pair_cells(metric, values, images, names, how, draws if len(draws) else None))
    return cells


def _pair_values(metric: Metric, predicted: Side, human: Side) -> Floats:
    """[P, columns]."""
    values = np.asarray(metric(predicted.paths, human.paths), np.float64)
    values = values.reshape(len(values), -1)
    if metric.name == "multimatch":
        values = np.concatenate([values, values[:, :4].mean(1, keepdims=True)], 1)
    return values


def _pair_cells(
    metric: Metric,
    values: Floats,
    images: Floats,
    names: list[Stimulus],
    how: ScoreSettings,
    weights: Floats | None,
) -> dict[str, Cell]:
    known = ~np.isnan(images)
    sums, counts = np.where(known, images, 0), known.astype(np.float64)
    tasks = _tasks(names, how)
    value = over_tasks(sums, counts, tasks)[0]
    samples = None if weights is None else over_tasks(sums, counts, tasks, weights)
    return _cells(_columns(metric), value, samples, (~np.isnan(values)).sum(0), len(values), how)


def _set_cells(
    metric: Metric,
    predicted: Side,
    human: Side,
    stimuli: list[Stimulus],
    how: ScoreSettings,
    weights: Floats | None,
) -> dict[str, Cell]:
    assert metric.rule is not None
    rule = metric.rule(how.max_step) if "boxes" in metric.needs else metric.rule()
    place = {one: index for index, one in enumerate(stimuli)}
    tasks = _tasks(stimuli, how) if rule.by_task else None
    tables = []
    for side in (predicted, human):
        means, first, _ = trial_means(rule.describe(side.paths), side.paths)
        tables.append(group_sums(means, np.array([place[side.stimuli[row]] for row in first], np.int64), len(stimuli)))
    value = rule.combine(*(over_tasks(*table, tasks)[0] for table in tables))
    samples = None
    if weights is not None:
        samples = np.reshape(rule.combine(*(over_tasks(*table, tasks, weights) for table in tables)), (-1, 1))
    valid = int((~np.isnan(rule.describe(predicted.paths)).all(1)).sum())
    return _cells([metric.name], np.reshape(value, 1), samples, np.array([valid]), len(predicted.stimuli), how)


def _tasks(names: Sequence[Stimulus], how: ScoreSettings) -> Ints | None:
    return codes([target for _, target in names])[0] if how.average == "tasks" else None


def _cells(
    columns: list[str], value: Floats, samples: Floats | None, valid: Any, total: int, how: ScoreSettings
) -> dict[str, Cell]:
    low = high = np.full(len(columns), np.nan)
    if samples is not None:
        low, high = percentiles(samples, how.level)
    return {
        column: {
            "value": _plain(value[k]),
            "low": _plain(low[k]),
            "high": _plain(high[k]),
            "n_valid": int(valid[k]),
            "n_total": int(total),
        }
        for k, column in enumerate(columns)
    }


def _plain(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
