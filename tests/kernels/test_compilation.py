"""Every kernel compiles for cards that are not here, spills no registers and fits into them.

One configuration of each kernel and dtype here; all of them take minutes and run in continuous integration:
`python benchmarks/kernel_resources.py --targets sm_80 sm_90 --strict`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlattn.kernels
from vlattn import ops

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
REFERENCE_ONLY = {"head_scale"}
"""Ops that are one line of PyTorch on every device."""


def resources(folder: Path, target: str) -> tuple[list[dict[str, Any]], int]:
    """What `benchmarks/kernel_resources.py` finds where nothing is interpreted, and the shared memory of the card."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = folder / "resources.json"
    command = [sys.executable, PROGRAM, "--targets", target, "--first", "--out", out]
    subprocess.run(command, check=True, capture_output=True, env={**kept, "TRITON_CACHE_DIR": str(folder / "cache")})
    found = json.loads(out.read_text())
    return found["kernels"], found["shared_limit"][target]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_kernel_spills_registers_or_exceeds_the_shared_memory_of_nvidia_cards(target: str, tmp_path: Path) -> None:
    rows, limit = resources(tmp_path, target)
    assert len(rows) > 20
    assert [row for row in rows if isinstance(row[target], str)] == []
    for row in rows:
        registers, spilled, shared = row[target]
        assert 0 < registers <= 255, row
        assert not spilled, row
        assert shared <= limit, row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_most_kernels_compile_for_newer_and_other_cards(target: str, tmp_path: Path) -> None:
    rows, _ = resources(tmp_path, target)
    compiled = [row for row in rows if not isinstance(row[target], str)]
    assert {row["op"] for row in compiled} == {row["op"] for row in rows}
    assert len(compiled) > 0.9 * len(rows)


def modules() -> list[str]:
    return [found.name for found in pkgutil.iter_modules(vlattn.kernels.__path__)]


def test_every_op_has_a_file_that_names_its_compilations() -> None:
    names = [name for name, thing in vars(ops).items() if getattr(thing, "__module__", "") == ops.__name__]
    public = {name for name in names if not name.startswith("_")} - REFERENCE_ONLY
    assert {"select_tokens", "gather_kv", "pooled_probe"} <= public
    for name in public:
        assert name in modules(), f"kernels/{name}.py"
        found = importlib.import_module(f"vlattn.kernels.{name}").compilations()
        assert found, name
        titles = [(one.name, one.warps, one.stages, str(sorted(one.constants.items(), key=str))) for one in found]
        assert len(titles) == len(set(titles)), name
        for one in found:
            given = set(one.signature) | set(one.constants)
            assert not set(one.signature) & set(one.constants), one.name
            assert given == set(one.kernel.arg_names), one.name


def test_every_compilation_has_half_and_full_precision_of_its_kernel() -> None:
    for name in ("pooled_probe", "select_tokens"):
        found = importlib.import_module(f"vlattn.kernels.{name}").compilations()
        kinds = {(one.kernel.__name__, "fp32" if " fp32 " in one.name else "bf16") for one in found}
        assert {kernel for kernel, kind in kinds if kind == "bf16"} == {k for k, kind in kinds if kind == "fp32"}


def test_importing_the_kernels_times_none_and_a_call_would_time_a_few() -> None:
    code = (
        "import importlib, pkgutil, vlattn.kernels as kernels, triton.runtime.autotuner as tuning;"
        "tuning.Autotuner._bench = None;"
        "found = [importlib.import_module(f'vlattn.kernels.{m.name}') for m in pkgutil.iter_modules(kernels.__path__)];"
        "from vlattn.kernels.launch import Tuned;"
        "lists = [x.values() if isinstance(x, dict) else [x] for m in found for x in vars(m).values()];"
        "tuned = {id(t): t for some in lists for t in some if isinstance(t, Tuned)}.values();"
        "print(len(tuned), sum(len(t._tuner.cache) for t in tuned), max(len(t.configs) for t in tuned))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kept)
    kernels, timed, most = map(int, done.stdout.split())
    assert kernels > 20
    assert timed == 0
    assert most <= 4
