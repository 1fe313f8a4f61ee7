"""`vlattn gaze score` as the shell calls it, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.gaze.trial import Fixation, GazeSet, Scene, SceneObject, Trial, write_gaze

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "timm", "open_clip", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import vlattn.cli
sys.argv = ["vlattn", *sys.argv[1:]]
vlattn.cli.main()
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    scene = Scene("desk", 300, 100, tuple(SceneObject(name, (100.0 * k, 0, 100, 100)) for k, name in enumerate("abc")))

    def trial(name: str, subject: str, *columns: int) -> Trial:
        fixations = tuple(Fixation(100 * column + 50, 50, 200) for column in columns)
        return Trial(name, "desk", "c", subject, fixations, None)

    people = (trial("t1", "p1", 0, 1, 2), trial("t2", "p2", 0, 2), trial("t3", "p3", 1, 1, 2))
    models = (trial("t1/0", "net", 0, 1, 2), trial("t1/1", "net", 0, 0, 1, 2))
    paths = tmp_path / "pred.json", tmp_path / "human.json"
    for path, trials in zip(paths, (models, people), strict=True):
        write_gaze(GazeSet({"desk": scene}, trials), path)
    return paths


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["gaze", "score", *map(str, arguments)], env={"COLUMNS": "120", "TERM": "dumb"})


def test_it_works_where_torch_cannot_be_imported(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, "gaze", "score", *map(str, files), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "multimatch.vector" in done.stdout
    assert json.loads(out.read_text(encoding="utf-8"))["models"]["net"]["metrics"]["ss"]["n_total"] == 6


def test_table_and_report_hold_the_chosen_metrics(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    result = run(*files, "--metrics", "ss, ed,tfp_auc", "--compare", "trial", "--n-boot", 20, "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text(encoding="utf-8"))
    cells = report["models"]["net"]["metrics"]
    assert list(cells) == ["ss", "ed", "tfp_auc"]
    assert cells["ss"]["value"] == pytest.approx((1 + 3 / 4) / 2)
    assert cells["ed"]["value"] == pytest.approx((0 + 1) / 2)
    assert report["settings"]["compare"] == "trial"
    for word in ("net: 2 paths", "ss", "0.875", "people", "random", "100.0%"):
        assert word in result.output
    assert "dtw" not in result.output


def test_missing_durations_are_said_once_per_metric(files: tuple[Path, Path]) -> None:
    data = json.loads(files[0].read_text(encoding="utf-8"))
    for trial in data["trials"]:
        trial["fixations"] = [one[:2] for one in trial["fixations"]]
    files[0].write_text(json.dumps(data), encoding="utf-8")
    result = run(*files)
    assert result.exit_code == 0
    assert "ss_time: not scored, fixations have no durations on both sides" in result.output


def test_durations_in_seconds_are_warned_of_once_and_name_the_file(files: tuple[Path, Path]) -> None:
    data = json.loads(files[1].read_text(encoding="utf-8"))
    for trial in data["trials"]:
        trial["fixations"] = [[x, y, ms / 1000] for x, y, ms in trial["fixations"]]
    files[1].write_text(json.dumps(data), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"looks like seconds") as caught:
        run(*files)
    assert len(caught) == 1
    assert "human.json" in str(caught[0].message)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("metric: got 'bleu'", ["--metrics", "bleu"]),
        ("over: got 'median'", ["--over", "median"]),
        ("max_step: got -1", ["--max-step", "-1"]),
    ],
)
def test_bad_settings_are_one_line(message: str, arguments: list[str], files: tuple[Path, Path]) -> None:
    result = run(*files, *arguments)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(message)


def test_a_file_that_is_not_there_is_named(files: tuple[Path, Path]) -> None:
    result = run(files[0], files[1].with_name("none.json"))
    assert isinstance(result.exception, InputError)
    assert "none.json" in str(result.exception)
