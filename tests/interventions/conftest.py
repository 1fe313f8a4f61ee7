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


def _load(name: str) -> ModuleType:
    """A helper module of the folder above, which is no package."""
    full = f"vlattn_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parents[1] / f"{name}.py")
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
