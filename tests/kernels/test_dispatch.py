"""Which implementation runs, and that asking costs nothing where it is the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from vlattn import ops
from vlattn.errors import InputError
from vlattn.kernels.dispatch import uses_triton


def run(code: str, **environment: str) -> str:
    """What a new process prints."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**kept, **environment}
    )
    return done.stdout


def test_a_tensor_on_the_cpu_goes_to_the_reference_unless_triton_is_asked_for() -> None:
    x = torch.zeros(2)
    assert not uses_triton(x, None)
    assert not uses_triton(x, "reference")
    assert uses_triton(x, "triton")


class _OnGpu:
    """What dispatch looks at of a tensor on a GPU."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_a_tensor_on_a_gpu_goes_to_triton_but_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    half, double = _OnGpu(torch.float16), _OnGpu(torch.float64)
    assert uses_triton(half, None)  # type: ignore[arg-type]
    assert not uses_triton(half, "reference")  # type: ignore[arg-type]
    assert not uses_triton(double, None)  # type: ignore[arg-type]
    assert uses_triton(double, "triton")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not uses_triton(half, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="backend: 'triton' is not installed here; install it, or give 'reference'"):
        uses_triton(half, "triton")  # type: ignore[arg-type]


def test_unknown_backends_and_triton_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "cuda"
    with pytest.raises(InputError, match="backend: got 'cuda'; give 'triton', 'reference', or None"):
        uses_triton(torch.zeros(2), wrong)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="backend: 'triton' cannot run on cpu; move the tensors to a GPU"):
        ops.select_tokens(torch.zeros(1, 3), 2, backend="triton")


def test_importing_and_using_the_ops_on_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; before = {m for m in sys.modules if m.split('.')[0] == 'triton'};"
        "from vlattn import ops; ops.select_tokens(torch.rand(1, 4), 2);"
        "ops.pooled_probe(torch.rand(2, 4), torch.rand(1, 3, 4), scale=1.0);"
        "print({m for m in sys.modules if m.split('.')[0] == 'triton'} - before)"
    )
    assert run(code).strip() == "set()"


def test_the_ops_work_where_triton_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "import torch; from vlattn import ops;"
        "print(ops.select_tokens(torch.tensor([[1.0, 3.0, 2.0]]), 2)[0].tolist())"
    )
    assert run(code).strip() == "[[1, 2]]"
