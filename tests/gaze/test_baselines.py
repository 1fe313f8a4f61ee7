"""Baselines are as good as their idea allows, and none is better than the searcher on what it made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlattn.assets.paths import tiny_gaze
from vlattn.errors import InputError
from vlattn.gaze.baselines import (
    BASELINES,
    STRENGTHS,
    ScoreModel,
    direct_paths,
    make_baseline,
    object_path,
    path_trial,
    predict_paths,
    step_losses,
)
from vlattn.gaze.search_view import SearchView, SearchViews
from vlattn.gaze.searcher import Searcher
from vlattn.gaze.splits import split_gaze
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, read_gaze, write_gaze


@pytest.fixture(scope="module")
def parts() -> tuple[GazeSet, GazeSet]:
    """Train and test, of other shelves and scenes."""
    gaze = read_gaze(tiny_gaze())
    split = split_gaze(replace(gaze, trials=gaze.trials[::3]), "scene", test=0.3)
    return split.train, split.test


def hand_made() -> GazeSet:
    objects = tuple(SceneObject(name, (x, 0, 10, 10)) for name, x in (("a", 0), ("b", 45), ("c", 90)))
    paths = ((1,), (1, 1), (1, 0), (1, 2, 1))
    trials = tuple(
        Trial(f"t{n}", "s", "c", "p", tuple(Fixation(1, 1) for _ in path), path, target_object=2)
        for n, path in enumerate(paths)
    )
    return GazeSet({"s": Scene("s", 100, 10, objects)}, trials)


@pytest.mark.parametrize("name", BASELINES)
def test_the_chances_of_every_step_sum_to_one(name: str, parts: tuple[GazeSet, GazeSet]) -> None:
    train, test = parts
    model = make_baseline(name, train)
    for trial in test.trials[::40]:
        view, path = SearchViews(test).of(trial), object_path(trial)
        for t in range(len(path) + 1):
            chances = model.probabilities(view, path[:t])
            assert chances.shape == (len(view.centers) + 1,)
            assert chances.sum() == pytest.approx(1)
            assert chances.min() >= 0
        assert model.probabilities(view, [])[-1] == 0  # no search ends before it began


def test_baselines_stand_in_the_order_of_what_they_know(parts: tuple[GazeSet, GazeSet]) -> None:
    train, test = parts
    loss = {name: np.concatenate(step_losses(make_baseline(name, train), test)).mean() for name in BASELINES}
    assert loss["searcher"] < loss["similarity"] - 0.3
    assert loss["similarity"] < loss["centre"] < loss["random"]
    assert loss["saliency"] < loss["random"] + 0.01


def test_searchers_with_other_settings_predict_the_data_worse(parts: tuple[GazeSet, GazeSet]) -> None:
    _, test = parts
    mean = {
        name: np.concatenate(step_losses(Searcher(**change), test)).mean()  # type: ignore[arg-type]
        for name, change in {
            "own": {},
            "blind": {"likeness": 1.0},
            "still": {"distance": 4.0},
            "amnesia": {"memory": 0.2},
            "eager": {"inhibition": 1.0},
        }.items()
    }
    assert min(mean, key=lambda name: mean[name]) == "own"


def test_the_searcher_against_itself_is_the_entropy_it_promises(parts: tuple[GazeSet, GazeSet]) -> None:
    """-log p of its own samples has the mean that its probabilities say, within what sampling leaves."""
    _, test = parts
    losses, entropy, model = [], [], Searcher()
    drawn = predict_paths(model, test, samples=2, seed=3)
    views = SearchViews(test)
    for trial, loss in zip(drawn.trials, step_losses(model, drawn), strict=True):
        losses += loss.tolist()
        for t in range(len(object_path(trial)) + 1):
            p = model.probabilities(views.of(trial), object_path(trial)[:t])
            entropy.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert np.mean(losses) == pytest.approx(np.mean(entropy), abs=4 * np.std(losses) / len(losses) ** 0.5)


def test_stopping_follows_the_lengths_of_training() -> None:
    model = make_baseline("random", hand_made(), "labels")
    assert isinstance(model, ScoreModel)
    usual = 4 / 8  # paths per fixation
    stops = [(1 + usual) / (4 + 1), (2 + usual) / (3 + 1), (1 + usual) / (1 + 1)]
    np.testing.assert_allclose(model.stops, stops)
    view = SearchViews(hand_made(), "labels").of(hand_made().trials[0])
    assert [model.probabilities(view, [0] * t)[-1] for t in range(5)] == pytest.approx([0, *stops, usual])
    lengths = np.array([len(path) for path in model.sample(view, np.random.default_rng(0), 4000)])
    expected = [stops[0], (1 - stops[0]) * stops[1]]
    np.testing.assert_allclose(np.bincount(lengths)[1:3] / 4000, expected, atol=0.03)


def test_the_strength_is_that_of_the_greatest_likelihood() -> None:
    gaze = hand_made()
    model = make_baseline("centre", gaze, "labels")
    assert isinstance(model, ScoreModel)
    score = np.array([1 - 0.9**2 / 2, 1, 1 - 0.9**2 / 2])
    path = np.concatenate([trial.objects for trial in gaze.trials if trial.objects])
    fits = [np.log(np.exp(b * score) / np.exp(b * score).sum())[path].sum() for b in STRENGTHS]
    assert model.strength == STRENGTHS[int(np.argmax(fits))]


def test_samples_of_a_score_have_its_chances() -> None:
    view = SearchView(np.array([[10, 50], [90, 50], [190, 50.0]]), (200, 100), 2, np.array([0, 0.5, 1]), np.ones(3))
    model = ScoreModel("similarity", 2.0, np.array([0.5, 0.5]))
    drawn = [index for path in model.sample(view, np.random.default_rng(0), 5000) for index in path]
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), model.probabilities(view, [])[:3], atol=0.02)


def test_predictions_are_gaze_files_named_after_trial_and_sample(
    parts: tuple[GazeSet, GazeSet], tmp_path: Path
) -> None:
    _, test = parts
    few = replace(test, trials=test.trials[:6])
    found = predict_paths(Searcher(), few, samples=3, seed=1)
    assert [one.id for one in found.trials[:4]] == [
        *(f"{few.trials[0].id}/{k}" for k in range(3)),
        f"{few.trials[1].id}/0",
    ]
    assert {one.subject for one in found.trials} == {"searcher"}
    one = found.trials[0]
    centers = found.scene_of(one).centers()
    np.testing.assert_allclose(one.points(), centers[list(one.objects or ())])
    assert read_gaze(write_gaze(found, tmp_path / "p.json")).trials == found.trials


def test_a_trials_samples_do_not_depend_on_the_other_trials(parts: tuple[GazeSet, GazeSet]) -> None:
    _, test = parts
    alone = predict_paths(Searcher(), replace(test, trials=test.trials[4:5]), seed=1)
    among = predict_paths(Searcher(), replace(test, trials=test.trials[:8]), seed=1)
    assert alone.trials[0] == among.trials[4]
    assert predict_paths(Searcher(), replace(test, trials=test.trials[:8]), seed=2) != among


def test_a_scene_of_one_object_is_predicted() -> None:
    gaze = hand_made()
    lone = Scene("s", 100, 10, gaze.scenes["s"].objects[:1])
    one = Trial("t", "s", "a", "p", (Fixation(1, 1),), (0,), target_object=0)
    single = GazeSet({"s": lone}, (one,))
    for name in BASELINES:
        model = make_baseline(name, single, "labels")
        assert set(predict_paths(model, single, 2, similarity="labels").trials[0].objects or ()) == {0}


def test_empty_paths_train_nothing_and_cost_the_chance_of_ending_at_once() -> None:
    gaze = hand_made()
    empty = replace(gaze, trials=tuple(replace(t, fixations=(), objects=()) for t in gaze.trials))
    with pytest.raises(InputError, match="train: got no path to fit 'random' to"):
        make_baseline("random", empty, "labels")
    assert step_losses(Searcher(), empty, "labels")[0].tolist() == [np.inf]
    some = replace(gaze, trials=(*gaze.trials, replace(gaze.trials[0], id="e", fixations=(), objects=())))
    both = make_baseline("random", some, "labels"), make_baseline("random", gaze, "labels")
    assert isinstance(both[0], ScoreModel)
    assert isinstance(both[1], ScoreModel)
    assert both[0].stops.tolist() == both[1].stops.tolist()


@pytest.mark.parametrize("objects", [None, (0, -1)])
def test_fixations_on_no_object_are_refused_with_the_remedy(objects: tuple[int, ...] | None) -> None:
    trial = replace(hand_made().trials[1], objects=objects)
    with pytest.raises(InputError, match=r"trial 't1': objects is missing or has -1.*assign_objects"):
        object_path(trial)


def test_unknown_baselines_and_no_training_are_refused() -> None:
    with pytest.raises(InputError, match="name: got 'oracle'"):
        make_baseline("oracle")
    with pytest.raises(InputError, match="train: got no path"):
        make_baseline("centre")


def test_a_path_becomes_a_trial_in_the_middle_of_its_objects() -> None:
    gaze = hand_made()
    made = path_trial(gaze.trials[0], gaze.scenes["s"], [2, 0], "m", 7)
    assert (made.id, made.subject, made.objects, made.correct) == ("t0/7", "m", (2, 0), None)
    assert made.points().tolist() == [[95, 5], [5, 5]]


def test_the_direct_path_is_one_fixation_on_the_target_where_there_is_one() -> None:
    gaze = hand_made()
    absent = replace(gaze.trials[1], target_object=None)
    found = direct_paths(replace(gaze, trials=(gaze.trials[0], absent)))
    assert [(one.id, one.subject, one.objects) for one in found.trials] == [("t0/0", "direct", (2,))]
