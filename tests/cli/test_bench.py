"""`vlattn bench`: a table and a file from the embedded model, and one-line errors for bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlattn.assets.paths import tiny_coco
from vlattn.cli import app
from vlattn.cli.bench import bench
from vlattn.errors import InputError
from vlattn.eval import bench as measure
from vlattn.eval.roofline import Roofline

Invoke = Callable[..., Any]

QUICK = ("--repeats", 1, "--warmup", 0, "--stage-repeats", 1, "--inputs", 1, "--new-tokens", 2)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Roofline("cpu", "float32", 1, {64: 1e11}, {"read": 1e10})
    monkeypatch.setattr(measure, "measure_roofline", lambda *_: machine)


@pytest.mark.slow
def test_methods_are_measured_beside_vanilla_and_written_down(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "found" / "results.json"
    result = invoke(bench, "--method", "flowcut:keep=36", "--method", "random:keep=36", *QUICK, "--out", out)
    assert result.exit_code == 0, result.exception
    found = json.loads(out.read_text())
    vanilla, flowcut, random = found["arms"]
    assert [row["name"] for row in found["arms"]] == ["vanilla", "flowcut:keep=36", "random:keep=36"]
    assert [row["visual_tokens"]["final"] for row in found["arms"]] == [144, 36, 36]
    assert flowcut["kv_bytes"] == random["kv_bytes"]
    assert flowcut["kv_bytes"]["used"] < vanilla["kv_bytes"]["used"]
    assert found["settings"]["name"] == "tiny"
    assert found["settings"]["batch"] == 1
    assert found["settings"]["preprocess_seconds"]["n"] == 1
    assert found["roofline"]["flops_per_second"] > 0
    for word in ("flowcut:keep=36", "random:keep=36", "removed before the decoder", "floor", "stages"):
        assert word in result.output


@pytest.mark.usefixtures("known_machine")
def test_images_batch_and_size_are_taken(invoke: Invoke, tmp_path: Path) -> None:
    files = sorted(tiny_coco("val").images.iterdir())[:2]
    out = tmp_path / "results.json"
    options = ("--images", files[0], "--images", files[1], "--batch", 2, "--image-size", 40, "--prompt", "What is it?")
    result = invoke(bench, *options, *QUICK, "--real-length", "--out", out)
    assert result.exit_code == 0, result.exception
    found = json.loads(out.read_text())
    assert found["settings"]["batch"] == 2
    assert found["settings"]["prompt"] == "What is it?"
    assert found["settings"]["image_size"] == 40
    assert found["arms"][0]["real_length"]["new_tokens"] <= 2


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize(("keep", "code", "verdict"), [(144, 0, "same tokens"), (2, 1, "OTHER TOKENS")])
def test_a_check_of_a_neutral_setting_decides_the_exit_code(invoke: Invoke, keep: int, code: int, verdict: str) -> None:
    result = invoke(bench, "--check", f"flowcut:keep={keep}", *QUICK, "--new-tokens", 12)
    assert result.exit_code == code
    assert f"check flowcut:keep={keep}: {verdict}" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "nothing"), "'nothing' is unknown"),
        (("--method", "flowcut:keep=999"), "keep: got 999"),
        (("--model", "no/such/model"), "neither a folder"),
        (("--layers", 2), "--random-weights-shape"),
        (("--images", "missing.jpg"), "missing.jpg does not exist"),
        (("--dtype", "float33"), "'float33' is not a torch dtype"),
        (("--dtype", "float33", "--random-weights-shape", "llava-1.5-7b"), "'float33' is not a torch dtype"),
    ],
)
@pytest.mark.usefixtures("known_machine")
def test_bad_input_is_named(invoke: Invoke, options: tuple[Any, ...], message: str) -> None:
    result = invoke(bench, *options, *QUICK)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_the_command_is_registered_and_its_help_shows_an_example() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert result.exit_code == 0
    assert "vlattn bench --method flowcut:keep=36" in text
    assert "--real-length" in text
