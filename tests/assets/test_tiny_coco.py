"""Tiny COCO is COCO in form, true in content, and comes out of its builder byte for byte."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from vlattn.assets.build_tiny_coco import (
    CATEGORY_IDS,
    COCO_CATEGORIES,
    COUNTS,
    LEAST_VISIBLE,
    build,
    draw,
    is_honest,
    load_honest_sprites,
)
from vlattn.assets.paths import SPLITS, TinyCoco, tiny_coco, tiny_llava
from vlattn.assets.reference_captions import SYNONYMS, reference_captions, visible_pixels
from vlattn.assets.scenes import BACKGROUNDS, NAMES, SEEN_FAMILIES, SIZE, Placed, Scene
from vlattn.errors import InputError
from vlattn.eval.chair import Caption, score_chair
from vlattn.eval.chair_words import CHAIR_PROFILES, vocabulary
from vlattn.eval.coco import CocoSet, read_coco
from vlattn.eval.pope_build import SPLITS as POPE_SPLITS
from vlattn.eval.pope_build import build_pope

# pycocotools 2.0.11 under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def paths(split: str) -> TinyCoco:
    return tiny_coco(split)


def load(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def objects(split: str) -> CocoSet:
    return read_coco(tiny_coco(split).instances)


# form


def test_pycocotools_loads_it_and_every_image_is_there(split: str, paths: TinyCoco) -> None:
    instances, captions = load(paths.instances), load(paths.captions)
    assert instances.imgs == captions.imgs
    assert len(instances.imgs) == COUNTS[split]
    assert sorted(path.name for path in paths.images.iterdir()) == sorted(
        image["file_name"] for image in instances.imgs.values()
    )
    for image_id, image in instances.imgs.items():
        assert image["file_name"] == f"{image_id:012d}.jpg"
        with Image.open(paths.images / image["file_name"]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (SIZE, SIZE))
        assert (image["width"], image["height"]) == (SIZE, SIZE)
        assert image["background"] in BACKGROUNDS
        assert set(image) == {"id", "file_name", "width", "height", "license", "background"}


def test_ids_are_unique_and_splits_share_none() -> None:
    ids = [set(load(tiny_coco(split).instances).imgs) for split in SPLITS]
    assert not ids[0] & ids[1]
    for split in SPLITS:
        for path in (tiny_coco(split).instances, tiny_coco(split).captions):
            annotations = json.loads(path.read_text())["annotations"]
            assert len({a["id"] for a in annotations}) == len(annotations)


def test_every_mask_decodes_to_its_area_and_box(paths: TinyCoco) -> None:
    coco = load(paths.instances)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (SIZE, SIZE)
        assert mask.sum() == annotation["area"] > 0
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert box == annotation["bbox"]
        assert annotation["iscrowd"] == 0
        assert isinstance(annotation["segmentation"]["counts"], str)
        assert rle.area(annotation["segmentation"]) == annotation["area"]


def test_masks_of_an_image_share_no_pixel(paths: TinyCoco) -> None:
    coco = load(paths.instances)
    for shown in coco.imgToAnns.values():
        assert sum(coco.annToMask(a).astype(int) for a in shown).max() == 1


def test_the_table_of_categories_is_cocos() -> None:
    meta = pytest.importorskip("torchvision.models._meta", reason="torchvision holds COCO's names by id")
    official = {i: name for i, name in enumerate(meta._COCO_CATEGORIES) if name not in ("__background__", "N/A")}
    assert {key: name for name, key in CATEGORY_IDS.items()} == official
    assert {group: len(members) for group, members in COCO_CATEGORIES.items()} == {
        **{"person": 1, "vehicle": 8, "outdoor": 5, "animal": 10, "accessory": 5, "sports": 10},
        **{"kitchen": 7, "food": 10, "furniture": 6, "electronic": 6, "appliance": 5, "indoor": 7},
    }


def test_categories_have_cocos_ids_and_all_occur(paths: TinyCoco) -> None:
    coco = load(paths.instances)
    assert {c["name"] for c in coco.cats.values()} == set(NAMES)
    for key, category in coco.cats.items():
        assert COCO_CATEGORIES[category["supercategory"]][key] == category["name"]
    assert {a["category_id"] for a in coco.anns.values()} == set(coco.cats)


def test_licences_and_families_are_said() -> None:
    val, shift = (json.loads(tiny_coco(split).instances.read_text()) for split in ("val", "shift"))
    assert "noto and twemoji" in val["info"]["description"]
    assert "fluent" in shift["info"]["description"]
    assert not any(family in shift["info"]["description"] for family in SEEN_FAMILIES)
    assert "CC BY 4.0" in val["licenses"][0]["name"]
    assert "MIT" in shift["licenses"][0]["name"]
    assert {image["license"] for data in (val, shift) for image in data["images"]} == {1}


def test_it_is_small() -> None:
    root = tiny_coco("val").images.parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 6e6


# content


def test_five_different_captions_per_image(paths: TinyCoco) -> None:
    captions = load(paths.captions)
    assert set(captions.imgToAnns) == set(captions.imgs)
    for texts in captions.imgToAnns.values():
        assert len({a["caption"] for a in texts}) == len(texts) == 5


@pytest.mark.parametrize("profile", CHAIR_PROFILES)
def test_no_caption_mentions_what_is_not_annotated(profile: str, split: str, paths: TinyCoco) -> None:
    captions = [Caption(str(a["id"]), a["image_id"], a["caption"]) for a in load(paths.captions).anns.values()]
    result = score_chair(captions, objects(split), profile)
    assert [(c.text, c.mentions) for c in result.captions if c.counts["hallucinated_mentions"]] == []
    assert result.counts["mentions"] > 1.5 * len(captions)


def test_the_first_caption_names_every_object(split: str, paths: TinyCoco) -> None:
    words, there = vocabulary("chair-fixed"), objects(split).objects
    for image_id, texts in load(paths.captions).imgToAnns.items():
        found, _ = words.find(texts[0]["caption"])
        assert {mention.node for mention in found} == set(there[image_id])


def test_captions_vary(paths: TinyCoco) -> None:
    text = " ".join(a["caption"] for a in load(paths.captions).anns.values())
    assert all(re.search(rf"\b{word}", text) for word in ("two", "sofa", "plane", "left", "above", "hidden", "pink"))


@pytest.mark.parametrize("profile", CHAIR_PROFILES)
def test_synonyms_name_their_category(profile: str) -> None:
    words = vocabulary(profile)
    for name, others in SYNONYMS.items():
        for word in others:
            for text in (f"a {word} here", f"two {word}s here"):
                assert [mention.node for mention in words.find(text)[0]] == [name], text


def test_objects_that_belong_together_come_together() -> None:
    images = [set(found) for split in SPLITS for found in objects(split).objects.values()]

    def share(name: str, given: str | None = None) -> float:
        return float(np.mean([name in found for found in images if given is None or given in found]))

    for name, given in (("keyboard", "laptop"), ("giraffe", "elephant"), ("spoon", "bowl"), ("tv", "couch")):
        assert share(name, given) > 3 * share(name), (name, given)
    assert share("toilet", "elephant") < 2 * share("toilet")


@pytest.mark.parametrize(("split", "n_images"), [("val", 300), ("shift", 120)])
def test_pope_builds_from_it(split: str, n_images: int) -> None:
    coco = objects(split)
    assert sum(len(found) >= 3 for found in coco.objects.values()) >= n_images
    questions = build_pope(coco.image_objects(), n_images=n_images)
    for name in POPE_SPLITS:
        assert Counter(question.label for question in questions[name]) == {"yes": 3 * n_images, "no": 3 * n_images}
        assert len({question.image for question in questions[name]}) == n_images


# the builder


def disc(category: int, x: int, y: int, size: int = 24) -> Placed:
    return Placed(category, x, y, size, np.ones((size, size), np.float32))


def stacked(*placed: Placed) -> Scene:
    owner = np.full((SIZE, SIZE), -1)
    for number, o in enumerate(placed):
        owner[o.y : o.y + o.size, o.x : o.x + o.size] = number
    return Scene(np.zeros((SIZE, SIZE, 3), np.float32), placed, owner, "blue")


def test_an_object_nearly_hidden_makes_a_scene_dishonest() -> None:
    assert is_honest(stacked(disc(0, 0, 0), disc(1, 0, 12)))
    assert not is_honest(stacked(disc(0, 0, 0), disc(1, 0, 6)))  # a quarter can be seen, and LEAST_VISIBLE is 0.3


def test_visible_pixels_count_what_no_later_object_covers() -> None:
    scene = stacked(disc(0, 0, 0), disc(1, 0, 12), disc(2, 50, 50))
    assert visible_pixels(scene).tolist() == [24 * 12, 24 * 24, 24 * 24]


def test_dishonest_scenes_are_drawn_again_from_the_next_seed(
    monkeypatch: pytest.MonkeyPatch, discs: list[list[list[np.ndarray]]]
) -> None:
    first, _ = draw(7, "val", 0, discs)
    verdicts = iter([False, False, True])
    seen: list[Scene] = []

    def verdict(scene: Scene) -> bool:
        seen.append(scene)
        return next(verdicts)

    monkeypatch.setattr("vlattn.assets.build_tiny_coco.is_honest", verdict)
    last, _ = draw(7, "val", 0, discs)
    np.testing.assert_array_equal(seen[0].image, first.image)
    assert last is seen[2]
    assert not any(np.array_equal(a.image, b.image) for a, b in [(seen[0], seen[1]), (seen[1], seen[2])])


def test_captions_of_one_lonely_object_are_still_five() -> None:
    scene = stacked(disc(NAMES.index("scissors"), 0, 0))
    captions = reference_captions(np.random.default_rng(0), scene)
    assert len(set(captions)) == 5
    assert all("a pair of scissors" in caption.lower() for caption in captions)


def test_relations_and_places_are_true(scenes: list[Scene]) -> None:
    pattern = re.compile(r"an? ([a-z ]+) (to the left of|to the right of|above|below) an? ([a-z ]+?)(?:, with.*)?\.")
    apart = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    rng, checked = np.random.default_rng(0), 0
    canonical = {word: name for name, others in SYNONYMS.items() for word in others}
    for scene in scenes:
        where = {NAMES[o.category]: o.center for o in scene.objects}
        for caption in reference_captions(rng, scene):
            match = pattern.fullmatch(caption.lower())
            if match and not {"pair", "head"} & set(match[0].split()):
                (axis, sign), names = apart[match[2]], [canonical.get(match[i], match[i]) for i in (1, 3)]
                assert sign * (where[names[0]][axis] - where[names[1]][axis]) >= SIZE / 6
                checked += 1
    assert checked > 50


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, artwork: Path) -> None:
    few = {"val": 4, "shift": 3}
    build(artwork, tmp_path / "a", 7, few)
    build(artwork, tmp_path / "c", 8, few)
    # Another process, with its own order of sets and its own clock.
    code = "import sys, pathlib as p; from vlattn.assets.build_tiny_coco import build; "
    code += f"build(p.Path(sys.argv[1]), p.Path(sys.argv[2]), 7, {few})"
    where = [str(artwork), str(tmp_path / "b")]
    subprocess.run([sys.executable, "-c", code, *where], check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    first = contents(tmp_path / "a")
    assert len(first) == 7 + 4
    assert contents(tmp_path / "b") == first
    assert all(data != first[name] for name, data in contents(tmp_path / "c").items())


def test_a_smaller_build_leaves_no_image_of_a_larger_one(tmp_path: Path, artwork: Path) -> None:
    for count in (3, 1):
        build(artwork, tmp_path, counts={"shift": count})
    assert [path.name for path in (tmp_path / "shift").iterdir()] == ["000000100001.jpg"]


def test_the_committed_files_are_what_the_builder_makes(tmp_path: Path, artwork: Path, split: str) -> None:
    build(artwork, tmp_path, counts={split: 5})
    for kind in ("instances", "captions"):
        made: Any = json.loads((tmp_path / f"{kind}_{split}.json").read_text())
        committed: Any = json.loads(getattr(tiny_coco(split), kind).read_text())
        ids = {image["id"] for image in made["images"]}
        assert made["info"] == committed["info"]
        assert made["images"] == committed["images"][:5]
        assert made["annotations"] == [a for a in committed["annotations"] if a["image_id"] in ids]
    for image_id in ids:
        name = f"{split}/{image_id:012d}.jpg"
        a, b = (np.asarray(Image.open(root / name), int) for root in (tmp_path, tiny_coco(split).images.parent))
        assert np.abs(a - b).mean() < 1  # JPEG decoders and encoders differ by rounding


def test_enough_of_every_object_can_be_seen(artwork: Path, split: str) -> None:
    families = SEEN_FAMILIES if split == "val" else ("fluent",)
    sprites = load_honest_sprites(artwork, families)
    for index in range(50):
        scene, _ = draw(7, split, index, sprites)
        whole = np.array([(o.alpha > 0.5).sum() for o in scene.objects])
        assert (visible_pixels(scene) >= LEAST_VISIBLE * whole).all()


def test_the_racket_that_is_a_ball_is_not_drawn(artwork: Path) -> None:
    counts = {
        name: len(families) for name, families in zip(NAMES, load_honest_sprites(artwork, SEEN_FAMILIES), strict=True)
    }
    assert {name for name, n in counts.items() if n < len(SEEN_FAMILIES)} == {"tennis racket"}


# where it lies


def test_paths_are_those_of_this_package() -> None:
    assert tiny_coco() == tiny_coco("val")
    assert tiny_llava().parent == tiny_coco().images.parent.parent
    assert tiny_llava().name == "tiny_llava"


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="split='train' is no split of tiny COCO; choose one of val, shift"):
        tiny_coco("train")
