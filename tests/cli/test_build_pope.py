"""`vlattn build-pope`: three files and a sidecar, the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vlattn.cli.build_pope import build_pope
from vlattn.errors import InputError


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    names = ["dog", "cat", "apple", "bus", "kite", "bench", "oven", "bed"]
    data = {
        "images": [{"id": i, "file_name": f"{i:06d}.jpg"} for i in range(1, 13)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "category_id": 1 + (i * (k + 1) + k) % 8}
            for i in range(1, 13)
            for k in range(5)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return path


def test_the_files_and_their_sidecar_are_written(invoke: Any, instances: Path, tmp_path: Path) -> None:
    out = tmp_path / "pope"
    result = invoke(build_pope, instances, "--out", out, "--n-images", 4, "--seed", 3)
    assert result.exit_code == 0, result.exception
    assert result.output.count("24 questions") == 3
    sidecar = json.loads((out / "pope_build.json").read_text())
    assert sidecar["settings"] == {
        **{"instances": "instances.json", "n_images": 4, "per_image": 3, "seed": 3},
        **{"universe": "observed", "freq_scope": "sample"},
        "instances_sha256": hashlib.sha256(instances.read_bytes()).hexdigest(),
    }
    assert len(sidecar["image_ids"]) == 4
    questions = [json.loads(line) for line in (out / "pope_adversarial.json").read_text().splitlines()]
    assert {q["image_id"] for q in questions} == set(sidecar["image_ids"])
    assert str(tmp_path) not in (out / "pope_build.json").read_text()


def test_the_same_seed_gives_the_same_bytes(invoke: Any, instances: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        invoke(build_pope, instances, "--out", tmp_path / name, "--n-images", 4, "--universe", "all")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_too_many_images_are_refused(invoke: Any, instances: Path, tmp_path: Path) -> None:
    result = invoke(build_pope, instances, "--out", tmp_path / "pope")
    assert isinstance(result.exception, InputError)
    assert "n_images=500" in str(result.exception)
    assert not (tmp_path / "pope").exists()
