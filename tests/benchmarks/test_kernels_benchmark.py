"""The kernel benchmarks: every op has a row, a machine without a card is told so, and wrong kernels are noticed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn import ops

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    full = f"vlattn_benchmark_{name}"
    spec = importlib.util.spec_from_file_location(full, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load("kernels")


def test_every_op_has_a_row(kernels: ModuleType) -> None:
    public = {
        name
        for name, thing in vars(ops).items()
        if getattr(thing, "__module__", "") == ops.__name__ and not name.startswith("_")
    }
    assert {op.__name__ for op in kernels.OPS} == public


def test_a_machine_without_a_card_is_told_so(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="No GPU here, so there is no kernel to time"):
        kernels.main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels, for machines without a card")
@pytest.mark.slow
def test_the_check_compares_every_op_with_its_reference(
    kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    kernels.main(["--check", "--out", str(out)])
    found = json.loads(out.read_text())
    assert "No GPU here" in capsys.readouterr().out
    assert not found["settings"]["timed"]
    assert {row["op"] for row in found["cases"]} == {op.__name__ for op in kernels.OPS}
    assert all(row["check"]["ok"] for row in found["cases"])
    assert all("milliseconds" not in row for row in found["cases"])


def test_references_are_checked_against_eager_pytorch(kernels: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    kernels.main(["--cpu", "--check", "--out", str(out)])
    found = json.loads(out.read_text())
    assert {row["op"] for row in found["cases"]} == {op.__name__ for op in kernels.OPS}
    assert all(row["check"]["ok"] for row in found["cases"])


def test_a_reference_is_timed_beside_eager_pytorch_with_what_each_holds(kernels: ModuleType) -> None:
    roofline = kernels.Roofline("cpu", "float32", 1, {1: 1e9}, {"copy": 1e9, "read": 1e9})
    case = kernels.Case(
        "x", "", lambda how: torch.zeros(1000), 0, 10.0, {"eager": lambda: torch.zeros(10, 1000).sum(0)}, {"eager": 0.1}
    )
    found = kernels.time(case, roofline, kernels.arguments(["--cpu", "--repeats", "3", "--warmup", "0"]))
    assert found["milliseconds"].keys() == {"reference", "eager"}
    assert found["reference_over"].keys() == {"eager"}
    assert found["targets"] == {}
    assert 4000 <= found["bytes_above_inputs"]["reference"] < 40_000 <= found["bytes_above_inputs"]["eager"]


def test_shapes_are_known_without_numbers(kernels: ModuleType) -> None:
    maker = kernels.Maker(torch.device("meta"), torch.bfloat16)
    assert {case.op for op in kernels.OPS for case in op(maker)} == {op.__name__ for op in kernels.OPS}


def test_a_wrong_kernel_is_noticed(kernels: ModuleType) -> None:
    def case(of_triton: Any) -> Any:
        return kernels.Case("x", "", lambda how: of_triton if how == "triton" else torch.ones(3), 0, 0)

    assert kernels.check(case(torch.ones(3)), torch.float32)["ok"]
    assert not kernels.check(case(torch.tensor([1, 1, 1.1])), torch.float32)["ok"]
    assert not kernels.check(case(torch.tensor([1, 1, torch.nan])), torch.float32)["ok"]
    chosen = kernels.Case("x", "", lambda how: torch.tensor([1 if how == "triton" else 2]), 0, 0)
    assert not kernels.check(chosen, torch.float32)["ok"]


def test_times_are_put_beside_targets_and_the_floor(kernels: ModuleType) -> None:
    roofline = kernels.Roofline("cpu", "float32", 1, {1: 1e9}, {"copy": 1e9, "read": 1e9})
    case = kernels.Case(
        "x", "", lambda how: sum(range(20_000)), 0, 10.0, {"other": lambda: None}, {"other": 1e9}, copy_share=0.8
    )
    found = kernels.time(case, roofline, kernels.arguments(["--repeats", "3", "--warmup", "0"]))
    assert found["targets"]["over other"]["met"]
    assert not found["targets"]["share of copy bandwidth"]["met"]
    assert found["milliseconds"]["triton"]["median"] > 0


def test_resources_are_listed_once_for_each_op() -> None:
    pytest.importorskip("triton")
    listed = load("kernel_resources").find()
    assert len(listed) == len(set(listed))
    assert {name for name, _ in listed} >= {"select_tokens", "gather_kv", "pooled_probe"}
    assert all(hasattr(ops, name) for name, _ in listed)
