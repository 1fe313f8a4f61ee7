"""Scenes: labels that agree with what is drawn, and objects that keep company as in life."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from vlattn.assets.scenes import (
    BACKGROUNDS,
    CONTEXTS,
    CONTRAST,
    FAMILIES,
    INDEX,
    MAX_OVERLAP,
    NAMES,
    SEEN_FAMILIES,
    SIZE,
    Placed,
    Scene,
    draw_scene,
    load_sprites,
)
from vlattn.eval.chair_words import synonym_groups

BACKGROUND = len(NAMES)


def test_images_are_square_rgb_between_0_and_1(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == np.float32
        assert 0 <= scene.image.min() <= scene.image.max() <= 1


def test_owner_is_the_last_object_that_is_opaque_there(scenes: list[Scene]) -> None:
    for scene in scenes:
        opaque = np.zeros((len(scene.objects), SIZE, SIZE), bool)
        for number, o in enumerate(scene.objects):
            opaque[number, o.y : o.y + o.size, o.x : o.x + o.size] = o.alpha > 0.5
        last = len(opaque) - 1 - opaque[::-1].argmax(0)
        np.testing.assert_array_equal(scene.owner, np.where(opaque.any(0), last, -1))


def test_the_label_map_names_the_owner_and_the_background(scenes: list[Scene]) -> None:
    for scene in scenes:
        labels = scene.label_map(BACKGROUND)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels == BACKGROUND, scene.owner == -1)
        for number, o in enumerate(scene.objects):
            assert (labels[scene.owner == number] == o.category).all()


def test_what_the_label_map_says_is_what_is_painted(scenes: list[Scene]) -> None:
    clear = [scene for scene in scenes if scene.contrast == 1]
    assert 0.6 < len(clear) / len(scenes) < 0.8
    for scene in clear[:100]:
        for number, o in enumerate(scene.objects):
            whole = np.zeros((SIZE, SIZE), bool)
            whole[o.y : o.y + o.size, o.x : o.x + o.size] = o.alpha == 1
            for later in scene.objects[number + 1 :]:  # its body and its shadow, which falls two pixels away
                whole[later.y : later.y + later.size + 2, later.x : later.x + later.size + 2] = False
            np.testing.assert_allclose(scene.image[whole], o.category / len(NAMES), atol=1e-6)


def test_haze_takes_contrast_and_adds_grain(scenes: list[Scene]) -> None:
    def grain(scene: Scene) -> float:
        """Spread between neighbouring background pixels."""
        both = (scene.owner[:, 1:] < 0) & (scene.owner[:, :-1] < 0)
        return float(np.std(np.diff(scene.image, axis=1)[both]))

    hazy, clear = ([s for s in scenes if (s.contrast < 1) is haze] for haze in (True, False))
    assert all(CONTRAST[0] <= s.contrast <= CONTRAST[1] for s in hazy)
    assert np.mean([grain(s) for s in hazy]) > 2 * np.mean([grain(s) for s in clear])
    assert np.mean([s.image.std() for s in hazy]) < np.mean([s.image.std() for s in clear])


def overlap(a: Placed, b: Placed) -> float:
    w = min(a.x + a.size, b.x + b.size) - max(a.x, b.x)
    h = min(a.y + a.size, b.y + b.size) - max(a.y, b.y)
    return max(w, 0) * max(h, 0) / min(a.size, b.size) ** 2


def test_objects_lie_in_the_image_and_overlap_little(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 1 <= len(scene.objects) <= 6
        assert all(0 <= o.x <= SIZE - o.size and 0 <= o.y <= SIZE - o.size for o in scene.objects)
        assert all(overlap(a, b) < MAX_OVERLAP for a, b in combinations(scene.objects, 2))


def test_the_background_has_the_colour_it_is_called(scenes: list[Scene]) -> None:
    for scene in scenes:
        bare = np.ones((SIZE, SIZE), bool)
        for o in scene.objects:
            bare[o.y : o.y + o.size + 2, o.x : o.x + o.size + 2] = False
        if bare.sum() > 1000:
            colour = scene.image[bare].mean(0)
            assert min(BACKGROUNDS, key=lambda name: np.abs(colour - BACKGROUNDS[name]).sum()) == scene.background


def test_the_same_seed_draws_the_same_scene(discs: list[list[list[np.ndarray]]]) -> None:
    a, b = (draw_scene(np.random.default_rng([7, 1, 5]), discs) for _ in range(2))
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.owner, b.owner)
    other = draw_scene(np.random.default_rng([7, 1, 6]), discs)
    assert not np.array_equal(a.image, other.image)


def test_most_scenes_stay_within_a_context(scenes: list[Scene]) -> None:
    within = [any({o.category for o in scene.objects} <= set(context) for context in CONTEXTS) for scene in scenes]
    assert np.mean(within) > 0.6


def test_every_category_is_one_of_cocos_and_in_a_context() -> None:
    assert set(NAMES) <= set(synonym_groups())
    assert {index for context in CONTEXTS for index in context} == set(range(len(NAMES)))
    assert [NAMES[INDEX[name]] for name in NAMES] == list(NAMES)


def test_missing_artwork_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npm packages named in assets/README\.md"):
        load_sprites(tmp_path, SEEN_FAMILIES)


def test_every_family_has_artwork_for_every_category(artwork: Path) -> None:
    sprites = load_sprites(artwork, tuple(FAMILIES))
    assert len(sprites) == len(NAMES)
    for per_family in sprites:
        assert len(per_family) == len(FAMILIES)
        for art in (variant for variants in per_family for variant in variants):
            assert art.shape == (*art.shape[:1] * 2, 4)
            assert (art[..., 3] > 0.5).mean() > 0.1
