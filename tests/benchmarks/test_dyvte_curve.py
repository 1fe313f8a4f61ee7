"""The DyVTE benchmark runs to its end on a few images, and its arithmetic is what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vlattn.eval.items import Item
from vlattn.eval.records import Record
from vlattn.training.tiny_examples import is_training_image

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "dyvte_curve.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_dyvte_curve", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_exit_is_the_first_gate_above_the_threshold_or_the_last_layer(benchmark: ModuleType) -> None:
    said = np.array([[0.1, 0.6, 0.9], [0.5, 0.4, 0.5], [0.9, 0.0, 0.0]])
    assert benchmark.chosen_exits(said, 0.5).tolist() == [1, 2, 0]
    assert benchmark.chosen_exits(said, 0.0).tolist() == [0, 0, 0]
    assert benchmark.chosen_exits(said, 1.0).tolist() == [2, 2, 2]


def test_no_image_that_trained_is_asked_about(benchmark: ModuleType) -> None:
    prompts, pope, chair, _ = benchmark.asked_things(None)
    assert len(pope.items) == 18 * len({item.image_id for item in pope.items})
    for item in [*pope.items, *chair.items]:
        assert not is_training_image(item.image_id)
    for asked in (pope, chair):
        assert [prompts[n] for n in asked.place] == [(item.image, item.prompt) for item in asked.items]
    assert len(prompts) == len(set(prompts))


def test_the_earliest_unchanged_exit_is_the_end_of_the_run_of_equal_answers(benchmark: ModuleType) -> None:
    said = ["yes yes no", "no yes yes", "no no no", "yes no yes"]  # by prompt: after layer 0, after 1, vanilla
    by_exit = [[Record(str(n), n, raw=answers.split()[layer]) for n, answers in enumerate(said)] for layer in range(3)]
    items = [Item(str(n), n, "", "") for n in range(4)]
    exits = np.full(4, 2)
    benchmark.lower_to_unchanged(exits, benchmark.Asked("pope", items, np.arange(4), 1), by_exit)
    assert exits.tolist() == [2, 1, 0, 2]


@pytest.mark.slow
def test_it_runs_and_says_all(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "results" / "toy.json"
    few = "--examples 4 --images 2 --hidden 2 3 --seeds 0 1 --check 3 --single 2 --epochs 1 --n-boot 20 --threads 1"
    benchmark.main([*few.split(), "--work", str(tmp_path / "work"), "--out", str(out)])
    found: dict[str, Any] = json.loads(out.read_text())
    assert "wrote" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000
    settings = found["settings"]
    assert (settings["pope_images"], settings["pope_questions"], settings["captions"]) == (2, 36, 2)
    assert [row["pope"]["mean_layers"] for row in found["forced"]] == [1, 2, 3, 4, 5, 6]
    assert set(found["gates"]) == {"2/0", "2/1", "3/0", "3/1"}
    for each in found["gates"].values():
        layers = [point["pope"]["mean_layers"] for point in each["curve"]]
        assert layers == sorted(layers)
        assert (layers[0], layers[-1]) == (1, 6)
        assert each["curve"][-1]["pope"] == found["forced"][-1]["pope"]
    assert found["earliest_unchanged"]["pope"]["accuracy"] == found["forced"][-1]["pope"]["accuracy"]
    assert [row["gate_hidden"] for row in found["sizes"]] == [2, 3]
    checked = {name: entry for name, entry in found["check"].items() if isinstance(entry, dict)}
    assert {name: entry["answers"] for name, entry in checked.items()} == {
        "pope mask": 36,
        "chair mask": 2,
        "pope single": 2,
        "chair single": 2,
    }
    assert all(entry["differ"] == 0 for entry in checked.values())
