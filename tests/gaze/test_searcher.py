"""The searcher does what its formula says, samples what it says, and made the embedded data."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlattn.assets.build_tiny_gaze import SUBJECTS, build, searched
from vlattn.assets.paths import tiny_gaze
from vlattn.errors import InputError
from vlattn.gaze.appearance import likeness, thumbnails
from vlattn.gaze.assign import assign_objects
from vlattn.gaze.saliency import object_saliency, saliency_map
from vlattn.gaze.search_view import SearchView, SearchViews
from vlattn.gaze.searcher import Searcher
from vlattn.gaze.trial import GazeSet, Scene, SceneObject, Trial, read_gaze

# pycocotools 2.0.11 under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def a_view(objects: int = 5, target: int | None = 2, seed: int = 0) -> SearchView:
    rng = np.random.default_rng(seed)
    alike = rng.random(objects)
    if target is not None:
        alike[target] = 1
    return SearchView(rng.random((objects, 2)) * [200, 100], (200, 100), target, alike, np.ones(objects))


def naive(searcher: Searcher, view: SearchView, path: list[int]) -> list[float]:
    """The docstring's formula, object by object."""
    if len(path) >= searcher.limit:
        return [0.0] * len(view.centers) + [1.0]
    x, y = (100.0, 50.0) if not path else view.centers[path[-1]]
    pull = []
    for index, (cx, cy) in enumerate(view.centers):
        ages = [len(path) - 1 - place for place, seen in enumerate(path) if seen == index]
        inhibited = searcher.memory ** min(ages) if ages else 0.0
        away = math.hypot(cx - x, cy - y) / math.hypot(200, 100)
        pull.append(
            math.exp(
                searcher.likeness * view.similarity[index] - searcher.distance * away - searcher.inhibition * inhibited
            )
        )
    end = 0.0
    if path:
        end = searcher.found if path[-1] == view.target else searcher.mistaken * view.similarity[path[-1]]
    return [(1 - end) * one / sum(pull) for one in pull] + [end]


@pytest.mark.parametrize("path", [[], [0], [2], [0, 1, 0], [4, 3, 1, 1, 0, 3]])
@pytest.mark.parametrize("target", [2, None])
def test_probabilities_are_those_of_the_formula(path: list[int], target: int | None) -> None:
    searcher, view = Searcher(limit=6), a_view(target=target)
    found = searcher.probabilities(view, path)
    np.testing.assert_allclose(found, naive(searcher, view, path), rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_samples_have_the_frequencies_that_probabilities_promise() -> None:
    searcher, view, count = Searcher(), a_view(), 20_000
    paths = searcher.sample(view, np.random.default_rng(1), count)
    first = np.bincount([path[0] for path in paths], minlength=5) / count
    np.testing.assert_allclose(first, searcher.probabilities(view, [])[:5], atol=0.012)
    start = Counter(path[0] for path in paths).most_common(1)[0][0]
    after = [path[1] if len(path) > 1 else 5 for path in paths if path[0] == start]
    np.testing.assert_allclose(
        np.bincount(after, minlength=6) / len(after), searcher.probabilities(view, [start]), atol=0.015
    )


def test_paths_have_at_least_one_fixation_and_at_most_the_limit() -> None:
    endless = Searcher(found=0, mistaken=0, limit=7)
    assert {len(path) for path in endless.sample(a_view(), np.random.default_rng(0), 50)} == {7}
    hasty = Searcher(found=1, mistaken=1)
    assert all(hasty.sample(a_view(), np.random.default_rng(0), 200))


def test_the_same_generator_gives_the_same_paths() -> None:
    one, other = (Searcher().sample(a_view(), np.random.default_rng(5), 9) for _ in range(2))
    assert one == other


def test_each_setting_does_what_it_is_named_for() -> None:
    view = SearchView(np.array([[10, 50], [90, 50], [190, 50.0]]), (200, 100), 2, np.array([0.5, 0.5, 1]), np.ones(3))
    plain = Searcher(likeness=0, distance=0, inhibition=0, mistaken=0)
    np.testing.assert_allclose(plain.probabilities(view, [0]), [1 / 3, 1 / 3, 1 / 3, 0])
    alike = Searcher(likeness=4, distance=0, inhibition=0).probabilities(view, [])
    assert alike[2] == pytest.approx(math.exp(2) * alike[0])
    near = Searcher(likeness=0, distance=4, inhibition=0).probabilities(view, [0])
    assert near[0] > near[1] > near[2]
    inhibited = Searcher(likeness=0, distance=0, inhibition=4, memory=0.5, mistaken=0)
    now, later = inhibited.probabilities(view, [0]), inhibited.probabilities(view, [0, 1])
    assert now[0] < later[0] < later[2]
    forgetful = Searcher(likeness=0, distance=0, inhibition=4, memory=0, mistaken=0).probabilities(view, [0, 1])
    assert forgetful[0] == forgetful[2]


def test_a_lone_object_is_searched_until_the_searcher_ends() -> None:
    view = SearchView(np.array([[5.0, 5.0]]), (10, 10), 0, np.ones(1), np.ones(1))
    np.testing.assert_allclose(Searcher(found=0.9).probabilities(view, [0]), [0.1, 0.9])
    assert set().union(*Searcher().sample(view, np.random.default_rng(0), 20)) == {0}


@pytest.mark.parametrize(("name", "value"), [("memory", 1.5), ("found", -1), ("limit", 0), ("distance", "far")])
def test_settings_that_make_no_sense_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}: got"):
        Searcher(**{name: value})  # type: ignore[arg-type]


