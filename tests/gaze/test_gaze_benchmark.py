"""The gaze benchmark runs to its end on a tiny model, and both its arms draw the same paths."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gaze.py"


def test_it_runs_and_says_all(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_gaze", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    small = "--dim 96 --layers 1 --searches 3 --samples 4 --single 3 --longest 4 --rounds 2 --batch 2 --length 3"
    module.main([*small.split(), "--repeats", "2", "--warmup", "0", "--out", str(tmp_path / "gaze.json")])
    found = json.loads((tmp_path / "gaze.json").read_text())
    assert found["paths"]["paths"] == 12
    assert found["paths"]["same_paths"] == "3 of 3"
    assert found["paths"]["one_by_one_over_batched"]["target"] == 20
    for name in ("crops", "features"):
        assert found["training"][name]["oat_over_plain"]["target"] == 1.3
    assert found["machine"]["device"] == "cpu"
