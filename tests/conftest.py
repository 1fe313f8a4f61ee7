"""Fixtures of every room. Nothing here imports torch until a test asks for a model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent

# Read when huggingface_hub is first imported: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Read when torch is first imported: workers share the cores, a test has one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when triton is first imported: kernels run on the CPU where there is no card.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"


def _load(name: str) -> ModuleType:
    """A helper module of this folder, which is no package."""
    full = f"vlattn_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """`tests/tiny_models.py`: random LLaVA models, prompts for them, and the short sequences built by hand."""
    return _load("tiny_models")


@pytest.fixture(scope="session")
def families(tiny: ModuleType) -> ModuleType:
    """`tests/family_models.py`: a random tiny model of every model family, and inputs for it."""
    return _load("family_models")


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """`tests/naive_flowcut.py`: FlowCut in plain loops, with full attention matrices."""
    return _load("naive_flowcut")


@pytest.fixture
def llava(tiny: ModuleType) -> Callable[..., Any]:
    """`llava(layers=..., dtype=..., ...)`: a random tiny LLaVA, seeded; see `tiny_models.llava`."""
    return tiny.llava


@pytest.fixture
def prompts(tiny: ModuleType) -> Callable[..., dict[str, Any]]:
    """`prompts(model, images=(1, 2))`: a left-padded batch; see `tiny_models.prompts`."""
    return tiny.prompts