# What is seen ---------------------------------------------------------------------------------------------------------
def a_picture() -> Image.Image:
    pixels = np.full((40, 80, 3), 128, np.uint8)
    pixels[10:20, 10:20] = (255, 0, 0)
    pixels[10:20, 50:60] = (250, 0, 0)
    pixels[25:35, 30:40] = (0, 0, 255)
    return Image.fromarray(pixels)


BOXES = np.array([[10, 10, 10, 10], [50, 10, 10, 10], [30, 25, 10, 10]], float)


def test_alike_objects_are_alike_and_the_target_is_most_alike_to_itself() -> None:
    alike = likeness(thumbnails(a_picture(), BOXES, (80, 40)), 0)
    assert alike[0] == 1
    assert alike[1] == pytest.approx(math.exp(-((5 / 255) ** 2) / 3 / (2 * 0.15**2)))
    assert alike[2] < 0.01


def test_pictures_of_another_size_than_the_screen_are_cropped_at_the_same_places() -> None:
    large = a_picture().resize((160, 80), Image.Resampling.NEAREST)
    same = thumbnails(a_picture(), BOXES, (80, 40))
    np.testing.assert_array_equal(thumbnails(large, BOXES, (80, 40)), same)


def test_boxes_off_the_picture_still_have_a_pixel() -> None:
    assert thumbnails(a_picture(), np.array([[200, 90, 5, 5], [-9, -9, 3, 3]], float), (80, 40)).shape == (2, 48)


def test_what_stands_out_is_salient() -> None:
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[20:28, 40:48] = 255
    boxes = np.array([[40, 20, 8, 8], [5, 50, 8, 8]], float)
    odd, plain = object_saliency(Image.fromarray(pixels), boxes, (64, 64))
    assert odd > 3 * plain
    assert saliency_map(Image.new("RGB", (9, 9), "red")).tolist() == [[1.0] * 64] * 64


def test_views_need_what_they_compare(tmp_path: Path) -> None:
    a_picture().save(tmp_path / "p.png")
    objects = tuple(SceneObject(name, tuple(box)) for name, box in zip("aba", BOXES.tolist(), strict=True))
    scene = Scene("s", 80, 40, objects, "p.png")
    trial = Trial("t", "s", "a", "p", (), (), target_object=0)
    assert SearchViews(GazeSet({"s": scene}, (trial,), tmp_path)).of(trial).similarity[0] == 1
    unpictured = GazeSet({"s": Scene("s", 80, 40, objects)}, (trial,))
    assert SearchViews(unpictured, "labels").of(trial).similarity.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="scene 's' has no picture"):
        SearchViews(unpictured).of(trial)
    missing = Trial("t", "s", "a", "p", (), ())
    with pytest.raises(InputError, match="trial 't': target_object is missing"):
        SearchViews(GazeSet({"s": scene}, (missing,), tmp_path)).of(missing)
    empty = GazeSet({"s": Scene("s", 80, 40, ())}, (trial,))
    with pytest.raises(InputError, match="scene 's' has no objects"):
        SearchViews(empty, "labels").of(trial)


# The embedded data ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def embedded() -> GazeSet:
    return read_gaze(tiny_gaze())


def test_tiny_gaze_has_the_searches_it_claims(embedded: GazeSet) -> None:
    assert Counter(trial.scene[:5] for trial in embedded.trials) == {
        "shelf": 60 * 4 * SUBJECTS,
        "coco0": 100 * 2 * SUBJECTS,
    }
    assert {trial.subject for trial in embedded.trials} == {f"s{n}" for n in range(1, SUBJECTS + 1)}
    for trial in embedded.trials:
        labels = [one.label for one in embedded.scene_of(trial).objects]
        assert trial.target_object is not None
        assert labels.count(trial.target) == 1
        assert labels[trial.target_object] == trial.target
        assert trial.objects
        assert trial.correct == (trial.objects[-1] == trial.target_object)


def test_every_picture_of_tiny_gaze_is_there_and_of_its_screens_size(embedded: GazeSet) -> None:
    total = 0
    for scene in embedded.scenes.values():
        path = embedded.image_path(scene)
        with Image.open(path) as picture:
            assert picture.size == (scene.width, scene.height)
        total += path.stat().st_size if path.parent.name == "tiny_gaze" else 0
    assert 0 < total < 1_000_000


def test_fixations_of_tiny_gaze_are_on_the_objects_they_say(embedded: GazeSet) -> None:
    again = assign_objects(embedded)
    said = np.concatenate([trial.objects for trial in embedded.trials if trial.objects])
    found = np.concatenate([trial.objects for trial in again.trials if trial.objects])
    shelves = np.concatenate([[t.scene[:5] == "shelf"] * len(t.objects or ()) for t in embedded.trials])
    assert (said[shelves] == found[shelves]).all()
    assert (found >= 0).all()
    assert (said == found)[~shelves].mean() > 0.95  # scenes have boxes that overlap


def test_the_builder_gives_the_same_bytes_and_the_committed_paths(tmp_path: Path, embedded: GazeSet) -> None:
    root = tmp_path / "assets" / "tiny_gaze"
    build(root)
    assert read_gaze(root / "gaze.json").trials == embedded.trials
    ours, theirs = (json.loads((folder / "gaze.json").read_text()) for folder in (root, tiny_gaze().parent))
    assert [s["objects"] for s in ours["scenes"]] == [s["objects"] for s in theirs["scenes"]]
    for path in sorted(root.glob("*.jpg")):
        assert path.read_bytes() == (tiny_gaze().parent / path.name).read_bytes(), path.name


def test_another_seed_gives_other_paths_of_the_same_searches(embedded: GazeSet) -> None:
    few = GazeSet(embedded.scenes, embedded.trials[:40], embedded.root)
    assert searched(few, 7) == few
    assert searched(few, 8) != few
