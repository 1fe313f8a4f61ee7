"""The benchmark of what OAT learns runs to its end on a small set, and a finished run is not run again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, write_gaze

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gaze_tiny.py"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With a set of ten scenes of two objects, and two settings."""
    rng, scenes, trials = np.random.default_rng(0), {}, []
    for n in range(10):
        name = f"s{n}"
        Image.fromarray(rng.integers(0, 256, (40, 80, 3)).astype(np.uint8)).save(tmp_path / f"{name}.png")
        objects = (SceneObject("dog", (0, 0, 40, 40)), SceneObject("cup", (40, 0, 40, 40)))
        scenes[name] = Scene(name, 80, 40, objects, f"{name}.png")
        for subject in "ab":
            path = (int(rng.integers(2)), n % 2)
            fixations = tuple(Fixation(20.0 + 40 * at, 20.0) for at in path)
            trials.append(
                Trial(name + subject, name, objects[n % 2].label, subject, fixations, path, target_object=n % 2)
            )
    write_gaze(GazeSet(scenes, tuple(trials), tmp_path), tmp_path / "gaze.json")
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_gaze_tiny", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COMMON", f"--data {tmp_path / 'gaze.json'} --split scene --size small --lr 0.001")
    monkeypatch.setattr(module, "SEEDED", {"delta": "--appearance cnn"})
    monkeypatch.setattr(module, "ABLATED", {"by loss": "--appearance cnn --select loss"})
    return module


def test_it_runs_says_all_and_goes_on(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--work", tmp_path / "work", "--seeds", 2, "--epochs", 1, "--samples", 2, "--n-boot", 10]
    words = [*map(str, words), "--out", str(tmp_path / "found.json")]
    program.main(words)
    found = json.loads((tmp_path / "found.json").read_text())
    runs = found["settings"]["delta"]["runs"]
    assert [one["seed"] for one in runs] == [0, 1]
    for model in ("OAT", "OAT greedy"):
        each = [one["models"][model]["metrics"]["ss"]["value"] for one in runs]
        spread = found["settings"]["delta"]["over_seeds"][model]["ss"]
        assert spread == {"mean": pytest.approx(np.mean(each)), "lowest": min(each), "highest": max(each)}
    assert len(found["settings"]["by loss"]["runs"]) == 1
    names = ["random", "centre", "saliency", "similarity", "searcher", "direct", "bridge"]
    assert list(found["baselines"]["models"]) == names
    assert found["baselines"]["bridge"]["chosen_by"] == "ss on val"
    assert found["baselines"]["human"]["ss"]["low"] <= found["baselines"]["human"]["ss"]["value"]
    assert str(tmp_path / "work") not in runs[0]["commands"][0]
    assert found["machine"]["device"] == "cpu"

    monkeypatch.setattr(program, "_command", lambda words: pytest.fail(f"runs {words}"))
    program.main(words)
    assert json.loads((tmp_path / "found.json").read_text()) == found
