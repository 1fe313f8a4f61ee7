"""`vlattn train dyvte`: from examples on disk to gates that the method loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vlattn.assets.paths import tiny_coco
from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.interventions.dyvte_gates import load_gates

runner = CliRunner()


def train(*words: object) -> Any:
    return runner.invoke(app, ["train", "dyvte", *map(str, words)], catch_exceptions=False, env={"COLUMNS": "100"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = tiny_coco("val").images
    lines = [
        {"image": str(images / f"{i:012d}.jpg"), "question": "Is there a dog in the image?", "answer": "no"}
        for i in (2, 6, 8, 12)
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_gates_are_trained_logged_and_loadable_and_the_balance_is_shown(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates"
    options = ("--gate-hidden", 4, "--batch-size", 2, "--layers-per-step", 6, "--epochs", 2, "--lr", "0.001")
    result = train("--data", data, "--out", out, *options)
    assert result.exit_code == 0
    gates = load_gates(out)
    assert gates.gate_hidden == 4
    assert gates.made_for.name == "tiny"
    assert gates.training_record["data"] == "set.jsonl"
    assert gates.training_record["labels"]["examples"] == [8] * 6
    assert len((out / "training_log.jsonl").read_text().splitlines()) == 4
    last = next(line for line in result.output.splitlines() if line.split()[:1] == ["5"])
    assert last.split()[:3] == ["5", "8", "100.0%"]
    assert "checkpoint.pt" not in [path.name for path in out.iterdir()]


def test_kept_tasks_serve_a_second_gate_size(data: Path, tmp_path: Path) -> None:
    shared = ("--data", data, "--tasks", tmp_path / "tasks", "--batch-size", 2, "--layers-per-step", 6)
    for hidden in (2, 3):
        assert train("--out", tmp_path / str(hidden), "--gate-hidden", hidden, *shared).exit_code == 0
    assert load_gates(tmp_path / "3").training_record["labels"] == load_gates(tmp_path / "2").training_record["labels"]
    assert len(list((tmp_path / "tasks").glob("*.safetensors"))) == 2


def test_a_second_run_into_the_same_folder_and_resuming_nothing_are_refused(data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--out", tmp_path / "gates", "--gate-hidden", 2, "--steps", 1, "--batch-size", 1)
    assert train(*options).exit_code == 0
    before = load_gates(tmp_path / "gates").state_dict()
    with pytest.raises(InputError, match="holds gates already"):
        train(*options)
    with pytest.raises(InputError, match="holds no checkpoint"):
        train(*options, "--resume")
    after = load_gates(tmp_path / "gates").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_embedded_set_is_the_part_of_val_that_is_set_aside(tmp_path: Path) -> None:
    options = ("--out", tmp_path, "--gate-hidden", 2, "--steps", 1, "--batch-size", 1)
    assert train("--data", "tiny:val", *options).exit_code == 0
    assert load_gates(tmp_path).training_record["data"] == "tiny:val"
