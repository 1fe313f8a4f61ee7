"""Scenes of COCO categories composed from openly licensed emoji artwork: numpy and Pillow, seeded, under 1 ms each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 96
"""Side of a scene in pixels."""

META = json.loads((files("vlattn.assets") / "coco_emoji.json").read_text(encoding="utf-8"))
NAMES: tuple[str, ...] = tuple(META["emoji"])
INDEX = {name: i for i, name in enumerate(NAMES)}
CONTEXTS = [[INDEX[name] for name in members] for members in META["contexts"].values()]
CONTEXT_WEIGHTS = np.array([1.6, 1.4, 0.7, 1.0, 0.7, 1.3, 1.1, 0.9, 1.0, 0.6, 0.9])

FAMILIES = {
    "noto": "emoji-datasource-google/img/google/64/{}.png",
    "twemoji": "emoji-datasource-twitter/img/twitter/64/{}.png",
    "fluent": "@lobehub/fluent-emoji-3d/assets/{}.webp",
}
SEEN_FAMILIES = ("noto", "twemoji")

SIZES, ANGLES = (24, 28, 32, 36, 40), (-12, -6, 0, 6, 12)
IN_CONTEXT = 0.9
OBJECT_COUNTS, OBJECT_COUNT_WEIGHTS = (2, 3, 4, 5, 6), (0.12, 0.24, 0.28, 0.22, 0.14)
REPEAT = 0.1
MAX_OVERLAP = 0.25
HAZE, CONTRAST, GRAIN = 0.3, (0.15, 0.5), (0.05, 0.12)
"""Share of scenes in haze, what it leaves of the contrast, and its noise: where sight fails, habit answers."""

BACKGROUNDS = {
    "blue": (0.45, 0.62, 0.85),
    "green": (0.50, 0.72, 0.45),
    "gray": (0.58, 0.58, 0.60),
    "brown": (0.60, 0.46, 0.34),
    "pink": (0.90, 0.66, 0.74),
    "purple": (0.62, 0.50, 0.78),
    "yellow": (0.90, 0.82, 0.52),
    "white": (0.93, 0.93, 0.92),
}


@dataclass(frozen=True)
class Placed:
    """One object of a scene: category index, top-left corner, side in pixels, and its full alpha mask [s, s]."""

    category: int
    x: int
    y: int
    size: int
    alpha: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """`image` float32 [S, S, 3] in [0, 1]; `objects` in drawing order; `owner` int [S, S]: object on top, or -1.

    `contrast` is 1 in clear air and what is left of it in haze.
    """

    image: np.ndarray
    objects: tuple[Placed, ...]
    owner: np.ndarray
    background: str
    contrast: float = 1.0

    def label_map(self, background: int) -> np.ndarray:
        """Category index per pixel, int64 [S, S], with `background` where no object is on top."""
        table = np.array([o.category for o in self.objects] + [background], np.int64)
        return table[self.owner]


def load_sprites(artwork: Path, families: tuple[str, ...]) -> list[list[list[np.ndarray]]]:
    """Read the artwork below `artwork` (a node_modules folder): [category][family] -> float RGBA arrays [s, s, 4]."""
    sprites = []
    for code in META["emoji"].values():
        per_family = []
        for family in families:
            path = artwork / FAMILIES[family].format(code)
            if not path.is_file():
                raise FileNotFoundError(
                    f"artwork {path} is missing: install the npm packages named in assets/README.md"
                )
            art = Image.open(path).convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
            variants = []
            for size in SIZES:
                small = art.resize((size, size), Image.Resampling.LANCZOS)
                for angle in ANGLES:
                    turned = small.rotate(angle, Image.Resampling.BICUBIC)
                    for image in (turned, turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
                        variants.append(np.asarray(image, np.float32) / 255)
            per_family.append(variants)
        sprites.append(per_family)
    return sprites


def _choose(rng: np.random.Generator, weights: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))


_ZIPF = {n: 1 / np.arange(1, n + 1) ** 0.7 for n in {len(c) for c in CONTEXTS}}


def _background(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    name = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    base = np.array(BACKGROUNDS[name], np.float32)
    a, b = (np.clip(base + rng.normal(0, 0.035, 3), 0, 1).astype(np.float32) for _ in range(2))
    t = np.linspace(0, 1, SIZE, dtype=np.float32)
    ramp = t[:, None, None] if rng.random() < 0.5 else t[None, :, None]
    coarse = rng.normal(0, 0.03, (7, 7, 1)).astype(np.float32)
    texture = np.repeat(np.repeat(coarse, 14, 0), 14, 1)[:SIZE, :SIZE]
    fine = rng.normal(0, 0.02, (SIZE, SIZE, 1)).astype(np.float32)
    return name, a * (1 - ramp) + b * ramp + texture + fine


def _place(rng: np.random.Generator, size: int, taken: list[Placed]) -> tuple[int, int] | None:
    for _ in range(12):
        x, y = (int(v) for v in rng.integers(0, SIZE - size + 1, 2))
        free = True
        for o in taken:
            w = min(x + size, o.x + o.size) - max(x, o.x)
            h = min(y + size, o.y + o.size) - max(y, o.y)
            if w > 0 and h > 0 and w * h >= MAX_OVERLAP * min(size, o.size) ** 2:
                free = False
                break
        if free:
            return x, y
    return None


def draw_scene(rng: np.random.Generator, sprites: list[list[list[np.ndarray]]]) -> Scene:
    """Draw one scene: a context, 2 to 6 objects that mostly belong to it, each partly hidden at most."""
    context = CONTEXTS[_choose(rng, CONTEXT_WEIGHTS)]
    background, image = _background(rng)
    owner = np.full((SIZE, SIZE), -1, np.int64)
    placed: list[Placed] = []
    for _ in range(int(rng.choice(OBJECT_COUNTS, p=OBJECT_COUNT_WEIGHTS))):
        if placed and rng.random() < REPEAT:
            category = placed[int(rng.integers(len(placed)))].category
        elif rng.random() < IN_CONTEXT:
            category = context[_choose(rng, _ZIPF[len(context)])]
        else:
            category = int(rng.integers(len(NAMES)))
        variants = sprites[category][int(rng.integers(len(sprites[category])))]
        art = variants[int(rng.integers(len(variants)))]
        size = art.shape[0]
        corner = _place(rng, size, placed)
        if corner is None:
            continue
        x, y = corner
        alpha = art[..., 3:]
        # A soft contact shadow, two pixels down and right, lifts the object from the background.
        sx, sy = min(x + 2, SIZE - size), min(y + 2, SIZE - size)
        image[sy : sy + size, sx : sx + size] *= 1 - 0.25 * alpha
        window = image[y : y + size, x : x + size]
        image[y : y + size, x : x + size] = window * (1 - alpha) + art[..., :3] * alpha
        owner[y : y + size, x : x + size][alpha[..., 0] > 0.5] = len(placed)
        placed.append(Placed(category, x, y, size, alpha[..., 0]))
    contrast = 1.0
    if rng.random() < HAZE:
        contrast = float(rng.uniform(*CONTRAST))
        veil = np.array(BACKGROUNDS[background], np.float32)
        grain = rng.normal(0, rng.uniform(*GRAIN), image.shape).astype(np.float32)
        image = veil + contrast * (image - veil) + grain
    return Scene(np.clip(image, 0, 1).astype(np.float32), tuple(placed), owner, background, contrast)
