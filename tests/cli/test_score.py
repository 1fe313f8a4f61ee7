"""`vlattn score`: a table, a report file, and no model library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlattn.cli.score import score
from vlattn.errors import InputError
from vlattn.eval.records import Record, RecordWriter


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    with RecordWriter(path, {"task": "pope"}) as writer:
        for i, (raw, label) in enumerate([("Yes", "yes"), ("No", "no"), ("NO", "no"), ("yes", "yes")]):
            writer.write(Record(f"popular:{i}", i // 2, raw=raw, label=label))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path, Path]:
    images = [{"id": 1, "file_name": "1.jpg"}]
    files = {
        "instances": {
            "images": images,
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1}],
            "categories": [{"id": 1, "name": "dog"}],
        },
        "captions": {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "A man with his dog."}]},
        "generated": [{"image_id": 1, "caption": "A man, a dog [and] a cat."}],
    }
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path / "generated.json", tmp_path / "instances.json", tmp_path / "captions.json"


def test_pope_prints_percent_and_writes_fractions(invoke: Any, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = invoke(score, records, "--out", out, "--n-boot", 50)
    assert result.exit_code == 0, result.exception
    for part in ("pope-official", "popular", "mean", "pooled", "75.0", "accuracy", "4 items, 2 images"):
        assert part in result.output
    assert "read by pope-official otherwise" in result.stderr
    report = json.loads(out.read_text())
    assert report["metrics"]["accuracy"]["value"] == 0.75
    assert "items" not in report


def test_chair_prints_every_metric(invoke: Any, coco: tuple[Path, Path, Path], tmp_path: Path) -> None:
    generated, instances, captions = coco
    out = tmp_path / "report.json"
    result = invoke(
        *(score, generated, "--task", "chair", "--profile", "chair-fixed", "--annotations", instances),
        *("--captions", captions, "--out", out, "--details"),
    )
    assert result.exit_code == 0, result.exception
    for part in ("CHAIR_s", "CHAIR_i", "33.3", "Len", "chair-fixed"):
        assert part in result.output
    assert json.loads(out.read_text())["items"][0]["truth"] == ["dog", "person"]


def test_bad_input_is_one_line(invoke: Any, tmp_path: Path) -> None:
    result = invoke(score, tmp_path / "none.jsonl", "--task", "pope")
    assert isinstance(result.exception, InputError)
    assert "\n" not in str(result.exception)


def test_help_names_profiles_and_options(invoke: Any) -> None:
    text = invoke(score, "--help").output
    for part in ("chair-legacy", "pope-official", "--annotations", "--captions", "--truncate", "--details"):
        assert part in text


def test_scoring_loads_neither_torch_nor_transformers(records: Path, coco: tuple[Path, Path, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from vlattn.cli.score import score\n"
        "from vlattn.cli.build_pope import build_pope; from vlattn.cli.compare import compare\n"
        "pope, generated, instances, captions = map(Path, sys.argv[1:])\n"
        "score(pope, n_boot=10); score(generated, 'chair', None, instances, captions, n_boot=10)\n"
        "compare(pope, pope, n_boot=10)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, records, *coco], check=True, capture_output=True, timeout=120)
