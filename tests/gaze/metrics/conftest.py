"""Two paths whose scores are known, and random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlattn.gaze.metrics.paths import Paths, make_paths

A = [(100, 100, 200), (300, 150, 300), (500, 400, 250), (200, 380, 200)]
B = [(110, 90, 200), (320, 180, 300), (480, 420, 150)]
P, Q = [3, 3, 5, 7], [3, 5, 5, 7, 7]
SCREEN = (1280, 720)
Draw = Callable[..., Paths]


@pytest.fixture
def known() -> tuple[Paths, Paths]:
    """A predicted and B human, and the other way round; durations in milliseconds."""
    return make_paths([A, B], SCREEN), make_paths([B, A], SCREEN)


@pytest.fixture
def symbols() -> tuple[Paths, Paths]:
    """P and Q, as symbols of every kind."""

    def one(path: list[int]) -> Paths:
        points = [(10 * place, 10, 100) for place in range(len(path))]
        return make_paths([points], SCREEN, symbols={kind: [path] for kind in ("objects", "labels", "clusters")})

    return one(P), one(Q)


@pytest.fixture
def draw() -> Draw:
    """draw(count, seed, low, high): random paths of low to high fixations, with symbols of every kind."""

    def make(count: int, seed: int, low: int = 1, high: int = 9, screen: tuple[int, int] = SCREEN) -> Paths:
        rng = np.random.default_rng(seed)
        paths, strings = [], []
        for n in rng.integers(low, high + 1, count):
            points = rng.random((n, 2)) * screen
            paths.append(np.concatenate([points, rng.uniform(60, 600, (n, 1))], 1))
            strings.append(rng.integers(0, 4, n).tolist())
        kinds: Any = dict.fromkeys(("objects", "labels", "clusters"), strings)
        boxes = np.concatenate([rng.random((count, 2)) * screen / 2, rng.uniform(200, 600, (count, 2))], 1)
        targets = rng.integers(0, 4, count).tolist()
        return make_paths(paths, screen, symbols=kinds, boxes=boxes, targets=targets)

    return make
