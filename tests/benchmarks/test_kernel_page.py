"""docs/kernels.md says what the result files say, and of what they do not say that it was not measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_page", ROOT / "benchmarks" / "kernel_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(*lines: dict[str, Any]) -> dict[str, Any]:
    named = {"op": "select_tokens", "kernel": "choose", "dtype": "bf16", "warps": 4, "stages": 2}
    return {"triton": "1.2", "shared_limit": {"sm_80": 2048}, "kernels": [{**named, **line} for line in lines]}


def timed(**machine: str) -> dict[str, Any]:
    spread = {"median": 1.5, "lower": 1.25, "upper": 2.0}
    case = {
        "op": "gather_kv", "shape": "8 x 8", "share_of_floor": 0.5, "bytes_above_inputs": {"reference": 3_000_000},
        "targets": {"over flash": {"at_most": 1.1, "met": False}},
        "milliseconds": {"triton": spread, "reference": spread},
        "triton_over": {"flash": {"median": 1.2}}, "reference_over": {"eager": {"median": 0.25}},
    }  # fmt: skip
    versions = {"cpu": "a cpu", "threads": 2, "versions": {"torch": "9.9"}}
    return {"machine": {**versions, **machine}, "settings": {"timed": True, "dtype": "float32"}, "cases": [case]}


def test_the_page_in_docs_is_what_the_results_give(program: ModuleType) -> None:
    written = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert written == program.page(RESULTS), "run: python benchmarks/kernel_page.py"


def test_every_compiled_configuration_is_counted_once_on_the_page(program: ModuleType) -> None:
    found = json.loads((RESULTS / "kernel_resources.json").read_text())
    for target in found["shared_limit"]:
        here = [line[target] for line in found["kernels"] if target in line]
        text = program.resources({**found, "shared_limit": {target: found["shared_limit"][target]}})
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
        assert sum(int(row[3].split(",")[0]) for row in rows) == len(here)
        spilled = [numbers[1] for numbers in here if not isinstance(numbers, str)]
        told = [row[5].split() for row in rows if row[5] not in ("0", "-")]
        assert sum(int(some.strip("(")) for _, some, *_ in told) == sum(map(bool, spilled))
        assert max((int(most) for most, *_ in told), default=0) == max(spilled)


def test_a_kernel_shows_its_ranges_and_its_heaviest_configuration(program: ModuleType) -> None:
    text = program.resources(
        asked(
            {"name": "narrow", "sm_80": [40, 0, 1024]},
            {"name": "wide", "sm_80": [255, 16, 4096]},
            {"name": "lost", "sm_80": "no"},
        )
    )
    assert (
        "3 of 3 configurations tried; 1 of them do not compile; 1 spill, up to 16 bytes of a thread; 1 ask for" in text
    )
    row = (
        "| select_tokens | choose | bf16 | 3, 1 fail | 40 to 255 | 16 (1 of them) | 1 to 4 | wide, 4 warps, 2 stages |"
    )
    assert row in text.splitlines()


def test_what_no_card_has_timed_is_not_measured(program: ModuleType) -> None:
    text = program.times([timed()])
    rows = [line for line in text.splitlines() if line.endswith("| not measured |")]
    assert {row.split(" | ")[0].strip("| ") for row in rows} == {op.__name__ for op in program.load("kernels").OPS}
    assert any("at most 1.1 of flash" in row for row in rows)
    assert "### a cpu, 2 threads, float32, torch 9.9" in text
    assert "| gather_kv | 8 x 8 | 1.5 (1.25 to 2) | eager 0.25 | 50% | reference 3 |" in text
    assert program.times([]).endswith("Not measured.\n")


def test_a_card_that_was_timed_has_its_table(program: ModuleType) -> None:
    text = program.times([timed(gpu="NVIDIA H100")])
    assert "| gather_kv | 8 x 8 | 1.5 (1.25 to 2) | flash 1.20 | 50% | over flash missed |" in text
    assert "| not measured |" not in text
