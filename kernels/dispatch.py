"""Which implementation of an op runs: Triton on a GPU, the PyTorch reference elsewhere, or the one asked for."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from vlattn.errors import InputError

Backend = Literal["triton", "reference"]


def uses_triton(tensor: torch.Tensor, backend: Backend | None) -> bool:
    """Whether an op on `tensor` runs its Triton kernel.

    Args:
        tensor: an input of the op. fp64 is left to the reference unless a backend is named.
        backend: the choice of the caller; None for what fits the device.

    Raises:
        InputError: `backend` is neither, or "triton" where it cannot run.
    """
    if backend == "reference":
        return False
    if backend is None:
        return tensor.is_cuda and tensor.dtype != torch.float64 and _installed()
    if backend != "triton":
        raise InputError(f"backend: got {backend!r}; give 'triton', 'reference', or None for what fits the device")
    if not _installed():
        raise InputError("backend: 'triton' is not installed here; install it, or give 'reference'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"backend: 'triton' cannot run on {tensor.device}; move the tensors to a GPU, or give 'reference', or set "
            "TRITON_INTERPRET=1 before the start, which interprets kernels on a CPU"
        )
    return True


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
