"""Peak memory of a call, where it can be told apart from everything else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch


def peak_memory(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run `call` once and report its peak in bytes.

    Returns:
        On CUDA: before (weights and inputs that were there), peak_allocated, peak_reserved, and above, the peak less
        what was there before. On the CPU above alone, by the allocations that torch's profiler records.
        Elsewhere {"measured": False, "why": ...}.
    """
    if device.type == "cpu":
        return _cpu_peak(call)
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


def _cpu_peak(call: Callable[[], object]) -> dict[str, Any]:
    """The most that torch's allocator held above what it began with, by the events that the profiler records."""
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    # Device type 0 is the CPU.
    found = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not found:
        return {"measured": False, "why": "torch's profiler recorded no allocation"}
    before = found[0]["Total Allocated"] - found[0]["Bytes"]
    return {"measured": True, "above": max(event["Total Allocated"] for event in found) - before}


def process_peak() -> int | None:
    """The largest resident size this process ever had, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
