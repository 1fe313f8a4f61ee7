"""Fixtures of the methods' tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _formula(k: int, *shape: int) -> torch.Tensor:
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    y = 43758.5453 * torch.sin(12.9898 * (i + 1) + 78.233 * k)
    return (y - y.floor() - 0.5).reshape(shape)


@pytest.fixture(scope="session")
def formula() -> Callable[..., torch.Tensor]:
    """Numbers in [-0.5, 0.5) that anyone can reproduce: the fraction of 43758.5453 sin(12.9898 (i + 1) + 78.233 k)."""
    return _formula


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], torch.Tensor]:
    """Published figures as fp64, from their text."""
    return lambda text: torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def _load(name: str, folder: Path = Path(__file__).parents[1]) -> ModuleType:
    """A module of a folder which is no package: helpers are in the one above."""
    full = f"vlattn_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def naive_pruners() -> ModuleType:
    """`tests/naive_decoder_pruners.py`: pruning inside a Llama decoder in plain loops."""
    return _load("naive_decoder_pruners")


@pytest.fixture(scope="session")
def naive_tower() -> ModuleType:
    """`tests/naive_tower.py`: vision towers with full attention matrices, and prompts with features put in by hand."""
    return _load("naive_tower")


@pytest.fixture(scope="session")
def naive_vhr() -> ModuleType:
    """`tests/naive_vhr.py`: VHD, T-VHD and VHR in plain loops over whole forwards."""
    return _load("naive_vhr")


@pytest.fixture(scope="session")
def naive_act() -> ModuleType:
    """`tests/naive_act.py`: attention calibration inside a Llama decoder in plain loops."""
    return _load("naive_act")


@pytest.fixture(scope="session")
def naive_boost() -> ModuleType:
    """`tests/naive_boost.py`: raised attention logits inside a Llama decoder in plain loops."""
    return _load("naive_boost")


@pytest.fixture(scope="session")
def matrix() -> ModuleType:
    """`test_matrix.py`, for its models and prompts of every family: `build`, `alone`."""
    return _load("test_matrix", Path(__file__).parent)
