"""Small random scenes, and models small enough to run in milliseconds."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlattn.gaze.oat import OAT, make_oat
from vlattn.gaze.oat_batch import OATData, Search
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.trial import GazeSet, Scene, SceneObject

FEATURES = 8


class RandomLooks:
    """Features that depend on the scene's id alone."""

    shape = (FEATURES,)

    def of(self, scene: Scene) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(scene.id.encode()))
        return torch.randn(len(scene.objects), FEATURES, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"looks": "random"}


def shelf(name: str, rows: int, columns: int) -> Scene:
    cells = [(10.0 * c, 20.0 * r, 10.0, 20.0) for r in range(rows) for c in range(columns)]
    return Scene(name, 10 * columns, 20 * rows, tuple(SceneObject(str(n), box) for n, box in enumerate(cells)))


def shelves(*sizes: tuple[int, int]) -> OATData:
    """Scenes "0", "1", ... of these rows and columns."""
    scenes = {str(n): shelf(str(n), *size) for n, size in enumerate(sizes)}
    return OATData(GazeSet(scenes, ()), RandomLooks())


def small(**changes: Any) -> OATConfig:
    sizes = {"dim": 96, "heads": 4, "ffn": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
    return OATConfig(**{**sizes, "appearance": "features", "features": FEATURES, **changes})


def model(seed: int = 0, **changes: Any) -> OAT:
    """In eval mode."""
    made = make_oat(small(**changes), seed)
    if "head" not in changes and changes.get("pointer_heads", 2) > 1:
        torch.nn.init.constant_(made.head.readout.bias, 0.3)  # type: ignore[union-attr]
    return made.eval()


def search(data: OATData, scene: int, length: int, seed: int = 0) -> Search:
    rng = np.random.default_rng((seed, scene, length))
    count = len(data.gaze.scenes[str(scene)].objects)
    return Search(str(scene), int(rng.integers(count)), tuple(rng.integers(count, size=length).tolist()))


@pytest.fixture(scope="session")
def oat() -> SimpleNamespace:
    return SimpleNamespace(
        RandomLooks=RandomLooks,
        shelf=shelf,
        shelves=shelves,
        small=small,
        model=model,
        search=search,
        features=FEATURES,
    )
