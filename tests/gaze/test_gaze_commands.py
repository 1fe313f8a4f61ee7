"""`vlattn gaze train`, `predict`, `eval` and `show`, from first to last, on small pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, read_gaze, write_gaze


def run(*words: Any, columns: int = 200) -> str:
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": str(columns)})
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches on ten shelves by two people, and a run that was trained on them."""
    path, rng = tmp_path_factory.mktemp("gaze"), np.random.default_rng(0)
    scenes, trials = {}, []
    for n in range(10):
        name = f"s{n}"
        Image.fromarray(rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)).save(path / f"{name}.png")
        boxes = [(30.0 * c, 30.0 * r, 30.0, 30.0) for r in range(2) for c in range(3)]
        scenes[name] = Scene(
            name, 90, 60, tuple(SceneObject(f"o{k}", box) for k, box in enumerate(boxes)), f"{name}.png"
        )
        for subject in "ab":
            seen = (*rng.integers(0, 6, 3).tolist(), n % 6)
            where = tuple(Fixation(float(x), float(y)) for x, y in scenes[name].centers()[list(seen)])
            trials.append(Trial(name + subject, name, f"o{n % 6}", subject, where, seen, target_object=n % 6))
    write_gaze(GazeSet(scenes, tuple(trials), path), path / "gaze.json")
    words = ["--size", "small", "--epochs", "1", "--batch-size", "8", "--lr", "0.001"]
    told = run("gaze", "train", "--data", path / "gaze.json", "--out", path / "run", *words)
    assert "16 + 2 + 2 searches, 0 left out" in told
    return path


def test_training_goes_on_only_when_asked_to(folder: Path) -> None:
    words = ["gaze", "train", "--data", folder / "gaze.json", "--out", folder / "run", "--size", "small"]
    with pytest.raises(InputError, match=r"holds result.json already"):
        run(*words)
    assert "tested: best epoch, 0 of 1" in run(
        *words, "--epochs", "1", "--batch-size", "8", "--lr", "0.001", "--resume"
    )


@pytest.mark.parametrize(("mode", "paths"), [("sample", 5), ("greedy", 1), ("beam", 3)])
def test_predictions_are_a_gaze_file_that_can_be_scored(folder: Path, mode: str, paths: int) -> None:
    out = folder / f"{mode}.json"
    words = [] if mode == "greedy" else ["--samples", paths]
    run("gaze", "predict", folder / "run", "--out", out, "--mode", mode, *words)
    found = read_gaze(out)
    assert len(found.trials) == 2 * paths
    assert {trial.subject for trial in found.trials} == {"OAT"}
    assert "ss" in run("gaze", "score", out, folder / "gaze.json", "--metrics", "ss,ed", "--n-boot", 0)


def test_all_data_can_be_predicted(folder: Path) -> None:
    run("gaze", "predict", folder / "run", "--out", folder / "all.json", "--part", "all", "--samples", 2)
    assert len(read_gaze(folder / "all.json").trials) == 40


def test_evaluation_has_people_and_baselines_beside_the_model(folder: Path) -> None:
    told = run("gaze", "eval", folder / "run", "--samples", 3, "--n-boot", 10, "--out", folder / "eval.json")
    found = json.loads((folder / "eval.json").read_text())
    assert list(found["models"]) == ["OAT", "OAT greedy", "random", "centre", "saliency", "similarity"]
    for name in ("OAT", "random"):
        assert found["models"][name]["loss"] > 0
        assert 0 < found["models"][name]["sim"] < 1
    assert 0 <= found["models"]["OAT"]["metrics"]["ss"]["value"] <= 1
    assert found["human"]["ss"]["value"] is not None
    assert all(name in told for name in ("people", "centre", "behaviour_delta", "loss"))


def test_a_language_model_and_the_shortest_path_can_stand_beside_it(folder: Path) -> None:
    words = ["--samples", 2, "--n-boot", 10, "--metrics", "ss", "--baselines", "direct,bridge"]
    told = run("gaze", "eval", folder / "run", *words, "--attention", "prompt:1", "--out", folder / "bridge.json")
    found = json.loads((folder / "bridge.json").read_text())
    assert list(found["models"]) == ["OAT", "OAT greedy", "direct", "bridge"]
    assert found["bridge"]["reading"] == "prompt:1"
    assert found["bridge"]["tried"] is None
    assert found["bridge"]["lvlm"] == "tiny"
    assert "bridge: attention of tiny, prompt:1" in told
    # Each of the two people goes to three random objects, then to the target.
    assert found["models"]["direct"]["metrics"]["ss"]["value"] == pytest.approx(0.25)


def test_more_models_than_fit_side_by_side_go_into_another_table(folder: Path) -> None:
    names = ["random", "centre", "saliency", "similarity", "searcher", "direct"]
    words = ["--samples", 1, "--n-boot", 0, "--metrics", "ss", "--baselines", ",".join(names)]
    told = run("gaze", "eval", folder / "run", *words, columns=100)
    assert all(f" {name} " in told for name in ("OAT greedy", *names))
    assert told.count(" people ") == 2


def test_a_choice_needs_a_part_to_choose_on(folder: Path) -> None:
    write_gaze(read_gaze(folder / "gaze.json"), folder / "other.json")
    with pytest.raises(InputError, match="attention: got auto, but there is no val part"):
        run("gaze", "eval", folder / "run", "--data", folder / "other.json", "--baselines", "bridge")


def test_pictures_are_drawn(folder: Path) -> None:
    told = run("gaze", "show", folder / "run", "--out", folder / "pictures", "--scenes", 1, "--steps", 2, "--side", 300)
    page, file = sorted((folder / "pictures").iterdir())
    assert page.name == "index.html"
    assert all(str(one.name) in told for one in (page, file))
    with Image.open(file) as picture:
        assert picture.width == 3 * 308 + 8
    shown = page.read_text()
    assert shown.count("<figcaption>") == shown.count("data:image/jpeg") == 2 + 1 + 2  # people, OAT, steps
    assert "gaze.json, test: 1 of 1 searches" in shown
    assert "subject a" in shown
    assert "OAT, greedy" in shown


def test_a_folder_without_a_run_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model: .* cannot be read"):
        run("gaze", "predict", folder, "--out", folder / "x.json")
