"""Floating-point operations of a live call, by PyTorch's own counter, with the attention kernels that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counted:
    """total: operations, two per multiply-accumulate. by_op: the same by operator, such as aten.mm."""

    total: int
    by_op: dict[str, int]


def count_flops(call: Callable[[], object]) -> Counted:
    """Run `call` once and count the operations of its matrix products, convolutions and attention, forward only.

    PyTorch's `FlopCounterMode` has no formula for the kernels that `scaled_dot_product_attention` takes on a CPU or on
    MPS and silently counts nothing for them; they are counted here, without the saving that causality allows, as
    PyTorch counts attention on CUDA. Kernels from outside PyTorch (flash_attn, Triton) stay uncounted.
    """
    with FlopCounterMode(display=False, custom_mapping=_missing()) as counter, torch.no_grad():
        call()
    by_op = {str(op): int(n) for op, n in counter.get_flop_counts()["Global"].items()}
    return Counted(int(counter.get_total_flops()), by_op)


def is_counted(attn_implementation: str | None) -> bool:
    """Whether `count_flops` sees the attention of a transformers attention implementation."""
    return (attn_implementation or "eager").removeprefix("vlattn_") in ("eager", "sdpa")


def _missing() -> dict[Any, Callable[..., int]]:
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")
    found = (getattr(torch.ops.aten, name, None) for name in names)
    return {op: _attention for op in found if op is not None}


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """q k^T and weights times values, from shapes [..., H, N, D]; keys may have fewer heads than queries."""
    heads, queries, width = math.prod(query[:-2]), query[-2], query[-1]
    return 2 * heads * queries * key[-2] * (width + value[-1])
