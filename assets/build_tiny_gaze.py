"""Simulate searches over tiny COCO scenes and over shelves of objects cut out of them.

    python -m vlattn.assets.build_tiny_gaze --out assets/tiny_gaze

Five subjects, all of them `vlattn.gaze.searcher.Searcher` with its default settings and a random stream each, look for
every target: 2 of each of 100 scenes of `val` that have at least four objects, and 4 of each of 60 shelves. Shelves are
2 x 8 and 3 x 6 cells; six of their categories are there once, and targets are among these, the others twice. Needs
nothing but tiny COCO. The same seed gives the same trials, and the same bytes with the same Pillow.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from vlattn.assets.paths import tiny_coco
from vlattn.gaze.data.json_file import read_json
from vlattn.gaze.data.shelf_grid import grid_boxes
from vlattn.gaze.search_view import SearchViews
from vlattn.gaze.searcher import Searcher
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, write_gaze

SUBJECTS = 5
SCENES, SCENE_TARGETS, LEAST_OBJECTS = 100, 2, 4
SHELVES, SHELF_TARGETS = 60, 4
LAYOUTS = ((2, 8), (3, 6))
CELL = 40
SINGLES = 6
VARIANTS = 3
"""Cutouts per category: of the instances that nothing overlaps, those with the most colour."""
GRAIN = 10.0
"""Scenes whose background varies more than this (of 255) from pixel to pixel lie in haze: nothing is cut from them."""

WALLS = ((214, 208, 196), (196, 206, 214), (205, 214, 198), (216, 204, 210))
BOARD = (122, 96, 72)
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 90, "subsampling": "4:4:4", "optimize": True}

SPREAD, MARGIN = 0.15, 0.08
"""Fixations scatter around the middle of an object with this share of its sides, and stay this far inside its box."""
MEDIAN_MS, SPREAD_MS, VERIFYING = 220.0, 0.35, 1.5
"""Durations are log-normal; the last one, on the target, is longer."""


@dataclass(frozen=True)
class Cutout:
    """colour: uint8 [h, w, 3]. mask: bool [h, w]."""

    colour: np.ndarray
    mask: np.ndarray


def cutouts() -> dict[str, list[Cutout]]:
    """Objects of tiny COCO that nothing overlaps and no haze veils, by category: the most colourful."""
    files = tiny_coco("val")
    data = read_json(files.instances, dict, "the instances of tiny COCO")
    names = {one["id"]: one["name"] for one in data["categories"]}
    pictures = {one["id"]: one["file_name"] for one in data["images"]}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for one in data["annotations"]:
        by_image.setdefault(one["image_id"], []).append(one)
    found: dict[str, list[tuple[float, Cutout]]] = {}
    for image_id, objects in by_image.items():
        picture = np.asarray(Image.open(files.images / pictures[image_id]).convert("RGB"))
        if grain(picture, [one["bbox"] for one in objects]) > GRAIN:
            continue
        for one in objects:
            if any(_overlap(one["bbox"], other["bbox"]) for other in objects if other is not one):
                continue
            x, y, width, height = map(int, one["bbox"])
            if max(width, height) > CELL - 4:
                continue
            mask = rle.decode(one["segmentation"]).astype(bool)[y : y + height, x : x + width]
            colour = picture[y : y + height, x : x + width]
            vivid = float(colour[mask].std(0).mean()) * float(mask.sum()) ** 0.5
            found.setdefault(names[one["category_id"]], []).append((vivid, Cutout(colour, mask)))
    best = {name: sorted(few, key=lambda pair: -pair[0])[:VARIANTS] for name, few in sorted(found.items())}
    return {name: [cutout for _, cutout in few] for name, few in best.items() if len(few) > 1}


def grain(picture: np.ndarray, boxes: list[list[float]]) -> float:
    """Mean difference between neighbouring pixels of a picture, outside all boxes."""
    free = np.ones(picture.shape[:2], bool)
    for x, y, width, height in boxes:
        free[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1] = False
    steps = np.abs(np.diff(picture.astype(np.float64), axis=1)).mean(2)
    return float(steps[free[:, 1:] & free[:, :-1]].mean())


def _overlap(a: list[float], b: list[float]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


# Scenes ---------------------------------------------------------------------------------------------------------------
def shelf(number: int, art: dict[str, list[Cutout]], rng: np.random.Generator) -> tuple[Scene, Image.Image]:
    """A shelf and its picture; objects stand on boards, one a cell."""
    rows, columns = LAYOUTS[number % len(LAYOUTS)]
    chosen = [str(name) for name in rng.choice(list(art), SINGLES + (rows * columns - SINGLES) // 2, replace=False)]
    stock = chosen[:SINGLES] + 2 * chosen[SINGLES:]
    stock = [stock[i] for i in rng.permutation(len(stock))]
    wall = np.array(WALLS[number % len(WALLS)], np.float64) + rng.normal(0, 2, (rows * CELL, columns * CELL, 1))
    picture = wall.clip(0, 255).astype(np.uint8)
    for row in range(rows):
        picture[(row + 1) * CELL - 3 : (row + 1) * CELL] = BOARD
    boxes = grid_boxes(rows, columns, (CELL, CELL))
    for name, (left, top, _, _) in zip(stock, boxes, strict=True):
        few = art[name]
        one = few[int(rng.integers(len(few)))]
        height, width = one.mask.shape
        x, y = int(left) + (CELL - width) // 2, int(top) + CELL - 3 - height
        picture[y : y + height, x : x + width][one.mask] = one.colour[one.mask]
    objects = tuple(SceneObject(name, box) for name, box in zip(stock, boxes, strict=True))
    name = f"shelf{number:02d}"
    return Scene(name, columns * CELL, rows * CELL, objects, f"{name}.jpg"), Image.fromarray(picture)


def coco_scenes(out: Path) -> list[Scene]:
    """The scenes of `val` with enough objects, pictures where tiny COCO has them."""
    files = tiny_coco("val")
    data = read_json(files.instances, dict, "the instances of tiny COCO")
    names = {one["id"]: one["name"] for one in data["categories"]}
    objects: dict[int, list[SceneObject]] = {}
    for one in data["annotations"]:
        objects.setdefault(one["image_id"], []).append(SceneObject(names[one["category_id"]], tuple(one["bbox"])))
    found = []
    for image in data["images"]:
        few = objects[image["id"]]
        if len(few) >= LEAST_OBJECTS and len(singles(few)) >= SCENE_TARGETS:
            picture = Path(os.path.relpath(files.images / image["file_name"], out)).as_posix()
            scene = Scene(f"coco{image['id']:04d}", image["width"], image["height"], tuple(few), picture)
            found.append(scene)
    return found[:SCENES]


def singles(objects: Any) -> list[int]:
    """Objects whose category no other has: what can be searched for by name."""
    labels = [one.label for one in objects]
    return [index for index, label in enumerate(labels) if labels.count(label) == 1]


# Searches -------------------------------------------------------------------------------------------------------------
def searches(scene: Scene, targets: int, rng: np.random.Generator) -> list[Trial]:
    """Trials without paths: each subject searches for each of a few targets."""
    chosen = rng.choice(singles(scene.objects), targets, replace=False)
    return [
        Trial(f"{scene.id}/{label}/s{subject}", scene.id, label, f"s{subject}", (), (), None, int(index))
        for index in sorted(chosen)
        for label in [scene.objects[index].label]
        for subject in range(1, SUBJECTS + 1)
    ]


def searched(gaze: GazeSet, seed: int) -> GazeSet:
    """The same trials with paths of the searcher, trial i from the generator seeded [seed, 1, i]."""
    views, searcher, found = SearchViews(gaze), Searcher(), []
    for number, trial in enumerate(gaze.trials):
        rng = np.random.default_rng([seed, 1, number])
        path = searcher.sample(views.of(trial), rng)[0]
        boxes = gaze.scene_of(trial).boxes()[path]
        scatter = (0.5 + SPREAD * rng.normal(size=(len(path), 2))).clip(MARGIN, 1 - MARGIN)
        points = np.round(boxes[:, :2] + scatter * boxes[:, 2:], 1)
        times = MEDIAN_MS * np.exp(SPREAD_MS * rng.normal(size=len(path)))
        correct = path[-1] == trial.target_object
        times[-1] *= VERIFYING if correct else 1
        fixations = tuple(Fixation(float(x), float(y), round(t)) for (x, y), t in zip(points, times, strict=True))
        found.append(replace(trial, fixations=fixations, objects=tuple(path), correct=correct))
    return replace(gaze, trials=tuple(found))


def build(out: Path, seed: int = 7) -> None:
    """Write the shelves' pictures and gaze.json to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("shelf[0-9][0-9].jpg"):
        old.unlink()
    art, scenes, trials = cutouts(), [], []
    for number in range(SHELVES):
        rng = np.random.default_rng([seed, 0, number])
        scene, picture = shelf(number, art, rng)
        picture.save(out / str(scene.image), **JPEG)
        scenes.append(scene)
        trials += searches(scene, SHELF_TARGETS, rng)
    for number, scene in enumerate(coco_scenes(out), SHELVES):
        scenes.append(scene)
        trials += searches(scene, SCENE_TARGETS, np.random.default_rng([seed, 0, number]))
    gaze = GazeSet({scene.id: scene for scene in scenes}, tuple(trials), out)
    write_gaze(searched(gaze, seed), out / "gaze.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/tiny_gaze"))
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    build(args.out, args.seed)


if __name__ == "__main__":
    main()
