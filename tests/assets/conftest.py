"""Sprites of two kinds: plain discs, made on the spot, and the artwork itself where VLATTN_ARTWORK says it is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vlattn.assets.scenes import NAMES, SIZES, Scene, draw_scene

Sprites = list[list[list[np.ndarray]]]


@pytest.fixture(scope="session")
def artwork() -> Path:
    """The node_modules folder with the artwork packages."""
    where = os.environ.get("VLATTN_ARTWORK")
    if not where:
        pytest.skip("VLATTN_ARTWORK does not name a node_modules folder with the packages of assets/README.md")
    return Path(where)


@pytest.fixture(scope="session")
def discs() -> Sprites:
    """One soft-edged disc per category and size, each category in a grey of its own."""
    sprites: Sprites = []
    for index in range(len(NAMES)):
        variants = []
        for size in SIZES:
            y, x = np.mgrid[:size, :size] - (size - 1) / 2
            alpha = np.clip(size / 2 - np.hypot(x, y), 0, 1)
            grey = np.full((size, size, 3), index / len(NAMES))
            variants.append(np.concatenate([grey, alpha[..., None]], -1).astype(np.float32))
        sprites.append([variants])
    return sprites


@pytest.fixture(scope="session")
def scenes(discs: Sprites) -> list[Scene]:
    return [draw_scene(np.random.default_rng([0, i]), discs) for i in range(400)]
