"""The FlowCut benchmark runs to its end on a toy model and writes what it claims to write."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "flowcut.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_flowcut", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_says_all(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "toy.json"
    toy = ["--tiny", "--layers", "2", "--repeats", "3", "--prefill-repeats", "2", "--warmup", "1", "--out", str(out)]
    benchmark.main(toy)
    found = json.loads(out.read_text())

    assert "wrote" in capsys.readouterr().out
    assert found["machine"]["cpu"]
    assert found["machine"]["versions"]["torch"]
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["settings"]["text"] == [64, 128, 4, 2]
    assert found["entropy"]["reached_by_layer"] == pytest.approx([0.8] * 8, abs=0.02)
    assert set(found["timings_ms"]) == {"decoder", "tower", "keep all", "prefill"}
    for group, timings in found["timings_ms"].items():
        for timing in timings.values():
            assert len(timing["raw"]) == (2 if group == "prefill" else 3)
            assert 0 < timing["lower"] <= timing["median"] <= timing["upper"]
    targets = {ratio["what"]: ratio["target"] for ratio in found["ratios"]}
    assert targets == {"decoder": 1.03, "tower": 1.05, "keep all": 1.02, "prefill": None}
    for ratio in found["ratios"]:
        assert ratio["met"] == (None if ratio["target"] is None else ratio["median"] <= ratio["target"])
    shares = [pruning["ratio"] for pruning in found["pruning"].values()]
    assert shares == sorted(shares)
    assert all(0 < share < 1 for share in shares)


def test_twins_share_weights_but_not_hooks(benchmark: ModuleType) -> None:
    model = benchmark.build(benchmark.shape_of(1, tiny=True), torch.float32, "cpu")
    other = benchmark.twin(model)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    other.language_model.register_forward_pre_hook(lambda module, args: None)
    assert not model.language_model._forward_pre_hooks


def test_an_arm_that_computes_something_else_stops_the_run(benchmark: ModuleType) -> None:
    model = benchmark.build(benchmark.shape_of(1, tiny=True), torch.float32, "cpu")
    ids = torch.tensor([[1] * 3 + [benchmark.IMAGE_ID] * 64 + [2] * 3])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 56, 56)}
    fewest, other = benchmark.prune(model, 8, inputs), benchmark.prune(model, 16, inputs)
    with pytest.raises(SystemExit, match="differ in their outputs"):
        benchmark.same_outputs(model, other, fewest, inputs)
