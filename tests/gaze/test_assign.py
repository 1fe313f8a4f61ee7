"""Fixations to objects: smallest box, borders, misses; and splits that hide what they say they hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlattn.errors import InputError
from vlattn.gaze.assign import assign_objects, assign_points
from vlattn.gaze.splits import GazeSplit, split_gaze
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial


def naive(point: np.ndarray, boxes: np.ndarray, nearest: bool) -> int:
    best: tuple[float, float, int] | None = None
    for index, (x, y, w, h) in enumerate(boxes.tolist()):
        if x <= point[0] < x + w and y <= point[1] < y + h:
            rank = (w * h, (point[0] - x - w / 2) ** 2 + (point[1] - y - h / 2) ** 2, index)
            best = rank if best is None or rank < best else best
    if best is not None:
        return best[2]
    away = [(point[0] - x - w / 2) ** 2 + (point[1] - y - h / 2) ** 2 for x, y, w, h in boxes.tolist()]
    return int(np.argmin(away)) if nearest else -1


@pytest.mark.parametrize("nearest", [False, True])
def test_points_are_assigned_as_a_naive_loop_does(nearest: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = np.concatenate([rng.integers(0, 80, (7, 2)), rng.integers(5, 50, (7, 2))], 1).astype(float)
        points = rng.integers(-20, 140, (40, 2)).astype(float)
        expected = [naive(point, boxes, nearest) for point in points]
        assert assign_points(points, boxes, nearest=nearest).tolist() == expected


def test_of_nested_boxes_the_smallest_is_fixated() -> None:
    boxes = np.array([[0, 0, 100, 100], [20, 20, 30, 30], [0, 0, 60, 60]], float)
    assert assign_points(np.array([[30, 30], [55, 55], [80, 80]], float), boxes).tolist() == [1, 2, 0]


def test_boxes_of_the_same_size_give_the_point_to_the_nearer_middle_and_then_to_the_first() -> None:
    boxes = np.array([[0, 0, 20, 20], [10, 0, 20, 20]], float)
    assert assign_points(np.array([[12, 10], [18, 10], [15, 10]], float), boxes).tolist() == [0, 1, 0]


def test_a_border_between_two_cells_belongs_to_one_of_them() -> None:
    boxes = np.array([[0, 0, 10, 10], [10, 0, 10, 10]], float)
    assert assign_points(np.array([[10, 5], [0, 0], [20, 5]], float), boxes).tolist() == [1, 0, -1]


def one_trial(*points: tuple[float, float]) -> GazeSet:
    scene = Scene("s", 100, 50, (SceneObject("a", (0, 0, 20, 20)), SceneObject("b", (60, 0, 20, 20))))
    return GazeSet({"s": scene}, (Trial("t", "s", "a", "p", tuple(Fixation(*p) for p in points), None),))


def test_a_fixation_outside_every_box_follows_the_policy() -> None:
    gaze = one_trial((5, 5), (55, 40), (70, 10))
    assert assign_objects(gaze).trials[0].objects == (0, -1, 1)
    assert assign_objects(gaze, "nearest").trials[0].objects == (0, 1, 1)
    dropped = assign_objects(gaze, "drop").trials[0]
    assert dropped.objects == (0, 1)
    assert [one.x for one in dropped.fixations] == [5, 70]
    with pytest.raises(InputError, match=r"trial 't': fixations\[1\] at \(55, 40\) is in no box of scene 's'"):
        assign_objects(gaze, "raise")
    with pytest.raises(InputError, match="outside: got 'ignore'"):
        assign_objects(gaze, "ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("outside", ["none", "nearest", "drop", "raise"])
def test_an_empty_path_stays_empty(outside: str) -> None:
    assert assign_objects(one_trial(), outside).trials[0].objects == ()  # type: ignore[arg-type]


def test_a_scene_of_one_object_gives_it_every_fixation_that_is_near_enough() -> None:
    gaze = one_trial((5, 5), (90, 40))
    lone = replace(gaze.scenes["s"], objects=gaze.scenes["s"].objects[:1])
    lonely = replace(gaze, scenes={"s": lone})
    assert assign_objects(lonely).trials[0].objects == (0, -1)
    assert assign_objects(lonely, "nearest").trials[0].objects == (0, 0)


def test_a_scene_without_objects_has_no_nearest_one() -> None:
    gaze = one_trial((5, 5))
    empty = replace(gaze, scenes={"s": replace(gaze.scenes["s"], objects=())})
    assert assign_objects(empty).trials[0].objects == (-1,)
    with pytest.raises(InputError, match="scene 's' has no objects"):
        assign_objects(empty, "nearest")


# Splits ---------------------------------------------------------------------------------------------------------------
def many() -> GazeSet:
    objects = (SceneObject("a", (0, 0, 20, 20)),)
    scenes = {f"s{i}": Scene(f"s{i}", 10, 10, objects) for i in range(10)}
    trials = tuple(
        Trial(f"{scene}/t{t}/p{p}", scene, f"t{t}", f"p{p}", (Fixation(1, 1),), (0,))
        for scene in scenes
        for t in range(10)
        for p in range(2)
        if (t + int(scene[1:])) % 3
    )
    return GazeSet(scenes, trials)


def ids(gaze: GazeSet) -> set[str]:
    return {trial.id for trial in gaze.trials}


def is_parted(split: GazeSplit) -> bool:
    parts = [ids(one) for one in (split.train, split.val, split.test)]
    return sum(map(len, parts)) == len(set.union(*parts)) == len(many().trials) and all(parts)


@pytest.mark.parametrize("by", ["trial", "scene", "target"])
def test_no_part_shares_what_a_split_is_by(by: str) -> None:
    split = split_gaze(many(), by)  # type: ignore[arg-type]
    assert is_parted(split)
    key = "id" if by == "trial" else by
    parts = [{getattr(t, key) for t in part.trials} for part in (split.train, split.val, split.test)]
    assert not any(parts[i] & parts[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len(parts[1]) == len(parts[2]) == round(0.1 * len(set.union(*parts)))


def test_unseen_pairs_are_of_known_targets_and_known_scenes() -> None:
    split = split_gaze(many(), "pair", seed=3)
    assert is_parted(split)
    train = {(t.target, t.scene) for t in split.train.trials}
    test = {(t.target, t.scene) for t in split.test.trials}
    assert not test & (train | {(t.target, t.scene) for t in split.val.trials})
    assert {target for target, _ in test} <= {target for target, _ in train}
    assert {scene for _, scene in test} <= {scene for _, scene in train}


def test_named_pairs_are_held_out() -> None:
    split = split_gaze(many(), "pair", pairs=[("t1", "s1")])
    assert {(t.target, t.scene) for t in split.test.trials} == {("t1", "s1")}
    assert len(split.test.trials) == 2
    with pytest.raises(InputError, match="pairs: no trial looks for 't9' in scene 'nowhere'"):
        split_gaze(many(), "pair", pairs=[("t9", "nowhere")])


def test_the_seed_decides_the_split() -> None:
    assert split_gaze(many(), seed=1) == split_gaze(many(), seed=1)
    assert split_gaze(many(), seed=1) != split_gaze(many(), seed=2)


def test_splits_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(InputError, match="by: 2 subjects cannot be parted"):
        split_gaze(many(), "subject")
    with pytest.raises(InputError, match="by: got 'day'"):
        split_gaze(many(), "day")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"val, test: got 0\.5 and 0\.5"):
        split_gaze(many(), val=0.5, test=0.5)
    with pytest.raises(InputError, match="pairs: got some with by='scene'"):
        split_gaze(many(), "scene", pairs=[("t1", "s1")])
    few = replace(many(), trials=many().trials[:2])
    with pytest.raises(InputError, match="no pair of target and scene can be held out"):
        split_gaze(few, "pair")
