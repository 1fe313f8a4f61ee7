"""Peak memory of a call, where it can be told apart from everything else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def peak_memory(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run `call` once and report its peak in bytes.

    Returns:
        On CUDA: before (weights and inputs that were there), peak_allocated, peak_reserved, and above, the peak less
        what was there before. Elsewhere {"measured": False, "why": ...}: a process has one high-water mark, which no
        single call can be given.
    """
    if device.type != "cuda":
        return {"measured": False, "why": f"{device.type} keeps no peak of a single call"}
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {
        "measured": True,
        "before": before,
        "peak_allocated": peak,
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "above": peak - before,
    }


def process_peak() -> int | None:
    """The largest resident size this process ever had, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
