"""The benchmark of the metrics runs to its end on few pairs, its loops agree, and it writes what it claims to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "scanpath_metrics.py"


def test_it_runs_and_says_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_scanpath_metrics", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    out = tmp_path / "results" / "few.json"
    few = [
        "--predictions",
        "3",
        "--people",
        "2",
        "--length",
        "6",
        "--loop-pairs",
        "4",
        "--repeats",
        "1",
        "--warmup",
        "0",
    ]
    program.main([*few, "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written["metrics"]) == set(program.LOOPS)
    assert written["metrics"]["dtw"]["batched"]["pairs"] == 6
    assert written["machine"]["cpu"]
    assert "loop / this" in capsys.readouterr().out
