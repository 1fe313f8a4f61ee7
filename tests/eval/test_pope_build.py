"""POPE questions: the worked example, and what must hold for any annotation file."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlattn.errors import InputError
from vlattn.eval.coco import ImageObjects, read_coco
from vlattn.eval.pope import SPLITS, PopeQuestion, build_pope, question_text, write_pope

SCENES = [
    ("person", "dog", "frisbee"),
    ("person", "car", "traffic light"),
    ("person", "dog", "car", "cat"),
    ("cat", "couch", "remote"),
]


def images(scenes: Any) -> list[ImageObjects]:
    return [ImageObjects(i, f"{i}.jpg", tuple(objects)) for i, objects in enumerate(scenes, start=1)]


def asked(questions: list[PopeQuestion], label: str) -> dict[int, list[str]]:
    """image id -> objects asked about with that label, taken back out of the question's text"""
    found: dict[int, list[str]] = {}
    for q in questions:
        if q.label == label:
            name = q.text.removeprefix("Is there a").removeprefix("n").strip().removesuffix(" in the image?")
            found.setdefault(q.image_id, []).append(name)
    return found


def test_the_worked_popular_split() -> None:
    popular = build_pope(images(SCENES), n_images=4)["popular"]
    assert asked(popular, "no") == {
        1: ["car", "cat", "traffic light"],
        2: ["dog", "cat", "frisbee"],
        3: ["frisbee", "traffic light", "couch"],
        4: ["person", "dog", "car"],
    }
    first, second = popular[:2]
    assert (first.question_id, first.text, first.label) == (1, "Is there a person in the image?", "yes")
    assert (second.question_id, second.text, second.label) == (2, "Is there a car in the image?", "no")
    assert [q.question_id for q in popular] == list(range(1, 25))
    assert sum(q.label == "yes" for q in popular) == 12


@pytest.mark.parametrize("seed", range(8))
def test_the_worked_adversarial_split_whatever_the_fallback_draws(seed: int) -> None:
    no = asked(build_pope(images(SCENES), n_images=4, seed=seed)["adversarial"], "no")
    (a1, a2, a3), (b1, b2, b3), (c1, c2, c3), (d1, d2, d3) = no[1], no[2], no[3], no[4]
    assert (a1, a2, b1, b2, c1, d1) == ("car", "cat", "dog", "cat", "frisbee", "person")
    assert a3 in {"traffic light", "couch", "remote"}
    assert b3 in {"frisbee", "couch", "remote"}
    assert c2 in {"traffic light", "couch", "remote"}
    assert c3 == "traffic light" if c2 != "traffic light" else c3 in {"couch", "remote"}
    assert {d2, d3} < {"dog", "car", "frisbee", "traffic light"}
    assert d2 != d3


def test_too_few_objects_outside_an_image_raises_instead_of_looping() -> None:
    with pytest.raises(InputError, match="image 3 leaves 2 objects"):
        build_pope(images(SCENES[:3]), n_images=3)
    found = build_pope(images(SCENES[:3]), 3, universe="all", categories=["bench"])
    assert "bench" in asked(found["popular"], "no")[3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dog", "Is there a dog in the image?"),
        ("apple", "Is there an apple in the image?"),
        ("umbrella", "Is there an umbrella in the image?"),
        ("skis", "Is there a skis in the image?"),
        ("orange", "Is there an orange in the image?"),
    ],
)
def test_the_article_changes_and_the_word_image_does_not(name: str, text: str) -> None:
    assert question_text(name) == text


OBJECTS = [f"o{i}" for i in range(14)]
files = st.lists(
    st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=6, unique=True), min_size=12, max_size=25
).filter(lambda scenes: sum(len(s) >= 3 for s in scenes) >= 6)


def enough(chosen: list[Any], scenes: list[Any]) -> bool:
    seen = {name for scene in chosen for name in scene}
    return all(len(seen - set(scene)) >= 3 for scene in chosen)


@settings(max_examples=60, deadline=None)
@given(files, st.integers(0, 5))
def test_every_file_makes_balanced_questions_about_absent_objects(scenes: Any, seed: int) -> None:
    try:
        found = build_pope(images(scenes), n_images=6, seed=seed)
    except InputError:  # a narrow draw: too few objects outside an image
        return
    there = {i: set(objects) for i, objects in enumerate(scenes, start=1)}
    ids = {q.image_id for q in found["random"]}
    seen = {name for i in ids for name in there[i]}
    positives = asked(found["random"], "yes")
    for split in SPLITS:
        questions = found[split]
        assert [q.label for q in questions] == ["yes", "no"] * 18
        assert Counter(q.image_id for q in questions) == dict.fromkeys(ids, 6)
        assert asked(questions, "yes") == positives
        for i, missing in asked(questions, "no").items():
            assert positives[i] == list(scenes[i - 1][:3])
            assert not set(missing) & there[i]
            assert len(set(missing)) == 3
            assert set(missing) <= seen


