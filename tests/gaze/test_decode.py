"""Generation: cached as uncached, sampling without regard to the batch, beams that find the best."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from vlattn.errors import InputError
from vlattn.gaze.decode import Decoding, generate, uniform_draws
from vlattn.gaze.decode_draw import quantile
from vlattn.gaze.decode_trials import predict_trials
from vlattn.gaze.oat import exclude
from vlattn.gaze.oat_batch import Search
from vlattn.gaze.oat_chances import overlap, path_losses, step_chances
from vlattn.gaze.trial import GazeSet, Trial

SIZES = [(2, 4), (3, 3), (2, 3), (1, 2)]


def log_prob(
    model: Any, data: Any, search: Search, path: tuple[int, ...], longest: int, temperature: float = 1.0
) -> float:
    """By one forward over the whole path, no cache, no batch."""
    batch = data.batch([Search(search.scene, search.target, path)])
    with torch.no_grad():
        logits = model(batch)[0]
    steps = [*path] + ([batch.end] if len(path) < longest else [])
    total = 0.0
    for time, step in enumerate(steps):
        total += float((exclude(logits[time], batch.objects, time == 0) / temperature).log_softmax(-1)[step])
    return total


def searches(data: Any, count: int = 8) -> list[Search]:
    return [Search(str(n % len(data.gaze.scenes)), n % 2) for n in range(count)]


@pytest.mark.parametrize("mode", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("rows", [2048, 3])
def test_caches_change_nothing(oat: Any, mode: str, rows: int) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    asked = searches(data)
    settings = {"mode": mode, "samples": {"greedy": 1, "sample": 7, "beam": 3}[mode], "longest": 9}
    cached = generate(model, data, asked, Decoding(**settings, rows=rows))
    plain = generate(model, data, asked, Decoding(**settings, cached=False))
    for one, two in zip(cached, plain, strict=True):
        assert [path.objects for path in one] == [path.objects for path in two]
        np.testing.assert_allclose([p.log_prob for p in one], [p.log_prob for p in two], atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"mode": "sample", "samples": 5, "temperature": 0.7}, {"mode": "beam"}])
def test_the_probability_of_a_path_is_that_of_its_steps(oat: Any, settings: dict[str, Any]) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    asked = searches(data, 4)
    for search, paths in zip(asked, generate(model, data, asked, Decoding(longest=6, **settings)), strict=True):
        for path in paths:
            expected = log_prob(model, data, search, path.objects, 6, settings.get("temperature", 1.0))
            assert path.log_prob == pytest.approx(expected, abs=1e-4)


def test_greedy_takes_the_likeliest_step_each_time(oat: Any) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    for search, (path,) in zip(
        searches(data, 4), generate(model, data, searches(data, 4), Decoding(longest=6)), strict=True
    ):
        chances = step_chances(model, data, [Search(search.scene, search.target, path.objects)])[0]
        ended = len(path.objects) < 6
        count = chances.shape[1] - 1
        assert [*path.objects, *([count] if ended else [])] == chances.argmax(1)[: len(path.objects) + ended].tolist()


def test_paths_have_one_to_longest_objects_of_their_scene(oat: Any) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    asked = searches(data)
    found = generate(model, data, asked, Decoding("sample", 40, longest=4))
    lengths = Counter(len(path.objects) for paths in found for path in paths)
    assert set(lengths) == {1, 2, 3, 4}  # all happen with random weights, and none is empty
    for search, paths in zip(asked, found, strict=True):
        assert all(0 <= place < len(data.gaze.scenes[search.scene].objects) for path in paths for place in path.objects)


def test_a_trials_samples_do_not_depend_on_what_is_decoded_beside_it(oat: Any) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    asked, keys = searches(data, 4), list("abcd")
    together = generate(model, data, asked, Decoding("sample", 6, longest=6), keys=keys)
    for index in (1, 3):
        alone = generate(model, data, asked[index : index + 1], Decoding("sample", 3, longest=6), keys=[keys[index]])
        assert [p.objects for p in alone[0]] == [p.objects for p in together[index]][:3]
    other = generate(model, data, asked, Decoding("sample", 6, longest=6, seed=1), keys=keys)
    assert [[p.objects for p in some] for some in other] != [[p.objects for p in some] for some in together]


def test_samples_come_as_often_as_they_are_likely(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((1, 2))
    (paths,) = generate(model, data, [Search("0", 0)], Decoding("sample", 4000, longest=3))
    often = Counter(path.objects for path in paths)
    every = [path for length in (1, 2, 3) for path in itertools.product(range(2), repeat=length)]
    chances = {path: np.exp(log_prob(model, data, Search("0", 0), path, 3)) for path in every}
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
    for path, chance in chances.items():
        assert often[path] / 4000 == pytest.approx(chance, abs=4 * (chance / 4000) ** 0.5 + 1e-3)


def test_low_temperature_samples_are_greedy(oat: Any) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    greedy = generate(model, data, searches(data, 4), Decoding(longest=5))
    cold = generate(model, data, searches(data, 4), Decoding("sample", 3, temperature=1e-4, longest=5))
    assert [[path.objects for path in some] for some in cold] == [[one.objects] * 3 for (one,) in greedy]


def test_enough_beams_find_the_likeliest_paths_of_all(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((1, 3))
    (found,) = generate(model, data, [Search("0", 1)], Decoding("beam", 5, beams=64, longest=3))
    every = [path for length in (1, 2, 3) for path in itertools.product(range(3), repeat=length)]
    ranked = sorted(every, key=lambda path: -log_prob(model, data, Search("0", 1), path, 3))
    assert [path.objects for path in found] == ranked[:5]


def test_a_length_penalty_favours_longer_beams(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((1, 3))
    plain, longer = (
        generate(model, data, [Search("0", 1)], Decoding("beam", 64, beams=64, longest=3, length_penalty=penalty))[0]
        for penalty in (0.0, 1.0)
    )
    score = {path.objects: path.log_prob / min(3, len(path.objects) + 1) for path in plain}
    assert [path.objects for path in longer] == sorted(score, key=lambda objects: -score[objects])


def test_a_scene_too_small_for_the_beams_gives_fewer(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((1, 1))
    (found,) = generate(model, data, [Search("0", 0)], Decoding("beam", 9, beams=9, longest=3))
    assert [path.objects for path in sorted(found, key=lambda p: len(p.objects))] == [(0,), (0, 0), (0, 0, 0)]


def test_a_quantile_is_never_what_is_impossible() -> None:
    chances = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log().expand(5, -1)
    assert quantile(chances, torch.tensor([0.0, 0.2499, 0.2501, 0.9, 1.0])).tolist() == [1, 1, 3, 3, 3]


def test_more_samples_begin_with_the_same_draws() -> None:
    np.testing.assert_array_equal(uniform_draws(3, "t", 8, 5)[:2], uniform_draws(3, "t", 2, 5))


def test_the_mode_of_the_model_is_restored(oat: Any) -> None:
    model, data = oat.model(dropout=0.5).train(), oat.shelves((2, 3))
    first, second = (generate(model, data, searches(data, 2), Decoding(longest=5)) for _ in range(2))
    assert first == second
    assert model.training


def test_the_longest_path_is_the_models_or_given(oat: Any) -> None:
    data = oat.shelves((2, 3))
    with pytest.raises(InputError, match="longest: got None"):
        generate(oat.model(), data, searches(data, 1))
    (paths,) = generate(oat.model(longest=2), data, [Search("0", 0)], Decoding("sample", 50))
    assert max(len(path.objects) for path in paths) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "mode: got"),
        ({"samples": 2}, "samples: got 2; greedy gives 1"),
        ({"mode": "beam", "samples": 9}, "samples: got 9; beam gives 5"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"longest": 0}, "longest: got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Decoding(**settings)


# Chances of what people did, and predictions as trials ------------------------------------------------------------
def test_step_chances_are_those_of_the_model_and_sum_to_one(oat: Any) -> None:
    model, data = oat.model(), oat.shelves(*SIZES)
    given = [oat.search(data, n % 4, 1 + n) for n in range(6)]
    found = step_chances(model, data, given, batch=4)
    losses = path_losses(found, given)
    for one, chances, loss in zip(given, found, losses, strict=True):
        assert one.path is not None
        assert chances.shape == (len(one.path) + 1, len(data.gaze.scenes[one.scene].objects) + 1)
        np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)
        assert chances[0, -1] == 0
        assert loss.sum() == pytest.approx(-log_prob(model, data, one, one.path, 99), abs=1e-4)
    expected = [
        chances[t, step] for one, chances in zip(given, found, strict=True) for t, step in enumerate(one.path or ())
    ]
    assert overlap(found, given) == pytest.approx(np.mean(expected))


def test_the_defect_of_the_reference_sums_to_one_along_the_path(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((2, 4), (2, 3))
    given = [oat.search(data, 0, 3), oat.search(data, 1, 5)]
    for chances, alone in zip(step_chances(model, data, given, over="time"), given, strict=True):
        np.testing.assert_allclose(chances.sum(0), 1, atol=1e-5)
        np.testing.assert_allclose(chances, step_chances(model, data, [alone], over="time")[0], atol=1e-5)


def test_predictions_are_trials_of_the_same_scenes(oat: Any) -> None:
    model, data = oat.model(longest=4), oat.shelves((2, 3))
    trials = [Trial("a", "0", "x", "p", (), (), target_object=2), Trial("b", "0", "x", "p", (), (), target_object=None)]
    found = predict_trials(model, data, trials, Decoding("sample", 3), name="mine")
    assert [trial.id for trial in found.trials] == ["a/0", "a/1", "a/2"]  # no token for what is not there
    scene = data.gaze.scenes["0"]
    for trial in found.trials:
        assert (trial.subject, trial.target_object) == ("mine", 2)
        np.testing.assert_allclose(trial.points(), scene.centers()[list(trial.objects or ())])
    assert isinstance(found, GazeSet)