@settings(max_examples=60, deadline=None)
@given(files, st.integers(0, 5), st.sampled_from(["sample", "all"]))
def test_popular_and_adversarial_take_the_most_frequent_eligible_object(scenes: Any, seed: int, scope: str) -> None:
    try:
        found = build_pope(images(scenes), n_images=6, seed=seed, freq_scope=scope)
    except InputError:
        return
    ids = sorted({q.image_id for q in found["random"]})
    counted = range(1, len(scenes) + 1) if scope == "all" else ids
    present = np.array([[name in scenes[i - 1] for name in OBJECTS] for i in counted], dtype=int)
    together = present.T @ present  # [objects, objects]
    for i in ids:
        barred = set(scenes[i - 1])
        for missing in asked(found["popular"], "no")[i]:
            best = max(together[j, j] for j, name in enumerate(OBJECTS) if name not in barred)
            assert together[OBJECTS.index(missing), OBJECTS.index(missing)] == best
            barred.add(missing)
        barred = set(scenes[i - 1])
        yes, no = asked(found["adversarial"], "yes")[i], asked(found["adversarial"], "no")[i]
        for positive, missing in zip(yes, no, strict=True):
            row = together[OBJECTS.index(positive)]
            best = max(row[j] for j, name in enumerate(OBJECTS) if name not in barred)
            assert row[OBJECTS.index(missing)] == best  # 0 when nothing eligible comes with it: then any
            barred.add(missing)


def test_the_random_split_reaches_every_absent_object() -> None:
    scenes = [*SCENES, ("apple", "kite", "bus")]
    drawn = Counter(
        name for seed in range(60) for name in asked(build_pope(images(scenes), 5, seed=seed)["random"], "no")[5]
    )
    assert set(drawn) == {name for scene in SCENES for name in scene}
    assert max(drawn.values()) < 3 * min(drawn.values())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    rng = random.Random(0)
    scenes = [rng.sample(OBJECTS, rng.randint(2, 6)) for _ in range(60)]
    shuffled = images(scenes)
    rng.shuffle(shuffled)  # the order images come in does not matter either

    def content(folder: str, seed: int, order: list[ImageObjects]) -> dict[str, bytes]:
        write_pope(build_pope(order, 20, seed=seed), tmp_path / folder, {"seed": seed})
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    first = content("a", 1, images(scenes))
    assert first == content("b", 1, shuffled)
    assert set(first) == {*(f"pope_{split}.json" for split in SPLITS), "pope_build.json"}
    assert first["pope_random.json"] != content("c", 2, images(scenes))["pope_random.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_images": 5}, "n_images=5 is more than the 4 images with 3 or more objects"),
        ({"n_images": 0}, "n_images=0"),
        ({"per_image": 0}, "per_image=0"),
        ({"per_image": 4, "n_images": 2}, "the 1 images with 4"),
        ({"universe": "some"}, "universe='some'"),
        ({"freq_scope": "most"}, "freq_scope='most'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_pope(images(SCENES), **{"n_images": 4, **options})


@pytest.mark.slow
def test_a_file_of_the_size_of_coco_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40,000 images with 300,000 instances of 80 categories."""
    import time

    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 81)
    kinds = rng.choice(80, size=300_000, p=weights / weights.sum()) + 1
    places = rng.integers(1, 40_001, size=300_000)
    data = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(1, 40_001)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k}
            for n, (i, k) in enumerate(zip(places.tolist(), kinds.tolist(), strict=True))
        ],
        "categories": [{"id": k, "name": f"thing {k}"} for k in range(1, 81)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    start = time.perf_counter()
    coco = read_coco(path)
    read = time.perf_counter()
    found = build_pope(coco.image_objects(), freq_scope="all")
    done = time.perf_counter()
    with capsys.disabled():
        print(f"\n40,000 images: read {read - start:.1f} s, built {done - read:.1f} s")
    assert all(len(questions) == 3000 for questions in found.values())
    present = {i: {f"thing {k}" for k in kinds[places == i].tolist()} for i in {q.image_id for q in found["random"]}}
    for questions in found.values():
        for label in ("yes", "no"):
            for i, names in asked(questions, label).items():
                assert all((name in present[i]) == (label == "yes") for name in names)
    common = Counter(name for names in asked(found["popular"], "no").values() for name in names)
    assert common.most_common(1)[0][0] in {"thing 1", "thing 2", "thing 3", "thing 4", "thing 5"}
